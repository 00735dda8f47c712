//! Synchronisations, and when the GPU had nothing to do.

use super::process_fed;
use crate::observation::{CopyDirection, Fact, Observation, SyncTarget, Thread};
use crate::timeline::synthetic::{COMM, COMPUTE, COPY, MAIN, MS, PROCESS, Script, window};

#[test]
fn the_gpu_is_drained_from_the_sync_to_the_next_submission() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    let mut expected = Vec::new();
    for wait_ms in [5, 9, 7] {
        expected.push(script.step(wait_ms * MS, 4, 40 * MS));
    }
    let fed = process_fed(&script.log);
    let all = window(0, script.now_ns);
    // Nothing proves the first wait drained: no synchronisation came before it.
    assert_eq!(fed.order.drained_within(all), expected[1..]);
}

#[test]
fn an_outstanding_stream_keeps_the_gpu_from_being_drained() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(COMPUTE, 1, MS);
    script.launches(COMM, 1, MS);
    script.sync(SyncTarget::Stream(COMPUTE), MS);
    script.now_ns += 5 * MS;
    let all = window(0, script.now_ns + 100 * MS);
    assert_eq!(process_fed(&script.log).order.drained_within(all), []);
    script.sync(SyncTarget::Stream(COMM), MS);
    let drained_ns = script.now_ns;
    assert_eq!(
        process_fed(&script.log).order.drained_within(all),
        [window(drained_ns, all.end_ns())]
    );
}

#[test]
fn a_failed_sync_drains_nothing() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(COMPUTE, 1, MS);
    script.fact(
        MS,
        Fact::Sync {
            thread: MAIN,
            target: SyncTarget::Context,
            result: 700,
        },
    );
    assert_eq!(
        process_fed(&script.log).order.drained_within(window(0, u64::MAX)),
        []
    );
}

#[test]
fn an_event_covers_what_was_submitted_before_it_was_recorded() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(COMPUTE, 1, MS);
    script.fact(
        1_000,
        Fact::EventRecord {
            thread: MAIN,
            event: 5,
            stream: COMPUTE,
        },
    );
    script.launches(COMPUTE, 1, MS);
    script.sync(SyncTarget::Event(5), MS);
    assert_eq!(
        process_fed(&script.log).order.drained_within(window(0, u64::MAX)),
        [],
        "a later launch is left"
    );
    script.fact(
        1_000,
        Fact::EventRecord {
            thread: MAIN,
            event: 5,
            stream: COMPUTE,
        },
    );
    script.sync(SyncTarget::Event(5), MS);
    let drained = window(script.now_ns, u64::MAX);
    assert_eq!(
        process_fed(&script.log).order.drained_within(window(0, u64::MAX)),
        [drained]
    );
}

#[test]
fn a_submission_told_late_takes_drained_time_back() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(COMPUTE, 1, MS);
    script.sync(SyncTarget::Context, MS);
    let drained_ns = script.now_ns;
    // Another thread's run, folded from before the synchronisation to after it.
    let other = Thread {
        process: PROCESS,
        tid: 101,
    };
    script.log.push(Observation {
        window: window(drained_ns - MS / 2, drained_ns + 3 * MS),
        fact: Fact::LaunchRun {
            thread: other,
            stream: COPY,
            kernels: 9,
            graphs: 0,
        },
    });
    assert_eq!(
        process_fed(&script.log).order.drained_within(window(0, u64::MAX)),
        []
    );
}

#[test]
fn a_synchronous_copy_to_the_host_drains_the_default_stream() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(0, 10, MS);
    script.copy(4, CopyDirection::ToHost, None, 3 * MS);
    let drained_ns = script.now_ns - 1_000;
    script.now_ns += 2 * MS;
    let next_ns = script.now_ns;
    script.launches(0, 10, MS);
    let fed = process_fed(&script.log);
    assert_eq!(
        fed.order.drained_within(window(0, u64::MAX)),
        [window(drained_ns, next_ns)]
    );
    assert_eq!(fed.marks.counts_within(window(0, u64::MAX)).1.blocked_ns, 3 * MS);
}
