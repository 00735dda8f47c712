//! Playing a job: every rank's GPU in exact nanoseconds.

use crate::variant::{RANKS, Variant};
use crate::work::{self, Work};

/// One step of one rank as it happened.
#[derive(Debug, Clone, Copy)]
pub struct Played {
    /// What the rank did itself.
    pub work: Work,
    /// Waiting for the last rank, ns.
    pub skew: u64,
    /// Start, ns since the job began.
    pub start: u64,
    /// End, the same on all ranks up to the last microseconds.
    pub end: u64,
}

/// A checkpoint of all ranks.
#[derive(Debug, Clone, Copy)]
pub struct Pause {
    /// The step before which it was written.
    pub before: usize,
    /// Start, ns.
    pub start: u64,
    /// End, ns.
    pub end: u64,
}

/// A job as it happened.
#[derive(Debug, Clone)]
pub struct Job {
    /// By step and rank.
    pub steps: Vec<Vec<Played>>,
    /// Checkpoints, in order.
    pub pauses: Vec<Pause>,
}

/// Plays a variant. Ranks that are ready wait for the last; then all move their data together.
#[must_use]
pub fn play(variant: &Variant) -> Job {
    let mut job = Job {
        steps: Vec::with_capacity(variant.steps),
        pauses: Vec::new(),
    };
    let mut now = 0;
    for step in 0..variant.steps {
        let pause = work::checkpoint(variant, step);
        if pause > 0 {
            job.pauses.push(Pause {
                before: step,
                start: now,
                end: now + pause,
            });
            now += pause;
        }
        let works = work::step(variant, step);
        let last = works.iter().map(Work::arrival).max().unwrap_or(0);
        let joint = works
            .iter()
            .map(|work| work.transfer + work.net)
            .max()
            .unwrap_or(0);
        let end = now + last + joint;
        let played = works.into_iter().map(|work| Played {
            skew: last - work.arrival(),
            start: now,
            end,
            work,
        });
        job.steps.push(played.collect());
        now = end;
    }
    debug_assert!(job.steps.iter().all(|step| step.len() == RANKS));
    job
}
