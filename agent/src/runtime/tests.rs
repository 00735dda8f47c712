#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::time::{Duration, Instant};

use stallscope_attribution::budget::Budget;
use stallscope_attribution::facts::{GpuSubject, Span, SpanKind};
use stallscope_attribution::time::Window;
use tempfile::TempDir;

use super::*;
use crate::control::client::ask;
use crate::control::{Answer, Request};
use crate::record::Replay;
use crate::store::{Scope, read_back};

/// A node without anything: no BPF object, no management library.
fn bare(dir: &TempDir) -> Config {
    let path = |name: &str| dir.path().join(name).display().to_string();
    let text = format!(
        "node = \"bare\"\n[probes]\nobject = \"{}\"\n[nvml]\nlibrary = \"{}\"\n[store]\ndir = \"{}\"\n[control]\nsocket = \"{}\"\n",
        path("none.o"),
        path("none.so"),
        path("store"),
        path("sock"),
    );
    Config::parse(&text, "test").unwrap()
}

fn parts(socket: &Path) -> Vec<(String, String)> {
    match ask(socket, &Request::Status, Duration::from_secs(2)) {
        Ok(Answer::Status(status)) => status
            .parts
            .into_iter()
            .map(|part| (part.part, part.condition))
            .collect(),
        _ => Vec::new(),
    }
}

#[test]
fn without_any_source_the_agent_runs_and_says_what_is_missing() {
    let dir = TempDir::new().unwrap();
    let config = bare(&dir);
    let socket = config.control.socket.clone();
    let options = Options {
        config,
        run_for: Some(Duration::from_secs(3)),
        ..Options::default()
    };
    let started = Instant::now();
    let agent = std::thread::spawn(move || run(&options));
    let mut seen = Vec::new();
    while seen.is_empty() && started.elapsed() < Duration::from_secs(3) {
        std::thread::sleep(Duration::from_millis(100));
        seen = parts(&socket)
            .into_iter()
            .filter(|(part, _)| part == "nvml")
            .collect();
    }
    assert_eq!(seen, [("nvml".to_owned(), "missing".to_owned())]);
    assert!(agent.join().unwrap().is_ok());
    assert!(!socket.exists(), "the socket is gone with the agent");
    let stored = read_back(&dir.path().join("store"), Scope::default()).unwrap();
    let gaps: Vec<&str> = stored.gaps().iter().map(|gap| gap.what.as_str()).collect();
    assert!(gaps.iter().any(|what| what.starts_with("probes: ")), "{gaps:?}");
    assert!(gaps.iter().any(|what| what.starts_with("nvml: ")), "{gaps:?}");
}

#[test]
fn recording_alone_leaves_no_store_and_no_socket() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("recording");
    let options = Options {
        config: bare(&dir),
        record: Some(file.clone()),
        record_only: true,
        run_for: Some(Duration::from_millis(2_500)),
    };
    run(&options).unwrap();
    assert!(!dir.path().join("store").exists() && !dir.path().join("sock").exists());
    let mut replay = Replay::open(&file).unwrap();
    assert_eq!(replay.node(), "bare");
    let mut offsets = 0;
    while let Some(batch) = replay.next_batch().unwrap() {
        let is_offset =
            |fact: &crate::observation::Fact| matches!(fact, crate::observation::Fact::RealtimeOffset { .. });
        offsets += batch
            .iter()
            .filter(|observation| is_offset(&observation.fact))
            .count();
    }
    assert!(offsets >= 2, "the clocks are observed once a second");
    assert!(!replay.is_torn());
}

#[test]
fn a_recording_that_cannot_be_written_stops_the_start() {
    let dir = TempDir::new().unwrap();
    let options = Options {
        config: bare(&dir),
        record: Some(Path::new("/proc/no/such").to_owned()),
        ..Options::default()
    };
    assert!(matches!(run(&options), Err(RunError::Record(_))));
}

#[test]
fn the_part_of_a_gap_is_one_clean_line() {
    let text = own::clean(&format!("a\nb\t{}", "x".repeat(5_000)));
    assert!(text.starts_with("a b x") && text.len() == 1_024);
    assert_ne!(own::random(), own::random());
}

#[test]
fn jobs_remembered_are_bounded_although_each_is_announced_before_its_first_step() {
    let mut recent = status::Recent::default();
    for number in 0..10 * status::RECENT_JOBS {
        recent.set_kind(&format!("job-{number:04}"), "pretrain");
    }
    let names: Vec<&str> = recent.jobs().collect();
    assert_eq!(names.len(), status::RECENT_JOBS);
    assert_eq!(
        names.first(),
        Some(&"job-0288"),
        "the jobs heard of last are kept"
    );
}

#[test]
fn steps_remembered_are_bounded_over_all_jobs_and_processes() {
    let span = Span {
        kind: SpanKind::Other,
        window: Window::instant(1),
        realtime_offset_ns: 0,
        budget: Budget::unobserved(0),
    };
    let subject = |job: usize, pid: u32| GpuSubject {
        job: format!("job-{job}"),
        node: "node".to_owned(),
        gpu: 0,
        pci: String::new(),
        device: String::new(),
        rank: 0,
        world: 1,
        pid,
    };
    let mut recent = status::Recent::default();
    let held = |recent: &status::Recent| -> usize {
        let facts = recent.job_facts();
        facts
            .iter()
            .flat_map(|job| &job.gpus)
            .map(|gpu| gpu.spans.len())
            .sum()
    };
    let gpus = u32::try_from(status::RECENT_GPUS).unwrap();
    for job in 0..16 {
        for pid in 0..gpus {
            for _ in 0..=status::RECENT_SPANS {
                recent.push_span(&subject(job, pid), span.clone());
            }
            assert!(
                held(&recent) <= status::RECENT_ENTRIES,
                "after job {job}, process {pid}"
            );
        }
    }
    assert!(
        held(&recent) > status::RECENT_ENTRIES / 2,
        "only the oldest give way"
    );
    let last = subject(15, gpus - 1);
    assert!(
        recent
            .job_facts()
            .iter()
            .any(|job| job.gpus.iter().any(|gpu| gpu.subject == last))
    );
    for job in 0..16 {
        recent.forget(&format!("job-{job}"));
    }
    assert_eq!(held(&recent), 0);
}

#[test]
fn the_agent_may_open_as_many_files_as_the_system_allows() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let lower = maximum.map_or(4_096, |maximum| maximum - 1);
    let lowered = Rlimit {
        current: Some(lower),
        maximum,
    };
    setrlimit(Resource::Nofile, lowered).unwrap();
    own::raise_file_limit();
    assert_eq!(getrlimit(Resource::Nofile).current, maximum);
}
