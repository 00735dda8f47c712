//! Exposed communication that was waiting for the last rank, moved to that rank and what kept it.
//!
//! Everyone in a synchronous step has the same length of step, so the rank with the least exposed communication
//! arrived last and the others' excess over it was waiting. The host's part of a rank's time is exact in every step;
//! compute comes from device averages that blur over edges, so it is averaged over a block of steps first.

use core::ops::Range;

use super::align::{AlignedStep, ByLeaf, median};
use crate::budget::arith::{apportion, signed};
use crate::leaf::{Class, Leaf};

/// Steps in a block.
const BLOCK: usize = 10;
/// A last arriver leads by at least this, parts per million of the step: below it the order is chance.
const MARGIN_PPM: u128 = 20_000;
/// A clock this much below the other ranks' explains slower compute, percent.
const SLOWER_CLOCK_PERCENT: u64 = 4;
/// Another process with this share of SM time explains slower compute, parts per million.
const FOREIGN_PPM: u32 = 30_000;

/// Waiting moved to a culprit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Move {
    /// Aligned step at which the block begins.
    pub(super) at: usize,
    /// Position of the rank that was late.
    pub(super) culprit: usize,
    /// What kept it.
    pub(super) leaf: Leaf,
    /// Waiting of all others, GPU-ns.
    pub(super) ns: u64,
}

/// Who waited, and for whom.
#[derive(Debug, Clone, Default)]
pub(super) struct Skew {
    /// By aligned step and rank: waiting, ns.
    pub(super) waited: Vec<Vec<u64>>,
    /// By aligned step: who was last, where somebody was.
    pub(super) last: Vec<Option<usize>>,
    /// Sums to all waiting of steps that had a last rank.
    pub(super) moves: Vec<Move>,
}

/// Finds waiting in the regimes of a job. Blocks do not cross regimes.
pub(super) fn skew(steps: &[AlignedStep<'_>], regimes: &[Range<usize>]) -> Skew {
    let mut skew = Skew {
        waited: Vec::with_capacity(steps.len()),
        ..Skew::default()
    };
    for regime in regimes {
        for at in regime.clone().step_by(BLOCK) {
            let block = &steps[at..(at + BLOCK).min(regime.end)];
            let waited = waiting(block);
            let last: Vec<_> = block
                .iter()
                .zip(&waited)
                .map(|(step, waited)| last_rank(step, waited))
                .collect();
            skew.moves.extend(moves(block, &waited, &last, at));
            skew.waited.extend(waited);
            skew.last.extend(last);
        }
    }
    skew
}

/// By step of the block and rank: waiting, ns. Nobody waits where fewer than two ranks were seen.
fn waiting(block: &[AlignedStep<'_>]) -> Vec<Vec<u64>> {
    let ranks = block.first().map_or(0, |step| step.cells.len());
    let compute = block_compute(block, ranks);
    let mut waited: Vec<Vec<u64>> = block.iter().map(|step| step_waiting(step, &compute)).collect();
    // No rank waited longer than it communicated: what the averages say beyond that is not there to be moved.
    for rank in 0..ranks {
        let comm: i64 = block
            .iter()
            .filter_map(|step| step.cells[rank].as_ref())
            .map(|cell| cell.class_ns(Class::Comm))
            .sum();
        let own: Vec<u64> = waited.iter().map(|step| step[rank]).collect();
        let comm = u64::try_from(comm).unwrap_or(0);
        if own.iter().sum::<u64>() > comm {
            for (step, ns) in waited.iter_mut().zip(apportion(comm, &own)) {
                step[rank] = ns;
            }
        }
    }
    waited
}

/// Mean compute of each rank over the block, steps alone, ns.
fn block_compute(block: &[AlignedStep<'_>], ranks: usize) -> Vec<i64> {
    (0..ranks)
        .map(|rank| {
            let cells = || block.iter().filter_map(|step| step.cells[rank].as_ref());
            let sum: i64 = cells()
                .map(|cell| cell.step.budget.class_ns(Class::Compute))
                .sum();
            sum / i64::try_from(cells().count().max(1)).unwrap_or(1)
        })
        .collect()
}

fn step_waiting(step: &AlignedStep<'_>, compute: &[i64]) -> Vec<u64> {
    let exact = step
        .cells
        .iter()
        .flatten()
        .any(|cell| cell.step.budget.is_measured(Leaf::CommSkew));
    if exact {
        let skew =
            |cell: &super::align::Cell<'_>| u64::try_from(cell.leaves[Leaf::CommSkew.index()]).unwrap_or(0);
        return step
            .cells
            .iter()
            .map(|cell| cell.as_ref().map_or(0, skew))
            .collect();
    }
    let none = vec![0; step.cells.len()];
    if step.present() < 2 {
        return none;
    }
    let comm: Vec<Option<u64>> = step
        .cells
        .iter()
        .zip(compute)
        .map(|(cell, compute)| {
            let cell = cell.as_ref()?;
            let other = cell.class_ns(Class::Idle) + cell.class_ns(Class::Memory) + compute;
            Some(u64::try_from(signed(cell.window_ns) - other).unwrap_or(0))
        })
        .collect();
    let least = comm.iter().flatten().min().copied().unwrap_or(0);
    let waited: Vec<u64> = comm
        .iter()
        .map(|comm| comm.map_or(0, |comm| comm - least))
        .collect();
    let most = waited.iter().max().copied().unwrap_or(0);
    let longest = step
        .cells
        .iter()
        .flatten()
        .map(|cell| cell.window_ns)
        .max()
        .unwrap_or(0);
    if u128::from(most) * 1_000_000 < u128::from(longest) * MARGIN_PPM {
        none
    } else {
        waited
    }
}

/// The rank that waited least, where somebody waited. Of one rank alone nobody knows for whom it waited.
fn last_rank(step: &AlignedStep<'_>, waited: &[u64]) -> Option<usize> {
    if step.present() < 2 || waited.iter().all(|ns| *ns == 0) {
        return None;
    }
    (0..waited.len())
        .filter(|rank| step.cells[*rank].is_some())
        .min_by_key(|rank| waited[*rank])
}

/// Moves a block's waiting to the last ranks of its steps.
fn moves(block: &[AlignedStep<'_>], waited: &[Vec<u64>], last: &[Option<usize>], at: usize) -> Vec<Move> {
    let ranks = block.first().map_or(0, |step| step.cells.len());
    let mut moves = Vec::new();
    for culprit in 0..ranks {
        let late: Vec<usize> = (0..block.len())
            .filter(|step| last[*step] == Some(culprit))
            .collect();
        let ns: u64 = late.iter().map(|step| waited[*step].iter().sum::<u64>()).sum();
        if ns == 0 {
            continue;
        }
        let excess = excess(block, &late, culprit);
        let parts = apportion(ns, &excess);
        if excess.iter().all(|excess| *excess == 0) {
            moves.push(Move {
                at,
                culprit,
                leaf: Leaf::IdleUnknown,
                ns,
            });
        }
        moves.extend(
            Leaf::ALL
                .iter()
                .zip(parts)
                .filter(|(_, ns)| *ns > 0)
                .map(|(leaf, ns)| Move {
                    at,
                    culprit,
                    leaf: *leaf,
                    ns,
                }),
        );
    }
    moves
}

/// By leaf: how much longer the culprit took than the median of the others, communication left out, ns.
fn excess(block: &[AlignedStep<'_>], late: &[usize], culprit: usize) -> Vec<u64> {
    let mut sums: ByLeaf = [0; Leaf::COUNT];
    for step in late.iter().map(|at| &block[*at]) {
        let Some(own) = &step.cells[culprit] else { continue };
        for leaf in Leaf::ALL
            .iter()
            .filter(|leaf| matches!(leaf.class(), Class::Idle | Class::Memory))
        {
            let others = others(step, culprit)
                .map(|cell| cell.leaves[leaf.index()])
                .collect();
            sums[leaf.index()] += own.leaves[leaf.index()] - median(others);
        }
    }
    let compute = block_compute(block, block.first().map_or(0, |step| step.cells.len()));
    let rest = compute
        .iter()
        .enumerate()
        .filter(|(rank, _)| *rank != culprit)
        .map(|(_, ns)| *ns)
        .collect();
    let slower = (compute[culprit] - median(rest)) * i64::try_from(late.len()).unwrap_or(1);
    for (leaf, part) in slower_compute(block, culprit) {
        sums[leaf.index()] = slower / 1000 * part;
    }
    sums.iter().map(|ns| u64::try_from(*ns).unwrap_or(0)).collect()
}

fn others<'a, 'b>(
    step: &'b AlignedStep<'a>,
    culprit: usize,
) -> impl Iterator<Item = &'b super::align::Cell<'a>> {
    step.cells
        .iter()
        .enumerate()
        .filter(move |(rank, _)| *rank != culprit)
        .filter_map(|(_, cell)| cell.as_ref())
}

/// What slower compute is put down to, in thousandths: device facts name it, else it is the kernels'.
fn slower_compute(block: &[AlignedStep<'_>], culprit: usize) -> Vec<(Leaf, i64)> {
    let clock = |cell: &super::align::Cell<'_>| {
        cell.step
            .signals
            .clock
            .value()
            .map(|clock| u64::from(clock.sm_mhz))
            .filter(|mhz| *mhz > 0)
    };
    let own = || block.iter().filter_map(|step| step.cells[culprit].as_ref());
    let own_mhz = median(own().filter_map(clock).collect());
    let other_mhz = median(
        block
            .iter()
            .flat_map(|step| others(step, culprit))
            .filter_map(clock)
            .collect(),
    );
    let slow = own_mhz > 0 && own_mhz * 100 < other_mhz * (100 - SLOWER_CLOCK_PERCENT);
    let foreign_ppm = median(
        own()
            .map(|cell| {
                cell.step
                    .signals
                    .foreign
                    .value()
                    .map_or(0, |foreign| foreign.sm_ppm * foreign.processes.min(1))
            })
            .collect(),
    );
    let shared = foreign_ppm >= FOREIGN_PPM;
    match (slow, shared) {
        (true, false) => vec![(Leaf::ComputeClock, 1000)],
        (false, true) => vec![(Leaf::ComputeContention, 1000)],
        (true, true) => {
            // Time lost to a clock at the fraction f of normal is 1/f - 1; to a share s taken by others, 1/(1-s) - 1.
            let by_clock = (other_mhz - own_mhz) * 1_000_000 / own_mhz.max(1);
            let taken = u64::from(foreign_ppm.min(900_000));
            let by_others = taken * 1_000_000 / (1_000_000 - taken);
            let clock = signed(by_clock * 1000 / (by_clock + by_others).max(1));
            vec![
                (Leaf::ComputeClock, clock),
                (Leaf::ComputeContention, 1000 - clock),
            ]
        }
        (false, false) => vec![(Leaf::ComputeKernel, 1000)],
    }
}
