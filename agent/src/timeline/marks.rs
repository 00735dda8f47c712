//! Counts of what a process submitted: launches, copies, collectives.

use std::collections::{BTreeMap, VecDeque};

use stallscope_attribution::facts::{CollectiveFact, Copies};
use stallscope_attribution::time::Window;

use crate::observation::{Collective, CommCreated, CopyDirection};

const MOST_MARKS: usize = 16_384;
const MOST_COLLECTIVES: usize = 16_384;
const MOST_COMMUNICATORS: usize = 1_024;
/// Neighbouring marks within this time are folded, unless a synchronisation lies between them.
const FOLD_NS: u64 = 1_000_000;

#[derive(Debug, Clone, Copy, Default)]
struct Mark {
    at_ns: u64,
    launches: u64,
    copies: Copies,
    /// Synchronisations and collectives seen before it.
    epoch: u64,
}

#[derive(Debug, Clone, Copy)]
struct Communicator {
    key: u64,
    ranks: u32,
    /// Order of appearance in the process.
    ordinal: u64,
    sequence: u64,
}

/// What one process submitted.
#[derive(Debug, Default)]
pub(super) struct Marks {
    marks: VecDeque<Mark>,
    collectives: VecDeque<CollectiveFact>,
    communicators: BTreeMap<u64, Communicator>,
    communicators_seen: u64,
    epoch: u64,
    forgotten: u64,
}

impl Marks {
    /// Kernel and graph launches, the last at `at_ns`.
    pub(super) fn launched(&mut self, count: u64, at_ns: u64) {
        self.mark(at_ns).launches += count;
    }

    /// A copy; `blocked_ns` is not zero for a synchronous one.
    pub(super) fn copied(&mut self, bytes: u64, direction: CopyDirection, blocked_ns: u64, at_ns: u64) {
        let copies = &mut self.mark(at_ns).copies;
        copies.count = copies.count.saturating_add(1);
        copies.blocked_ns += blocked_ns;
        match direction {
            CopyDirection::ToDevice => copies.to_device_bytes += bytes,
            CopyDirection::ToHost => copies.to_host_bytes += bytes,
            CopyDirection::DeviceToDevice | CopyDirection::Unknown => {}
        }
    }

    /// Marks are not folded across this point.
    pub(super) const fn synchronised(&mut self) {
        self.epoch += 1;
    }

    /// A communicator was made, or found in use. The calls of one that is older than the agent are not numbered as on the
    /// other ranks, so it is never joined with theirs, though its name is known.
    pub(super) fn created(&mut self, pid: u32, created: &CommCreated) {
        if created.result != 0 {
            return;
        }
        if let Some(known) = self.communicators.get_mut(&created.comm)
            && (created.found_in_use || Some(known.key) == created.key)
        {
            known.ranks = created.ranks.unwrap_or(known.ranks);
            return;
        }
        let ordinal = self.communicators_seen;
        self.communicators_seen += 1;
        self.remember(
            created.comm,
            Communicator {
                key: created
                    .key
                    .filter(|_| !created.found_in_use)
                    .unwrap_or_else(|| local_key(pid, created.comm)),
                ranks: created.ranks.unwrap_or(0),
                ordinal,
                sequence: 0,
            },
        );
    }

    /// A communicator is gone; its handle may be reused.
    pub(super) fn destroyed(&mut self, comm: u64) {
        self.communicators.remove(&comm);
    }

    /// A collective was called. Gives its token: function, bytes and communicator.
    pub(super) fn collective(&mut self, collective: &Collective, call: Window) -> u64 {
        self.epoch += 1;
        let comm = self.communicator(collective.thread.process.pid, collective.comm);
        let bytes = collective
            .count
            .saturating_mul(datatype_bytes(collective.datatype));
        if self.collectives.len() == MOST_COLLECTIVES {
            self.collectives.pop_front();
            self.forgotten += 1;
        }
        self.collectives.push_back(CollectiveFact {
            comm: comm.key,
            sequence: comm.sequence,
            function: collective.function.name(),
            bytes,
            ranks: comm.ranks,
            call,
        });
        mix(mix(collective.function as u64 + 1, bytes), comm.ordinal)
    }

    /// Launches and copies whose mark lies in the window.
    pub(super) fn counts_within(&self, window: Window) -> (u64, Copies) {
        let (mut launches, mut copies) = (0, Copies::default());
        let first = self.marks.partition_point(|mark| mark.at_ns < window.start_ns());
        for mark in self
            .marks
            .range(first..)
            .take_while(|mark| mark.at_ns < window.end_ns())
        {
            launches += mark.launches;
            copies.to_device_bytes += mark.copies.to_device_bytes;
            copies.to_host_bytes += mark.copies.to_host_bytes;
            copies.count = copies.count.saturating_add(mark.copies.count);
            copies.blocked_ns += mark.copies.blocked_ns;
        }
        (launches, copies)
    }

    /// Collectives whose call began in the window.
    pub(super) fn collectives_within(&self, window: Window) -> Vec<CollectiveFact> {
        let inside =
            |fact: &&CollectiveFact| (window.start_ns()..window.end_ns()).contains(&fact.call.start_ns());
        self.collectives.iter().filter(inside).cloned().collect()
    }

    /// Forgets marks before `before_ns`.
    pub(super) fn prune(&mut self, before_ns: u64) {
        while self.marks.front().is_some_and(|mark| mark.at_ns < before_ns) {
            self.marks.pop_front();
        }
        while self
            .collectives
            .front()
            .is_some_and(|fact| fact.call.start_ns() < before_ns)
        {
            self.collectives.pop_front();
        }
    }

    /// Marks, collectives and communicators forgotten for lack of room.
    pub(super) const fn forgotten(&self) -> u64 {
        self.forgotten
    }

    /// The mark to count at `at_ns` in.
    fn mark(&mut self, at_ns: u64) -> &mut Mark {
        let epoch = self.epoch;
        let folds = |last: &Mark| last.epoch == epoch && at_ns >= last.at_ns && at_ns - last.at_ns < FOLD_NS;
        let full = self.marks.len() >= MOST_MARKS;
        if self.marks.back().is_none_or(|last| !(folds(last) || full)) {
            let at = self.marks.partition_point(|mark| mark.at_ns <= at_ns);
            self.marks.insert(
                at,
                Mark {
                    at_ns,
                    epoch,
                    ..Mark::default()
                },
            );
            return &mut self.marks[at];
        }
        if full {
            self.forgotten += 1;
        }
        let last = self.marks.len() - 1;
        &mut self.marks[last]
    }

    fn communicator(&mut self, pid: u32, comm: u64) -> Communicator {
        if !self.communicators.contains_key(&comm) {
            let ordinal = self.communicators_seen;
            self.communicators_seen += 1;
            self.remember(
                comm,
                Communicator {
                    key: local_key(pid, comm),
                    ranks: 0,
                    ordinal,
                    sequence: 0,
                },
            );
        }
        let Some(entry) = self.communicators.get_mut(&comm) else {
            return Communicator {
                key: local_key(pid, comm),
                ranks: 0,
                ordinal: 0,
                sequence: 0,
            };
        };
        let now = *entry;
        entry.sequence += 1;
        now
    }

    fn remember(&mut self, comm: u64, communicator: Communicator) {
        if self.communicators.len() >= MOST_COMMUNICATORS && !self.communicators.contains_key(&comm) {
            self.communicators.pop_first();
            self.forgotten += 1;
        }
        self.communicators.insert(comm, communicator);
    }
}

/// A communicator whose unique id was not seen gets a key that no other process shares.
const fn local_key(pid: u32, comm: u64) -> u64 {
    mix(mix(0x6c6f_6361_6c00, pid as u64), comm)
}

/// Folds a value into a hash (the finaliser of splitmix64).
pub(super) const fn mix(hash: u64, value: u64) -> u64 {
    let mut x = hash ^ value.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_add(hash << 6);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Size of an `ncclDataType_t` (nccl.h); 1 for one that is not known.
const fn datatype_bytes(datatype: u32) -> u64 {
    match datatype {
        2 | 3 | 7 => 4,
        4 | 5 | 8 => 8,
        6 | 9 => 2,
        _ => 1,
    }
}
