//! Verdicts as they come and go: when each was first seen.

use std::collections::BTreeMap;

use stallscope_attribution::cause::{Cause, Place};
use stallscope_attribution::job::JobAnalysis;

/// Verdicts kept per job; the one not seen for longest goes first.
const MAX_PER_JOB: usize = 256;
/// Jobs kept; the one not analysed for longest goes first.
const MAX_JOBS: usize = 256;

/// When a verdict was held. Times are `CLOCK_REALTIME` of the collector, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// First live analysis that gave it.
    pub first_seen_ns: u64,
    /// Last one.
    pub last_seen_ns: u64,
    /// Live analyses that gave it.
    pub times: u64,
}

#[derive(Debug, Default)]
struct JobVerdicts {
    analysed_ns: u64,
    held: BTreeMap<(Cause, Place), Held>,
}

/// The verdicts of the live analyses, by job.
#[derive(Debug, Default)]
pub struct VerdictHistory {
    jobs: BTreeMap<String, JobVerdicts>,
}

impl VerdictHistory {
    /// Takes a live analysis; the causes and places that are new in it.
    pub fn note(&mut self, analysis: &JobAnalysis, now_ns: u64) -> Vec<(Cause, Place)> {
        if !self.jobs.contains_key(&analysis.job) && self.jobs.len() >= MAX_JOBS {
            let oldest = self
                .jobs
                .iter()
                .min_by_key(|(_, job)| job.analysed_ns)
                .map(|(name, _)| name.clone());
            oldest.and_then(|name| self.jobs.remove(&name));
        }
        let job = self.jobs.entry(analysis.job.clone()).or_default();
        job.analysed_ns = now_ns;
        let mut new = Vec::new();
        for verdict in &analysis.verdicts {
            let key = (verdict.cause, verdict.place.clone());
            if let Some(held) = job.held.get_mut(&key) {
                held.last_seen_ns = now_ns;
                held.times += 1;
                continue;
            }
            if job.held.len() >= MAX_PER_JOB {
                let stale = job
                    .held
                    .iter()
                    .min_by_key(|(_, held)| held.last_seen_ns)
                    .map(|(key, _)| key.clone());
                stale.and_then(|key| job.held.remove(&key));
            }
            job.held.insert(
                key.clone(),
                Held {
                    first_seen_ns: now_ns,
                    last_seen_ns: now_ns,
                    times: 1,
                },
            );
            new.push(key);
        }
        new
    }

    /// When a verdict was held; `None` when no live analysis gave it.
    #[must_use]
    pub fn held(&self, job: &str, cause: Cause, place: &Place) -> Option<Held> {
        self.jobs.get(job)?.held.get(&(cause, place.clone())).copied()
    }

    /// All verdicts of a job that were held, with their times.
    pub fn of_job(&self, job: &str) -> impl Iterator<Item = (&Cause, &Place, &Held)> {
        let held = self.jobs.get(job).into_iter().flat_map(|job| &job.held);
        held.map(|((cause, place), held)| (cause, place, held))
    }
}
