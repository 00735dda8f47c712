#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;

use stallscope_attribution::facts::{FlowFacts, PortFacts};
use stallscope_attribution::reading::Reading;
use tempfile::TempDir;

use super::*;
use crate::observation::{
    Collective, CollectiveFunction, CopyDirection, Fact, FileOp, GpuReading, OffCpuReason, ProcessRole,
    StepWait, StepWaits, SyncTarget,
};
use crate::timeline::synthetic::{HELPER, LOADER, MAIN, MS, PROCESS, Script, process, reading, window};

/// Every fact, with every kind of value that its fields can have.
fn every_fact() -> Vec<Fact> {
    let mut facts = vec![
        Fact::Process(Box::new(process(PROCESS, ProcessRole::Gpu))),
        Fact::Process(Box::new(process(HELPER, ProcessRole::Helper))),
        Fact::ProcessGone(HELPER),
        Fact::CommDestroyed {
            thread: MAIN,
            comm: u64::MAX,
        },
        Fact::GroupEnd { thread: MAIN },
        step_waits(None),
        step_waits(Some(StepWait {
            steps_ns: 1 << 50,
            any_ns: 8,
            entered: 9,
        })),
        Fact::LaunchRun {
            thread: MAIN,
            stream: 0,
            kernels: 3,
            graphs: 1,
        },
        Fact::EventRecord {
            thread: MAIN,
            event: 1,
            stream: 2,
        },
        Fact::StreamWait {
            thread: MAIN,
            stream: 2,
            event: 1,
        },
        Fact::Block {
            process: HELPER,
            requests: 3,
            bytes: 4096,
            latency_ns: 9,
        },
        Fact::RealtimeOffset { ns: -5 },
        Fact::ThreadCpu {
            thread: LOADER,
            cpu_ns: 7,
        },
        Fact::CpuQuota {
            process: PROCESS,
            throttled_ns: Reading::Value(0),
            quota_ppm: Reading::NotMeasured,
        },
        Fact::CpuQuota {
            process: PROCESS,
            throttled_ns: Reading::Unsupported,
            quota_ppm: Reading::Failed("no such file".to_owned()),
        },
        Fact::Gpu(Box::new(reading(1))),
        Fact::Gpu(Box::new(GpuReading {
            busy_ppm: Reading::Unsupported,
            process_sm_ppm: Reading::Failed("lost".to_owned()),
            processes: Reading::NotMeasured,
            clock_reasons: Reading::Value(u64::MAX),
            ..reading(0)
        })),
        Fact::Port(Box::new(port())),
    ];
    facts.extend([None, Some(-1), Some(3)].map(|peer| {
        Fact::Collective(Collective {
            thread: MAIN,
            comm: 7,
            function: CollectiveFunction::Send,
            count: 1 << 40,
            datatype: 9,
            peer,
            stream: 1,
            result: peer,
        })
    }));
    let targets = [SyncTarget::Context, SyncTarget::Stream(0), SyncTarget::Event(9)];
    facts.extend(targets.map(|target| Fact::Sync {
        thread: MAIN,
        target,
        result: -1,
    }));
    let directions = [
        CopyDirection::ToDevice,
        CopyDirection::ToHost,
        CopyDirection::DeviceToDevice,
        CopyDirection::Unknown,
    ];
    facts.extend(directions.map(|direction| Fact::Copy {
        thread: MAIN,
        bytes: 1,
        direction,
        stream: None,
    }));
    facts.push(Fact::Copy {
        thread: MAIN,
        bytes: 1,
        direction: CopyDirection::ToHost,
        stream: Some(0),
    });
    let reasons = [OffCpuReason::Preempted, OffCpuReason::Sleep, OffCpuReason::Disk];
    facts.extend(reasons.map(|reason| Fact::OffCpu {
        thread: LOADER,
        reason,
        runnable_ns: 5,
    }));
    for op in [FileOp::Read, FileOp::Write, FileOp::Flush] {
        facts.push(Fact::FileIo {
            thread: LOADER,
            op,
            bytes: 3,
            blocked_ns: 2,
        });
        facts.push(Fact::FileIoFolded {
            process: HELPER,
            op,
            calls: 1,
            bytes: 2,
            total_ns: 3,
            blocked_ns: 4,
        });
    }
    facts.extend(
        [
            "nccl",
            "cuda",
            "sched",
            "block",
            "verbs",
            "agent",
            "nccl-profiler",
        ]
        .map(|ring| Fact::Lost { ring, count: 1 }),
    );
    facts
}

fn port() -> PortFacts {
    PortFacts {
        node: "node-a".to_owned(),
        port: "eth0".to_owned(),
        window: window(5, 9),
        realtime_offset_ns: -7,
        line_bytes_per_s: Reading::Unsupported,
        sent_bytes: 1,
        received_bytes: 2,
        backlog_bytes: Reading::Value(0),
        queue_overlimits: Reading::NotMeasured,
        flows: vec![FlowFacts {
            pid: 1,
            local: "10.0.0.1:5".to_owned(),
            peer: "10.0.0.2:6".to_owned(),
            acked_bytes: 1,
            busy_ns: 2,
            receiver_limited_ns: 3,
            unsent_bytes: 4,
            retransmits: 5,
            rtt_us: 6,
            min_rtt_us: 7,
            receive_backlog_bytes: 5_000_000_000,
            window_probes: 2,
        }],
    }
}

fn job() -> Vec<Observation> {
    let mut script = Script::new(1_000 * MS);
    script.communicator(9);
    for _ in 0..40 {
        script.step(12 * MS, 5, 90 * MS);
        let end_ns = script.now_ns;
        script.log.push(Observation {
            window: window(end_ns - 100 * MS, end_ns),
            fact: Fact::Gpu(Box::new(reading(1))),
        });
        script.off_cpu(
            LOADER,
            OffCpuReason::Disk,
            MS,
            window(end_ns - 30 * MS, end_ns - 3 * MS),
        );
    }
    script.log
}

fn record(path: &Path, batches: &[&[Observation]]) {
    let mut recorder = Recorder::create(path, "node-a").unwrap();
    batches.iter().for_each(|batch| recorder.write(batch).unwrap());
    recorder.finish().unwrap();
}

/// Every number is another.
fn step_waits(send_credit: Option<StepWait>) -> Fact {
    let wait = |first| StepWait {
        steps_ns: first,
        any_ns: first + 1,
        entered: first + 2,
    };
    Fact::StepWaits {
        thread: MAIN,
        waits: Box::new(StepWaits {
            send_gpu: wait(10),
            send_credit,
            send_wire: wait(20),
            receive_wire: wait(30),
            receive_flush: wait(40),
            receive_gpu: wait(50),
            sent: 60,
            received: 61,
            unknown: 62,
        }),
    }
}

#[test]
fn every_fact_comes_back_as_it_was() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("all");
    let facts = every_fact();
    let observed: Vec<Observation> = facts
        .into_iter()
        .enumerate()
        .map(|(at, fact)| Observation {
            window: window(3, 3 + at as u64),
            fact,
        })
        .collect();
    // More than one frame for one batch.
    let many: Vec<Observation> = observed.iter().cycle().take(5_000).cloned().collect();
    record(&path, &[&observed, &many]);
    let mut replay = Replay::open(&path).unwrap();
    assert_eq!(replay.node(), "node-a");
    assert_eq!(replay.next_batch().unwrap().unwrap(), observed);
    assert_eq!(replay.next_batch().unwrap().unwrap(), many);
    assert_eq!(replay.next_batch().unwrap(), None);
    assert!(!replay.is_torn());
}

#[test]
fn a_recorder_that_is_killed_loses_nothing_that_it_wrote() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("killed");
    let observed = [Observation {
        window: window(3, 4),
        fact: every_fact().remove(0),
    }];
    let mut recorder = Recorder::create(&path, "node-a").unwrap();
    recorder.write(&observed).unwrap();
    // It is still there, and nothing was finished.
    let mut replay = Replay::open(&path).unwrap();
    assert_eq!(replay.next_batch().unwrap().unwrap(), observed);
    assert_eq!(replay.next_batch().unwrap(), None);
    assert!(!replay.is_torn());
    drop(recorder);
}

#[test]
fn a_replay_gives_the_same_steps_bit_for_bit() {
    let log = job();
    let mut timeline = Timeline::new("node-a");
    let mut live = Vec::new();
    let batches: Vec<&[Observation]> = log.chunks(37).collect();
    for batch in &batches {
        batch
            .iter()
            .for_each(|observation| timeline.push(observation.clone()));
        timeline.advance(&mut live);
    }
    timeline.finish(&mut live);
    assert!(
        live.iter()
            .filter(|event| matches!(event, Event::Step { .. }))
            .count()
            > 25
    );
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("job");
    record(&path, &batches);
    assert_eq!(replay(&path).unwrap(), live);
    assert_eq!(replay(&path).unwrap(), live, "and again");
}

#[test]
fn a_recording_cut_off_anywhere_replays_up_to_there() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("cut");
    let log = job();
    let batches: Vec<&[Observation]> = log[..60].chunks(20).collect();
    record(&path, &batches);
    let whole = std::fs::read(&path).unwrap();
    let mut seen = [false; 4];
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let Ok(mut replay) = Replay::open(&path) else {
            continue;
        };
        let mut count = 0;
        while let Some(batch) = replay.next_batch().unwrap() {
            assert_eq!(batch, batches[count]);
            count += 1;
        }
        seen[count] = true;
    }
    assert_eq!(seen, [true, true, true, false]);
}

#[test]
fn other_files_are_refused_with_a_reason() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("other");
    for bytes in [b"".as_slice(), b"{\"traceEvents\": []}", &[0; 64]] {
        std::fs::write(&path, bytes).unwrap();
        let error = Replay::open(&path).unwrap_err().to_string();
        assert!(error.contains("no recording"), "{error}");
    }
    std::fs::write(
        &path,
        frame::encode_message(&v1::Hello::default()).unwrap_or_default(),
    )
    .unwrap();
    assert!(Replay::open(&path).is_err());
    assert!(
        Recorder::create(Path::new("/proc/no/such"), "n")
            .unwrap_err()
            .to_string()
            .contains("create")
    );
}

#[test]
fn what_is_no_observation_is_refused() {
    let refused = |wire: v1::Observation| from_wire::observation(wire).is_err();
    assert!(refused(v1::Observation {
        start_ns: 1,
        len_ns: 1,
        fact: None
    }));
    let fact = Some(v1::observation::Fact::RealtimeOffsetNs(1));
    assert!(refused(v1::Observation {
        start_ns: u64::MAX,
        len_ns: 1,
        fact
    }));
    let fact = Some(v1::observation::Fact::LaunchRun(v1::LaunchRun::default()));
    assert!(refused(v1::Observation {
        start_ns: 1,
        len_ns: 1,
        fact
    }));
    let fact = Some(v1::observation::Fact::GroupEnd(v1::Thread {
        process: None,
        tid: 1,
    }));
    assert!(refused(v1::Observation {
        start_ns: 1,
        len_ns: 1,
        fact
    }));
}
