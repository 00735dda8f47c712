//! A run from its first namespace to its last.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::{Value, json};
use virtual_node_state::clock::now_ns;
use virtual_node_state::control::Control;
use virtual_node_state::gpu::Gpu;
use virtual_node_state::map::Shared;
use virtual_node_state::{PPM, VNODE_ENV};

use crate::faults::{Scene, Switch};
use crate::plan::{Node, Plan};
use crate::scenario::Scenario;
use crate::signals;
use crate::topology::Topology;
use crate::truth;

/// File built by cargo, and the name by which programs ask for it.
const LIBRARIES: [(&str, &str); 3] = [
    ("libvirtual_cuda.so", "libcuda.so.1"),
    ("libvirtual_nccl.so", "libnccl.so.2"),
    ("libvirtual_nvml.so", "libnvidia-ml.so.1"),
];
const TICK: Duration = Duration::from_millis(50);
/// How long ranks may take to begin, and to end after they were told.
const PATIENCE_NS: u64 = 60_000_000_000;

/// GPUs of all nodes, by rank.
pub(crate) type Gpus = Vec<Shared<Gpu>>;

/// Prints one event.
pub(crate) fn emit(event: &Value) {
    let mut out = std::io::stdout().lock();
    // A reader that has gone closes our input as well, which ends the run.
    let _gone = writeln!(out, "{event}").and_then(|()| out.flush());
}

/// Runs a scenario.
pub(crate) fn run(scenario: &Path, dir: &Path, libraries: Option<&Path>) -> anyhow::Result<()> {
    let scenario = Scenario::read(scenario)?;
    signals::listen()?;
    std::fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
    let dir = dir.canonicalize()?;
    let plan = Plan::new(&format!("{:x}", std::process::id()), &dir, scenario);
    let source = match libraries {
        Some(folder) => folder.to_owned(),
        None => std::env::current_exe()?
            .parent()
            .map(Path::to_owned)
            .unwrap_or_default(),
    };
    let gpus = furnish(&plan, &source)?;
    let control = Shared::<Control>::create(&plan.control())?;
    prepare(&control, &plan);
    plan.write()?;
    let topology = Topology::build(&plan)?;
    emit(&ready(&plan));
    let scene = Scene {
        plan: &plan,
        control: &control,
        gpus: &gpus,
        topology: &topology,
    };
    let faults = drive(&scene, Ranks::start(&plan)?)?;
    drop(topology);
    truth::tell(&plan, &faults)?;
    emit(&json!({"event": "done", "truth": dir.join("truth.json")}));
    Ok(())
}

/// Makes the nodes' folders: libraries of their own and GPUs.
fn furnish(plan: &Plan, source: &Path) -> anyhow::Result<Gpus> {
    let mut gpus = Vec::new();
    for (index, node) in plan.nodes.iter().enumerate() {
        // What an earlier run left in the folder must not be taken for this one's.
        if node.state.exists() {
            std::fs::remove_dir_all(&node.state)?;
        }
        std::fs::create_dir_all(&node.lib)?;
        for (built, name) in LIBRARIES {
            let from = source.join(built);
            std::fs::copy(&from, node.lib.join(name)).with_context(|| {
                format!(
                    "failed to copy {}: build virtual-cuda, virtual-nccl and virtual-nvml first",
                    from.display()
                )
            })?;
        }
        for gpu in 0..plan.scenario.topology.gpus_per_node {
            let uuid = format!("GPU-{index:08x}-5641-4c47-8055-{:012x}", 0x51a7_0000 + gpu);
            gpus.push(Gpu::create(&node.state, gpu, &uuid)?);
        }
    }
    Ok(gpus)
}

fn prepare(control: &Control, plan: &Plan) {
    let job = &plan.scenario.job;
    control.stop_at_step.store(u64::MAX, SeqCst);
    for rank in &control.ranks {
        rank.decode_ppm.store(PPM, SeqCst);
        rank.launch_split.store(1, SeqCst);
        rank.checkpoint_every.store(job.checkpoint_every, SeqCst);
        rank.checkpoint_bytes.store(job.checkpoint_mib << 20, SeqCst);
    }
}

pub(crate) fn node_env(node: &Node) -> [(&'static str, PathBuf); 2] {
    [
        (VNODE_ENV, node.state.clone()),
        ("LD_LIBRARY_PATH", node.lib.clone()),
    ]
}

fn ready(plan: &Plan) -> Value {
    let node = |node: &Node| {
        json!({
            "name": node.name,
            "netns": node.netns,
            "cgroup": node.cgroup,
            "nvml_library": node.lib.join("libnvidia-ml.so.1"),
            "env": node_env(node).into_iter().collect::<std::collections::BTreeMap<_, _>>(),
            "ip": node.ip,
        })
    };
    json!({
        "event": "ready",
        "nodes": plan.nodes.iter().map(node).collect::<Vec<_>>(),
        "collector": {"netns": plan.management.netns, "ip": plan.management.ip},
    })
}

/// The job's processes; killed when dropped.
pub(crate) struct Ranks(Vec<Child>);

impl Ranks {
    fn start(plan: &Plan) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let mut ranks = Self(Vec::new());
        let job = &plan.scenario.job;
        for rank in 0..plan.scenario.ranks() {
            let (node, gpu) = plan.node_of(rank);
            let log = std::fs::File::create(node.state.join(format!("rank{rank}.log")))?;
            let mut command = Command::new(&program);
            command
                .args(["trainer", "--rank", &rank.to_string()])
                .arg("--dir")
                .arg(&plan.dir);
            command.envs(node_env(node));
            command
                .env("RANK", rank.to_string())
                .env("LOCAL_RANK", gpu.to_string());
            command.env("WORLD_SIZE", plan.scenario.ranks().to_string());
            command.env(
                "LOCAL_WORLD_SIZE",
                plan.scenario.topology.gpus_per_node.to_string(),
            );
            command.env("MASTER_ADDR", plan.nodes[0].ip.to_string());
            command.env("MASTER_PORT", crate::plan::STORE_PORT.to_string());
            command
                .env("STALLSCOPE_JOB", &job.name)
                .env("STALLSCOPE_JOB_KIND", &job.kind);
            command.env(
                "STALLSCOPE_MODEL_FLOPS_PER_STEP",
                job.flops_per_step().to_string(),
            );
            command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
            ranks.0.push(command.spawn().context("failed to start a rank")?);
        }
        Ok(ranks)
    }

    /// Fails when a rank has left with an error.
    fn check(&mut self, plan: &Plan) -> anyhow::Result<()> {
        for (rank, child) in (0_u32..).zip(&mut self.0) {
            if let Some(status) = child.try_wait()?.filter(|status| !status.success()) {
                let log = plan.node_of(rank).0.state.join(format!("rank{rank}.log"));
                let said = std::fs::read_to_string(log).unwrap_or_default();
                bail!("rank {rank} left with {status}: {}", said.trim());
            }
        }
        Ok(())
    }

    fn all_left(&mut self) -> anyhow::Result<bool> {
        for child in &mut self.0 {
            if child.try_wait()?.is_none() {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Drop for Ranks {
    fn drop(&mut self) {
        for child in &mut self.0 {
            // One that has left already is what we want.
            let _gone = child.kill();
            let _reaped = child.wait();
        }
    }
}

/// From the ranks' start to their end: faults on and off, GPUs kept, progress told.
fn drive(scene: &Scene<'_>, mut job: Ranks) -> anyhow::Result<Vec<Switch>> {
    let ranks = scene.plan.scenario.ranks() as usize;
    let steps = |at: usize| scene.control.ranks[at].steps.load(SeqCst);
    let begun = now_ns();
    while (0..ranks).any(|rank| steps(rank) < 2) {
        pause(scene, &mut job)?;
        ensure!(
            now_ns() - begun < PATIENCE_NS,
            "the ranks did not begin within a minute"
        );
    }
    let started = now_ns();
    emit(&json!({"event": "started"}));
    let mut faults = Switch::all(scene.plan);
    let end = started + (scene.plan.scenario.job.duration_s * 1e9) as u64;
    let mut told = started;
    while now_ns() < end {
        pause(scene, &mut job)?;
        faults
            .iter_mut()
            .try_for_each(|fault| fault.tick(scene, started))?;
        let now = now_ns();
        if now >= told + 1_000_000_000 {
            told = now;
            let step = (0..ranks).map(steps).min().unwrap_or(0);
            emit(&json!({"event": "progress", "step": step, "at_ns": now}));
        }
    }
    // No rank can be further than this: collectives hold them together, and the host runs ahead one period at most.
    let last = (0..ranks).map(steps).max().unwrap_or(0) + 2 + scene.plan.scenario.job.sync_every;
    scene.control.stop_at_step.store(last, SeqCst);
    let told = now_ns();
    while !job.all_left()? {
        pause(scene, &mut job)?;
        ensure!(
            now_ns() - told < PATIENCE_NS,
            "the ranks did not end within a minute"
        );
    }
    faults.iter_mut().try_for_each(|fault| fault.finish(scene))?;
    job.check(scene.plan)?;
    Ok(faults)
}

/// One tick: nobody has died, nobody has told us to stop, the GPUs' sums are kept.
fn pause(scene: &Scene<'_>, job: &mut Ranks) -> anyhow::Result<()> {
    std::thread::sleep(TICK);
    if signals::asked() {
        bail!("told to stop");
    }
    let now = now_ns();
    scene.gpus.iter().for_each(|gpu| gpu.settle(now));
    job.check(scene.plan)
}
