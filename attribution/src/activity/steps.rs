//! Steps on the GPU's own clock.

use super::{KernelClass, Record, Work};
use crate::facts::StepMethod;
use crate::steps::find_period_timed;
use crate::time::Window;

/// A pattern shorter than this is no training step, ns.
const SHORTEST_STEP_NS: u64 = 1_000_000;

/// A repeating pattern of work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    /// What repeats.
    pub method: StepMethod,
    /// Collectives or launches per step.
    pub calls: u32,
    /// Share of calls equal to the one a step earlier, parts per million.
    pub match_ppm: u32,
    /// Starts of the steps on the GPU, ns.
    pub edges: Vec<u64>,
}

/// Steps found without the job's marks: the period of the collectives, else of the launches of the thread that
/// launches most. `records` are sorted by start.
#[must_use]
pub fn pattern(records: &[Record]) -> Option<Pattern> {
    let collectives = records
        .iter()
        .filter(|record| record.work == Work::Kernel(KernelClass::Communication));
    let collectives: Vec<(u64, u64)> = collectives
        .map(|record| (record.window.start_ns(), record.token))
        .collect();
    repeat(&collectives, StepMethod::CollectivePeriod)
        .or_else(|| repeat(&launches(records), StepMethod::LaunchPeriod))
}

/// Starts and tokens of the kernels in the order of their launches.
fn launches(records: &[Record]) -> Vec<(u64, u64)> {
    let mut kernels: Vec<(u64, u64, u64)> = records
        .iter()
        .filter(|record| matches!(record.work, Work::Kernel(_)))
        .map(|record| {
            let start = record.window.start_ns();
            (
                record.launch.map_or(start, |launch| launch.at_ns),
                start,
                record.token,
            )
        })
        .collect();
    kernels.sort_unstable();
    kernels
        .into_iter()
        .map(|(_, start, token)| (start, token))
        .collect()
}

fn repeat(calls: &[(u64, u64)], method: StepMethod) -> Option<Pattern> {
    let tokens: Vec<u64> = calls.iter().map(|(_, token)| *token).collect();
    let times: Vec<u64> = calls.iter().map(|(at, _)| *at).collect();
    let period = find_period_timed(&tokens, &times).filter(crate::steps::Period::is_conclusive)?;
    let mut edges: Vec<u64> = times
        .iter()
        .copied()
        .skip(period.phase)
        .step_by(period.lag)
        .collect();
    edges.sort_unstable();
    edges.dedup();
    let span = edges.last()?.checked_sub(*edges.first()?)?;
    let steps = edges.len().checked_sub(1).filter(|steps| *steps > 0)? as u64;
    (span / steps >= SHORTEST_STEP_NS).then(|| Pattern {
        method,
        calls: u32::try_from(period.lag).unwrap_or(u32::MAX),
        match_ppm: period.match_ppm,
        edges,
    })
}

/// The job's marks moved to the GPU: a step begins where the first work launched inside the mark begins to run.
/// Work that runs before the first such edge is of no step.
pub(super) fn marked(records: &[Record], marks: &[Window]) -> Vec<u64> {
    let mut marks = marks.to_vec();
    marks.sort_unstable();
    let mut first = vec![None::<u64>; marks.len()];
    for record in records {
        let Some(launch) = record.launch else { continue };
        let at = marks.partition_point(|mark| mark.start_ns() <= launch.at_ns);
        if let Some(mark) = at.checked_sub(1)
            && launch.at_ns < marks[mark].end_ns()
        {
            let start = record.window.start_ns();
            first[mark] = Some(first[mark].map_or(start, |known| known.min(start)));
        }
    }
    let mut edges: Vec<u64> = first.into_iter().flatten().collect();
    // Streams may run a step's first copy before the last kernel of the step before: edges never go back.
    for at in 1..edges.len() {
        edges[at] = edges[at].max(edges[at - 1]);
    }
    edges.dedup();
    edges
}
