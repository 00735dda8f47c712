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

#[cfg(test)]
mod tests {
    use stallscope_attribution::cause::Confidence;
    use stallscope_attribution::facts::JobFacts;
    use stallscope_attribution::job::{Recovers, Verdict, analyse};

    use super::*;

    fn analysis(job: &str, verdicts: &[(Cause, &str)]) -> JobAnalysis {
        let mut analysis = analyse(&JobFacts {
            job: job.into(),
            ..JobFacts::default()
        });
        let verdict = |(cause, node): &(Cause, &str)| Verdict {
            cause: *cause,
            place: Place {
                node: Some((*node).into()),
                ..Place::default()
            },
            cost_ns: 1,
            share_ppm: 1,
            confidence: Confidence::High,
            evidence: vec![],
            ruled_out: vec![],
            confirm: String::new(),
            recovers: Recovers::default(),
            onset_ns: None,
        };
        analysis.verdicts = verdicts.iter().map(verdict).collect();
        analysis
    }

    #[test]
    fn a_verdict_that_comes_back_keeps_the_time_it_was_first_seen() {
        let mut history = VerdictHistory::default();
        let place = |node: &str| Place {
            node: Some(node.into()),
            ..Place::default()
        };
        let new = history.note(&analysis("job", &[(Cause::NetworkNic, "n1")]), 10);
        assert_eq!(new, [(Cause::NetworkNic, place("n1"))]);
        history.note(&analysis("job", &[(Cause::DataLoader, "n1")]), 20);
        let new = history.note(
            &analysis("job", &[(Cause::NetworkNic, "n1"), (Cause::NetworkNic, "n2")]),
            30,
        );
        assert_eq!(new, [(Cause::NetworkNic, place("n2"))]);
        let held = history
            .held("job", Cause::NetworkNic, &place("n1"))
            .expect("held");
        assert_eq!((held.first_seen_ns, held.last_seen_ns, held.times), (10, 30, 2));
        assert_eq!(history.held("other", Cause::NetworkNic, &place("n1")), None);
        assert_eq!(history.of_job("job").count(), 3);
    }

    #[test]
    fn jobs_and_verdicts_are_bounded() {
        let mut history = VerdictHistory::default();
        for index in 0..1000_u64 {
            history.note(&analysis("job", &[(Cause::HostCpu, &format!("n{index}"))]), index);
            history.note(&analysis(&format!("job{index}"), &[]), index);
        }
        assert_eq!(history.of_job("job").count(), MAX_PER_JOB);
        assert_eq!(history.jobs.len(), MAX_JOBS);
        let newest = Place {
            node: Some("n999".into()),
            ..Place::default()
        };
        assert!(history.held("job", Cause::HostCpu, &newest).is_some());
    }
}
