//! Observations put in order of time.
//!
//! Records come from several rings and sources, each in order, not so together. They are held until the newest end of
//! a window lies [`HOLD_NS`] ahead and are then released by the end of their window, in an order that does not
//! depend on the order of arrival.

use std::collections::BTreeMap;

use crate::observation::{Fact, Observation, Thread};

/// How long an observation is held back, ns of observed time.
pub const HOLD_NS: u64 = 500_000_000;
/// Most observations held; beyond it the oldest is released early. About 14 MiB.
const MOST_HELD: usize = 131_072;
/// Observations are put in order this much at a time, ns: so much longer than [`HOLD_NS`] may one be held.
const BUCKET_NS: u64 = 8_000_000;
/// Buckets kept to be used again, and the most observations that such a one has room for.
const MOST_SPARE: usize = 8;
const MOST_SPARE_ROOM: usize = 1_024;

/// Total order of observations: by end, start, kind, and what tells two of a kind apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    end_ns: u64,
    start_ns: u64,
    rank: u8,
    who: u64,
    what: u64,
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

/// Observations that end in the same stretch of [`BUCKET_NS`]: as they came, until they are opened.
type Bucket = Vec<Option<Observation>>;

/// The buffer: a bucket is put in order only when it is its turn, so that an observation is moved twice and not once for
/// every level of a heap.
#[derive(Debug, Default)]
pub(super) struct Reorder {
    closed: BTreeMap<u64, Bucket>,
    /// What is being released, and the places in it that are left, the next one last.
    open: Bucket,
    order: Vec<(Key, usize)>,
    /// Number of the bucket that was opened last, and one.
    opened: u64,
    /// Buckets to use again.
    spare: Vec<Bucket>,
    held: usize,
    newest_ns: u64,
    released: Option<Key>,
    late: u64,
}

impl Reorder {
    /// Takes an observation in.
    pub(super) fn push(&mut self, observation: Observation) {
        let end_ns = observation.window.end_ns();
        self.newest_ns = self.newest_ns.max(end_ns);
        self.held += 1;
        let number = end_ns / BUCKET_NS;
        if number < self.opened {
            self.push_open(observation);
            return;
        }
        let spare = &mut self.spare;
        self.closed
            .entry(number)
            .or_insert_with(|| spare.pop().unwrap_or_default())
            .push(Some(observation));
    }

    /// One that belongs to what is being released already.
    fn push_open(&mut self, observation: Observation) {
        if self.order.is_empty() {
            self.open.clear();
        }
        let key = key(&observation);
        if self.released.is_some_and(|released| key < released) {
            self.late += 1;
        }
        let at = self.order.partition_point(|(other, _)| *other > key);
        self.order.insert(at, (key, self.open.len()));
        self.open.push(Some(observation));
    }

    /// The next observation whose turn has come.
    pub(super) fn pop(&mut self) -> Option<Observation> {
        if self.order.is_empty() {
            let (number, _) = self.closed.first_key_value()?;
            let due_ns = self.newest_ns.saturating_sub(HOLD_NS);
            let due = number.saturating_add(1).saturating_mul(BUCKET_NS) <= due_ns;
            if !due && self.held <= MOST_HELD {
                return None;
            }
        }
        self.pop_any()
    }

    /// The next observation, whether its turn has come or not: at the end of the input.
    pub(super) fn pop_any(&mut self) -> Option<Observation> {
        loop {
            let Some((key, place)) = self.order.pop() else {
                self.open_next()?;
                continue;
            };
            let Some(observation) = self.open.get_mut(place).and_then(Option::take) else {
                continue;
            };
            self.held = self.held.saturating_sub(1);
            self.released = self.released.max(Some(key));
            return Some(observation);
        }
    }

    /// Puts the earliest bucket in order; `None` when there is none.
    fn open_next(&mut self) -> Option<()> {
        let (number, bucket) = self.closed.pop_first()?;
        let mut used = std::mem::replace(&mut self.open, bucket);
        used.clear();
        if self.spare.len() < MOST_SPARE && used.capacity() <= MOST_SPARE_ROOM {
            self.spare.push(used);
        }
        self.opened = number.saturating_add(1);
        let keys = self.open.iter().enumerate();
        let keys = keys.filter_map(|(place, observation)| Some((key(observation.as_ref()?), place)));
        self.order.extend(keys);
        // Each source is in order, so this is a few runs. Of equals, what came first goes first.
        self.order.sort_by(|a, b| b.cmp(a));
        Some(())
    }

    /// Observations that came after later ones had been released. They are used, but what was already concluded
    /// stays.
    pub(super) const fn late(&self) -> u64 {
        self.late
    }
}

#[cfg(test)]
mod tests {
    use stallscope_attribution::time::Window;

    use super::*;

    fn lost(end_ns: u64, count: u64) -> Observation {
        Observation {
            window: Window::instant(end_ns),
            fact: Fact::Lost { ring: "sched", count },
        }
    }

    fn count(observation: &Observation) -> u64 {
        match observation.fact {
            Fact::Lost { count, .. } => count,
            _ => 0,
        }
    }

    #[test]
    fn releases_in_order_of_time_whatever_the_order_of_arrival() {
        let mut reorder = Reorder::default();
        // Times that no generator knows: multiples of a step that shares no factor with their number.
        let times: Vec<u64> = (0..1_000_u64).map(|at| at * 389 % 1_000 * 1_000_000).collect();
        for (at, end_ns) in times.iter().enumerate() {
            reorder.push(lost(*end_ns, at as u64));
        }
        let mut released = Vec::new();
        while let Some(observation) = reorder.pop() {
            assert!(observation.window.end_ns() + HOLD_NS <= 999_000_000, "too early");
            released.push(observation.window.end_ns());
        }
        assert!(released.len() >= 480, "held too long: {}", released.len());
        while let Some(observation) = reorder.pop_any() {
            released.push(observation.window.end_ns());
        }
        let expected: Vec<u64> = (0..1_000).map(|ms| ms * 1_000_000).collect();
        assert_eq!(released, expected);
        assert_eq!(reorder.late(), 0);
    }

    #[test]
    fn what_comes_late_is_released_at_once_and_counted() {
        let mut reorder = Reorder::default();
        let second = 1_000_000_000;
        (0..4).for_each(|at| reorder.push(lost(second + at, at)));
        reorder.push(lost(3 * second, 9));
        assert_eq!(reorder.pop().as_ref().map(count), Some(0));
        assert_eq!(reorder.pop().as_ref().map(count), Some(1));
        reorder.push(lost(second, 5));
        reorder.push(lost(second + 2, 1));
        let rest: Vec<u64> = std::iter::from_fn(|| reorder.pop())
            .map(|next| count(&next))
            .collect();
        assert_eq!(rest, [5, 1, 2, 3], "by time, then by what tells them apart");
        assert_eq!(reorder.late(), 1);
        assert_eq!(reorder.pop_any().as_ref().map(count), Some(9));
        assert_eq!(reorder.pop_any(), None);
    }

    #[test]
    fn holds_no_more_than_it_may() {
        let mut reorder = Reorder::default();
        let mut released = 0;
        for at in 0..=MOST_HELD as u64 + 100 {
            reorder.push(lost(at, 0));
            released += u64::from(reorder.pop().is_some());
        }
        assert!(released >= 100, "{released}");
        assert!(reorder.held <= MOST_HELD + 1);
    }
}
