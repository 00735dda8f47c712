#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::sync::Arc;

use stallscope_attribution::budget::Budget;
use stallscope_attribution::facts::{GpuSubject, Span, SpanKind};
use stallscope_attribution::leaf::Leaf;
use stallscope_attribution::time::Window;

use super::*;
use crate::control::server::ControlServer;
use crate::runtime::status::SharedStatus;
use crate::store::{Ring, Writer};
use crate::timeline::Event;

fn subject(job: &str, rank: u32) -> GpuSubject {
    GpuSubject {
        job: job.to_owned(),
        node: "node1".to_owned(),
        gpu: rank,
        pci: String::new(),
        device: String::new(),
        rank,
        world: 2,
        pid: 100 + rank,
    }
}

/// A second of idle time that ended at `end_realtime_ns`.
fn span(end_realtime_ns: u64) -> Span {
    const LENGTH_NS: u64 = 1_000_000_000;
    let mut leaves = [0; Leaf::COUNT];
    leaves[Leaf::IdleUnknown.index()] = 1_000_000_000;
    let start_ns = 77_000_000_000;
    Span {
        kind: SpanKind::Other,
        window: Window::new(start_ns, start_ns + LENGTH_NS).unwrap(),
        realtime_offset_ns: i64::try_from(end_realtime_ns).unwrap()
            - i64::try_from(start_ns + LENGTH_NS).unwrap(),
        budget: Budget::from_leaves(LENGTH_NS, leaves, 0, Vec::new()).unwrap(),
    }
}

fn record(dir: &Path, job: &str, end_realtime_ns: u64) {
    let ring = Arc::new(Ring::open(dir, 1 << 24, 7).unwrap().ring);
    let mut writer = Writer::new(ring, "node1", 1);
    for rank in 0..2 {
        let subject = Arc::new(subject(job, rank));
        let _ = writer.write(&Event::Subject {
            subject: Arc::clone(&subject),
            kind: Some("pretrain".to_owned()),
        });
        let _ = writer.write(&Event::Span {
            subject,
            span: Box::new(span(end_realtime_ns)),
        });
    }
    assert_eq!(writer.lost(), 0);
}

fn jobs(document: &Document) -> Vec<&str> {
    document.jobs.iter().map(|job| job.job.as_str()).collect()
}

fn minutes(minutes: u64) -> Option<Duration> {
    Some(Duration::from_secs(60 * minutes))
}

#[test]
fn the_store_answers_for_jobs_long_gone_and_since_counts_in_wall_clock() {
    let dir = tempfile::tempdir().unwrap();
    let source = Source::Store {
        dir: dir.path().to_owned(),
    };
    record(dir.path(), "old", since_realtime_ns(Duration::from_secs(3_600)));
    record(dir.path(), "new", since_realtime_ns(Duration::from_secs(60)));
    let all = ask(&source, &Question::default()).unwrap();
    all.check().unwrap();
    assert_eq!(jobs(&all), ["new", "old"]);
    assert_eq!(all.jobs[0].kind, "pretrain");
    assert_eq!(all.jobs[0].total.total_ns, 2_000_000_000);
    let recent = ask(
        &source,
        &Question {
            job: None,
            since: minutes(10),
        },
    )
    .unwrap();
    assert_eq!(jobs(&recent), ["new"]);
    let old = ask(
        &source,
        &Question {
            job: Some("old".to_owned()),
            since: minutes(120),
        },
    )
    .unwrap();
    assert_eq!(jobs(&old), ["old"]);
    let nothing = ask(
        &source,
        &Question {
            job: Some("old".to_owned()),
            since: minutes(10),
        },
    )
    .unwrap_err();
    assert!(
        matches!(&nothing, AnswerError::NothingRecorded(why) if why.contains("in that time")),
        "{nothing}"
    );
}

#[test]
fn damage_in_the_store_is_a_gap_of_the_report() {
    let dir = tempfile::tempdir().unwrap();
    record(dir.path(), "llama", since_realtime_ns(Duration::from_secs(120)));
    let first: Vec<_> = std::fs::read_dir(dir.path().join("segments"))
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    record(dir.path(), "llama", since_realtime_ns(Duration::from_secs(60)));
    // The segment that was closed first loses its end.
    let bytes = std::fs::read(&first[0]).unwrap();
    std::fs::write(&first[0], &bytes[..bytes.len() - 5]).unwrap();
    let document = ask(
        &Source::Store {
            dir: dir.path().to_owned(),
        },
        &Question::default(),
    )
    .unwrap();
    let gaps: Vec<&str> = document.jobs[0]
        .gaps
        .iter()
        .map(|gap| gap.what.as_str())
        .collect();
    assert!(
        gaps.iter().any(|what| what.contains("store is damaged")),
        "{gaps:?}"
    );
}

#[test]
fn a_node_is_asked_by_its_store_and_then_by_its_agent() {
    let dir = tempfile::tempdir().unwrap();
    let (store, socket) = (dir.path().join("store"), dir.path().join("control.sock"));
    let source = Source::Node {
        dir: store.clone(),
        socket: socket.clone(),
    };
    let neither = ask(&source, &Question::default()).unwrap_err();
    assert!(matches!(neither, AnswerError::NothingRecorded(_)), "{neither}");
    assert!(neither.to_string().contains("control.sock"), "{neither}");

    let status = SharedStatus::default();
    status.lock().recent.push_span(
        &subject("of-the-agent", 0),
        span(since_realtime_ns(Duration::ZERO)),
    );
    let _server = ControlServer::start(&socket, status).unwrap();
    assert_eq!(
        jobs(&ask(&source, &Question::default()).unwrap()),
        ["of-the-agent"]
    );

    record(&store, "of-the-store", since_realtime_ns(Duration::ZERO));
    assert_eq!(
        jobs(&ask(&source, &Question::default()).unwrap()),
        ["of-the-store"]
    );
}
