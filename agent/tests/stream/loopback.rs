//! Agents and a collector in one process, over real QUIC.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use stallscope::store::{Ring, Spool, Writer, Written};
use stallscope::stream::query;
use stallscope::timeline::Event;
use stallscope_attribution::budget::Budget;
use stallscope_attribution::facts::{GpuStep, GpuSubject, StepMethod, StepSignals};
use stallscope_attribution::leaf::Leaf;
use stallscope_attribution::time::Window;
use stallscope_collector::Collector;
use stallscope_proto::convert::{Payload, Record, SubjectEntry};
use stallscope_proto::v1::{self, report_response};
use stallscope_report::document::Document;

use crate::lab::{self, Authority};
use crate::spool::MemorySpool;

const STEP_NS: u64 = 100_000_000;
static JOB_END_NS: std::sync::OnceLock<u64> = std::sync::OnceLock::new();

fn unix_ns() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap()
        .as_nanos() as u64
}

/// The messages of one node of a job: its GPU, then steps that end about now, at the same time on every node.
fn job_records(node: &str, rank: u32, steps: u64) -> Vec<Record> {
    let subject = GpuSubject {
        job: "llm".into(),
        node: node.into(),
        gpu: 0,
        pci: "0000:01:00.0".into(),
        device: "NVIDIA H100".into(),
        rank,
        world: 2,
        pid: 100 + rank,
    };
    let start_ns = *JOB_END_NS.get_or_init(unix_ns) - steps * STEP_NS;
    let mut leaves = [0; Leaf::COUNT];
    leaves[Leaf::IdleDataCpu.index()] = 30_000_000;
    leaves[Leaf::ComputeKernel.index()] = STEP_NS as i64 - 30_000_000;
    let budget = Budget::from_leaves(STEP_NS, leaves, u32::MAX >> 8, vec![]).unwrap();
    let step = |index: u64| GpuStep {
        index,
        window: Window::new(index * STEP_NS, (index + 1) * STEP_NS).unwrap(),
        realtime_offset_ns: start_ns as i64,
        method: StepMethod::CollectivePeriod,
        period_calls: 4,
        budget: budget.clone(),
        signals: StepSignals::default(),
    };
    let announced = Payload::Subject {
        id: 1,
        entry: SubjectEntry {
            subject,
            job_kind: "pretrain".into(),
        },
    };
    let steps = (0..steps).map(|index| Payload::Step {
        subject: 1,
        step: Box::new(step(index)),
    });
    std::iter::once(announced)
        .chain(steps)
        .zip(1..)
        .map(|(payload, sequence)| Record {
            node: node.into(),
            boot_id: 1,
            sequence,
            payload,
        })
        .collect()
}

fn spool_of(records: &[Record]) -> Arc<MemorySpool> {
    let spool = Arc::new(MemorySpool::new(usize::MAX));
    records.iter().for_each(|record| spool.append_record(record));
    spool
}

async fn ask(collector: &Collector, authority: &Authority, job: &str) -> report_response::Result {
    let target = lab::target(collector.local_addr().unwrap(), &authority.issue("operator"));
    let request = v1::ReportRequest {
        job: job.into(),
        since_realtime_ns: 0,
    };
    query(&target, request, Duration::from_secs(20))
        .await
        .unwrap()
        .result
        .unwrap()
}

fn document(result: report_response::Result) -> Document {
    let report_response::Result::DocumentJson(json) = result else {
        panic!("no document: {result:?}")
    };
    Document::from_json(std::str::from_utf8(&json).unwrap()).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_become_one_report_that_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let store = dir.path().join("store");
    let collector = lab::collector(&authority, &store).await;
    let address = collector.local_addr().unwrap();

    let before = ask(&collector, &authority, "llm").await;
    assert!(
        matches!(before, report_response::Result::NothingRecorded(_)),
        "{before:?}"
    );

    for (node, rank) in [("n1", 0), ("n2", 1)] {
        let target = lab::target(address, &authority.issue(node));
        let streaming = lab::agent(target, node, 1, spool_of(&job_records(node, rank, 20)));
        streaming.caught_up().await;
        assert!(streaming.status().connected);
        streaming.stop().await;
    }
    let first = document(ask(&collector, &authority, "").await);
    let job = &first.jobs[0];
    assert_eq!((job.job.as_str(), job.kind.as_str()), ("llm", "pretrain"));
    assert_eq!(
        job.gpus
            .iter()
            .map(|gpu| (gpu.rank, gpu.total_ns))
            .collect::<Vec<_>>(),
        [(0, 20 * STEP_NS), (1, 20 * STEP_NS)]
    );
    assert_eq!(job.gaps, [], "nothing is missing");
    assert_eq!(collector.stats().stored_messages, 42);
    collector.stop().await;

    let again = lab::collector(&authority, &store).await;
    let mut second = document(ask(&again, &authority, "llm").await);
    // Each collector has its own memory of when its live analysis first gave a verdict.
    let mut first = first;
    for job in first.jobs.iter_mut().chain(&mut second.jobs) {
        for verdict in &mut job.verdicts {
            verdict.first_seen_unix_ns = None;
        }
    }
    assert_eq!(first, second, "read back from disk, the report is the same");
    again.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_outage_longer_than_the_agents_ring_leaves_one_gap_with_its_count() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let store = dir.path().join("store");
    let records = job_records("n1", 0, 12_000);
    let (mut subject, mut steps) = (None, Vec::new());
    for record in records {
        match record.payload {
            Payload::Subject { entry, .. } => subject = Some(entry.subject),
            Payload::Step { step, .. } => steps.push(step),
            other => panic!("{other:?}"),
        }
    }
    let subject = Arc::new(subject.unwrap());
    let ring = Arc::new(Ring::open(&dir.path().join("ring"), 1 << 20, 42).unwrap().ring);
    let mut writer = Writer::new(Arc::clone(&ring), "n1", 1);
    let mut write = |event: &Event| assert!(matches!(writer.write(event), Written::Yes));
    write(&Event::Subject {
        subject: subject.clone(),
        kind: Some("pretrain".into()),
    });
    let mut write_steps = |range: std::ops::Range<usize>| {
        for step in &steps[range] {
            write(&Event::Step {
                subject: subject.clone(),
                step: step.clone(),
            });
        }
    };

    let collector = lab::collector(&authority, &store).await;
    let target = lab::target(collector.local_addr().unwrap(), &authority.issue("n1"));
    let streaming = lab::agent(target.clone(), "n1", 1, Arc::clone(&ring));
    write_steps(0..100);
    streaming.caught_up().await;
    collector.stop().await;
    lab::eventually("the outage is noticed", || !streaming.status().connected).await;
    write_steps(100..12_000);
    let dropped = ring.dropped_unacked();
    assert!(
        dropped > 1_000,
        "{dropped} dropped: the ring must be too small for this outage"
    );

    let mut config = lab::collector_config(&authority, &store);
    config.listen = (target.host.parse::<std::net::IpAddr>().unwrap(), target.port).into();
    let collector = Collector::start(config).await.unwrap();
    streaming.caught_up().await;
    let report = document(ask(&collector, &authority, "llm").await);
    let gaps = &report.jobs[0].gaps;
    let arrived: Vec<_> = gaps
        .iter()
        .filter(|gap| gap.what.contains("never arrived"))
        .collect();
    assert_eq!(arrived.len(), 1, "{gaps:?}");
    assert_eq!((arrived[0].node.as_str(), arrived[0].count), ("n1", dropped));
    let stored = lab::stored(&store);
    assert!(stored.values().all(|times| *times == 1));
    assert_eq!(stored.len() as u64 + dropped, *ring.watch_last().borrow());
    // Every step that arrived is in the report: the ring's segments announce their subjects themselves.
    let announcements = stored.len() as u64 - report.jobs[0].gpus[0].steps.count;
    assert!(
        (2..50).contains(&announcements),
        "{announcements} stored messages are no steps of the report"
    );
    assert!(!gaps.iter().any(|gap| gap.what.contains("refused")), "{gaps:?}");
    streaming.stop().await;
    collector.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_messages_arrive_once_and_fast() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let store = dir.path().join("store");
    let collector = lab::collector(&authority, &store).await;
    let records = job_records("n1", 0, 9_999);
    let bytes: usize = records.iter().map(|record| record.encode().len()).sum();
    let target = lab::target(collector.local_addr().unwrap(), &authority.issue("n1"));
    let started = Instant::now();
    let streaming = lab::agent(target, "n1", 1, spool_of(&records));
    streaming.caught_up().await;
    let took = started.elapsed();
    let per_s = 10_000.0 / took.as_secs_f64();
    println!(
        "10000 messages of {} bytes in {took:?}: {per_s:.0} messages/s",
        bytes / 10_000
    );
    streaming.stop().await;
    collector.stop().await;
    lab::assert_stored_once(&store, "n1", 1, 10_000);
    assert!(per_s > 1_000.0, "{per_s:.0} messages/s");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_whose_certificate_is_foreign_is_refused_and_keeps_its_data() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (
        Authority::new(dir.path(), "ours"),
        Authority::new(dir.path(), "theirs"),
    );
    let collector = lab::collector(&ours, &dir.path().join("store")).await;
    let address = collector.local_addr().unwrap();
    let mut foreign = theirs.issue("n1");
    foreign.ca = ours.issue("unused").ca;
    let streaming = lab::agent(
        lab::target(address, &foreign),
        "n1",
        1,
        spool_of(&job_records("n1", 0, 3)),
    );
    let trouble = streaming.trouble("does not trust this node").await;
    assert!(trouble.contains("[stream] cert and key"), "{trouble}");
    assert_eq!(streaming.spool.last_acked(), 0);
    assert_eq!(streaming.status().waiting_messages, 4);
    assert!(collector.stats().failed_handshakes >= 1);
    assert_eq!(collector.stats().stored_messages, 0);

    // Repaired on disk, the certificate counts from the next try, without a restart.
    let good = ours.issue("n1");
    std::fs::copy(&good.cert, &foreign.cert).unwrap();
    std::fs::copy(&good.key, &foreign.key).unwrap();
    streaming.caught_up().await;
    streaming.stop().await;
    collector.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_expired_certificate_is_named_on_either_side() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let good = lab::collector(&authority, &dir.path().join("good")).await;
    let old_node = lab::target(good.local_addr().unwrap(), &authority.issue_expired("n1"));
    let streaming = lab::agent(old_node, "n1", 1, spool_of(&job_records("n1", 0, 3)));
    let trouble = streaming.trouble("does not trust this node").await;
    assert!(trouble.to_lowercase().contains("expired"), "{trouble}");
    assert_eq!(streaming.spool.last_acked(), 0);
    streaming.stop().await;
    good.stop().await;

    let mut config = lab::collector_config(&authority, &dir.path().join("old"));
    config.identity = authority.issue_expired("collector");
    let old = Collector::start(config).await.unwrap();
    let target = lab::target(old.local_addr().unwrap(), &authority.issue("n2"));
    let streaming = lab::agent(target, "n2", 1, spool_of(&job_records("n2", 0, 3)));
    let trouble = streaming.trouble("not trusted here").await;
    assert!(trouble.to_lowercase().contains("expired"), "{trouble}");
    streaming.stop().await;
    old.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_whose_certificate_is_foreign_gets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, theirs) = (
        Authority::new(dir.path(), "ours"),
        Authority::new(dir.path(), "theirs"),
    );
    let collector = lab::collector(&theirs, &dir.path().join("store")).await;
    let target = lab::target(collector.local_addr().unwrap(), &ours.issue("n1"));
    let streaming = lab::agent(target.clone(), "n1", 1, spool_of(&job_records("n1", 0, 3)));
    let trouble = streaming.trouble("not trusted here").await;
    assert!(trouble.contains("[stream] ca and server_name"), "{trouble}");
    assert_eq!(streaming.spool.last_acked(), 0);
    assert_eq!(collector.stats().connections, 0);
    let refused = query(&target, v1::ReportRequest::default(), Duration::from_secs(10))
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("not trusted here"), "{refused}");
    streaming.stop().await;

    let mut wrong_name = lab::target(collector.local_addr().unwrap(), &theirs.issue("n1"));
    wrong_name.server_name = "elsewhere".into();
    let streaming = lab::agent(wrong_name, "n1", 1, spool_of(&job_records("n1", 0, 3)));
    streaming.trouble("server_name").await;
    streaming.stop().await;
    collector.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_store_keeps_its_bound_and_counts_on_after_it_dropped_old_segments() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let store = dir.path().join("store");
    let max_bytes = 256 << 10;
    let mut config = lab::collector_config(&authority, &store);
    config.max_bytes = max_bytes;
    let collector = Collector::start(config.clone()).await.unwrap();
    let spool = spool_of(&job_records("n1", 0, 4_000));
    let target = lab::target(collector.local_addr().unwrap(), &authority.issue("n1"));
    let streaming = lab::agent(target, "n1", 1, Arc::clone(&spool));
    streaming.caught_up().await;
    streaming.stop().await;
    collector.stop().await;
    let segments = std::fs::read_dir(&store)
        .unwrap()
        .map(|entry| entry.unwrap().metadata().unwrap().len());
    let bytes: u64 = segments.sum();
    assert!(bytes <= max_bytes, "{bytes} bytes");
    let found = lab::stored(&store);
    assert!(found.values().all(|times| *times == 1));
    assert!(found.len() > 300, "{} messages kept", found.len());
    assert_eq!(found.keys().next_back().unwrap().2, 4_001);

    let again = Collector::start(config).await.unwrap();
    let target = lab::target(again.local_addr().unwrap(), &authority.issue("n1"));
    let streaming = lab::agent(target, "n1", 1, spool);
    lab::eventually("connected", || streaming.status().connected).await;
    streaming.spool.append("n1", 1);
    streaming.caught_up().await;
    assert_eq!(again.stats().stored_messages, 1, "only what is new is sent");
    assert_eq!(again.stats().duplicates, 0);
    let report = document(ask(&again, &authority, "llm").await);
    assert!(
        report.jobs[0].gpus[0].steps.count > 300,
        "segments are readable without the ones before"
    );
    streaming.stop().await;
    again.stop().await;
}

/// A tmpfs that goes with the test.
struct SmallDisk(std::path::PathBuf);

impl SmallDisk {
    fn mount(at: std::path::PathBuf, size: &str) -> Option<Self> {
        std::fs::create_dir_all(&at).unwrap();
        let options = format!("size={size}");
        let done = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &options, "tmpfs"])
            .arg(&at)
            .status();
        done.is_ok_and(|status| status.success()).then_some(Self(at))
    }

    fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        assert!(
            Command::new("mount")
                .args(["-o", &options])
                .arg(&self.0)
                .status()
                .unwrap()
                .success()
        );
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_acknowledges_nothing_and_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let Some(disk) = SmallDisk::mount(dir.path().join("disk"), "256k") else {
        eprintln!("not run: mounting a tmpfs needs root");
        return;
    };
    let authority = Authority::new(dir.path(), "ours");
    let store = disk.0.join("store");
    let collector = lab::collector(&authority, &store).await;
    let spool = spool_of(&job_records("n1", 0, 5_000));
    let target = lab::target(collector.local_addr().unwrap(), &authority.issue("n1"));
    let streaming = lab::agent(target, "n1", 1, spool);
    let trouble = streaming.trouble("collector cannot store").await;
    assert!(trouble.contains("No space left"), "{trouble}");
    let cannot_store = |report: &Document| {
        let gaps = &report.jobs[0].gaps;
        gaps.iter()
            .any(|gap| gap.what.contains("cannot store") && gap.what.contains("No space left"))
    };
    let report = document(ask(&collector, &authority, "llm").await);
    assert!(cannot_store(&report), "{:?}", report.jobs[0].gaps);
    let acked = streaming.spool.last_acked();
    let on_disk = lab::stored(&store).len() as u64;
    assert!(acked <= on_disk, "{acked} acknowledged, {on_disk} on disk");
    assert!(acked < 5_001);
    assert!(collector.stats().store_errors >= 1);

    disk.resize("64m");
    streaming.caught_up().await;
    let report = document(ask(&collector, &authority, "llm").await);
    assert!(!cannot_store(&report), "{:?}", report.jobs[0].gaps);
    streaming.stop().await;
    collector.stop().await;
    lab::assert_stored_once(&store, "n1", 1, 5_001);
}
