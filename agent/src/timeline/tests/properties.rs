//! What holds whatever the job does.

use proptest::prelude::*;

use super::{assert_covered, run};
use crate::observation::{Fact, OffCpuReason, ProcessRole, SyncTarget};
use crate::timeline::synthetic::{MAIN, MS, PROCESS, job, process, window};
use crate::timeline::{Event, Process, Timeline};

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the waits: covered to the nanosecond, budgets sum, every step between two drains.
    #[test]
    fn time_is_covered_exactly(
        waits_ms in prop::collection::vec(0_u64..80, 30..60),
        buckets in 1_u32..7,
        busy_ms in 8_u64..120,
        drop in prop::collection::vec(0_usize..4_000, 0..12),
    ) {
        let mut log = job(&waits_ms, buckets, busy_ms).log;
        for at in drop {
            if at > 3 && at < log.len() {
                log.remove(at);
            }
        }
        let end_ns = log.iter().map(|observation| observation.window.end_ns()).max().unwrap();
        let events = run(&log);
        assert_covered(&events, 1_000 * MS, end_ns);
        for event in &events {
            if let Event::Step { step, .. } = event {
                let sum: i64 = step.budget.leaves().iter().sum();
                prop_assert_eq!(sum, step.window.len_ns().cast_signed());
            }
        }
    }

    /// The order of arrival within the reorder window does not matter, nor does when the timeline is advanced.
    #[test]
    fn arrival_order_does_not_matter(
        waits_ms in prop::collection::vec(0_u64..60, 30..40),
        delays_ms in prop::collection::vec(0_u64..290, 64),
        batch in 1_usize..200,
    ) {
        let log = job(&waits_ms, 4, 60).log;
        let mut arrivals: Vec<(u64, usize)> = log
            .iter()
            .enumerate()
            .map(|(at, observation)| (observation.window.end_ns() + delays_ms[at % delays_ms.len()] * MS, at))
            .collect();
        arrivals.sort_unstable();
        let mut timeline = Timeline::new("node-a");
        let mut shuffled = Vec::new();
        for part in arrivals.chunks(batch) {
            part.iter().for_each(|(_, at)| timeline.push(log[*at].clone()));
            timeline.advance(&mut shuffled);
        }
        timeline.finish(&mut shuffled);
        let mut sorted = log.clone();
        sorted.sort_by_key(|observation| observation.window.end_ns());
        prop_assert_eq!(run(&sorted), shuffled);
        prop_assert_eq!(timeline.counters().late, 0);
    }
}

#[test]
fn history_stays_bounded_without_any_edge() {
    let mut fed = Process::new(process(PROCESS, ProcessRole::Gpu), 0);
    let mut at_ns = 0;
    for round in 0..150_000_u64 {
        at_ns += 10_000;
        let call = window(at_ns - 5_000, at_ns);
        match round % 5 {
            0 => fed.observe(
                call,
                &Fact::LaunchRun {
                    thread: MAIN,
                    stream: round,
                    kernels: 1,
                    graphs: 0,
                },
            ),
            1 => fed.observe(
                call,
                &Fact::OffCpu {
                    thread: MAIN,
                    reason: OffCpuReason::Sleep,
                    runnable_ns: 0,
                },
            ),
            2 => fed.observe(
                call,
                &Fact::EventRecord {
                    thread: MAIN,
                    event: round,
                    stream: round,
                },
            ),
            3 => fed.observe(
                call,
                &Fact::StreamWait {
                    thread: MAIN,
                    stream: 1,
                    event: round - 1,
                },
            ),
            _ => fed.observe(
                call,
                &Fact::Sync {
                    thread: MAIN,
                    target: SyncTarget::Stream(round),
                    result: 0,
                },
            ),
        }
    }
    assert!(fed.forgotten() > 0, "what does not fit is counted");
    let states = fed.host.states_within(window(0, u64::MAX));
    assert!(states.len() < 60_000, "{} states", states.len());
}
