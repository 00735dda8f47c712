//! Kernels slowed by what ran beside them.

use std::collections::BTreeMap;

use super::{KernelClass, Record, Work};
use crate::budget::arith::mul_div;
use crate::sweep;
use crate::time::Window;

/// A kernel's length by itself is known from at least this many runs without company.
const LEAST_ALONE: usize = 3;

/// How much longer kernels ran than by themselves.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Contention {
    /// By record, ns; 0 for what is no kernel.
    pub(super) excess_ns: Vec<u64>,
    /// Time of kernels that ran beside communication or copies, ns.
    pub(super) beside_ns: u64,
    /// Of that, time of kernels whose length by themselves is not known, ns.
    pub(super) unknown_ns: u64,
}

/// What communication and copies cost the compute kernels that ran beside them.
///
/// For each kernel and shape: the sum over its runs with company of their length beyond the median of its runs
/// alone. Shorter runs count against longer ones, so that jitter sums to nothing; what is left is shared out among
/// the longer runs. `records` are sorted by start.
pub(super) fn contention(records: &[Record]) -> Contention {
    let mut found = Contention {
        excess_ns: vec![0; records.len()],
        ..Contention::default()
    };
    let company = company(records);
    let mut runs: BTreeMap<u64, (Vec<u64>, Vec<usize>)> = BTreeMap::new();
    for (at, record) in records
        .iter()
        .enumerate()
        .filter(|(_, record)| is_compute(record))
    {
        let (alone, beside) = runs.entry(record.token).or_default();
        if overlaps(&company, record.window) {
            beside.push(at);
        } else {
            alone.push(record.window.len_ns());
        }
    }
    for (mut alone, beside) in runs.into_values() {
        let lengths = |at: &usize| records[*at].window.len_ns();
        let time_ns: u64 = beside.iter().map(lengths).sum();
        found.beside_ns += time_ns;
        let shaped = beside.iter().all(|at| records[*at].shaped);
        if alone.len() < LEAST_ALONE || !shaped {
            found.unknown_ns += time_ns;
            continue;
        }
        alone.sort_unstable();
        let usual = alone[alone.len() / 2];
        let longer: u64 = beside
            .iter()
            .map(lengths)
            .map(|ns| ns.saturating_sub(usual))
            .sum();
        let shorter: u64 = beside
            .iter()
            .map(lengths)
            .map(|ns| usual.saturating_sub(ns))
            .sum();
        for at in beside {
            let excess = records[at].window.len_ns().saturating_sub(usual);
            found.excess_ns[at] = mul_div(excess, longer.saturating_sub(shorter), longer);
        }
    }
    found
}

const fn is_compute(record: &Record) -> bool {
    matches!(record.work, Work::Kernel(class) if !matches!(class, KernelClass::Communication))
}

/// When communication or copies ran: disjoint and in order.
fn company(records: &[Record]) -> Vec<Window> {
    let others = || records.iter().filter(|record| !is_compute(record));
    let start = others().map(|record| record.window.start_ns()).min().unwrap_or(0);
    let end = others().map(|record| record.window.end_ns()).max().unwrap_or(0);
    let Some(all) = Window::new(start, end) else {
        return Vec::new();
    };
    sweep::sweep(all, others().map(|record| (0, record.window)))
        .into_iter()
        .filter(|segment| segment.active != 0)
        .map(|segment| segment.window)
        .collect()
}

fn overlaps(company: &[Window], window: Window) -> bool {
    let at = company.partition_point(|other| other.end_ns() <= window.start_ns());
    company
        .get(at)
        .is_some_and(|other| other.start_ns() < window.end_ns())
}
