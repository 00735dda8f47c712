//! Steps and spans summed to GPUs and jobs.

use super::{GpuSummary, JobAnalysis, Tier};
use crate::budget::Budget;
use crate::facts::{Activity, GpuHistory, JobFacts, StepMethod};
use crate::reading::Reading;
use crate::time::Window;

/// The whole answer for one job.
#[must_use]
pub fn analyse(facts: &JobFacts) -> JobAnalysis {
    let mut gpus: Vec<GpuSummary> = facts.gpus.iter().map(summary).collect();
    gpus.sort_by(|a, b| a.subject.cmp(&b.subject));
    JobAnalysis {
        job: facts.job.clone(),
        kind: facts.kind.clone(),
        observed: observed(facts),
        tier: Tier::Probes,
        gpus,
        blame: Vec::new(),
        verdicts: Vec::new(),
        gaps: facts.gaps.clone(),
        mfu_ppm: None,
        mfu_declared: false,
    }
}

fn summary(history: &GpuHistory) -> GpuSummary {
    let steps = &history.steps;
    let budgets = steps
        .iter()
        .map(|step| &step.budget)
        .chain(history.spans.iter().map(|span| &span.budget));
    let mut lengths: Vec<u64> = steps.iter().map(|step| step.window.len_ns()).collect();
    lengths.sort_unstable();
    GpuSummary {
        subject: history.subject.clone(),
        total: Budget::sum(budgets),
        method: steps.last().map_or(StepMethod::FixedWindow, |step| step.method),
        steps: steps.len() as u64,
        period_calls: steps.last().map_or(0, |step| step.period_calls),
        median_step_ns: lengths.get(lengths.len() / 2).copied().unwrap_or(0),
        activity: activity(history),
    }
}

fn activity(history: &GpuHistory) -> Reading<Activity> {
    Activity::mean(
        history
            .steps
            .iter()
            .map(|step| (step.window.len_ns(), &step.signals.activity)),
    )
}

/// A monotonic window in `CLOCK_REALTIME`.
pub(super) fn realtime(window: Window, offset_ns: i64) -> Window {
    Window::new(
        window.start_ns().saturating_add_signed(offset_ns),
        window.end_ns().saturating_add_signed(offset_ns),
    )
    .unwrap_or_default()
}

fn observed(facts: &JobFacts) -> Option<Window> {
    let windows = facts.gpus.iter().flat_map(|gpu| {
        let steps = gpu
            .steps
            .iter()
            .map(|step| realtime(step.window, step.realtime_offset_ns));
        steps.chain(
            gpu.spans
                .iter()
                .map(|span| realtime(span.window, span.realtime_offset_ns)),
        )
    });
    windows
        .reduce(|a, b| Window::new(a.start_ns().min(b.start_ns()), a.end_ns().max(b.end_ns())).unwrap_or(a))
}
