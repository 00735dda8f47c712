//! One clock for ranks of different nodes, from the ends of their collectives.
//!
//! A collective ends on all its ranks within microseconds: the last bytes reach all of them. Ranks of one node whose
//! ends agree share a clock. Every other rank gets a line (offset and drift) that maps its clock to that of the ranks
//! aligned before it, through the largest communicator that joins them often enough to show a drift: a node without a
//! world-wide collective is reached through a smaller one. What the line leaves over is the error; waiting shorter than
//! it is nobody's.

use super::meetings::Members;
use crate::budget::arith::median;

/// Ends that agree this closely were taken on one clock; those that no line brings this close are not aligned, ns.
const ONE_CLOCK_NS: u64 = 50_000;
/// A drift is looked for in at least so many collectives.
const LEAST_FOR_DRIFT: usize = 4;
/// Parts in which a drift is expressed.
const PPB: i128 = 1_000_000_000;

/// How one rank's clock maps to the common one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line {
    /// Own clock minus the common clock at `at_ns`, ns.
    offset_ns: i64,
    /// How much faster the own clock runs, parts per billion.
    drift_ppb: i64,
    /// Where on the own clock the offset holds, ns.
    at_ns: u64,
    /// Ranks of one clock have one number.
    clock: usize,
    /// Error of the line, ns; 0 for the reference.
    error_ns: u64,
}

impl Line {
    const fn reference(clock: usize) -> Self {
        Self {
            offset_ns: 0,
            drift_ppb: 0,
            at_ns: 0,
            clock,
            error_ns: 0,
        }
    }

    /// Own clock minus the common clock at a time of the own clock, ns.
    fn offset(&self, own_ns: u64) -> i64 {
        let since = i128::from(own_ns) - i128::from(self.at_ns);
        let drifted = since * i128::from(self.drift_ppb) / PPB;
        i64::try_from(i128::from(self.offset_ns) + drifted).unwrap_or(self.offset_ns)
    }

    fn common(&self, own_ns: u64) -> u64 {
        shifted(own_ns, self.offset(own_ns).saturating_neg())
    }
}

/// The ranks' clocks.
#[derive(Debug, Clone, Default)]
pub(super) struct Clocks {
    /// By rank; `None` where no line fits.
    lines: Vec<Option<Line>>,
}

impl Clocks {
    /// Aligns the ranks, by position, through the channels whose collectives are matched. `nodes` names each rank's
    /// node.
    pub(super) fn of(channels: &[&Members<'_>], nodes: &[&str]) -> Self {
        let mut order: Vec<&Members<'_>> = channels
            .iter()
            .copied()
            .filter(|members| members.len() > 1)
            .collect();
        // Stable: of equal channels the first.
        order.sort_by_key(|members| {
            let count = collectives(members);
            core::cmp::Reverse((count >= LEAST_FOR_DRIFT, members.len(), count))
        });
        let mut aligning = Aligning {
            lines: vec![None; nodes.len()],
            tried: vec![false; nodes.len()],
            clocks: 0,
            nodes,
        };
        while let Some(members) = aligning.next(&order) {
            aligning.align(members);
        }
        // Ranks that share no collective with any other need no alignment.
        for at in 0..nodes.len() {
            if !aligning.tried[at] {
                aligning.refer(at);
            }
        }
        Self {
            lines: aligning.lines,
        }
    }

    /// A rank's time on the common clock. Only of ranks that are aligned.
    pub(super) fn common(&self, rank: usize, own_ns: u64) -> u64 {
        self.lines[rank].map_or(own_ns, |line| line.common(own_ns))
    }

    /// A time of the common clock on a rank's own.
    pub(super) fn own(&self, rank: usize, common_ns: u64) -> u64 {
        let Some(line) = self.lines[rank] else {
            return common_ns;
        };
        // The offset changes by less than a ten-thousandth of the way it is off by: the second guess is exact to
        // the ns for offsets of minutes.
        let near = shifted(common_ns, line.offset(common_ns));
        let nearer = shifted(common_ns, line.offset(near));
        shifted(common_ns, line.offset(nearer))
    }

    /// Whether all ranks have a clock that can be compared.
    pub(super) fn are_aligned(&self, ranks: impl IntoIterator<Item = usize>) -> bool {
        ranks.into_iter().all(|rank| self.lines[rank].is_some())
    }

    /// By how much times of these ranks may be off against each other, ns; 0 on one clock.
    pub(super) fn error_ns(&self, ranks: impl IntoIterator<Item = usize>) -> u64 {
        let lines: Vec<Line> = ranks.into_iter().filter_map(|rank| self.lines[rank]).collect();
        let one = lines.windows(2).all(|pair| pair[0].clock == pair[1].clock);
        let most = lines.iter().map(|line| line.error_ns).max().unwrap_or(0);
        if one { 0 } else { most }
    }

    /// Number of clocks that were brought to another's time.
    pub(super) fn moved(&self) -> usize {
        let mut clocks: Vec<usize> = self
            .lines
            .iter()
            .flatten()
            .filter(|line| line.error_ns > 0)
            .map(|line| line.clock)
            .collect();
        clocks.sort_unstable();
        clocks.dedup();
        clocks.len()
    }
}

struct Aligning<'a> {
    lines: Vec<Option<Line>>,
    /// Ranks whose line was looked for, found or not.
    tried: Vec<bool>,
    clocks: usize,
    nodes: &'a [&'a str],
}

impl Aligning<'_> {
    /// The channel to go on with: the largest that joins aligned ranks with others; without one, the largest of
    /// which no rank is aligned yet.
    fn next<'m, 'r>(&self, order: &[&'m Members<'r>]) -> Option<&'m Members<'r>> {
        let fresh = |members: &&&Members<'_>| members.keys().any(|rank| !self.tried[*rank]);
        let joined = |members: &&&Members<'_>| members.keys().any(|rank| self.lines[*rank].is_some());
        let mut open = order.iter().filter(fresh);
        open.clone().find(joined).or_else(|| open.next()).copied()
    }

    fn refer(&mut self, rank: usize) {
        self.lines[rank] = Some(Line::reference(self.clocks));
        self.tried[rank] = true;
        self.clocks += 1;
    }

    fn align(&mut self, members: &Members<'_>) {
        if !members.keys().any(|rank| self.lines[*rank].is_some()) {
            let first = members.keys().find(|rank| !self.tried[**rank]);
            if let Some(first) = first {
                self.refer(*first);
            }
        }
        let known = self.ends(members);
        let fresh: Vec<usize> = members
            .keys()
            .copied()
            .filter(|rank| !self.tried[*rank])
            .collect();
        for rank in fresh {
            let own = members[&rank].iter().map(|record| record.window.end_ns());
            let pairs: Vec<(u64, u64)> = own.zip(known.iter().copied()).collect();
            self.lines[rank] = self.shared(rank, &pairs).or_else(|| self.fitted(&pairs));
            self.tried[rank] = true;
        }
    }

    /// By collective: its end on the common clock, the middle one of the aligned ranks'.
    fn ends(&self, members: &Members<'_>) -> Vec<u64> {
        let aligned: Vec<(Line, &Vec<&crate::activity::Record>)> = members
            .iter()
            .filter_map(|(rank, sequence)| Some((self.lines[*rank]?, sequence)))
            .collect();
        (0..collectives(members))
            .map(|at| {
                let ends = aligned
                    .iter()
                    .map(|(line, sequence)| line.common(sequence[at].window.end_ns()));
                median(ends.collect())
            })
            .collect()
    }

    /// The line of a rank on the same node, if the ends agree by it.
    fn shared(&self, rank: usize, pairs: &[(u64, u64)]) -> Option<Line> {
        let mut lines: Vec<Line> = Vec::new();
        for (line, node) in self.lines.iter().zip(self.nodes) {
            if let Some(line) = line.filter(|line| *node == self.nodes[rank] && !lines.contains(line)) {
                lines.push(line);
            }
        }
        lines.into_iter().find(|line| {
            let (typical, _) = errors(line, pairs);
            typical <= ONE_CLOCK_NS
        })
    }

    fn fitted(&mut self, pairs: &[(u64, u64)]) -> Option<Line> {
        let line = fit(pairs, self.clocks)?;
        self.clocks += 1;
        Some(line)
    }
}

/// The line that brings own ends to the common ones; `None` when none brings them near enough.
fn fit(pairs: &[(u64, u64)], clock: usize) -> Option<Line> {
    let apart = |(own, common): &(u64, u64)| own.wrapping_sub(*common).cast_signed();
    let (at_ns, _) = *pairs.get(pairs.len() / 2)?;
    let level = Line {
        offset_ns: median(pairs.iter().map(apart).collect()),
        at_ns,
        ..Line::reference(clock)
    };
    let sloped = drift_ppb(pairs).map(|drift_ppb| {
        let flat = Line {
            drift_ppb,
            offset_ns: 0,
            ..level
        };
        let left = pairs
            .iter()
            .map(|pair| apart(pair).saturating_sub(flat.offset(pair.0)));
        Line {
            offset_ns: median(left.collect()),
            ..flat
        }
    });
    // A drift that explains nothing is noise.
    let better = |line: &Line| errors(line, pairs).1 * 2 < errors(&level, pairs).1;
    let line = sloped.filter(better).unwrap_or(level);
    let (typical, most) = errors(&line, pairs);
    (typical <= ONE_CLOCK_NS).then_some(Line {
        error_ns: most.max(1),
        ..line
    })
}

/// The middle of the drifts between collectives half a trace apart: single late ends do not move it.
fn drift_ppb(pairs: &[(u64, u64)]) -> Option<i64> {
    if pairs.len() < LEAST_FOR_DRIFT {
        return None;
    }
    let half = pairs.len() / 2;
    let drifts: Vec<i64> = pairs
        .iter()
        .zip(&pairs[half..])
        .filter_map(|((own, common), (own_later, common_later))| {
            let (own, common) = (own_later.checked_sub(*own)?, common_later.checked_sub(*common)?);
            let gained = i128::from(own) - i128::from(common);
            i64::try_from((gained * PPB).checked_div(i128::from(own))?).ok()
        })
        .collect();
    (!drifts.is_empty()).then(|| median(drifts))
}

/// How far a line leaves ends apart: the middle one, and the one that nine of ten lie below, ns.
fn errors(line: &Line, pairs: &[(u64, u64)]) -> (u64, u64) {
    let mut errors: Vec<u64> = pairs
        .iter()
        .map(|(own, common)| line.common(*own).abs_diff(*common))
        .collect();
    errors.sort_unstable();
    let at = |tenths: usize| errors.get(errors.len() * tenths / 10).copied().unwrap_or(0);
    (at(5), at(9))
}

fn collectives(members: &Members<'_>) -> usize {
    members.values().map(Vec::len).min().unwrap_or(0)
}

const fn shifted(at_ns: u64, by_ns: i64) -> u64 {
    at_ns.saturating_add_signed(by_ns)
}
