//! What is stored, as facts again.

use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::io;
use std::path::Path;

use bytes::Bytes;
use stallscope_attribution::facts::{
    GpuHistory, GpuStep, GpuSubject, HardwareFacts, JobFacts, PortFacts, RecordGap, Span,
};
use stallscope_proto::convert::{KnownSubjects, Payload, Record};

use super::segment::{Messages, Next, Segment};

/// How much to read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scope {
    /// Only what ended after this, `CLOCK_REALTIME` ns.
    pub since_realtime_ns: i64,
    /// Only about the newest so many bytes of the store.
    pub newest_bytes: u64,
    /// Most steps, spans and ports each kept; the newest are.
    pub most: usize,
}

impl Default for Scope {
    fn default() -> Self {
        Self {
            since_realtime_ns: i64::MIN,
            newest_bytes: u64::MAX,
            most: 1 << 20,
        }
    }
}

/// Everything read.
#[derive(Debug, Default)]
pub struct StoredJobs {
    jobs: BTreeMap<String, StoredJob>,
    ports: VecDeque<PortFacts>,
    hardware: VecDeque<HardwareFacts>,
    gaps: VecDeque<RecordGap>,
    /// Messages that could not be understood or whose subject is not known.
    pub refused: u64,
    /// Segments with damage: the rest of each is missing.
    pub damaged_segments: u64,
}

#[derive(Debug, Default)]
struct StoredJob {
    kind: String,
    gpus: BTreeMap<GpuSubject, StoredGpu>,
}

#[derive(Debug, Default)]
struct StoredGpu {
    steps: VecDeque<GpuStep>,
    spans: VecDeque<Span>,
}

/// Reads the store in `dir`; an agent may be writing to it.
///
/// # Errors
/// When the directory cannot be read. Damage is counted, not an error.
pub fn read_back(dir: &Path, scope: Scope) -> io::Result<StoredJobs> {
    let dir = dir.join("segments");
    let mut segments = Segment::list(&dir)?;
    let mut bytes = 0_u64;
    let skip = segments.iter().rev().take_while(|segment| {
        bytes = bytes.saturating_add(segment.bytes);
        bytes <= scope.newest_bytes
    });
    let skip = segments.len() - skip.count().max(1).min(segments.len());
    segments.drain(..skip);
    let mut stored = StoredJobs::default();
    for segment in segments {
        let file = match File::open(segment.path(&dir)) {
            Ok(file) => file,
            // The ring went on meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(error),
        };
        stored.read_segment(Messages::new(file, 0, segment.bytes)?, scope)?;
    }
    Ok(stored)
}

impl StoredJobs {
    /// Steps and spans of each GPU, newest last.
    pub fn histories(
        &self,
    ) -> impl Iterator<Item = (&GpuSubject, &str, &VecDeque<GpuStep>, &VecDeque<Span>)> {
        self.jobs.values().flat_map(|job| {
            job.gpus
                .iter()
                .map(|(subject, gpu)| (subject, job.kind.as_str(), &gpu.steps, &gpu.spans))
        })
    }

    /// Network windows, newest last.
    #[must_use]
    pub const fn ports(&self) -> &VecDeque<PortFacts> {
        &self.ports
    }

    /// What devices told, oldest first.
    #[must_use]
    pub const fn hardware(&self) -> &VecDeque<HardwareFacts> {
        &self.hardware
    }

    /// Gaps, newest last.
    #[must_use]
    pub const fn gaps(&self) -> &VecDeque<RecordGap> {
        &self.gaps
    }

    /// Where each GPU's account ends: the end of its last window, `CLOCK_REALTIME` ns.
    #[must_use]
    pub fn left_off(&self) -> Vec<(GpuSubject, i128)> {
        let last = |(subject, _, steps, spans): (&GpuSubject, &str, &VecDeque<GpuStep>, &VecDeque<Span>)| {
            let step = steps
                .back()
                .map(|step| realtime(step.window.end_ns(), step.realtime_offset_ns));
            let span = spans
                .back()
                .map(|span| realtime(span.window.end_ns(), span.realtime_offset_ns));
            Some((subject.clone(), step.max(span)?))
        };
        self.histories().filter_map(last).collect()
    }

    /// One entry per job, by name; what devices told without any job is one without a name.
    #[must_use]
    pub fn into_job_facts(mut self) -> Vec<JobFacts> {
        if self.jobs.is_empty() && !self.hardware.is_empty() {
            self.jobs.insert(String::new(), StoredJob::default());
        }
        let (ports, gaps): (Vec<_>, Vec<_>) = (self.ports.into(), self.gaps.into());
        let hardware: Vec<_> = self.hardware.into();
        let history = |(subject, gpu): (GpuSubject, StoredGpu)| GpuHistory {
            subject,
            steps: gpu.steps.into(),
            spans: gpu.spans.into(),
        };
        let facts = |(name, job): (String, StoredJob)| JobFacts {
            job: name,
            kind: if job.kind.is_empty() {
                "unknown".to_owned()
            } else {
                job.kind
            },
            gpus: job.gpus.into_iter().map(history).collect(),
            ports: ports.clone(),
            hardware: hardware.clone(),
            gaps: gaps.clone(),
        };
        self.jobs.into_iter().map(facts).collect()
    }

    fn read_segment(&mut self, mut messages: Messages, scope: Scope) -> io::Result<()> {
        // Every segment announces what it uses, and belongs to one run of the agent.
        let mut subjects = KnownSubjects::default();
        loop {
            match messages.next()? {
                Next::Message(body) => self.take(body, &mut subjects, scope),
                Next::End => return Ok(()),
                Next::Damaged => {
                    self.damaged_segments += 1;
                    return Ok(());
                }
            }
        }
    }

    fn take(&mut self, body: Bytes, subjects: &mut KnownSubjects, scope: Scope) {
        let Ok(record) = Record::decode(body) else {
            self.refused += 1;
            return;
        };
        let wanted =
            |end_ns: u64, offset_ns: i64| realtime(end_ns, offset_ns) > i128::from(scope.since_realtime_ns);
        match record.payload {
            Payload::Subject { id, entry } => {
                let job = entry.subject.job.clone();
                let kind = entry.job_kind.clone();
                if subjects.announce(id, entry).is_err() {
                    self.refused += 1;
                } else if !kind.is_empty() {
                    self.jobs.entry(job).or_default().kind = kind;
                }
            }
            Payload::Step { subject, step } => {
                let Some(gpu) = self.gpu(subjects, subject) else {
                    return;
                };
                if wanted(step.window.end_ns(), step.realtime_offset_ns) {
                    push(&mut gpu.steps, *step, scope.most);
                }
            }
            Payload::Span { subject, span } => {
                let Some(gpu) = self.gpu(subjects, subject) else {
                    return;
                };
                if wanted(span.window.end_ns(), span.realtime_offset_ns) {
                    push(&mut gpu.spans, *span, scope.most);
                }
            }
            Payload::Port(port) => {
                if wanted(port.window.end_ns(), port.realtime_offset_ns) {
                    push(&mut self.ports, port, scope.most);
                }
            }
            Payload::Hardware(facts) => {
                if wanted(facts.window.end_ns(), facts.realtime_offset_ns) {
                    push(&mut self.hardware, facts, scope.most);
                }
            }
            Payload::Gap(gap) => push(&mut self.gaps, gap, scope.most),
        }
    }

    fn gpu(&mut self, subjects: &KnownSubjects, id: u32) -> Option<&mut StoredGpu> {
        let Some(entry) = subjects.get(id) else {
            self.refused += 1;
            return None;
        };
        let job = self.jobs.entry(entry.subject.job.clone()).or_default();
        Some(job.gpus.entry(entry.subject.clone()).or_default())
    }
}

fn push<T>(queue: &mut VecDeque<T>, item: T, most: usize) {
    if queue.len() >= most {
        queue.pop_front();
    }
    queue.push_back(item);
}

fn realtime(at_ns: u64, offset_ns: i64) -> i128 {
    i128::from(at_ns) + i128::from(offset_ns)
}
