//! Discovery over a built `/proc`.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::*;
use crate::observation::ProcessRole;
use crate::sources::clock::monotonic_ns;

const MS: u64 = 1_000_000;

struct FakeProc {
    dir: tempfile::TempDir,
}

struct Process {
    pid: u32,
    parent: u32,
    start: u64,
    environ: Vec<&'static str>,
    libraries: Vec<&'static str>,
    cgroup: &'static str,
}

impl Process {
    fn new(pid: u32, parent: u32, start: u64) -> Self {
        Self {
            pid,
            parent,
            start,
            environ: Vec::new(),
            libraries: Vec::new(),
            cgroup: "/",
        }
    }

    fn env(mut self, environ: &[&'static str]) -> Self {
        self.environ = environ.to_vec();
        self
    }

    fn maps(mut self, libraries: &[&'static str]) -> Self {
        self.libraries = libraries.to_vec();
        self
    }

    fn cgroup(mut self, path: &'static str) -> Self {
        self.cgroup = path;
        self
    }
}

impl FakeProc {
    fn new() -> Self {
        let fake = Self {
            dir: tempfile::tempdir().unwrap(),
        };
        for library in ["libcuda.so.1", "libnccl.so.2"] {
            std::fs::create_dir_all(fake.dir.path().join("image/lib")).unwrap();
            std::fs::write(fake.dir.path().join("image/lib").join(library), library).unwrap();
        }
        fake
    }

    fn proc(&self) -> PathBuf {
        self.dir.path().join("proc")
    }

    fn inode(&self, library: &str) -> u64 {
        std::fs::metadata(self.dir.path().join("image/lib").join(library))
            .unwrap()
            .ino()
    }

    fn put(&self, process: &Process) {
        let Process {
            pid, parent, start, ..
        } = process;
        let at = self.proc().join(pid.to_string());
        std::fs::create_dir_all(&at).unwrap();
        let stat =
            format!("{pid} (python3) S {parent} {pid} 9 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 {start} 1 2\n");
        std::fs::write(at.join("stat"), stat).unwrap();
        std::fs::write(
            at.join("statm"),
            format!("{} 1 1\n", 100 + process.libraries.len()),
        )
        .unwrap();
        std::fs::write(
            at.join("cgroup"),
            format!("4:cpu,cpuacct:{0}\n0::/\n", process.cgroup),
        )
        .unwrap();
        std::fs::write(at.join("environ"), process.environ.join("\0")).unwrap();
        let map = |name: &&str| format!("7f00-7f10 r-xp 00000000 fd:01 {} /lib/{name}\n", self.inode(name));
        std::fs::write(
            at.join("maps"),
            process.libraries.iter().map(map).collect::<String>(),
        )
        .unwrap();
        if !at.join("root").exists() {
            std::os::unix::fs::symlink(self.dir.path().join("image"), at.join("root")).unwrap();
        }
    }

    fn end(&self, pid: u32) {
        std::fs::remove_dir_all(self.proc().join(pid.to_string())).unwrap();
    }

    fn discovery(&self) -> Discovery {
        let mut discovery = Discovery::new(self.proc(), None);
        discovery.set_events_live(true);
        discovery
    }
}

fn rank(pid: u32, start: u64) -> Process {
    Process::new(pid, 1, start)
        .env(&[
            "RANK=3",
            "WORLD_SIZE=4",
            "LOCAL_RANK=1",
            "STALLSCOPE_JOB=llm",
            "STALLSCOPE_MODEL_FLOPS_PER_STEP=99",
        ])
        .maps(&["libcuda.so.1", "libnccl.so.2"])
}

fn traced(actions: &[Action]) -> Vec<&ProcessFacts> {
    actions
        .iter()
        .filter_map(|action| match action {
            Action::Trace { facts, .. } => Some(&**facts),
            _ => None,
        })
        .collect()
}

fn kinds(actions: &[Action]) -> String {
    actions
        .iter()
        .map(|action| match action {
            Action::AttachLibrary(_) => 'A',
            Action::ReleaseLibrary(_) => 'R',
            Action::Trace { .. } => 'T',
            Action::Gone(_) => 'G',
        })
        .collect()
}

#[test]
fn a_rank_is_found_with_its_libraries_and_let_go() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50));
    fake.put(&Process::new(101, 1, 51));
    let mut discovery = fake.discovery();
    let actions = discovery.poll(0);
    assert_eq!(kinds(&actions), "AAT");
    let Action::AttachLibrary(library) = &actions[0] else {
        panic!("{actions:?}")
    };
    assert_eq!(std::fs::metadata(&library.path).unwrap().ino(), library.id.inode);
    assert!(
        library.path.starts_with(fake.proc().join("100/root")),
        "{library:?}"
    );
    let facts = traced(&actions)[0];
    assert_eq!(
        facts.key,
        ProcessKey {
            pid: 100,
            start_ticks: 50
        }
    );
    assert_eq!(
        (facts.rank, facts.world, facts.local_rank, facts.gpu),
        (Some(3), Some(4), Some(1), Some(1))
    );
    assert_eq!(
        (facts.job.as_deref(), facts.role),
        (Some("llm"), ProcessRole::Gpu)
    );
    assert_eq!(facts.model_flops_per_step, Some(99));
    assert_eq!(discovery.poll(10 * MS), []);

    fake.end(100);
    discovery.on_event(ProcessEvent::Exit { tgid: 100 }, 20 * MS);
    assert_eq!(kinds(&discovery.poll(20 * MS)), "GRR");
    assert_eq!(discovery.traced().count(), 0);
}

#[test]
fn the_configured_model_serves_jobs_that_declare_none() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50));
    let named = |job| ["RANK=3", "WORLD_SIZE=4", "LOCAL_RANK=1", job];
    let silent = |pid, job| Process::new(pid, 1, 50).env(&named(job)).maps(&["libcuda.so.1"]);
    fake.put(&silent(200, "STALLSCOPE_JOB=llm"));
    fake.put(&silent(300, "STALLSCOPE_JOB=other"));
    let text = "[model]\njob = \"llm\"\nparameters = 10\nlayers = 1\nheads = 1\nhead_size = 1\nsequence = 1\n\
                tokens_per_step = 8\n";
    let config = crate::config::Config::parse(text, "f").unwrap();
    let mut discovery = fake.discovery();
    discovery.set_model(config.model.declared().unwrap());
    let actions = discovery.poll(0);
    let mut found: Vec<_> = traced(&actions)
        .into_iter()
        .map(|facts| (facts.key.pid, facts.model_flops_per_step))
        .collect();
    found.sort_unstable();
    // (6 * 10 + 12) * 8 tokens over 4 ranks.
    assert_eq!(found, [(100, Some(99)), (200, Some(144)), (300, None)]);
}

#[test]
fn late_dlopen_is_seen_100_ms_after_its_event() {
    let fake = FakeProc::new();
    fake.put(&Process::new(100, 1, 50).env(&["RANK=0"]));
    let mut discovery = fake.discovery();
    assert_eq!(discovery.poll(0), []);
    fake.put(&Process::new(100, 1, 50).env(&["RANK=0"]).maps(&["libcuda.so.1"]));
    discovery.on_event(ProcessEvent::MapExec { tgid: 100 }, 200 * MS);
    discovery.on_event(ProcessEvent::MapExec { tgid: 100 }, 290 * MS);
    assert_eq!(discovery.due_ns(), 300 * MS);
    assert_eq!(discovery.poll(299 * MS), []);
    assert_eq!(kinds(&discovery.poll(300 * MS)), "AT");
    fake.put(
        &Process::new(100, 1, 50)
            .env(&["RANK=0"])
            .maps(&["libcuda.so.1", "libnccl.so.2"]),
    );
    discovery.on_event(ProcessEvent::MapExec { tgid: 100 }, 400 * MS);
    assert_eq!(kinds(&discovery.poll(500 * MS)), "AT");
}

#[test]
fn without_events_everything_is_seen_within_a_second() {
    let fake = FakeProc::new();
    fake.put(&Process::new(100, 1, 50));
    let mut discovery = Discovery::new(fake.proc(), None);
    assert_eq!(discovery.poll(0), []);
    fake.put(&Process::new(100, 1, 50).maps(&["libcuda.so.1"]));
    fake.put(&rank(102, 60));
    assert_eq!(discovery.due_ns(), 500 * MS);
    assert_eq!(kinds(&discovery.poll(500 * MS)), "ATAT");
    fake.end(100);
    assert_eq!(kinds(&discovery.poll(1000 * MS)), "G");
}

#[test]
fn a_reused_pid_is_another_process() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50));
    let mut discovery = fake.discovery();
    discovery.poll(0);
    fake.put(&rank(100, 77));
    discovery.on_event(ProcessEvent::Exec { tgid: 100 }, 0);
    let actions = discovery.poll(100 * MS);
    assert_eq!(kinds(&actions), "TG");
    assert!(actions.contains(&Action::Gone(ProcessKey {
        pid: 100,
        start_ticks: 50
    })));
    assert_eq!(traced(&actions)[0].key.start_ticks, 77);
}

#[test]
fn a_forked_loader_is_a_helper_until_the_driver_lists_it() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50));
    let mut worker = rank(110, 60);
    worker.parent = 100;
    fake.put(&worker);
    fake.put(&Process::new(120, 110, 70));
    let mut discovery = fake.discovery();
    let actions = discovery.poll(0);
    let helpers: Vec<_> = traced(&actions)
        .into_iter()
        .filter(|facts| facts.role == ProcessRole::Helper)
        .collect();
    assert_eq!(
        helpers.iter().map(|facts| facts.key.pid).collect::<Vec<_>>(),
        [110, 120]
    );
    for helper in helpers {
        assert_eq!(
            helper.works_for,
            Some(ProcessKey {
                pid: 100,
                start_ticks: 50
            })
        );
        assert_eq!((helper.job.as_deref(), helper.rank), (Some("llm"), Some(3)));
    }
    discovery.set_gpus(GpuView {
        devices: Vec::new(),
        processes: Some(vec![(1, 100), (2, 110)]),
    });
    let actions = discovery.poll(MS);
    let facts = traced(&actions);
    assert_eq!(
        (facts[0].key.pid, facts[0].role, facts[0].gpu),
        (110, ProcessRole::Gpu, Some(2))
    );
    assert_eq!(
        (facts[1].key.pid, facts[1].works_for.map(|key| key.pid)),
        (120, Some(110))
    );
}

#[test]
fn an_orphaned_helper_stays_until_its_owner_ends() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50));
    fake.put(&Process::new(110, 100, 60));
    fake.put(&Process::new(120, 110, 70));
    let mut discovery = fake.discovery();
    discovery.poll(0);
    fake.end(110);
    fake.put(&Process::new(120, 1, 70));
    let actions = discovery.rescan(MS);
    assert_eq!(kinds(&actions), "TG");
    assert_eq!(traced(&actions)[0].works_for.map(|key| key.pid), Some(100));
    fake.end(100);
    assert_eq!(kinds(&discovery.rescan(2 * MS)), "GGRR");
}

#[test]
fn ranks_below_a_launcher_that_uses_no_gpu_are_gpu_processes() {
    let fake = FakeProc::new();
    fake.put(
        &Process::new(90, 1, 40)
            .env(&["SLURM_PROCID=0", "SLURM_JOB_ID=7"])
            .maps(&["libnccl.so.2"]),
    );
    let mut child = rank(100, 50);
    child.parent = 90;
    fake.put(&child);
    let actions = fake.discovery().poll(0);
    let facts = traced(&actions);
    assert_eq!(
        (facts[0].key.pid, facts[0].rank, facts[0].job.as_deref()),
        (90, None, Some("7"))
    );
    assert_eq!(
        (facts[1].key.pid, facts[1].role, facts[1].rank),
        (100, ProcessRole::Gpu, Some(3))
    );
}

#[test]
fn a_co_tenant_is_a_gpu_process_without_a_job() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50));
    fake.put(&Process::new(200, 1, 55).maps(&["libcuda.so.1"]));
    let mut discovery = fake.discovery();
    discovery.set_gpus(GpuView {
        devices: Vec::new(),
        processes: Some(vec![(1, 100), (1, 200)]),
    });
    let actions = discovery.poll(0);
    let tenant = *traced(&actions).last().unwrap();
    assert_eq!(
        (tenant.key.pid, tenant.role, &tenant.job, tenant.gpu),
        (200, ProcessRole::Gpu, &None, Some(1))
    );
}

#[test]
fn scope_keeps_others_out_and_takes_in_who_moves() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50).cgroup("/vnode/a/rank0"));
    fake.put(&rank(200, 50).cgroup("/vnode/b/rank1"));
    let mut discovery = Discovery::new(fake.proc(), Some("/vnode/a".to_owned()));
    let actions = discovery.poll(0);
    assert_eq!(
        traced(&actions)
            .iter()
            .map(|facts| facts.key.pid)
            .collect::<Vec<_>>(),
        [100]
    );
    assert_eq!(traced(&actions)[0].cgroup, "/vnode/a/rank0");
    fake.put(&rank(200, 50).cgroup("/vnode/a/rank1"));
    assert_eq!(kinds(&discovery.poll(500 * MS)), "T");
}

#[test]
fn a_deleted_or_replaced_library_is_opened_through_the_mapping() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50).maps(&["libcuda.so.1"]));
    let maps = fake.proc().join("100/maps");
    std::fs::write(
        &maps,
        "7f00-7f10 r-xp 00000000 fd:01 123456789 /lib/libcuda.so.1\n",
    )
    .unwrap();
    let actions = fake.discovery().poll(0);
    let Action::AttachLibrary(library) = &actions[0] else {
        panic!("{actions:?}")
    };
    assert_eq!(library.path, fake.proc().join("100/map_files/7f00-7f10"));
}

#[test]
fn the_packaged_units_capabilities_open_what_a_process_maps() {
    const NAME: &str = "the_packaged_units_capabilities_open_what_a_process_maps";
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: {NAME}: only root has capabilities to give up");
        return;
    }
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/stallscope.service");
    let unit = std::fs::read_to_string(unit).unwrap().replace("\\\n", " ");
    let bounding = unit
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .unwrap();
    let only: Vec<String> = bounding
        .split_whitespace()
        .map(|name| format!("+{}", name.trim_start_matches("CAP_").to_lowercase()))
        .collect();
    let mut child = Command::new("sleep").arg("60").spawn().unwrap();
    let mapped = format!("/proc/{}/map_files", child.id());
    let open = || {
        let range = std::fs::read_dir(&mapped).unwrap().next()?.unwrap().path();
        Command::new("setpriv")
            .args(["--bounding-set", &format!("-all,{}", only.join(","))])
            .args(["--", "head", "-c", "4"])
            .arg(range)
            .output()
            .ok()
    };
    // A process is there before its program is mapped.
    let opened = (0..100)
        .find_map(|_| {
            std::thread::sleep(Duration::from_millis(20));
            open()
        })
        .expect("a mapped program and setpriv");
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(
        opened.stdout,
        b"\x7fELF",
        "{}",
        String::from_utf8_lossy(&opened.stderr)
    );
}

#[test]
fn a_pipe_in_place_of_a_library_is_not_opened() {
    let fake = FakeProc::new();
    let library = fake.dir.path().join("image/lib/libcuda.so.1");
    std::fs::remove_file(&library).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &library,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    // The maps name the pipe's own inode, as another user can bring about.
    fake.put(&rank(100, 50).maps(&["libcuda.so.1"]));
    let actions = fake.discovery().poll(0);
    let Action::AttachLibrary(library) = &actions[0] else {
        panic!("{actions:?}")
    };
    assert_eq!(library.path, fake.proc().join("100/map_files/7f00-7f10"));
}

#[test]
fn a_failed_attachment_is_offered_again() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50).maps(&["libcuda.so.1"]));
    let mut discovery = fake.discovery();
    let actions = discovery.poll(0);
    let Action::AttachLibrary(library) = &actions[0] else {
        panic!("{actions:?}")
    };
    discovery.attach_failed(library.id);
    assert_eq!(discovery.poll(MS), []);
    assert_eq!(kinds(&discovery.poll(5000 * MS)), "A");
}

#[test]
fn processes_that_die_while_read_or_hold_nonsense_are_passed_over() {
    let fake = FakeProc::new();
    fake.put(&rank(100, 50));
    for (pid, missing) in [
        (201, "stat"),
        (202, "cgroup"),
        (203, "statm"),
        (204, "maps"),
        (205, "environ"),
    ] {
        fake.put(&rank(pid, 50));
        std::fs::remove_file(fake.proc().join(format!("{pid}/{missing}"))).unwrap();
    }
    fake.put(&rank(206, 50));
    std::fs::write(fake.proc().join("206/stat"), b"206 (x").unwrap();
    fake.put(&rank(207, 50));
    std::fs::write(
        fake.proc().join("207/environ"),
        b"RANK=\xff\0WORLD_SIZE=no\0\0=\0",
    )
    .unwrap();
    let actions = fake.discovery().poll(0);
    let pids: Vec<u32> = traced(&actions).iter().map(|facts| facts.key.pid).collect();
    assert_eq!(pids, [100, 205, 207]);
    assert_eq!(traced(&actions)[2].rank, None);
}

#[test]
fn the_real_proc_is_read() {
    let mut discovery = Discovery::new("/proc", None);
    discovery.poll(0);
    assert!(discovery.due_ns() > 0);
    let mut none = Discovery::new("/nonexistent", None);
    assert_eq!(none.poll(0), []);
}

/// A program that says when it runs, loads its first argument when told to, forks when told to, and ends with its input.
const PROGRAM: &str = r#"
#include <dlfcn.h>
#include <stdio.h>
#include <unistd.h>
int main(int count, char **arguments) {
    (void)count;
    char byte;
    puts("ready");
    fflush(stdout);
    if (read(0, &byte, 1) != 1) return 1;
    if (!dlopen(arguments[1], RTLD_NOW)) return 2;
    if (read(0, &byte, 1) != 1) return 1;
    if (fork() == 0) { while (read(0, &byte, 1) > 0) {} return 0; }
    while (read(0, &byte, 1) > 0) {}
    return 0;
}
"#;

struct Live {
    child: Child,
    _dir: tempfile::TempDir,
}

impl Live {
    fn start(environ: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let compile = |source: &str, out: &Path, shared: &[&str]| {
            let at = dir.path().join("source.c");
            std::fs::write(&at, source).unwrap();
            assert!(
                Command::new("cc")
                    .args(shared)
                    .arg("-o")
                    .arg(out)
                    .arg(&at)
                    .arg("-ldl")
                    .status()
                    .unwrap()
                    .success()
            );
        };
        let (program, library) = (dir.path().join("trainer"), dir.path().join("libcuda.so.1"));
        compile(PROGRAM, &program, &[]);
        compile(
            "int cuInit(unsigned flags) { return (int)flags; }",
            &library,
            &["-shared", "-fPIC"],
        );
        let mut child = Command::new(&program)
            .arg(&library)
            .envs(environ.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(child.stdout.as_mut().unwrap()),
            &mut String::new(),
        )
        .unwrap();
        Self { child, _dir: dir }
    }

    fn tell(&mut self) {
        std::io::Write::write_all(self.child.stdin.as_mut().unwrap(), b"x").unwrap();
    }
}

/// Polls as the agent does until an action satisfies `wanted`; how long that took.
fn until(discovery: &mut Discovery, wanted: impl Fn(&Action) -> bool) -> Duration {
    let begin = Instant::now();
    loop {
        if discovery.poll(monotonic_ns()).iter().any(&wanted) {
            return begin.elapsed();
        }
        assert!(begin.elapsed() < Duration::from_secs(5), "not seen");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_live_process_is_seen_within_a_second_of_dlopen_fork_and_exit() {
    let mut live = Live::start(&[
        ("RANK", "1"),
        ("WORLD_SIZE", "2"),
        ("STALLSCOPE_JOB", "live"),
        ("LOCAL_RANK", "0"),
    ]);
    let pid = live.child.id();
    let mut discovery = Discovery::new("/proc", None);
    discovery.poll(monotonic_ns());
    assert!(discovery.traced().all(|facts| facts.key.pid != pid));

    live.tell();
    let second = Duration::from_secs(1);
    let role = |action: &Action, role: ProcessRole, owner: Option<u32>| match action {
        Action::Trace { facts, libraries } => {
            let right = facts.role == role && facts.job.as_deref() == Some("live") && facts.rank == Some(1);
            right && !libraries.is_empty() && facts.works_for.map(|key| key.pid) == owner
        }
        _ => false,
    };
    assert!(until(&mut discovery, |action| role(action, ProcessRole::Gpu, None)) < second);
    live.tell();
    assert!(
        until(&mut discovery, |action| role(
            action,
            ProcessRole::Helper,
            Some(pid)
        )) < second
    );
    drop(live.child.stdin.take());
    live.child.wait().unwrap();
    let gone = |action: &Action| matches!(action, Action::Gone(key) if key.pid == pid);
    assert!(until(&mut discovery, gone) < second);
}
