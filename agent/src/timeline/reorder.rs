//! Observations put in order of time.
//!
//! Records come from several rings and sources, each in order, not so together. They are held until the newest end of
//! a window lies [`HOLD_NS`] ahead and are then released by the end of their window, in an order that does not
//! depend on the order of arrival.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

use crate::observation::{Fact, Observation, Thread};

/// How long an observation is held back, ns of observed time.
pub const HOLD_NS: u64 = 500_000_000;
/// Most observations held; beyond it the oldest is released early. About 14 MiB.
const MOST_HELD: usize = 131_072;

/// Total order of observations: by end, start, kind, and what tells two of a kind apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    end_ns: u64,
    start_ns: u64,
    rank: u8,
    who: u64,
    what: u64,
}

#[derive(Debug)]
struct Held {
    key: Key,
    observation: Observation,
}

impl PartialEq for Held {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for Held {}

impl PartialOrd for Held {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Held {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key.cmp(&other.key)
    }
}

fn thread_id(thread: &Thread) -> u64 {
    (u64::from(thread.process.pid) << 32) | u64::from(thread.tid)
}

/// At one instant a process appears first and goes last, and work is submitted before it is waited for.
fn key(observation: &Observation) -> Key {
    let (rank, who, what) = match &observation.fact {
        Fact::Process(facts) => (0, u64::from(facts.key.pid), facts.key.start_ticks),
        Fact::RealtimeOffset { ns } => (1, 0, ns.cast_unsigned()),
        Fact::CommCreated(created) => (2, thread_id(&created.thread), created.comm),
        Fact::EventRecord {
            thread,
            event,
            stream,
        } => (3, thread_id(thread), event ^ stream.rotate_left(32)),
        Fact::StreamWait {
            thread,
            stream,
            event,
        } => (4, thread_id(thread), event ^ stream.rotate_left(32)),
        Fact::LaunchRun { thread, stream, .. } => (5, thread_id(thread), *stream),
        Fact::Copy { thread, bytes, .. } => (6, thread_id(thread), *bytes),
        Fact::Collective(collective) => (
            7,
            thread_id(&collective.thread),
            collective.comm ^ collective.count,
        ),
        Fact::GroupEnd { thread } => (8, thread_id(thread), 0),
        Fact::Sync { thread, .. } => (9, thread_id(thread), 0),
        Fact::OffCpu { thread, .. } => (10, thread_id(thread), 0),
        Fact::FileIo { thread, bytes, .. } => (11, thread_id(thread), *bytes),
        Fact::Block { process, bytes, .. } => (12, u64::from(process.pid), *bytes),
        Fact::ThreadCpu { thread, cpu_ns } => (11, thread_id(thread), *cpu_ns),
        Fact::FileIoFolded { process, bytes, .. } => (12, u64::from(process.pid), *bytes ^ (1 << 63)),
        Fact::StepWaits { thread, .. } => (12, thread_id(thread), 1 << 62),
        Fact::Gpu(reading) => (13, u64::from(reading.gpu), 0),
        Fact::Port(_) | Fact::Hardware(_) => (14, 0, 0),
        Fact::CpuQuota { process, .. } => (15, u64::from(process.pid), 0),
        Fact::Lost { count, .. } => (16, 0, *count),
        Fact::CommDestroyed { thread, comm } => (17, thread_id(thread), *comm),
        Fact::ProcessGone(process) => (18, u64::from(process.pid), process.start_ticks),
    };
    Key {
        end_ns: observation.window.end_ns(),
        start_ns: observation.window.start_ns(),
        rank,
        who,
        what,
    }
}

/// The buffer.
#[derive(Debug, Default)]
pub(super) struct Reorder {
    held: BinaryHeap<Reverse<Held>>,
    newest_ns: u64,
    released: Option<Key>,
    late: u64,
}

impl Reorder {
    /// Takes an observation in.
    pub(super) fn push(&mut self, observation: Observation) {
        let key = key(&observation);
        self.newest_ns = self.newest_ns.max(key.end_ns);
        if self.released.is_some_and(|released| key < released) {
            self.late += 1;
        }
        self.held.push(Reverse(Held { key, observation }));
    }

    /// The next observation whose turn has come.
    pub(super) fn pop(&mut self) -> Option<Observation> {
        let due_ns = self.newest_ns.saturating_sub(HOLD_NS);
        let due = self
            .held
            .peek()
            .is_some_and(|Reverse(held)| held.key.end_ns <= due_ns);
        if due || self.held.len() > MOST_HELD {
            self.pop_any()
        } else {
            None
        }
    }

    /// The next observation, whether its turn has come or not: at the end of the input.
    pub(super) fn pop_any(&mut self) -> Option<Observation> {
        let Reverse(held) = self.held.pop()?;
        self.released = self.released.max(Some(held.key));
        Some(held.observation)
    }

    /// Observations that came after later ones had been released. They are used, but what was already concluded
    /// stays.
    pub(super) const fn late(&self) -> u64 {
        self.late
    }
}
