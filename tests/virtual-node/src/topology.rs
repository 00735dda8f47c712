//! What makes a node out of a corner of this host: network namespaces joined by a bridge, control groups, a disk of
//! its own. Everything carries the run's id, is written down before it is made, and can be undone by a later run.

use std::fs;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use rustix::process::{Signal, set_parent_process_death_signal};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};
use test_cgroups::Tree;

use crate::plan::{Node, Plan, SHARDS};

/// Notes of running topologies, for whoever has to clean up after a killed run.
const NOTES: &str = "/run/stallscope-vnode";

/// What a run has made, enough to undo it.
#[derive(Debug, Clone, Deserialize, Serialize)]
struct Note {
    pid: u32,
    id: String,
    namespaces: Vec<String>,
    mount: PathBuf,
}

/// A topology that stands; taken down when dropped.
#[derive(Debug)]
pub(crate) struct Topology {
    note: Note,
    cgroups: Tree,
    /// Loop device of the dataset's disk.
    loop_device: String,
}

/// Runs a command to its end; its output, or an error that quotes what it said.
pub(crate) fn command(line: &str) -> anyhow::Result<String> {
    let mut words = line.split_whitespace();
    let program = words.next().unwrap_or_default();
    let output = Command::new(program)
        .args(words)
        .output()
        .with_context(|| format!("failed to run {program}"))?;
    if !output.status.success() {
        bail!(
            "`{line}` failed: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Moves the calling process into a node and one of its control groups, and ties it to its parent's life.
pub(crate) fn enter(netns: &str, cgroup: &str) -> anyhow::Result<()> {
    die_with_parent()?;
    Tree::find()?.join(cgroup)?;
    let file = fs::File::open(format!("/run/netns/{netns}"))
        .with_context(|| format!("no network namespace {netns}"))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("failed to enter network namespace {netns}"))
}

/// The group of another job's process on a node's GPU.
pub(crate) fn tenant_cgroup(node: &Node, gpu: u32) -> String {
    format!("{}/cotenant{gpu}", node.cgroup)
}

/// Has the kernel kill this process when its parent dies.
pub(crate) fn die_with_parent() -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))
        .context("failed to tie the process to its parent's life")
}

impl Topology {
    /// Builds all of it.
    pub(crate) fn build(plan: &Plan) -> anyhow::Result<Self> {
        clean_leftovers();
        let cgroups = Tree::find()?;
        let mut namespaces: Vec<String> = plan.nodes.iter().map(|node| node.netns.clone()).collect();
        namespaces.push(plan.management.netns.clone());
        let note = Note {
            pid: std::process::id(),
            id: plan.id.clone(),
            namespaces,
            mount: plan.data(),
        };
        fs::create_dir_all(NOTES).with_context(|| format!("failed to create {NOTES}"))?;
        fs::write(note_path(&note.id), serde_json::to_vec(&note)?)
            .context("failed to write down the topology")?;
        // From here on a failure undoes what stands.
        let mut topology = Self {
            note,
            cgroups,
            loop_device: String::new(),
        };
        topology.network(plan)?;
        for rank in 0..plan.scenario.ranks() {
            let (node, gpu) = plan.node_of(rank);
            for cgroup in [plan.rank_cgroup(rank), tenant_cgroup(node, gpu)] {
                topology.cgroups.create(&cgroup)?;
            }
        }
        topology.loop_device = disk(plan)?;
        Ok(topology)
    }

    /// Loop device of the dataset's disk, as `major:minor`.
    pub(crate) fn disk_number(&self) -> anyhow::Result<String> {
        let name = self.loop_device.trim_start_matches("/dev/");
        let file = format!("/sys/block/{name}/dev");
        Ok(fs::read_to_string(&file)
            .with_context(|| format!("failed to read {file}"))?
            .trim()
            .to_owned())
    }

    /// The host's control groups.
    pub(crate) fn cgroups(&self) -> &Tree {
        &self.cgroups
    }

    fn network(&self, plan: &Plan) -> anyhow::Result<()> {
        for namespace in &self.note.namespaces {
            command(&format!("ip netns add {namespace}"))?;
            command(&format!("ip -n {namespace} link set lo up"))?;
        }
        let management = &plan.management;
        let inside = format!("ip -n {}", management.netns);
        command(&format!("{inside} link add br0 type bridge"))?;
        command(&format!("{inside} addr add {}/24 dev br0", management.ip))?;
        command(&format!("{inside} link set br0 up"))?;
        for (index, node) in plan.nodes.iter().enumerate() {
            let Node { netns, ip, .. } = node;
            command(&format!(
                "{inside} link add port{index} type veth peer name eth0 netns {netns}"
            ))?;
            command(&format!("{inside} link set port{index} master br0 up"))?;
            command(&format!("ip -n {netns} addr add {ip}/24 dev eth0"))?;
            command(&format!("ip -n {netns} link set eth0 up"))?;
        }
        Ok(())
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        undo(&self.note);
    }
}

fn note_path(id: &str) -> PathBuf {
    Path::new(NOTES).join(format!("{id}.json"))
}

/// Makes the dataset on a disk of its own, so that it can be slow for one group and nobody else.
fn disk(plan: &Plan) -> anyhow::Result<String> {
    let (image, mount) = (plan.dir.join("disk.img"), plan.data());
    let ranks = u64::from(plan.scenario.ranks());
    let job = &plan.scenario.job;
    let needed = ranks * (SHARDS * job.sample_bytes() + 3 * (job.checkpoint_mib << 20));
    fs::create_dir_all(&mount).with_context(|| format!("failed to create {}", mount.display()))?;
    fs::File::create(&image)?
        .set_len(needed * 3 / 2 + (64 << 20))
        .context("failed to size the dataset's disk")?;
    command(&format!(
        "mkfs.ext4 -q -F -E lazy_itable_init=0,lazy_journal_init=0,nodiscard -O ^has_journal {}",
        image.display()
    ))?;
    command(&format!(
        "mount -o loop,noatime {} {}",
        image.display(),
        mount.display()
    ))?;
    let device = command(&format!("findmnt -n -o SOURCE --mountpoint {}", mount.display()))?;
    let sample = vec![0x7e; usize::try_from(job.sample_bytes())?];
    for rank in 0..plan.scenario.ranks() {
        for shard in 0..SHARDS {
            let path = plan.sample(rank, shard);
            fs::create_dir_all(path.parent().unwrap_or(&mount))?;
            fs::write(&path, &sample).with_context(|| format!("failed to write {}", path.display()))?;
        }
    }
    command(&format!("sync -f {}", mount.display()))?;
    Ok(device)
}

/// Takes down topologies whose run is gone.
pub(crate) fn clean_leftovers() {
    let Ok(notes) = fs::read_dir(NOTES) else { return };
    for entry in notes.flatten() {
        let note = fs::read(entry.path())
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Note>(&bytes).ok());
        if let Some(note) = note.filter(|note| !is_vnode(note.pid)) {
            undo(&note);
        }
    }
}

fn is_vnode(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == "vnode")
}

/// Undoes what a note says; parts that are already gone are no error.
fn undo(note: &Note) {
    let groups = Tree::find().and_then(|tree| tree.remove(&format!("/stallscope-vnode-{}", note.id)));
    report(groups.map_err(Into::into));
    if fs::read_to_string("/proc/mounts")
        .is_ok_and(|mounts| mounts.contains(&format!(" {} ", note.mount.display())))
    {
        report(command(&format!("umount -l {}", note.mount.display())).map(drop));
    }
    for namespace in note
        .namespaces
        .iter()
        .filter(|name| Path::new("/run/netns").join(name).exists())
    {
        report(command(&format!("ip netns del {namespace}")).map(drop));
    }
    report(fs::remove_file(note_path(&note.id)).map_err(Into::into));
}

fn report(result: anyhow::Result<()>) {
    if let Err(error) = result {
        eprintln!("vnode: {error:#}");
    }
}
