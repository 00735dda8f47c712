//! The same step on every rank, found by when it ended.
//!
//! A synchronous step ends on all ranks within a few microseconds of the last collective's end, so the edges, not
//! the ranks' own counts, tell which steps belong together: an agent that started late counts from its own first.

use super::rollup::realtime;
use crate::budget::arith::median;
use crate::facts::{GpuHistory, GpuStep, RecordGap, Span, SpanKind};
use crate::leaf::{Class, Leaf};
use crate::time::Window;

/// Nanoseconds by leaf.
pub(super) type ByLeaf = [i64; Leaf::COUNT];

/// One rank in one aligned step: the step and the spans that came between it and the step before.
#[derive(Debug, Clone)]
pub(super) struct Cell<'a> {
    pub(super) step: &'a GpuStep,
    /// Step and spans together, ns.
    pub(super) window_ns: u64,
    /// Of step and spans together.
    pub(super) leaves: ByLeaf,
}

impl Cell<'_> {
    pub(super) fn class_ns(&self, class: Class) -> i64 {
        class_ns(&self.leaves, class)
    }
}

/// Nanoseconds of one class.
pub(super) fn class_ns(leaves: &ByLeaf, class: Class) -> i64 {
    Leaf::ALL
        .iter()
        .filter(|leaf| leaf.class() == class)
        .map(|leaf| leaves[leaf.index()])
        .sum()
}

/// One step of the job.
#[derive(Debug, Clone)]
pub(super) struct AlignedStep<'a> {
    /// First start and last end over the ranks, `CLOCK_REALTIME` ns, spans before it not included.
    pub(super) window: Window,
    /// By position of the rank in the job; `None` where its record has no such step.
    pub(super) cells: Vec<Option<Cell<'a>>>,
}

impl AlignedStep<'_> {
    /// Median over ranks of the step alone, ns.
    pub(super) fn step_ns(&self) -> u64 {
        median(
            self.cells
                .iter()
                .flatten()
                .map(|cell| cell.step.window.len_ns())
                .collect(),
        )
    }

    /// Number of ranks seen.
    pub(super) fn present(&self) -> usize {
        self.cells.iter().flatten().count()
    }
}

/// The steps of the job in order.
pub(super) fn align<'a>(ranks: &[&'a GpuHistory]) -> Vec<AlignedStep<'a>> {
    let cells: Vec<Vec<(Window, Cell<'a>)>> = ranks.iter().map(|history| cells(history)).collect();
    let Some(reference) = (0..cells.len()).max_by_key(|at| (cells[*at].len(), core::cmp::Reverse(*at)))
    else {
        return Vec::new();
    };
    let mut next = vec![0; cells.len()];
    let mut steps = Vec::with_capacity(cells[reference].len());
    for (window, _) in &cells[reference] {
        let tolerance_ns = window.len_ns() / 2;
        let mut joined = *window;
        let members = cells
            .iter()
            .zip(&mut next)
            .map(|(row, next)| {
                let at = nearest(row, *next, window.end_ns(), tolerance_ns)?;
                *next = at + 1;
                let (own, cell) = &row[at];
                joined = Window::new(
                    joined.start_ns().min(own.start_ns()),
                    joined.end_ns().max(own.end_ns()),
                )
                .unwrap_or(joined);
                Some(cell.clone())
            })
            .collect();
        steps.push(AlignedStep {
            window: joined,
            cells: members,
        });
    }
    steps
}

/// Steps by which the ranks' records may begin or end apart.
const RAGGED: usize = 2;

/// Ranks whose record misses steps that others have.
pub(super) fn gaps(ranks: &[&GpuHistory], steps: &[AlignedStep<'_>]) -> Vec<RecordGap> {
    let missing = |at: usize| {
        // Ranks begin and end a record within a step or two of each other: that is no gap.
        let seen = |step: &AlignedStep<'_>| step.cells[at].is_some();
        let begun = steps
            .iter()
            .position(seen)
            .filter(|first| *first <= RAGGED)
            .unwrap_or(0);
        let ended = steps
            .iter()
            .rev()
            .position(seen)
            .filter(|last| *last <= RAGGED)
            .unwrap_or(0);
        steps[begun..steps.len() - ended]
            .iter()
            .filter(move |step| step.cells[at].is_none())
    };
    let mut gaps = Vec::new();
    for (at, history) in ranks.iter().enumerate() {
        let count = missing(at).count() as u64;
        if count == 0 {
            continue;
        }
        let (first, last) = (missing(at).next(), missing(at).next_back());
        let window = first
            .zip(last)
            .and_then(|(first, last)| Window::new(first.window.start_ns(), last.window.end_ns()));
        let what = format!("steps of rank {} that other ranks have", history.subject.rank);
        gaps.push(RecordGap {
            node: history.subject.node.clone(),
            window,
            what,
            count,
        });
    }
    let seen = ranks.len() as u64;
    let world = ranks
        .iter()
        .map(|history| u64::from(history.subject.world))
        .max()
        .unwrap_or(0);
    if world > seen {
        let what = format!("ranks of the job: {seen} of {world} seen");
        gaps.push(RecordGap {
            node: String::new(),
            window: None,
            what,
            count: world - seen,
        });
    }
    gaps
}

/// A rank's steps in order, each with its `CLOCK_REALTIME` window and the spans since the step before.
fn cells(history: &GpuHistory) -> Vec<(Window, Cell<'_>)> {
    let mut steps: Vec<&GpuStep> = history
        .steps
        .iter()
        .filter(|step| !step.window.is_empty())
        .collect();
    steps.sort_by_key(|step| step.window);
    // What came before the first step, or was not seen, is no part of a step that other ranks have too.
    let begun_ns = steps.first().map_or(u64::MAX, |first| first.window.start_ns());
    let between = |span: &&Span| {
        matches!(span.kind, SpanKind::Checkpoint | SpanKind::Other) && span.window.start_ns() >= begun_ns
    };
    let mut spans: Vec<&Span> = history.spans.iter().filter(between).collect();
    spans.sort_by_key(|span| span.window);
    let mut spans = spans.into_iter().peekable();
    let fold = |step: &'_ GpuStep| (step.window.len_ns(), *step.budget.leaves());
    steps
        .into_iter()
        .map(|step| {
            let (mut window_ns, mut leaves) = fold(step);
            while let Some(span) = spans.next_if(|span| span.window.end_ns() <= step.window.start_ns()) {
                window_ns = window_ns.saturating_add(span.window.len_ns());
                for (sum, ns) in leaves.iter_mut().zip(span.budget.leaves()) {
                    *sum = sum.saturating_add(*ns);
                }
            }
            (
                realtime(step.window, step.realtime_offset_ns),
                Cell {
                    step,
                    window_ns,
                    leaves,
                },
            )
        })
        .collect()
}

/// The step at or after `from` that ends nearest to `end_ns`, within the tolerance.
fn nearest(row: &[(Window, Cell<'_>)], from: usize, end_ns: u64, tolerance_ns: u64) -> Option<usize> {
    let off = |at: &usize| row[*at].0.end_ns().abs_diff(end_ns);
    let first = from + row[from.min(row.len())..].partition_point(|(window, _)| window.end_ns() < end_ns);
    [
        first.checked_sub(1).filter(|before| *before >= from),
        Some(first).filter(|at| *at < row.len()),
    ]
    .into_iter()
    .flatten()
    .min_by_key(off)
    .filter(|at| off(at) <= tolerance_ns)
}
