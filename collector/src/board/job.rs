//! The recent steps of one job.

use std::collections::{BTreeMap, VecDeque};

use stallscope_attribution::facts::{GpuStep, GpuSubject, Span};

use super::realtime;

/// One process on one GPU. A job that restarts has new ones.
#[derive(Debug, Default)]
pub(super) struct Gpu {
    pub(super) steps: VecDeque<GpuStep>,
    pub(super) spans: VecDeque<Span>,
    /// Newest end, `CLOCK_REALTIME` ns.
    pub(super) last_ns: u64,
    /// Everything that ended at or before this is forgotten, `CLOCK_REALTIME` ns.
    pub(super) forgotten_to_ns: u64,
}

/// One process of a rank and what it did.
pub(super) type Incarnation<'a> = (&'a GpuSubject, &'a Gpu);

/// One job.
#[derive(Debug, Default)]
pub(super) struct Job {
    pub(super) kind: String,
    /// When the last message came, `CLOCK_REALTIME` of the collector.
    pub(super) received_ns: u64,
    pub(super) gpus: BTreeMap<GpuSubject, Gpu>,
}

fn step_end_ns(step: &GpuStep) -> u64 {
    realtime(step.window.end_ns(), step.realtime_offset_ns)
}

fn span_end_ns(span: &Span) -> u64 {
    realtime(span.window.end_ns(), span.realtime_offset_ns)
}

impl Gpu {
    fn entries(&self) -> usize {
        self.steps.len() + self.spans.len()
    }

    fn forget_oldest(&mut self) -> bool {
        let step_ns = self.steps.front().map(step_end_ns);
        let span_ns = self.spans.front().map(span_end_ns);
        let forgotten_ns = match (step_ns, span_ns) {
            (None, None) => return false,
            (Some(step_ns), Some(span_ns)) if span_ns < step_ns => {
                self.spans.pop_front();
                span_ns
            }
            (Some(step_ns), _) => {
                self.steps.pop_front();
                step_ns
            }
            (None, Some(span_ns)) => {
                self.spans.pop_front();
                span_ns
            }
        };
        self.forgotten_to_ns = self.forgotten_to_ns.max(forgotten_ns);
        true
    }

    fn oldest_ns(&self) -> Option<u64> {
        let steps = self.steps.front().map(step_end_ns);
        let spans = self.spans.front().map(span_end_ns);
        steps.into_iter().chain(spans).min()
    }

    /// When what is remembered began, `CLOCK_REALTIME` ns; 0 when nothing is.
    pub(super) fn began_ns(&self) -> u64 {
        let step = self
            .steps
            .front()
            .map(|step| (step.window, step.realtime_offset_ns));
        let span = self
            .spans
            .front()
            .map(|span| (span.window, span.realtime_offset_ns));
        let begins = step.into_iter().chain(span);
        begins
            .map(|(window, offset_ns)| realtime(window.start_ns(), offset_ns))
            .min()
            .unwrap_or(0)
    }

    /// Steps that ended after a time.
    pub(super) fn steps_since(&self, since_ns: u64) -> Vec<GpuStep> {
        self.steps
            .iter()
            .filter(|step| step_end_ns(step) > since_ns)
            .cloned()
            .collect()
    }

    /// Spans that ended after a time.
    pub(super) fn spans_since(&self, since_ns: u64) -> Vec<Span> {
        self.spans
            .iter()
            .filter(|span| span_end_ns(span) > since_ns)
            .cloned()
            .collect()
    }
}

impl Job {
    pub(super) fn add_step(&mut self, subject: &GpuSubject, step: GpuStep, end_ns: u64) {
        let gpu = self.gpus.entry(subject.clone()).or_default();
        gpu.last_ns = gpu.last_ns.max(end_ns);
        gpu.steps.push_back(step);
    }

    pub(super) fn add_span(&mut self, subject: &GpuSubject, span: Span, end_ns: u64) {
        let gpu = self.gpus.entry(subject.clone()).or_default();
        gpu.last_ns = gpu.last_ns.max(end_ns);
        gpu.spans.push_back(span);
    }

    /// Forgets what the subject did longer than `window_ns` before its newest.
    pub(super) fn trim(&mut self, subject: &GpuSubject, window_ns: u64) {
        let Some(gpu) = self.gpus.get_mut(subject) else {
            return;
        };
        let keep_ns = gpu.last_ns.saturating_sub(window_ns);
        while gpu.oldest_ns().is_some_and(|oldest_ns| oldest_ns < keep_ns) && gpu.forget_oldest() {}
        // Earlier processes of the rank tell nothing new, so nothing else would trim them.
        self.gpus
            .retain(|other, gpu| other.rank != subject.rank || gpu.last_ns >= keep_ns);
    }

    /// Forgets the oldest of the subject until the whole job holds at most `max_entries`.
    pub(super) fn trim_to(&mut self, subject: &GpuSubject, max_entries: usize) {
        let mut entries = self.entries();
        let Some(gpu) = self.gpus.get_mut(subject) else {
            return;
        };
        while entries > max_entries && gpu.forget_oldest() {
            entries -= 1;
        }
        if gpu.entries() == 0 {
            self.gpus.remove(subject);
        }
    }

    pub(super) fn entries(&self) -> usize {
        self.gpus.values().map(Gpu::entries).sum()
    }

    /// For each rank the process heard of last, and the earlier ones.
    pub(super) fn incarnations(&self) -> (Vec<Incarnation<'_>>, Vec<Incarnation<'_>>) {
        let mut newest: BTreeMap<u32, Incarnation<'_>> = BTreeMap::new();
        for (subject, gpu) in &self.gpus {
            let entry = newest.entry(subject.rank).or_insert((subject, gpu));
            if gpu.last_ns > entry.1.last_ns {
                *entry = (subject, gpu);
            }
        }
        let is_newest = |subject: &GpuSubject| {
            newest
                .get(&subject.rank)
                .is_some_and(|(kept, _)| *kept == subject)
        };
        let earlier = self
            .gpus
            .iter()
            .filter(|(subject, _)| !is_newest(subject))
            .collect();
        (newest.into_values().collect(), earlier)
    }
}
