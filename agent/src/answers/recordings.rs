//! A report from recorded observations: replayed through the timeline as the agent would have seen them.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use stallscope_attribution::facts::{GpuHistory, GpuSubject, HardwareFacts, JobFacts, PortFacts, RecordGap};
use stallscope_report::document::Document;

use super::select;
use crate::record::{RecordError, Replay};
use crate::timeline::{Event, Timeline};

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// A recording cannot be replayed.
    #[error(transparent)]
    Recording(#[from] RecordError),
    /// Two recordings of one node.
    #[error(
        "{} and {} are both recorded on node {node}; give one recording per node, of one time",
        first.display(),
        second.display()
    )]
    SameNode {
        /// Which node.
        node: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },
    /// They hold no account of any GPU or device.
    #[error("nothing to report in the recordings: {0}")]
    Nothing(String),
}

/// The report of the jobs in recordings, one per node.
///
/// # Errors
/// When a recording cannot be read, two are of one node, or nothing of a GPU is in any of them.
pub fn document(recordings: &[PathBuf]) -> Result<Document, ReplayError> {
    let mut jobs = Jobs::default();
    let mut nodes: BTreeMap<String, &Path> = BTreeMap::new();
    for recording in recordings {
        let replay = Replay::open(recording)?;
        if let Some(first) = nodes.insert(replay.node().to_owned(), recording) {
            return Err(ReplayError::SameNode {
                node: replay.node().to_owned(),
                first: first.to_owned(),
                second: recording.clone(),
            });
        }
        jobs.take_in(replay)?;
    }
    jobs.document()
}

/// The report of the jobs in one recording.
///
/// # Errors
/// When it cannot be read or holds nothing of a GPU.
pub fn document_of<R: Read>(replay: Replay<R>) -> Result<Document, ReplayError> {
    let mut jobs = Jobs::default();
    jobs.take_in(replay)?;
    jobs.document()
}

/// What recordings showed, by job.
#[derive(Debug, Default)]
struct Jobs {
    kinds: BTreeMap<String, String>,
    gpus: BTreeMap<GpuSubject, GpuHistory>,
    ports: Vec<PortFacts>,
    hardware: Vec<HardwareFacts>,
    gaps: Vec<RecordGap>,
}

impl Jobs {
    fn take_in<R: Read>(&mut self, mut replay: Replay<R>) -> Result<(), RecordError> {
        let node = replay.node().to_owned();
        let mut timeline = Timeline::new(node.clone());
        let mut events = Vec::new();
        while let Some(batch) = replay.next_batch()? {
            batch
                .into_iter()
                .for_each(|observation| timeline.push(observation));
            timeline.advance(&mut events);
            events.drain(..).for_each(|event| self.take(event));
        }
        timeline.finish(&mut events);
        events.drain(..).for_each(|event| self.take(event));
        let counters = timeline.counters();
        let missing = [
            (
                u64::from(replay.is_torn()),
                "the recording ends within a batch: its recorder was stopped",
            ),
            (counters.late, "observations came too late to be put in order"),
            (
                counters.processes_refused,
                "processes were not followed for lack of room",
            ),
        ];
        let missing = missing.into_iter().filter(|(count, _)| *count > 0);
        self.gaps.extend(missing.map(|(count, what)| RecordGap {
            node: node.clone(),
            window: None,
            what: what.to_owned(),
            count,
        }));
        Ok(())
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Subject { subject, kind } => {
                if let Some(kind) = kind {
                    self.kinds.insert(subject.job.clone(), kind);
                }
            }
            Event::Step { subject, step } => self.gpu(&subject).steps.push(*step),
            Event::Span { subject, span } => self.gpu(&subject).spans.push(*span),
            Event::Port(port) => self.ports.push(*port),
            Event::Hardware(facts) => self.hardware.push(*facts),
            Event::Gap(gap) => self.gaps.push(gap),
            Event::Gone { .. } => {}
        }
    }

    fn gpu(&mut self, subject: &GpuSubject) -> &mut GpuHistory {
        self.gpus.entry(subject.clone()).or_insert_with(|| GpuHistory {
            subject: subject.clone(),
            steps: Vec::new(),
            spans: Vec::new(),
        })
    }

    fn document(self) -> Result<Document, ReplayError> {
        select::document(self.into_facts(), None).map_err(ReplayError::Nothing)
    }

    fn into_facts(self) -> Vec<JobFacts> {
        let mut jobs: BTreeMap<String, Vec<GpuHistory>> = BTreeMap::new();
        for gpu in self.gpus.into_values() {
            jobs.entry(gpu.subject.job.clone()).or_default().push(gpu);
        }
        if jobs.is_empty() && !self.hardware.is_empty() {
            // What the devices told belongs to no job then.
            jobs.insert(String::new(), Vec::new());
        }
        let facts = |(job, gpus): (String, Vec<GpuHistory>)| JobFacts {
            kind: self
                .kinds
                .get(&job)
                .cloned()
                .unwrap_or_else(|| "unknown".to_owned()),
            job,
            gpus,
            ports: self.ports.clone(),
            hardware: self.hardware.clone(),
            gaps: self.gaps.clone(),
        };
        jobs.into_iter().map(facts).collect()
    }
}
