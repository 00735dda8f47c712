//! Collectives of several ranks joined: who waited, and for whom.
//!
//! The n-th collective of a communicator is the same one on all its ranks. It moves no byte before its last rank has
//! arrived, so what the others spend in it until then is waiting.

use std::collections::BTreeMap;

use super::label::Moving;
use super::{KernelClass, Label, Record, Work};
use crate::budget::arith::mul_div;
use crate::facts::RecordGap;
use crate::leaf::Leaf;
use crate::time::Window;

/// Ends of one collective that agree this closely were taken on one clock, ns.
const ONE_CLOCK_NS: u64 = 50_000;
/// The best of fewer collectives of one size is no reference.
const LEAST_OF_A_SIZE: usize = 3;

/// A rank waited in a collective for its last rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wait {
    /// From its own start to that of the last rank, on its own clock.
    pub(super) window: Window,
    /// Position of the last rank.
    pub(super) culprit: usize,
    /// The culprit's clock minus the own one, ns.
    pub(super) shift_ns: i64,
}

/// The collectives of all ranks.
#[derive(Debug, Clone, Default)]
pub(super) struct Joined {
    /// By rank: its waits, by start. Empty for all when nothing could be joined.
    pub(super) waits: Vec<Vec<Wait>>,
    /// By rank: its collectives after their last rank had arrived, where a reference is known.
    pub(super) moves: Vec<Vec<Moving>>,
    /// By rank: time of collectives after their last rank had arrived for which no reference is known, ns.
    pub(super) unreferenced_ns: Vec<u64>,
    /// Collectives that were joined.
    pub(super) collectives: u64,
    /// By rank: collectives that it was the last to join.
    pub(super) last: Vec<u64>,
    /// By rank: whether all of its collectives were joined.
    pub(super) whole: Vec<bool>,
    /// Error of the alignment of clocks, ns; 0 on one clock.
    pub(super) residual_ns: u64,
    /// What could not be joined, and why.
    pub(super) gaps: Vec<RecordGap>,
}

/// Joins the ranks, whose records are sorted by start. `world` is the number of ranks of the job, 0 when unknown;
/// `bus_bytes_per_s` is the bus bandwidth to measure against, in place of the best of the same size.
pub(super) fn join(ranks: &[&[Record]], world: u32, bus_bytes_per_s: Option<u64>) -> Joined {
    let mut groups: BTreeMap<u64, BTreeMap<usize, Vec<&Record>>> = BTreeMap::new();
    for (rank, records) in ranks.iter().enumerate() {
        for record in records
            .iter()
            .filter(|record| record.work == Work::Kernel(KernelClass::Communication))
        {
            let group = record.collective.map_or(0, |collective| collective.group);
            groups
                .entry(group)
                .or_default()
                .entry(rank)
                .or_default()
                .push(record);
        }
    }
    let mut joined = Joined {
        waits: vec![Vec::new(); ranks.len()],
        moves: vec![Vec::new(); ranks.len()],
        unreferenced_ns: vec![0; ranks.len()],
        last: vec![0; ranks.len()],
        whole: vec![true; ranks.len()],
        ..Joined::default()
    };
    let mut sound = Vec::new();
    for (group, members) in groups {
        match complete(group, &members, world) {
            Ok(()) => sound.push(members),
            Err(why) => joined.refuse(&members, &why),
        }
    }
    let shifts = clocks(&sound, ranks.len());
    for members in sound {
        joined.add(&members, &shifts, bus_bytes_per_s);
    }
    for waits in &mut joined.waits {
        waits.sort_by_key(|wait| wait.window);
    }
    joined
}

/// Whether the same collectives of a communicator are known of all its ranks; else why not.
fn complete(group: u64, members: &BTreeMap<usize, Vec<&Record>>, world: u32) -> Result<(), String> {
    let declared = members
        .values()
        .flatten()
        .filter_map(|record| record.collective)
        .map(|collective| collective.ranks)
        .max()
        .filter(|ranks| *ranks > 0);
    let expected = declared.unwrap_or(if group == 0 { world } else { 0 }) as usize;
    let name = if group == 0 {
        "one communicator"
    } else {
        "a communicator"
    };
    if expected == 1 {
        return Ok(());
    }
    if members.len() < 2 || members.len() < expected {
        let of = if expected == 0 {
            "an unknown number".to_owned()
        } else {
            expected.to_string()
        };
        return Err(format!(
            "collectives of {name}: {} of {of} ranks given, so waiting for the last rank cannot be told from \
             transfer; give the traces of all ranks",
            members.len(),
        ));
    }
    let mut sequences = members.values();
    let first = sequences.next().map_or(&[][..], Vec::as_slice);
    let message = |record: &Record| record.collective.map(|collective| collective.message);
    for sequence in sequences {
        if sequence.len() != first.len() {
            return Err(format!(
                "collectives of {name}: ranks recorded {} and {} of them, so they cannot be matched; trace the \
                 same steps on all ranks",
                first.len(),
                sequence.len(),
            ));
        }
        let differs = first
            .iter()
            .zip(sequence)
            .position(|(a, b)| message(a) != message(b));
        if let Some(at) = differs {
            return Err(format!(
                "collectives of {name}: number {} differs between ranks, so they cannot be matched; trace the \
                 same steps on all ranks, of one run",
                at + 1,
            ));
        }
    }
    Ok(())
}

/// What to subtract from each rank's times to have one clock, and the error left; `None` for ranks that share no
/// communicator with all.
struct Clocks {
    offset_ns: Vec<i64>,
    residual_ns: u64,
    /// Ends neither agree nor can be made to.
    unaligned: bool,
}

fn clocks(groups: &[BTreeMap<usize, Vec<&Record>>], ranks: usize) -> Clocks {
    let mut clocks = Clocks {
        offset_ns: vec![0; ranks],
        residual_ns: 0,
        unaligned: false,
    };
    let whole = groups.iter().filter(|members| members.len() == ranks);
    let Some(members) = whole.max_by_key(|members| members.values().map(Vec::len).min()) else {
        return clocks;
    };
    if spread(members, &clocks.offset_ns) <= ONE_CLOCK_NS {
        return clocks;
    }
    let Some(first) = members.values().next() else {
        return clocks;
    };
    let mut offset_ns = vec![0; ranks];
    for (rank, sequence) in members {
        let mut apart: Vec<i64> = first
            .iter()
            .zip(sequence)
            .map(|(a, b)| b.window.end_ns().wrapping_sub(a.window.end_ns()).cast_signed())
            .collect();
        apart.sort_unstable();
        offset_ns[*rank] = apart.get(apart.len() / 2).copied().unwrap_or(0);
    }
    let left = spread(members, &offset_ns);
    if left <= ONE_CLOCK_NS {
        clocks.offset_ns = offset_ns;
        clocks.residual_ns = left.max(1);
    } else {
        clocks.unaligned = true;
    }
    clocks
}

/// Median over collectives of how far apart their ends are, ns.
fn spread(members: &BTreeMap<usize, Vec<&Record>>, offset_ns: &[i64]) -> u64 {
    let count = members.values().map(Vec::len).min().unwrap_or(0);
    let mut spreads: Vec<u64> = (0..count)
        .map(|at| {
            let ends = members
                .iter()
                .map(|(rank, sequence)| shifted(sequence[at].window.end_ns(), offset_ns[*rank]));
            let (low, high) = ends.fold((u64::MAX, 0), |(low, high), end| (low.min(end), high.max(end)));
            high.saturating_sub(low)
        })
        .collect();
    spreads.sort_unstable();
    spreads.get(spreads.len() / 2).copied().unwrap_or(0)
}

const fn shifted(at_ns: u64, offset_ns: i64) -> u64 {
    at_ns.saturating_add_signed(offset_ns.saturating_neg())
}

/// What is known of one rank.
#[derive(Debug, Clone, Copy)]
pub(super) struct OfRank<'a> {
    pub(super) waits: &'a [Wait],
    pub(super) moves: &'a [Moving],
    pub(super) unreferenced_ns: u64,
    pub(super) whole: bool,
}

/// By collective: when its last rank arrived on the common clock, and which one that was.
fn arrivals(members: &BTreeMap<usize, Vec<&Record>>, clocks: &Clocks) -> Vec<(u64, usize)> {
    let count = members.values().map(Vec::len).min().unwrap_or(0);
    (0..count)
        .filter_map(|at| {
            let starts = members.iter().map(|(rank, sequence)| {
                let start = shifted(sequence[at].window.start_ns(), clocks.offset_ns[*rank]);
                (start, *rank)
            });
            starts.max_by_key(|(start, rank)| (*start, core::cmp::Reverse(*rank)))
        })
        .collect()
}

/// The shortest time from the arrival of the last rank to the end of the last, by operation and size, ns.
fn best(
    members: &BTreeMap<usize, Vec<&Record>>,
    arrivals: &[(u64, usize)],
    clocks: &Clocks,
) -> BTreeMap<u64, u64> {
    let mut times: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for (at, (last_ns, _)) in arrivals.iter().enumerate() {
        let ends = members
            .iter()
            .map(|(rank, sequence)| shifted(sequence[at].window.end_ns(), clocks.offset_ns[*rank]));
        let record = members.values().next().map(|sequence| sequence[at]);
        let sized = record
            .and_then(|record| record.collective)
            .filter(|of| of.bus_bytes.is_some());
        if let Some((end, collective)) = ends.max().zip(sized) {
            let of_size = times.entry(collective.message).or_default();
            of_size.push(end.saturating_sub(*last_ns));
        }
    }
    let known = times
        .into_iter()
        .filter(|(_, times)| times.len() >= LEAST_OF_A_SIZE);
    known
        .filter_map(|(message, times)| Some((message, times.into_iter().min()?)))
        .collect()
}

/// What a collective's bytes need at the reference, ns: at the declared bandwidth, else as the best of its size did.
fn needs(record: &Record, best: &BTreeMap<u64, u64>, bus_bytes_per_s: Option<u64>) -> Option<u64> {
    let collective = record.collective?;
    let bytes = collective.bus_bytes?;
    match bus_bytes_per_s.filter(|rate| *rate > 0) {
        Some(rate) => Some(mul_div(bytes, 1_000_000_000, rate)),
        None => best.get(&collective.message).copied(),
    }
}

impl Joined {
    /// What is known of the rank at a position.
    pub(super) fn of(&self, rank: usize) -> OfRank<'_> {
        OfRank {
            waits: &self.waits[rank],
            moves: &self.moves[rank],
            unreferenced_ns: self.unreferenced_ns[rank],
            whole: self.whole[rank],
        }
    }

    fn refuse(&mut self, members: &BTreeMap<usize, Vec<&Record>>, why: &str) {
        for rank in members.keys() {
            self.whole[*rank] = false;
        }
        self.gaps.push(RecordGap {
            node: "all".to_owned(),
            window: None,
            what: why.to_owned(),
            count: members.values().map(|sequence| sequence.len() as u64).sum(),
        });
    }

    fn add(
        &mut self,
        members: &BTreeMap<usize, Vec<&Record>>,
        clocks: &Clocks,
        bus_bytes_per_s: Option<u64>,
    ) {
        if clocks.unaligned && members.len() > 1 {
            let why = "the ranks' clocks differ and the ends of their collectives do not align them: waiting for \
                       the last rank cannot be told from transfer";
            return self.refuse(members, why);
        }
        self.residual_ns = self.residual_ns.max(clocks.residual_ns);
        let arrivals = arrivals(members, clocks);
        let best = best(members, &arrivals, clocks);
        for (at, (last_ns, culprit)) in arrivals.into_iter().enumerate() {
            self.collectives += 1;
            self.last[culprit] += u64::from(members.len() > 1);
            for (rank, sequence) in members {
                let record = sequence[at];
                let (from, end) = (record.window.start_ns(), record.window.end_ns());
                let to = shifted(last_ns, clocks.offset_ns[*rank].saturating_neg()).clamp(from, end);
                let wait = Window::new(from, to).filter(|wait| wait.len_ns() > clocks.residual_ns);
                if let Some(window) = wait {
                    let shift_ns = clocks.offset_ns[culprit].saturating_sub(clocks.offset_ns[*rank]);
                    self.waits[*rank].push(Wait {
                        window,
                        culprit,
                        shift_ns,
                    });
                }
                let Some(window) = Window::new(to, end) else {
                    continue;
                };
                match needs(record, &best, bus_bytes_per_s) {
                    Some(needs_ns) => self.moves[*rank].push(Moving { window, needs_ns }),
                    None => self.unreferenced_ns[*rank] += window.len_ns(),
                }
            }
        }
    }

    /// All waiting, moved to who was late and the leaf that kept it; what no rank can be blamed for is under `None`.
    /// Sums to all waits exactly.
    pub(super) fn blame(&self, labels: &[Vec<Label>]) -> BTreeMap<(Option<usize>, Leaf), u64> {
        let mut moved = BTreeMap::new();
        for (rank, waits) in self.waits.iter().enumerate() {
            for wait in waits {
                let mut path = vec![rank];
                self.follow(wait.window, wait, labels, &mut path, &mut moved);
            }
        }
        moved
    }

    /// Gives `window`, a part of a wait, to what the culprit did meanwhile. Its own waits in other communicators are
    /// followed to their culprits; a circle is given to nobody.
    fn follow(
        &self,
        window: Window,
        wait: &Wait,
        labels: &[Vec<Label>],
        path: &mut Vec<usize>,
        moved: &mut BTreeMap<(Option<usize>, Leaf), u64>,
    ) {
        let culprit = wait.culprit;
        let at = |ns: u64| ns.saturating_add_signed(wait.shift_ns);
        let Some(there) = Window::new(at(window.start_ns()), at(window.end_ns())) else {
            *moved.entry((None, Leaf::CommSkew)).or_default() += window.len_ns();
            return;
        };
        let own = &labels[culprit];
        let from = own.partition_point(|label| label.window.end_ns() <= there.start_ns());
        let mut seen = 0;
        for label in own[from..]
            .iter()
            .take_while(|label| label.window.start_ns() < there.end_ns())
        {
            let Some(part) = label.window.intersect(there) else {
                continue;
            };
            seen += part.len_ns();
            if label.leaf != Leaf::CommSkew {
                *moved.entry((Some(culprit), label.leaf)).or_default() += part.len_ns();
                continue;
            }
            let deeper = self.waits[culprit]
                .iter()
                .find_map(|wait| Some((wait, wait.window.intersect(part)?)));
            match deeper.filter(|(wait, found)| *found == part && !path.contains(&wait.culprit)) {
                Some((wait, found)) => {
                    path.push(culprit);
                    self.follow(found, wait, labels, path, moved);
                    path.pop();
                }
                None => *moved.entry((None, Leaf::CommSkew)).or_default() += part.len_ns(),
            }
        }
        // Before the culprit's first record nothing is known of it but that it was late.
        if window.len_ns() > seen {
            *moved.entry((Some(culprit), Leaf::IdleUnknown)).or_default() += window.len_ns() - seen;
        }
    }
}
