//! The facts of one job, as the analysis takes them, with everything missing named.

use std::collections::BTreeSet;

use stallscope_attribution::facts::{GpuHistory, GpuSubject, JobFacts, RecordGap};
use stallscope_attribution::time::Window;

use super::Board;
use super::job::{Gpu, Job};
use super::node::{Absence, Node};

/// A node that said nothing for longer than this is unreachable, ns.
pub(super) const UNREACHABLE_NS: u64 = 10_000_000_000;

impl Board {
    /// What is known of a job that ended after `since_ns` (`CLOCK_REALTIME`); `None` when the job is not known.
    #[must_use]
    pub fn facts(&self, job_name: &str, since_ns: u64, now_ns: u64) -> Option<JobFacts> {
        let job = self.jobs.get(job_name)?;
        let (newest, earlier) = job.incarnations();
        let node_names: BTreeSet<&str> = newest.iter().map(|(subject, _)| subject.node.as_str()).collect();
        let gpus = newest
            .iter()
            .map(|(subject, gpu)| GpuHistory {
                subject: (*subject).clone(),
                steps: gpu.steps_since(since_ns),
                spans: gpu.spans_since(since_ns),
            })
            .filter(|history| !history.steps.is_empty() || !history.spans.is_empty())
            .collect();
        let nodes = || {
            node_names
                .iter()
                .filter_map(|name| Some((*name, self.nodes.get(*name)?)))
        };
        let mut gaps: Vec<RecordGap> = nodes().flat_map(|(name, node)| node.all_gaps(name)).collect();
        gaps.retain(|gap| gap.window.is_none_or(|window| window.end_ns() > since_ns));
        gaps.extend(nodes().filter_map(|(name, node)| self.silence(name, node, job, now_ns)));
        gaps.extend(
            newest
                .iter()
                .filter_map(|(subject, gpu)| self.silent_rank(subject, gpu, job)),
        );
        gaps.extend(self.full.as_ref().map(|(full_ns, why)| RecordGap {
            node: String::new(),
            window: Window::new(*full_ns, now_ns.max(*full_ns)),
            what: format!(
                "the collector cannot store what nodes send, they keep it and send it again: {why}"
            ),
            count: 0,
        }));
        gaps.extend(earlier.into_iter().filter(|(_, gpu)| gpu.last_ns > since_ns).map(|(subject, gpu)| {
            let what = format!(
                "the job restarted: steps of rank {} as process {} belong to an earlier run and are left out",
                subject.rank, subject.pid
            );
            let window = Window::new(gpu.began_ns().max(since_ns), gpu.last_ns);
            let count = (gpu.steps.len() + gpu.spans.len()) as u64;
            RecordGap { node: subject.node.clone(), window, what, count }
        }));
        Some(JobFacts {
            job: job_name.to_owned(),
            kind: if job.kind.is_empty() {
                "unknown".to_owned()
            } else {
                job.kind.clone()
            },
            gpus,
            ports: nodes()
                .flat_map(|(_, node)| node.ports.since(since_ns))
                .cloned()
                .collect(),
            hardware: nodes()
                .flat_map(|(_, node)| node.hardware.since(since_ns))
                .cloned()
                .collect(),
            gaps,
        })
    }

    /// From when on everything the job told is in memory, `CLOCK_REALTIME` ns; 0 when nothing was forgotten.
    #[must_use]
    pub fn complete_since(&self, job_name: &str) -> u64 {
        let gpus = self
            .jobs
            .get(job_name)
            .into_iter()
            .flat_map(|job| job.gpus.values());
        gpus.map(|gpu| gpu.forgotten_to_ns).max().unwrap_or(0)
    }

    /// A rank of which nothing is told while its node tells of other things and other ranks go on. Where other ranks of
    /// the job are on the node, its agent says so itself.
    fn silent_rank(&self, subject: &GpuSubject, gpu: &Gpu, job: &Job) -> Option<RecordGap> {
        let node = self.nodes.get(&subject.node)?;
        let went_on = |other: &&GpuSubject| other.node == subject.node && other.rank != subject.rank;
        if job.gpus.keys().any(|other| went_on(&other)) {
            return None;
        }
        let job_ns = job.gpus.values().map(|gpu| gpu.last_ns).max().unwrap_or(0);
        let behind_ns = job_ns.min(node.told_to_ns).saturating_sub(gpu.last_ns);
        (behind_ns > UNREACHABLE_NS).then(|| RecordGap {
            node: subject.node.clone(),
            window: Window::new(gpu.last_ns, gpu.last_ns + behind_ns),
            what: format!(
                "rank {} (process {}, GPU {}) tells nothing while other ranks go on (for {} s)",
                subject.rank,
                subject.pid,
                subject.gpu,
                behind_ns / 1_000_000_000
            ),
            count: 0,
        })
    }

    /// A node that fell silent while its job, or the clock, went on.
    fn silence(&self, name: &str, node: &Node, job: &Job, now_ns: u64) -> Option<RecordGap> {
        let job_ns = job.gpus.values().map(|gpu| gpu.last_ns).max().unwrap_or(0);
        let silent_ns = now_ns.saturating_sub(node.heard_ns);
        let behind_ns = job_ns.saturating_sub(node.told_to_ns);
        let what = match node.absence {
            Absence::Lost if silent_ns > UNREACHABLE_NS => "node unreachable: its connection was lost",
            Absence::Here if silent_ns > UNREACHABLE_NS => "node unreachable: it says nothing",
            Absence::Stopped if behind_ns > UNREACHABLE_NS => "agent stopped while the job went on",
            Absence::NeverSeen if behind_ns > UNREACHABLE_NS => {
                "node not connected since the collector started"
            }
            Absence::Here | Absence::Stopped | Absence::Lost | Absence::NeverSeen => return None,
        };
        let seconds = if node.absence == Absence::Stopped || node.absence == Absence::NeverSeen {
            behind_ns / 1_000_000_000
        } else {
            silent_ns / 1_000_000_000
        };
        Some(RecordGap {
            node: name.to_owned(),
            window: Window::new(node.told_to_ns, node.told_to_ns.max(job_ns))
                .filter(|window| !window.is_empty()),
            what: format!("{what} (for {seconds} s)"),
            count: 0,
        })
    }
}
