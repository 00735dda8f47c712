//! Exposed communication that was waiting for the last rank, moved to that rank and what kept it.
//!
//! Everyone in a synchronous step has the same length of step, so the rank with the least exposed communication
//! arrived last and the others' excess over it was waiting. The host's part of a rank's time is exact in every step;
//! compute comes from device averages that blur over edges, so it is averaged over a block of steps first.
//!
//! Ranks that arrive about as late as the last one share the blame in proportion to their lateness: of a pipeline
//! stage with more work, or a node without a CPU, chance alone decides which rank is the very last.
//!
//! A rank that stands idle for no reason seen may wait for another by a call that is not seen. It does where a rank
//! that was busy instead waited no longer than it: nobody held that one up, so that one held the others.

use core::ops::Range;

use super::align::{AlignedStep, ByLeaf};
use crate::budget::arith::{apportion, median, mul_div, signed};
use crate::facts::StepMethod;
use crate::leaf::{Class, Leaf};

/// Steps in a block.
const BLOCK: usize = 10;
/// Windows of fixed length in a block: together they hold several steps of most jobs.
const FIXED_BLOCK: usize = 60;
/// Who waited for less than this share of what the first rank waited for was late too, percent.
const LATE_PERCENT: u64 = 35;
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
    /// By aligned step: who was late, with weights; empty where nobody was.
    pub(super) late: Vec<Vec<Late>>,
    /// Sums to all waiting of steps that had a last rank.
    pub(super) moves: Vec<Move>,
}

/// A rank that others waited for in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Late {
    /// Its position.
    pub(super) rank: usize,
    /// How much later than the first rank it arrived, ns.
    by_ns: u64,
}

/// Finds waiting in the regimes of a job. Blocks do not cross regimes.
pub(super) fn skew(steps: &[AlignedStep<'_>], regimes: &[Range<usize>]) -> Skew {
    let ranks = steps.first().map_or(0, |step| step.cells.len());
    let mut skew = Skew {
        // Steps before the first regime have neither.
        waited: vec![vec![0; ranks]; steps.len()],
        late: vec![Vec::new(); steps.len()],
        moves: Vec::new(),
    };
    for regime in regimes {
        for range in blocks(steps, regime) {
            let at = range.start;
            let block = &steps[range];
            let waited = waiting(block);
            let unexplained = unexplained(block);
            let late: Vec<_> = block
                .iter()
                .zip(waited.iter().zip(&unexplained))
                .map(|(step, (waited, unexplained))| late_ranks(step, waited, unexplained))
                .collect();
            skew.moves.extend(moves(block, &waited, &late, at));
            skew.waited.splice(at..at + block.len(), waited);
            skew.late.splice(at..at + block.len(), late);
        }
    }
    skew
}

/// The blocks of a regime. Windows of fixed length and steps do not share one.
fn blocks(steps: &[AlignedStep<'_>], regime: &Range<usize>) -> Vec<Range<usize>> {
    let mut blocks = Vec::new();
    let mut at = regime.start;
    while at < regime.end {
        let fixed = is_fixed(&steps[at]);
        let most = if fixed { FIXED_BLOCK } else { BLOCK };
        let until = regime.end.min(at + most);
        let end = (at..until)
            .find(|at| is_fixed(&steps[*at]) != fixed)
            .unwrap_or(until);
        blocks.push(at..end);
        at = end;
    }
    blocks
}

/// Whether the edges are not those of a step.
pub(super) fn is_fixed(step: &AlignedStep<'_>) -> bool {
    let mut cells = step.cells.iter().flatten();
    cells.any(|cell| cell.step.method == StepMethod::FixedWindow)
}

/// By step of the block and rank: waiting, ns. Nobody waits where fewer than two ranks were seen.
fn waiting(block: &[AlignedStep<'_>]) -> Vec<Vec<u64>> {
    let ranks = block.first().map_or(0, |step| step.cells.len());
    let mut compute = block_compute(block, ranks);
    for (compute, unseen) in compute.iter_mut().zip(unseen_idle(block, ranks)) {
        *compute = compute.saturating_add(unseen);
    }
    let mut waited: Vec<Vec<u64>> = if block.first().is_some_and(is_fixed) && !block.iter().any(is_exact) {
        window_waiting(block, &compute)
    } else {
        block.iter().map(|step| step_waiting(step, &compute)).collect()
    };
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

/// Idle time of each rank that its device average cannot show, because another process keeps the device busy: what its
/// peers have beyond it, ns per step. It looked like communication, which holds as few SMs.
fn unseen_idle(block: &[AlignedStep<'_>], ranks: usize) -> Vec<i64> {
    let mean = |rank: usize| {
        let cells = || block.iter().filter_map(|step| step.cells[rank].as_ref());
        let shared = cells().any(|cell| {
            let foreign = cell.step.signals.foreign.value();
            foreign.is_some_and(|load| load.processes > 0 && load.sm_ppm >= FOREIGN_PPM)
        });
        let sum: i64 = cells()
            .map(|cell| cell.class_ns(Class::Idle) + cell.class_ns(Class::Memory))
            .sum();
        (shared, sum / i64::try_from(cells().count().max(1)).unwrap_or(1))
    };
    let means: Vec<(bool, i64)> = (0..ranks).map(mean).collect();
    let alone: Vec<i64> = means
        .iter()
        .filter(|(shared, _)| !shared)
        .map(|(_, ns)| *ns)
        .collect();
    let normal = median(alone);
    means
        .iter()
        .map(|(shared, ns)| if *shared { (normal - ns).max(0) } else { 0 })
        .collect()
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

/// Waiting where edges of steps are not known. Windows cut steps in the middle: who communicates least in one of them
/// is only at another point of the step, and a pipeline's ranks take turns. Over a block of windows it is who arrives
/// last. The waiting is spread evenly: in which window it was is not known.
fn window_waiting(block: &[AlignedStep<'_>], compute: &[i64]) -> Vec<Vec<u64>> {
    let mut waited = vec![vec![0; compute.len()]; block.len()];
    let mean = |rank: usize| {
        let cells = || block.iter().filter_map(|step| step.cells[rank].as_ref());
        let sum: u64 = cells().map(|cell| communicated(cell, compute[rank])).sum();
        let window_ns: u64 = cells().map(|cell| cell.window_ns).sum();
        let count = cells().count() as u64;
        (count > 0).then(|| (sum / count, window_ns / count))
    };
    let means: Vec<Option<(u64, u64)>> = (0..compute.len()).map(mean).collect();
    let known = || means.iter().flatten();
    let least = known().map(|(comm, _)| *comm).min().unwrap_or(0);
    let most = known().map(|(comm, _)| comm - least).max().unwrap_or(0);
    let longest = known().map(|(_, window_ns)| *window_ns).max().unwrap_or(0);
    if known().count() < 2 || is_chance(most, longest) {
        return waited;
    }
    for (step, waited) in block.iter().zip(&mut waited) {
        for (rank, mean) in means.iter().enumerate() {
            if let (Some((comm, _)), Some(_)) = (mean, &step.cells[rank]) {
                waited[rank] = comm - least;
            }
        }
    }
    waited
}

/// What is left of a cell's window when idle time, copies and compute are taken off, ns.
fn communicated(cell: &super::align::Cell<'_>, compute: i64) -> u64 {
    let other = cell.class_ns(Class::Idle) + cell.class_ns(Class::Memory) + compute;
    u64::try_from(signed(cell.window_ns) - other).unwrap_or(0)
}

/// Whether waiting this long may be chance in a step that long.
fn is_chance(waited_ns: u64, step_ns: u64) -> bool {
    u128::from(waited_ns) * 1_000_000 < u128::from(step_ns) * MARGIN_PPM
}

/// Whether its waiting was measured.
fn is_exact(step: &AlignedStep<'_>) -> bool {
    let mut cells = step.cells.iter().flatten();
    cells.any(|cell| cell.step.budget.is_measured(Leaf::CommSkew))
}

fn step_waiting(step: &AlignedStep<'_>, compute: &[i64]) -> Vec<u64> {
    if is_exact(step) {
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
        .map(|(cell, compute)| Some(communicated(cell.as_ref()?, *compute)))
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
    if is_chance(most, longest) { none } else { waited }
}

/// By step of the block and rank: idle time for no reason seen, ns. Where edges of steps are not known its mean over the
/// block, as of waiting.
fn unexplained(block: &[AlignedStep<'_>]) -> Vec<Vec<u64>> {
    let idle = |cell: &super::align::Cell<'_>| {
        let ns = cell.leaves[Leaf::IdleUnknown.index()];
        u64::try_from(ns).unwrap_or(0)
    };
    if !block.first().is_some_and(is_fixed) {
        let step = |step: &AlignedStep<'_>| {
            let cells = step.cells.iter();
            cells.map(|cell| cell.as_ref().map_or(0, idle)).collect()
        };
        return block.iter().map(step).collect();
    }
    let ranks = block.first().map_or(0, |step| step.cells.len());
    let mean = |rank: usize| {
        let cells = || block.iter().filter_map(|step| step.cells[rank].as_ref());
        cells().map(idle).sum::<u64>() / cells().count().max(1) as u64
    };
    vec![(0..ranks).map(mean).collect(); block.len()]
}

/// The ranks that waited least, where somebody waited. Of one rank alone nobody knows for whom it waited.
fn late_ranks(step: &AlignedStep<'_>, waited: &[u64], unexplained: &[u64]) -> Vec<Late> {
    let most = waited.iter().max().copied().unwrap_or(0);
    if step.present() < 2 || most == 0 {
        return Vec::new();
    }
    let few_ns = mul_div(most, LATE_PERCENT, 100);
    let present = || (0..waited.len()).filter(|rank| step.cells[*rank].is_some());
    let least = present().map(|rank| waited[rank]).min().unwrap_or(0);
    let last: Vec<usize> = present()
        .filter(|rank| waited[*rank] == least || waited[*rank] < few_ns)
        .collect();
    let cells = step.cells.iter().flatten();
    let step_ns = cells.map(|cell| cell.window_ns).max().unwrap_or(0);
    // What of a rank's idle time is waiting by a call that is not seen: what it has beyond a rank that waited no longer.
    let held_ns = |rank: usize| {
        let others = last.iter().filter(|other| {
            let longer = waited[**other].saturating_sub(waited[rank]);
            longer == 0 || is_chance(longer, step_ns)
        });
        let busiest = others.map(|other| unexplained[*other]).min();
        unexplained[rank].saturating_sub(busiest.unwrap_or(u64::MAX))
    };
    last.iter()
        .map(|rank| (*rank, waited[*rank].saturating_add(held_ns(*rank))))
        .filter(|(_, slack_ns)| *slack_ns == least || *slack_ns < few_ns)
        .map(|(rank, slack_ns)| Late {
            rank,
            by_ns: most.saturating_sub(slack_ns).max(1),
        })
        .collect()
}

/// Each late rank's part of a step's waiting; the parts sum to it.
fn shares(late: &[Late], waited: &[u64]) -> Vec<u64> {
    let weights: Vec<u64> = late.iter().map(|late| late.by_ns).collect();
    let total = waited.iter().fold(0, |sum: u64, ns| sum.saturating_add(*ns));
    apportion(total, &weights)
}

/// Moves a block's waiting to the late ranks of its steps.
fn moves(block: &[AlignedStep<'_>], waited: &[Vec<u64>], late: &[Vec<Late>], at: usize) -> Vec<Move> {
    let ranks = block.first().map_or(0, |step| step.cells.len());
    let parts: Vec<Vec<u64>> = late
        .iter()
        .zip(waited)
        .map(|(late, waited)| shares(late, waited))
        .collect();
    let mut moves = Vec::new();
    for culprit in 0..ranks {
        let part = |step: usize| {
            let at = late[step].iter().position(|late| late.rank == culprit)?;
            Some((step, parts[step][at]))
        };
        let own: Vec<(usize, u64)> = (0..block.len()).filter_map(part).collect();
        let ns: u64 = own.iter().map(|(_, ns)| ns).sum();
        let late: Vec<usize> = own.into_iter().map(|(step, _)| step).collect();
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
