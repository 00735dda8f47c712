//! What the ranks' network steps waited for, and what that says about who holds the collectives back.
//!
//! In a ring every rank takes from the one before and gives to the one after. What is slow fills up everything before it
//! (whose senders wait for credit, whose GPUs leave unconsumed what arrived) and starves everything after it (whose senders
//! wait for their GPUs, whose receivers wait for data). So what is slow itself shows by what only it shows: a way by steps
//! on the wire, a rank that is late by data that its GPU neither takes nor gives, a path into a GPU by flushes. The rules
//! are those by which Mycroft (SOSP 2025) tells ready, transmitted and done apart.
//!
//! The steps are watched for a part of the time only, so all that counts are shares of what was watched. What nobody
//! watched says nothing.

use std::collections::BTreeMap;

use super::rollup::counts_for;
use crate::budget::arith::mul_div;
use crate::cause::Cause;
use crate::facts::{GpuSubject, HardwareFact, HardwareFacts, PPM, ProcessWaits, StepWait};
use crate::time::Window;

/// Less than this of one rank's steps, watched in a regime, says nothing, ns.
const LEAST_WATCHED_NS: u64 = 1_500_000_000;
/// A wait matters when steps are in it for this share of the time, parts per million.
const MATTERS_PPM: u64 = 100_000;
/// What is held up on the wire or for credit spends this share of its steps' time there, parts per million.
const MOST_OF_IT_PPM: u64 = 350_000;
/// A GPU is late when it keeps steps on both sides waiting for this share of their time, parts per million.
const LATE_PPM: u64 = 500_000;
/// The same of flushes, which nothing should wait for.
const FLUSHED_PPM: u64 = 200_000;
/// One rank stands out from those of other nodes by this factor, percent.
const STANDS_OUT_PERCENT: u64 = 200;
/// A wait grew when it takes this share of what it took, percent.
const GREW_PERCENT: u64 = 150;
/// Below this share of what it took, a wait did not grow, percent; and below this much more, parts per million.
const SAME_PERCENT: u64 = 110;
const SAME_PPM: u64 = 10_000;
/// Without a healthy stretch to compare with, only one of at least this many nodes can stand out.
const LEAST_NODES: usize = 4;
/// And by this factor, percent.
const STANDS_FAR_OUT_PERCENT: u64 = 400;

/// One rank's network steps over a stretch of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RankWaits {
    /// Position of the rank.
    pub(super) rank: usize,
    pub(super) node: String,
    pub(super) seen: ProcessWaits,
}

/// Where network steps say that the network is slow, by positions in the stretch's waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Slow {
    /// What one rank sends is long on its way.
    Way(usize),
    /// What any rank sends is.
    Everywhere,
    /// One rank makes no room for what others have ready to send, though its GPU has taken what came.
    Receiver(usize),
    /// What one rank receives takes long to reach its GPU's memory.
    Flush(usize),
}

impl Slow {
    /// The cause it stands for.
    pub(super) const fn cause(self) -> Cause {
        match self {
            Self::Way(_) | Self::Everywhere => Cause::NetworkFabric,
            Self::Receiver(_) => Cause::HostReceiver,
            Self::Flush(_) => Cause::NetworkPcie,
        }
    }
}

/// What network steps say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Says {
    /// Nothing: nobody watched, or nothing stands out.
    Nothing,
    /// The network is slow.
    Slow(Slow),
    /// One rank's GPU neither takes what arrived nor gives what others wait for.
    Late(usize),
    /// The network is as fast as it was.
    AsBefore,
}

impl RankWaits {
    /// Share of the time watched in which any step was in a wait, parts per million.
    fn time_ppm(&self, wait: StepWait) -> u64 {
        mul_div(wait.any_ns, PPM, self.seen.watched_ns)
    }

    /// On the wire, share of the time watched, parts per million.
    pub(super) fn wire_ppm(&self) -> u64 {
        self.time_ppm(self.seen.waits.send_wire)
    }

    /// Waiting for the receiver's credit, likewise; `None` where that is not told apart.
    pub(super) fn credit_ppm(&self) -> Option<u64> {
        self.seen.waits.send_credit.map(|credit| self.time_ppm(credit))
    }

    fn flush_ppm(&self) -> u64 {
        self.time_ppm(self.seen.waits.receive_flush)
    }

    /// Waiting for data to arrive, likewise; over sockets a slow way shows here alone, as a late sender does.
    pub(super) fn arrival_ppm(&self) -> u64 {
        self.time_ppm(self.seen.waits.receive_wire)
    }

    /// Time in which something was under way to the rank, or had come and was not taken yet.
    fn has_room_ppm(&self) -> u64 {
        self.arrival_ppm()
            .saturating_add(self.time_ppm(self.seen.waits.receive_gpu))
    }

    /// Time in which the rank's GPU had something to take and did not, and others waited for what it had to give.
    fn late_ppm(&self) -> u64 {
        let waits = &self.seen.waits;
        // Where credit is not told apart, waiting for the GPU holds it.
        let gives = waits.send_credit.map_or(0, |_| self.time_ppm(waits.send_gpu));
        gives.min(self.time_ppm(waits.receive_gpu))
    }

    /// What sending steps waited for: GPU, credit, wire, parts per million of their time.
    pub(super) fn sending(&self) -> [u64; 3] {
        let waits = &self.seen.waits;
        shares([
            waits.send_gpu,
            waits.send_credit.unwrap_or_default(),
            waits.send_wire,
        ])
    }

    /// What receiving steps waited for: arrival, flush, GPU.
    pub(super) fn receiving(&self) -> [u64; 3] {
        let waits = &self.seen.waits;
        shares([waits.receive_wire, waits.receive_flush, waits.receive_gpu])
    }
}

/// Each one's part of all steps' time, parts per million.
fn shares(of: [StepWait; 3]) -> [u64; 3] {
    let total = of
        .iter()
        .fold(0_u64, |sum, wait| sum.saturating_add(wait.steps_ns));
    of.map(|wait| mul_div(wait.steps_ns, PPM, total))
}

/// What was told of the ranks' network steps within a stretch of `CLOCK_REALTIME`, by rank: windows count where their middle
/// lies in it.
pub(super) fn of_ranks(
    hardware: &[HardwareFacts],
    subjects: &[&GpuSubject],
    within: Window,
) -> Vec<RankWaits> {
    let mut ranks: BTreeMap<usize, RankWaits> = BTreeMap::new();
    for facts in hardware {
        let HardwareFact::Waits(waits) = &facts.fact else {
            continue;
        };
        if !counts_for(within, facts.window, facts.realtime_offset_ns) {
            continue;
        }
        let of = |subject: &&GpuSubject| subject.node == facts.node && subject.pid == waits.pid;
        let Some(rank) = subjects.iter().position(of) else {
            continue;
        };
        ranks
            .entry(rank)
            .and_modify(|known| known.seen.add(waits))
            .or_insert_with(|| RankWaits {
                rank,
                node: facts.node.clone(),
                seen: **waits,
            });
    }
    let mut ranks: Vec<RankWaits> = ranks.into_values().collect();
    ranks.retain(|rank| rank.seen.watched_ns >= LEAST_WATCHED_NS);
    ranks
}

/// What the steps say of a regime; `before` is a healthy one, if there is one.
pub(super) fn says(now: &[RankWaits], before: Option<&[RankWaits]>) -> Says {
    let stretch = Stretch { now, before };
    if stretch.nodes() < 2 {
        return Says::Nothing;
    }
    stretch
        .way()
        .or_else(|| stretch.everywhere())
        .or_else(|| stretch.flush())
        .map(Says::Slow)
        .or_else(|| stretch.late().map(Says::Late))
        .or_else(|| stretch.receiver().map(Says::Slow))
        .or_else(|| stretch.is_as_before().then_some(Says::AsBefore))
        .unwrap_or(Says::Nothing)
}

struct Stretch<'a> {
    now: &'a [RankWaits],
    before: Option<&'a [RankWaits]>,
}

impl Stretch<'_> {
    fn nodes(&self) -> usize {
        let mut nodes: Vec<&str> = self.now.iter().map(|rank| rank.node.as_str()).collect();
        nodes.sort_unstable();
        nodes.dedup();
        nodes.len()
    }

    /// The same rank in the healthy regime.
    fn earlier(&self, rank: &RankWaits) -> Option<&RankWaits> {
        self.before?.iter().find(|other| other.rank == rank.rank)
    }

    /// Whether what a rank shows grew since the healthy regime; without one, whether the job has enough nodes to tell.
    fn grew(&self, rank: &RankWaits, of: fn(&RankWaits) -> u64) -> bool {
        match self.earlier(rank) {
            Some(earlier) => of(rank) * 100 >= of(earlier).saturating_mul(GREW_PERCENT),
            None => self.before.is_none() && self.nodes() >= LEAST_NODES,
        }
    }

    /// The one rank that shows something for much of the time, more than before, and more than any rank of another node.
    fn standing_out(&self, of: fn(&RankWaits) -> u64) -> Option<usize> {
        let top = (0..self.now.len()).max_by_key(|at| of(&self.now[*at]))?;
        let rank = &self.now[top];
        let others = self.now.iter().filter(|other| other.node != rank.node);
        let most = others.map(of).max()?;
        let factor = if self.before.is_some() {
            STANDS_OUT_PERCENT
        } else {
            STANDS_FAR_OUT_PERCENT
        };
        let alone = of(rank) * 100 >= most.saturating_mul(factor);
        (of(rank) >= MATTERS_PPM && alone && self.grew(rank, of)).then_some(top)
    }

    /// Steps of one rank are on the wire, and somebody on another node waits for data.
    fn way(&self) -> Option<Slow> {
        let at = self.standing_out(RankWaits::wire_ppm)?;
        let sender = &self.now[at];
        let waited_for = self
            .now
            .iter()
            .filter(|other| other.node != sender.node)
            .any(|other| other.arrival_ppm() * 2 >= sender.wire_ppm());
        (waited_for && sender.sending()[2] >= MOST_OF_IT_PPM).then_some(Slow::Way(at))
    }

    /// Steps of all ranks are on the wire for longer than they were.
    fn everywhere(&self) -> Option<Slow> {
        let sends = || self.now.iter().filter(|rank| rank.seen.waits.sent > 0);
        let slow = |rank: &RankWaits| {
            rank.wire_ppm() >= MATTERS_PPM
                && rank.sending()[2] >= MOST_OF_IT_PPM
                && self.earlier(rank).is_some()
                && self.grew(rank, RankWaits::wire_ppm)
        };
        (sends().count() >= 2 && sends().all(slow)).then_some(Slow::Everywhere)
    }

    fn flush(&self) -> Option<Slow> {
        let at = self.standing_out(RankWaits::flush_ppm)?;
        (self.now[at].receiving()[1] >= FLUSHED_PPM).then_some(Slow::Flush(at))
    }

    fn late(&self) -> Option<usize> {
        let at = self.standing_out(RankWaits::late_ppm)?;
        let rank = &self.now[at];
        (rank.sending()[0] >= LATE_PPM && rank.receiving()[2] >= LATE_PPM).then_some(at)
    }

    /// Steps wait for credit, and one rank alone has neither anything under way to it nor anything left to take: it has not
    /// said that it has room.
    fn receiver(&self) -> Option<Slow> {
        let credit = |rank: &RankWaits| rank.credit_ppm().unwrap_or(0);
        let waits = |rank: &&RankWaits| {
            credit(rank) >= MATTERS_PPM
                && rank.sending()[1] >= MOST_OF_IT_PPM
                && self.grew(rank, |rank| rank.credit_ppm().unwrap_or(0))
        };
        let sender = self.now.iter().filter(waits).max_by_key(|rank| credit(rank))?;
        let at = (0..self.now.len()).min_by_key(|at| self.now[*at].has_room_ppm())?;
        let rank = &self.now[at];
        let least = self
            .now
            .iter()
            .filter(|other| other.node != rank.node)
            .map(RankWaits::has_room_ppm)
            .min()?;
        let alone = least * 100 >= rank.has_room_ppm().saturating_mul(STANDS_OUT_PERCENT);
        (alone && rank.node != sender.node && !waits(&rank)).then_some(Slow::Receiver(at))
    }

    /// Whether every rank was watched before, and none waits longer for the network now. Sockets take what is sent into
    /// buffers, so that a slow way shows at the receiver alone, as a late sender does: data that is longer on its way says
    /// that nobody knows.
    fn is_as_before(&self) -> bool {
        let same = |rank: &RankWaits, earlier: &RankWaits, of: fn(&RankWaits) -> u64| {
            of(rank) <= mul_div(of(earlier), SAME_PERCENT, 100).saturating_add(SAME_PPM)
        };
        self.now.iter().all(|rank| {
            self.earlier(rank).is_some_and(|earlier| {
                [
                    RankWaits::wire_ppm as fn(&RankWaits) -> u64,
                    RankWaits::flush_ppm,
                    RankWaits::arrival_ppm,
                    |rank| rank.credit_ppm().unwrap_or(0),
                ]
                .into_iter()
                .all(|of| same(rank, earlier, of))
            })
        })
    }
}

#[cfg(test)]
mod tests;
