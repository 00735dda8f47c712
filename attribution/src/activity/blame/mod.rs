//! Waiting moved through communicators to what kept the rank at the end of the chain.
//!
//! A rank that waits in a collective waits for the last one to arrive. From that arrival the time is gone through
//! backwards: as long as the late rank did anything but wait, it is blamed for it; where it was released from a wait of
//! its own in another communicator (for its tensor-parallel peer, the pipeline stage before, another replica), the way
//! goes on at the rank that it waited for, and does not come back. What the late rank did before that wait was not
//! what held it: with that done sooner it would have waited longer. So every nanosecond is moved once, to what was on
//! the critical path at that time.
//!
//! That path tells *who*. What a late rank did last is seldom what made it late: after a pause at the begin of the step
//! it still computes at the end of it, as everybody did before. So *what* is told by what the rank spent more time on
//! than the others since they all met before. A circle of ranks that wait for each other at one instant has no such path: what is
//! left then belongs to nobody and keeps the names of the circle.

mod culprit;

use std::collections::BTreeMap;

use super::Label;
use crate::budget::arith::apportion;
use crate::leaf::Leaf;
use crate::time::Window;

pub(super) use culprit::{Culprit, Groups, Kind, culprit};

/// A rank waited in a collective for its last rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wait {
    /// From its own start to that of the last rank, on its own clock.
    pub(super) window: Window,
    /// The collective, by its position in [`Waits`].
    pub(super) meeting: usize,
    /// The last rank's clock minus the own one, ns.
    pub(super) shift_ns: i64,
}

/// A collective.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Meeting {
    /// Position of the rank that came last.
    pub(super) last: usize,
    /// When it came, on its own clock, ns.
    pub(super) arrived_ns: u64,
    /// The job's step it was in; `None` outside of steps.
    pub(super) step: Option<u32>,
    /// By rank that took part: from the end of the meeting before on the same channel to its own arrival, on its own
    /// clock.
    pub(super) since: Vec<(usize, Window)>,
}

/// All waiting of a job.
#[derive(Debug, Clone, Default)]
pub(super) struct Waits {
    meetings: Vec<Meeting>,
    /// By rank, by start.
    by_rank: Vec<Vec<Wait>>,
    /// By rank and wait: the latest end up to that wait.
    reach: Vec<Vec<u64>>,
}

/// Where waiting was moved to, ns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Moved {
    /// By rank that was late, what it did, and step.
    pub(super) to: BTreeMap<(usize, Leaf, Option<u32>), u64>,
    /// Ranks that wait in a circle, or the ends of a chain that is too long, by position; with the waiting.
    pub(super) circles: BTreeMap<Vec<usize>, u64>,
}

/// Where the critical path is.
#[derive(Debug, Clone, Copy)]
struct Here {
    rank: usize,
    /// On the rank's clock, ns: what lies before it is still to be explained.
    until_ns: u64,
    /// The rank's clock minus that of the rank the path began at, ns.
    shift_ns: i64,
}

impl Waits {
    /// The waits of all ranks, in any order within a rank.
    pub(super) fn new(meetings: Vec<Meeting>, mut by_rank: Vec<Vec<Wait>>) -> Self {
        for waits in &mut by_rank {
            waits.sort_by_key(|wait| (wait.window, wait.meeting));
        }
        let reach = by_rank
            .iter()
            .map(|waits| {
                let ends = waits.iter().scan(0, |latest: &mut u64, wait| {
                    *latest = (*latest).max(wait.window.end_ns());
                    Some(*latest)
                });
                ends.collect()
            })
            .collect();
        Self {
            meetings,
            by_rank,
            reach,
        }
    }

    /// Times a rank waited.
    pub(super) fn windows(&self, rank: usize) -> Vec<Window> {
        self.by_rank[rank].iter().map(|wait| wait.window).collect()
    }

    /// All waiting, moved; sums to it exactly. `labels` are what each rank did: disjoint, in order.
    pub(super) fn moved(&self, labels: &[Vec<Label>]) -> Moved {
        let mut moved = Moved::default();
        let mut more = vec![None; self.meetings.len()];
        for (at, victims) in self.victims().into_iter().enumerate() {
            let meeting = &self.meetings[at];
            let waiting = Stacked::new(&victims);
            let Some(until_ns) = waiting.end_ns() else {
                continue;
            };
            for stretch in self.follow(at, until_ns, &waiting, labels, &mut moved) {
                let through = &self.meetings[stretch.through];
                let more = more[stretch.through].get_or_insert_with(|| more_than_others(through, labels));
                stretch.give(more, meeting.step, &mut moved);
            }
        }
        moved
    }

    /// By meeting: the waits in it, on the clock of its last rank.
    fn victims(&self) -> Vec<Vec<Window>> {
        let mut victims = vec![Vec::new(); self.meetings.len()];
        for wait in self.by_rank.iter().flatten() {
            // A clock that would go below zero is pushed to where it does not: lengths are what must be kept.
            let start = wait.window.start_ns().saturating_add_signed(wait.shift_ns);
            let end = start.saturating_add(wait.window.len_ns());
            victims[wait.meeting].extend(Window::new(start, end));
        }
        victims
    }

    /// Goes back along the critical path from a meeting's last arrival, as far as anybody waited: the stretches of it.
    fn follow(
        &self,
        at: usize,
        until_ns: u64,
        waiting: &Stacked,
        labels: &[Vec<Label>],
        moved: &mut Moved,
    ) -> Vec<Stretch> {
        let meeting = &self.meetings[at];
        let mut stretches = vec![Stretch::new(meeting.last, at)];
        let mut here = Here {
            rank: meeting.last,
            until_ns,
            shift_ns: 0,
        };
        // Ranks the path went through without getting any further back.
        let mut standing = vec![here.rank];
        loop {
            let begin_ns = waiting.start_ns.saturating_add_signed(here.shift_ns);
            if here.until_ns <= begin_ns {
                return stretches;
            }
            let weight = |from_ns: u64| {
                let back = |at_ns: u64| at_ns.saturating_add_signed(here.shift_ns.saturating_neg());
                waiting.between(back(from_ns), back(here.until_ns))
            };
            let label = label_before(&labels[here.rank], here.until_ns);
            let (from_ns, leaf) = match label {
                Before::In(label) => (label.window.start_ns(), label.leaf),
                // Where a rank has no record nothing is known of it but that it was late.
                Before::Out(from_ns) => (from_ns, Leaf::IdleUnknown),
            };
            let held = (leaf == Leaf::CommSkew).then(|| self.holding(here, meeting.arrived_ns));
            let from_ns = from_ns.max(begin_ns);
            let Some(held) = held else {
                if let Some(stretch) = stretches.last_mut() {
                    stretch.ns[leaf.index()] += weight(from_ns);
                }
                here.until_ns = from_ns;
                standing = vec![here.rank];
                continue;
            };
            let next = held.map(|wait| (self.meetings[wait.meeting].last, wait));
            let Some((rank, wait)) = next.filter(|(rank, _)| !standing.contains(rank)) else {
                moved.circle(&standing, weight(begin_ns));
                return stretches;
            };
            let shift_ns = wait.shift_ns;
            stretches.push(Stretch::new(rank, wait.meeting));
            here = Here {
                rank,
                until_ns: here.until_ns.saturating_add_signed(shift_ns),
                shift_ns: here.shift_ns.saturating_add(shift_ns),
            };
            standing.push(rank);
        }
    }

    /// The wait that a rank was in just before. Of several at once the one counts that ended last before it arrived
    /// where it was late: what went on beyond that did not hold it.
    fn holding(&self, here: Here, arrived_ns: u64) -> Option<&Wait> {
        let arrived_ns = arrived_ns.saturating_add_signed(here.shift_ns);
        let (waits, reach) = (&self.by_rank[here.rank], &self.reach[here.rank]);
        let until = waits.partition_point(|wait| wait.window.start_ns() < here.until_ns);
        let from = reach[..until].partition_point(|end_ns| *end_ns < here.until_ns);
        let there = waits[from..until]
            .iter()
            .filter(|wait| wait.window.end_ns() >= here.until_ns);
        there.max_by_key(|wait| {
            let end_ns = wait.window.end_ns();
            (end_ns <= arrived_ns, end_ns, core::cmp::Reverse(wait.meeting))
        })
    }
}

/// Nanoseconds by leaf.
type ByLeaf = [u64; Leaf::COUNT];

/// A part of the critical path on one rank.
#[derive(Debug)]
struct Stretch {
    rank: usize,
    /// The meeting that the rank was late for.
    through: usize,
    /// What it did at these times, weighted by how many waited.
    ns: ByLeaf,
}

impl Stretch {
    const fn new(rank: usize, through: usize) -> Self {
        Self {
            rank,
            through,
            ns: [0; Leaf::COUNT],
        }
    }

    /// Gives its time to what the rank did more of than others; to what it did at these times where that is nothing.
    fn give(&self, more: &ByLeaf, step: Option<u32>, moved: &mut Moved) {
        let total = self.ns.iter().fold(0, |sum: u64, ns| sum.saturating_add(*ns));
        let weights = if more.iter().any(|ns| *ns > 0) {
            more
        } else {
            &self.ns
        };
        for (leaf, ns) in Leaf::ALL.iter().zip(apportion(total, weights)) {
            moved.add(self.rank, *leaf, step, ns);
        }
    }
}

/// By leaf: how much longer the last rank of a meeting was in it than the middle one of the others, since they met
/// before; waiting, and what only reshuffles within less than a tenth of the most, left out.
fn more_than_others(meeting: &Meeting, labels: &[Vec<Label>]) -> ByLeaf {
    let spent = |rank: usize, window: Window| {
        let own = &labels[rank];
        let from = own.partition_point(|label| label.window.end_ns() <= window.start_ns());
        let mut ns: ByLeaf = [0; Leaf::COUNT];
        for label in own[from..]
            .iter()
            .take_while(|label| label.window.start_ns() < window.end_ns())
        {
            ns[label.leaf.index()] += label.window.intersect(window).map_or(0, Window::len_ns);
        }
        ns
    };
    let mut own: ByLeaf = [0; Leaf::COUNT];
    let mut others: Vec<ByLeaf> = Vec::new();
    for (rank, window) in &meeting.since {
        if *rank == meeting.last {
            own = spent(*rank, *window);
        } else {
            others.push(spent(*rank, *window));
        }
    }
    for leaf in Leaf::ALL {
        let at = leaf.index();
        let mut usual: Vec<u64> = others.iter().map(|ns| ns[at]).collect();
        usual.sort_unstable();
        let usual = usual.get(usual.len() / 2).copied().unwrap_or(0);
        own[at] = if *leaf == Leaf::CommSkew {
            0
        } else {
            own[at].saturating_sub(usual)
        };
    }
    let most = own.iter().max().copied().unwrap_or(0);
    own.map(|ns| if ns >= most / 10 { ns } else { 0 })
}

/// What a rank did just before a time.
enum Before<'a> {
    In(&'a Label),
    /// Nothing that is known since then.
    Out(u64),
}

fn label_before(labels: &[Label], until_ns: u64) -> Before<'_> {
    let at = labels.partition_point(|label| label.window.start_ns() < until_ns);
    match at.checked_sub(1).map(|at| &labels[at]) {
        Some(label) if label.window.end_ns() >= until_ns => Before::In(label),
        Some(label) => Before::Out(label.window.end_ns()),
        None => Before::Out(0),
    }
}

impl Moved {
    fn add(&mut self, rank: usize, leaf: Leaf, step: Option<u32>, ns: u64) {
        if ns > 0 {
            *self.to.entry((rank, leaf, step)).or_default() += ns;
        }
    }

    fn circle(&mut self, ranks: &[usize], ns: u64) {
        if ns > 0 {
            let mut ranks = ranks.to_vec();
            ranks.sort_unstable();
            *self.circles.entry(ranks).or_default() += ns;
        }
    }
}

/// How many ranks wait at each time.
struct Stacked {
    start_ns: u64,
    /// Times at which the number changes, with the waiting summed up to there and the number from there on.
    steps: Vec<(u64, u64, u64)>,
}

impl Stacked {
    fn new(windows: &[Window]) -> Self {
        let mut edges: Vec<(u64, i64)> = Vec::with_capacity(windows.len() * 2);
        for window in windows.iter().filter(|window| !window.is_empty()) {
            edges.push((window.start_ns(), 1));
            edges.push((window.end_ns(), -1));
        }
        edges.sort_unstable();
        let (mut sum_ns, mut depth, mut from_ns) = (0_u64, 0_i64, 0_u64);
        let mut steps: Vec<(u64, u64, u64)> = Vec::with_capacity(edges.len());
        for (at_ns, change) in edges {
            let waiting = u64::try_from(depth).unwrap_or(0);
            sum_ns = sum_ns.saturating_add((at_ns - from_ns).saturating_mul(waiting));
            depth += change;
            from_ns = at_ns;
            let waiting = u64::try_from(depth).unwrap_or(0);
            match steps.last_mut() {
                Some(last) if last.0 == at_ns => last.2 = waiting,
                _ => steps.push((at_ns, sum_ns, waiting)),
            }
        }
        Self {
            start_ns: steps.first().map_or(0, |step| step.0),
            steps,
        }
    }

    fn end_ns(&self) -> Option<u64> {
        self.steps.last().map(|step| step.0)
    }

    /// Waiting between two times, over all that wait, ns.
    fn between(&self, from_ns: u64, to_ns: u64) -> u64 {
        let until = |at_ns: u64| {
            let at = self.steps.partition_point(|step| step.0 <= at_ns);
            let step = at.checked_sub(1).map(|at| self.steps[at]);
            step.map_or(0, |(begin_ns, sum_ns, waiting)| {
                sum_ns.saturating_add((at_ns - begin_ns).saturating_mul(waiting))
            })
        };
        until(to_ns).saturating_sub(until(from_ns))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn window(start: u64, end: u64) -> Window {
        Window::new(start, end).expect("a window")
    }

    fn wait(start: u64, end: u64, meeting: usize) -> Wait {
        Wait {
            window: window(start, end),
            meeting,
            shift_ns: 0,
        }
    }

    fn label(start: u64, end: u64, leaf: Leaf) -> Label {
        Label {
            window: window(start, end),
            leaf,
        }
    }

    const fn last(rank: usize, arrived_ns: u64) -> Meeting {
        Meeting {
            last: rank,
            arrived_ns,
            step: None,
            since: Vec::new(),
        }
    }

    fn total_ns(moved: &Moved) -> u64 {
        moved.to.values().chain(moved.circles.values()).sum()
    }

    #[test]
    fn what_a_rank_did_before_it_waited_itself_did_not_hold_it() {
        // Rank 0 waits for rank 1, which computed, waited for rank 2, and computed again.
        let waits = Waits::new(
            vec![last(1, 100), last(2, 80)],
            vec![vec![wait(0, 100, 0)], vec![wait(30, 80, 1)], Vec::new()],
        );
        let labels = [
            vec![label(0, 100, Leaf::CommSkew)],
            vec![
                label(0, 30, Leaf::ComputeKernel),
                label(30, 80, Leaf::CommSkew),
                label(80, 100, Leaf::ComputeKernel),
            ],
            vec![label(0, 80, Leaf::IdleDataCpu)],
        ];
        let moved = waits.moved(&labels);
        let expected = [
            ((1, Leaf::ComputeKernel, None), 20),
            ((2, Leaf::IdleDataCpu, None), 80 + 50),
        ];
        assert_eq!(moved.to, BTreeMap::from(expected));
        assert!(moved.circles.is_empty());
    }

    #[test]
    fn a_pause_made_a_rank_late_though_it_computed_at_last() {
        let since = [(0, window(0, 60)), (1, window(0, 100)), (2, window(0, 70))];
        let waits = Waits::new(
            vec![Meeting {
                since: since.to_vec(),
                ..last(1, 100)
            }],
            vec![vec![wait(60, 100, 0)], Vec::new(), vec![wait(70, 100, 0)]],
        );
        let labels = [
            vec![label(0, 60, Leaf::ComputeKernel), label(60, 100, Leaf::CommSkew)],
            vec![label(0, 40, Leaf::IdleGc), label(40, 100, Leaf::ComputeKernel)],
            vec![label(0, 70, Leaf::ComputeKernel), label(70, 100, Leaf::CommSkew)],
        ];
        let moved = waits.moved(&labels);
        assert_eq!(moved.to, BTreeMap::from([((1, Leaf::IdleGc, None), 40 + 30)]));
    }

    #[test]
    fn ranks_that_wait_for_each_other_are_named_and_nobody_is_blamed() {
        let waits = Waits::new(
            vec![last(1, 100), last(2, 100), last(0, 100)],
            vec![
                vec![wait(0, 100, 0)],
                vec![wait(20, 100, 1)],
                vec![wait(50, 100, 2)],
            ],
        );
        let labels = [0, 20, 50].map(|start| vec![label(start, 100, Leaf::CommSkew)]);
        let moved = waits.moved(&labels);
        assert!(moved.to.is_empty(), "{moved:?}");
        assert_eq!(moved.circles, BTreeMap::from([(vec![0, 1, 2], 100 + 80 + 50)]));
    }

    #[test]
    fn a_wait_that_goes_on_beyond_the_arrival_did_not_hold_the_rank() {
        // Rank 1 is late at 60. Until 50 it waited for rank 2; a wait for rank 3 on another stream goes on.
        let waits = Waits::new(
            vec![last(1, 60), last(2, 50), last(3, 90)],
            vec![
                vec![wait(0, 60, 0)],
                vec![wait(0, 50, 1), wait(0, 90, 2)],
                Vec::new(),
                Vec::new(),
            ],
        );
        let labels = [
            vec![label(0, 60, Leaf::CommSkew)],
            vec![
                label(0, 50, Leaf::CommSkew),
                label(50, 60, Leaf::ComputeKernel),
                label(60, 90, Leaf::CommSkew),
            ],
            vec![label(0, 50, Leaf::IdleGc)],
            vec![label(0, 90, Leaf::IdleCkpt)],
        ];
        let moved = waits.moved(&labels);
        assert_eq!(moved.to.get(&(2, Leaf::IdleGc, None)), Some(&(50 + 50)));
        assert_eq!(moved.to.get(&(1, Leaf::ComputeKernel, None)), Some(&10));
    }

    proptest! {
        #[test]
        fn every_nanosecond_is_moved_once(
            meetings in proptest::collection::vec((0_usize..4, 100_u64..1_000), 1..12),
            starts in proptest::collection::vec((0_usize..12, 0_usize..4, 0_u64..900), 0..40),
            skewed in proptest::collection::vec(proptest::collection::vec(any::<bool>(), 20), 4),
            shifts in proptest::collection::vec(-50_i64..50, 4),
        ) {
            let mut by_rank = vec![Vec::new(); 4];
            let mut waited = 0;
            for (at, rank, start) in starts {
                let at = at % meetings.len();
                let (last, arrived_ns) = meetings[at];
                if last != rank && start < arrived_ns {
                    // Clocks that differ: lengths must be kept all the same.
                    let shift_ns = shifts[last] - shifts[rank];
                    let (start, end) = (start + 100, arrived_ns + 100);
                    by_rank[rank].push(Wait { window: window(start, end), meeting: at, shift_ns });
                    waited += end - start;
                }
            }
            let labels: Vec<Vec<Label>> = skewed
                .iter()
                .map(|skewed| {
                    (0_u64..).zip(skewed).map(|(at, skewed)| {
                        let leaf = if *skewed { Leaf::CommSkew } else { Leaf::ComputeKernel };
                        label(at * 53, at * 53 + 53, leaf)
                    }).collect()
                })
                .collect();
            let meetings = meetings.into_iter().map(|(rank, at)| last(rank, at + 100)).collect();
            let moved = Waits::new(meetings, by_rank).moved(&labels);
            prop_assert_eq!(total_ns(&moved), waited);
        }
    }
}
