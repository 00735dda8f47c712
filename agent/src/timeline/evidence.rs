//! Everything known about one window, put together for the budget.

use stallscope_attribution::facts::{
    GpuSubject, HostState, SpanKind, StateInterval, StepEvidence, StepMethod,
};
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use super::gpu::GpuCounters;
use super::process::{Cut, CutKind, Process};

/// Builds the evidence of `cut`. `ours` tells which pids belong to the job.
pub(super) fn gather(
    process: &Process,
    cut: Cut,
    subject: GpuSubject,
    realtime_offset_ns: i64,
    counters: Option<&GpuCounters>,
    ours: impl Fn(u32) -> bool,
) -> StepEvidence {
    let window = cut.window;
    let drained = process.order.drained_within(window);
    let (launches, copies) = process.marks.counts_within(window);
    StepEvidence {
        subject,
        index: process.next_index,
        window,
        realtime_offset_ns,
        method: match cut.kind {
            CutKind::Step { method, .. } => method,
            CutKind::Between => StepMethod::FixedWindow,
        },
        host: host_states(process, window),
        workers: process.workers.within(window, &drained),
        drained,
        quota_throttled_ns: quota(process, window),
        launches,
        copies,
        collectives: process.marks.collectives_within(window),
        activity: counters.map_or(Reading::NotMeasured, |counters| {
            counters.activity(window, process.ratio.ppm())
        }),
        clock: counters.map_or(Reading::NotMeasured, |counters| counters.clock(window)),
        foreign: counters.map_or(Reading::NotMeasured, |counters| counters.foreign(window, ours)),
        links: counters.map_or(Reading::NotMeasured, |counters| counters.links(window)),
        lost_records: lost(process, window),
    }
}

/// What a window between steps was.
pub(super) fn span_kind(process: &Process, evidence: &StepEvidence) -> SpanKind {
    let checkpoint_ns: u64 = evidence
        .host
        .iter()
        .filter(|interval| interval.state == HostState::Checkpoint)
        .map(|interval| interval.window.len_ns())
        .sum();
    if checkpoint_ns > evidence.window.len_ns() / 2 {
        SpanKind::Checkpoint
    } else if evidence.lost_records > 0 {
        SpanKind::Unobserved
    } else if process.next_index == 0 {
        SpanKind::Startup
    } else {
        SpanKind::Other
    }
}

/// States of the launching thread. A checkpoint that other threads write counts only while it sleeps: otherwise it
/// goes on training beside it.
fn host_states(process: &Process, window: Window) -> Vec<StateInterval> {
    let mut states = process.host.states_within(window);
    let launching = process.host.launching_thread();
    let asleep = process.host.sleeping_within(window);
    for checkpoint in process.checkpoints.within(window) {
        let mut push = |window| {
            states.push(StateInterval {
                window,
                state: HostState::Checkpoint,
            })
        };
        if checkpoint.tid.is_some() && checkpoint.tid == launching {
            push(checkpoint.window);
        } else {
            asleep
                .iter()
                .filter_map(|sleep| sleep.intersect(checkpoint.window))
                .for_each(push);
        }
    }
    states
}

/// Throttled time, apportioned by overlap.
fn quota(process: &Process, window: Window) -> Reading<u64> {
    let mut sum: Option<u64> = None;
    let mut why_not = Reading::NotMeasured;
    for (read, throttled_ns) in &process.quota {
        let Some(overlap) = read.intersect(window) else {
            continue;
        };
        match throttled_ns {
            Reading::Value(ns) => {
                let share = u128::from(*ns) * u128::from(overlap.len_ns()) / u128::from(read.len_ns());
                sum = Some(
                    sum.unwrap_or(0)
                        .saturating_add(u64::try_from(share).unwrap_or(u64::MAX)),
                );
            }
            other => why_not = other.clone(),
        }
    }
    sum.map_or(why_not, Reading::Value)
}

fn lost(process: &Process, window: Window) -> u64 {
    let inside = |at_ns: &u64| (window.start_ns()..window.end_ns()).contains(at_ns);
    process
        .lost
        .iter()
        .filter(|(at_ns, _)| inside(at_ns))
        .map(|(_, count)| count)
        .sum()
}
