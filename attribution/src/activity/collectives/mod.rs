//! Collectives of several ranks joined: who waited, and for whom.
//!
//! A collective moves no byte before its last rank has arrived, so what the others spend in it until then is waiting.

mod clocks;
mod meetings;

use std::collections::BTreeMap;

use super::blame::{Groups, Meeting, Moved, Wait, Waits};
use super::label::Moving;
use super::{Label, Record};
use crate::budget::arith::mul_div;
use crate::facts::{GpuSubject, RecordGap};
use crate::time::Window;
use clocks::Clocks;
use meetings::{Channel, Members, channels, complete};

/// The best of fewer collectives of one size is no reference.
const LEAST_OF_A_SIZE: usize = 3;

/// The collectives of all ranks.
#[derive(Debug, Clone, Default)]
pub(super) struct Joined {
    /// Empty when nothing could be joined.
    waits: Waits,
    /// By rank: its collectives after their last rank had arrived, where a reference is known.
    moves: Vec<Vec<Moving>>,
    /// By rank: time of collectives after their last rank had arrived for which no reference is known, ns.
    unreferenced_ns: Vec<u64>,
    /// Collectives that were joined.
    pub(super) collectives: u64,
    /// By rank: collectives that it was the last to join.
    pub(super) last: Vec<u64>,
    /// By rank: whether all of its collectives were joined.
    pub(super) whole: Vec<bool>,
    /// Error of the alignment of clocks, ns; 0 on one clock.
    pub(super) residual_ns: u64,
    /// Clocks that were brought to another's time.
    pub(super) clocks: usize,
    /// Ranks that are late together when one thing keeps them.
    pub(super) groups: Groups,
    /// What could not be joined, and why.
    pub(super) gaps: Vec<RecordGap>,
}

/// What is known of one rank.
#[derive(Debug, Clone)]
pub(super) struct OfRank<'a> {
    pub(super) waits: Vec<Window>,
    pub(super) moves: &'a [Moving],
    pub(super) unreferenced_ns: u64,
    pub(super) whole: bool,
}

/// A rank as it is joined with others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Joining<'a> {
    pub(super) subject: &'a GpuSubject,
    /// By start.
    pub(super) records: &'a [Record],
    /// Begins of its steps, in order.
    pub(super) steps: &'a [u64],
}

/// Joins the ranks. `world` is the number of ranks of the job, 0 when unknown; `bus_bytes_per_s` is the bus bandwidth
/// to measure against, in place of the best of the same size.
pub(super) fn join(ranks: &[Joining<'_>], world: u32, bus_bytes_per_s: Option<u64>) -> Joined {
    let records: Vec<&[Record]> = ranks.iter().map(|rank| rank.records).collect();
    let numbers: Vec<u32> = ranks.iter().map(|rank| rank.subject.rank).collect();
    let nodes: Vec<&str> = ranks.iter().map(|rank| rank.subject.node.as_str()).collect();
    let mut joined = Joined {
        moves: vec![Vec::new(); ranks.len()],
        unreferenced_ns: vec![0; ranks.len()],
        last: vec![0; ranks.len()],
        whole: vec![true; ranks.len()],
        ..Joined::default()
    };
    let mut sound: BTreeMap<Channel, Members<'_>> = BTreeMap::new();
    for (channel, members) in channels(&records, &numbers) {
        match complete(channel, &members, world) {
            Ok(()) => {
                sound.insert(channel, members);
            }
            Err(why) => joined.refuse(&members, &why),
        }
    }
    let clocks = Clocks::of(&sound.values().collect::<Vec<_>>(), &nodes);
    joined.clocks = clocks.moved();
    joined.groups = groups(&sound, &nodes);
    let mut joining = Meetings {
        joined: &mut joined,
        clocks: &clocks,
        steps: ranks
            .iter()
            .map(|rank| rank.steps)
            .max_by_key(|steps| steps.len()),
        reference: ranks
            .iter()
            .enumerate()
            .max_by_key(|(at, rank)| (rank.steps.len(), *at))
            .map_or(0, |(at, _)| at),
        meetings: Vec::new(),
        waits: vec![Vec::new(); ranks.len()],
    };
    for members in sound.values() {
        joining.add(members, bus_bytes_per_s);
    }
    let (meetings, waits) = (joining.meetings, joining.waits);
    joined.waits = Waits::new(meetings, waits);
    joined
}

fn groups(channels: &BTreeMap<Channel, Members<'_>>, nodes: &[&str]) -> Groups {
    let (mut sends, mut members) = (Vec::new(), Vec::new());
    for (channel, of) in channels {
        let ranks: Vec<usize> = of.keys().copied().collect();
        match (channel.pair, ranks.as_slice()) {
            (Some(_), [one, other]) => sends.push((*one, *other)),
            _ => members.push(ranks),
        }
    }
    Groups::new(nodes, &sends, &members)
}

/// The shortest time from the arrival of the last rank to the end of the last, by operation and size, ns.
fn best(members: &Members<'_>, arrivals: &[(u64, usize)], clocks: &Clocks) -> BTreeMap<u64, u64> {
    let mut times: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for (at, (last_ns, _)) in arrivals.iter().enumerate() {
        let ends = members
            .iter()
            .map(|(rank, sequence)| clocks.common(*rank, sequence[at].window.end_ns()));
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

/// By collective: when its last rank arrived on the common clock, and which one that was. Of ranks that arrive in the
/// same nanosecond each is taken in turn: none of them kept the others longer.
fn arrivals(members: &Members<'_>, clocks: &Clocks) -> Vec<(u64, usize)> {
    let count = members.values().map(Vec::len).min().unwrap_or(0);
    (0..count)
        .filter_map(|at| {
            let starts: Vec<(u64, usize)> = members
                .iter()
                .map(|(rank, sequence)| (clocks.common(*rank, sequence[at].window.start_ns()), *rank))
                .collect();
            let last_ns = starts.iter().map(|(start, _)| *start).max()?;
            let last: Vec<usize> = starts
                .into_iter()
                .filter(|(start, _)| *start == last_ns)
                .map(|(_, rank)| rank)
                .collect();
            last.get(at % last.len().max(1)).map(|rank| (last_ns, *rank))
        })
        .collect()
}

/// Meetings on their way into [`Waits`].
struct Meetings<'a> {
    joined: &'a mut Joined,
    clocks: &'a Clocks,
    /// Begins of the steps of the rank of which most are known.
    steps: Option<&'a [u64]>,
    /// That rank.
    reference: usize,
    meetings: Vec<Meeting>,
    waits: Vec<Vec<Wait>>,
}

impl Meetings<'_> {
    fn add(&mut self, members: &Members<'_>, bus_bytes_per_s: Option<u64>) {
        let ranks = || members.keys().copied();
        if !self.clocks.are_aligned(ranks()) && members.len() > 1 {
            let why = "the ranks' clocks differ and the ends of their collectives do not align them: waiting for \
                       the last rank cannot be told from transfer";
            return self.joined.refuse(members, why);
        }
        let error_ns = self.clocks.error_ns(ranks());
        self.joined.residual_ns = self.joined.residual_ns.max(error_ns);
        let arrivals = arrivals(members, self.clocks);
        let best = best(members, &arrivals, self.clocks);
        for (at, (last_ns, last)) in arrivals.into_iter().enumerate() {
            self.joined.collectives += 1;
            self.joined.last[last] += u64::from(members.len() > 1);
            let arrived_ns = members[&last][at].window.start_ns();
            let meeting = self.meetings.len();
            for (rank, sequence) in members {
                let record = sequence[at];
                let (from, end) = (record.window.start_ns(), record.window.end_ns());
                let to = self.clocks.own(*rank, last_ns).clamp(from, end);
                let wait = Window::new(from, to).filter(|wait| *rank != last && wait.len_ns() > error_ns);
                if let Some(window) = wait {
                    let shift_ns = arrived_ns.wrapping_sub(self.clocks.own(*rank, last_ns));
                    self.waits[*rank].push(Wait {
                        window,
                        meeting,
                        shift_ns: shift_ns.cast_signed(),
                    });
                }
                let Some(window) = Window::new(to, end) else {
                    continue;
                };
                match needs(record, &best, bus_bytes_per_s) {
                    Some(needs_ns) => self.joined.moves[*rank].push(Moving { window, needs_ns }),
                    None => self.joined.unreferenced_ns[*rank] += window.len_ns(),
                }
            }
            // Where the ranks last met before the trace began is not known.
            let before = at.checked_sub(1);
            let since = members.iter().filter_map(|(rank, sequence)| {
                let to = sequence[at].window.start_ns();
                let from = sequence[before?].window.end_ns().min(to);
                Some((*rank, Window::new(from, to)?))
            });
            self.meetings.push(Meeting {
                last,
                arrived_ns,
                step: self.step(last_ns),
                since: since.collect(),
            });
        }
    }

    /// The step of a time on the common clock.
    fn step(&self, common_ns: u64) -> Option<u32> {
        let at_ns = self.clocks.own(self.reference, common_ns);
        let begun = self.steps?.partition_point(|begin| *begin <= at_ns);
        u32::try_from(begun.checked_sub(1)?).ok()
    }
}

impl Joined {
    /// What is known of the rank at a position.
    pub(super) fn of(&self, rank: usize) -> OfRank<'_> {
        OfRank {
            waits: self.waits.windows(rank),
            moves: &self.moves[rank],
            unreferenced_ns: self.unreferenced_ns[rank],
            whole: self.whole[rank],
        }
    }

    /// All waiting, moved to who was late and what it did; sums to it exactly.
    pub(super) fn moved(&self, labels: &[Vec<Label>]) -> Moved {
        self.waits.moved(labels)
    }

    fn refuse(&mut self, members: &Members<'_>, why: &str) {
        for rank in members.keys() {
            self.whole[*rank] = false;
        }
        let count = members.values().map(|sequence| sequence.len() as u64).sum();
        // Channels that fail for one reason are one thing to say.
        if let Some(known) = self.gaps.iter_mut().find(|gap| gap.what == why) {
            known.count += count;
            return;
        }
        self.gaps.push(RecordGap {
            node: "all".to_owned(),
            window: None,
            what: why.to_owned(),
            count,
        });
    }
}
