//! When the GPU certainly had nothing to do, from the order of submissions and synchronisations.
//!
//! Streams are FIFO: a successful synchronisation that began at `b` proves that everything submitted to the stream
//! by calls that had returned by `b` is done when it returns. An event proves the same up to the point where it was
//! recorded, and a stream that waited for an event proves what the event covers. The GPU is *drained* from the
//! return of a synchronisation after which nothing is outstanding until the next call that submits something begins.
//!
//! Conservative choices, each can only make drained time shorter:
//! - A synchronous copy to the host drains its own (legacy default) stream and what that stream waited for, not the
//!   streams that block with it implicitly. Other synchronous copies count as submissions: a staged copy may return
//!   before its last part has landed.
//! - Events and waits that no longer fit the bounds are forgotten: they then prove nothing.
//! - Work submitted before tracing began is presumed outstanding until a synchronisation of the whole context, or of
//!   anything that begins [`UNSEEN_WORK_NS`] later.

use std::collections::{BTreeMap, VecDeque};

use stallscope_attribution::time::Window;

use crate::observation::SyncTarget;

/// How long streams that were never seen are presumed to hold work from before tracing, ns.
pub(super) const UNSEEN_WORK_NS: u64 = 1_000_000_000;

const MOST_STREAMS: usize = 256;
const MOST_EVENTS: usize = 16_384;
const MOST_WAITS: usize = 128;
const MOST_DRAINED: usize = 16_384;

/// A stream: handle and, for the per-thread default stream, the thread.
type StreamKey = (u64, u32);

/// `CU_STREAM_LEGACY` and the null handle are one stream; `CU_STREAM_PER_THREAD` is one per thread.
const fn stream_key(stream: u64, tid: u32) -> StreamKey {
    match stream {
        0 | 1 => (0, 0),
        2 => (2, tid),
        other => (other, 0),
    }
}

#[derive(Debug, Default)]
struct Stream {
    /// Return of the last call that submitted to it.
    submitted_ns: u64,
    /// Calls that returned up to here are done.
    covered_ns: u64,
    waits: VecDeque<Wait>,
}

impl Stream {
    const fn outstanding(&self) -> bool {
        self.submitted_ns > self.covered_ns
    }

    /// Makes room for a wait. One that a later wait for the same stream goes beyond goes first, and tells so: what covers the
    /// later one proves as much, and steps of many collectives leave hundreds before anything is synchronised.
    fn forget_a_wait(&mut self) -> bool {
        let later = |at: usize| self.waits.range(at + 1..);
        let beyond = |at: &usize| {
            let wait = self.waits[*at];
            later(*at).any(|other| other.on == wait.on && other.position_ns >= wait.position_ns)
        };
        let place = (0..self.waits.len()).find(beyond);
        self.waits.remove(place.unwrap_or(0));
        place.is_some()
    }
}

/// The stream waited, in a call that returned at `at_ns`, for what `on` had been given up to `position_ns`.
#[derive(Debug, Clone, Copy)]
struct Wait {
    at_ns: u64,
    on: StreamKey,
    position_ns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Recorded {
    stream: StreamKey,
    position_ns: u64,
}

/// Drain tracking for one process.
#[derive(Debug)]
pub(super) struct StreamOrder {
    streams: BTreeMap<StreamKey, Stream>,
    /// The last two records of each event: a synchronisation waits for the last one before it began.
    events: BTreeMap<u64, [Option<Recorded>; 2]>,
    drained: VecDeque<Window>,
    open_ns: Option<u64>,
    unseen_until_ns: Option<u64>,
    forgotten: u64,
}

impl StreamOrder {
    /// Tracking that begins at `first_seen_ns`.
    pub(super) const fn new(first_seen_ns: u64) -> Self {
        Self {
            streams: BTreeMap::new(),
            events: BTreeMap::new(),
            drained: VecDeque::new(),
            open_ns: None,
            unseen_until_ns: Some(first_seen_ns.saturating_add(UNSEEN_WORK_NS)),
            forgotten: 0,
        }
    }

    /// Work was submitted to a stream by calls within the window.
    pub(super) fn submit(&mut self, stream: u64, tid: u32, call: Window) {
        let key = stream_key(stream, tid);
        if self.streams.len() >= MOST_STREAMS && !self.streams.contains_key(&key) {
            self.forget_streams();
        }
        let entry = self.streams.entry(key).or_default();
        entry.submitted_ns = entry.submitted_ns.max(call.end_ns());
        if call.end_ns() <= entry.covered_ns {
            return;
        }
        self.cut_drained(call);
    }

    /// An event was recorded: it marks what the stream had been given when the call began.
    pub(super) fn record(&mut self, event: u64, stream: u64, tid: u32, call: Window) {
        if self.events.len() >= MOST_EVENTS && !self.events.contains_key(&event) {
            self.forget_events();
        }
        let recorded = Recorded {
            stream: stream_key(stream, tid),
            position_ns: call.start_ns(),
        };
        let entry = self.events.entry(event).or_default();
        *entry = [entry[1], Some(recorded)];
    }

    /// A stream was made to wait for an event.
    pub(super) fn wait(&mut self, stream: u64, tid: u32, event: u64, call: Window) {
        let Some(recorded) = self.recorded_before(event, call.start_ns()) else {
            return;
        };
        let covered_ns = self.streams.get(&recorded.stream).map_or(0, |on| on.covered_ns);
        if recorded.position_ns <= covered_ns {
            return;
        }
        let entry = self.streams.entry(stream_key(stream, tid)).or_default();
        if entry.waits.len() == MOST_WAITS {
            self.forgotten += u64::from(!entry.forget_a_wait());
        }
        entry.waits.push_back(Wait {
            at_ns: call.end_ns(),
            on: recorded.stream,
            position_ns: recorded.position_ns,
        });
    }

    /// A synchronisation returned success. Gives the instant from which the GPU is drained, if it newly is.
    pub(super) fn synchronised(&mut self, target: SyncTarget, tid: u32, call: Window) -> Option<u64> {
        let begun_ns = call.start_ns();
        match target {
            SyncTarget::Context => {
                for stream in self.streams.values_mut() {
                    stream.covered_ns = stream.covered_ns.max(begun_ns);
                    stream.waits.retain(|wait| wait.at_ns > begun_ns);
                }
                self.unseen_until_ns = None;
            }
            SyncTarget::Stream(stream) => self.cover(stream_key(stream, tid), begun_ns),
            SyncTarget::Event(event) => {
                if let Some(recorded) = self.recorded_before(event, begun_ns) {
                    self.cover(recorded.stream, recorded.position_ns);
                }
            }
        }
        self.drained_from(begun_ns, call.end_ns())
    }

    /// A synchronous copy to the host returned: it drains the legacy default stream, itself included.
    pub(super) fn copied_to_host(&mut self, call: Window) -> Option<u64> {
        self.submit(0, 0, call);
        self.cover((0, 0), call.end_ns());
        self.drained_from(call.start_ns(), call.end_ns())
    }

    /// Drained windows that touch `window`, clipped to it, in order.
    pub(super) fn drained_within(&self, window: Window) -> Vec<Window> {
        let open = self.open_ns.and_then(|start_ns| Window::new(start_ns, u64::MAX));
        self.drained
            .iter()
            .copied()
            .chain(open)
            .filter_map(|drained| drained.intersect(window))
            .collect()
    }

    /// Forgets drained windows that ended before `before_ns`.
    pub(super) fn prune(&mut self, before_ns: u64) {
        while self
            .drained
            .front()
            .is_some_and(|drained| drained.end_ns() <= before_ns)
        {
            self.drained.pop_front();
        }
    }

    /// Streams, events and waits forgotten for lack of room.
    pub(super) const fn forgotten(&self) -> u64 {
        self.forgotten
    }

    fn recorded_before(&self, event: u64, at_ns: u64) -> Option<Recorded> {
        let [older, newer] = self.events.get(&event)?;
        newer.filter(|recorded| recorded.position_ns <= at_ns).or(*older)
    }

    /// Marks everything submitted to `stream` up to `position_ns` as done, and what it had waited for.
    fn cover(&mut self, stream: StreamKey, position_ns: u64) {
        let mut open = vec![(stream, position_ns)];
        while let Some((key, position_ns)) = open.pop() {
            let Some(entry) = self.streams.get_mut(&key) else {
                continue;
            };
            entry.waits.retain(|wait| {
                let proven = wait.at_ns <= position_ns;
                if proven {
                    open.push((wait.on, wait.position_ns));
                }
                !proven
            });
            entry.covered_ns = entry.covered_ns.max(position_ns);
        }
    }

    fn drained_from(&mut self, begun_ns: u64, returned_ns: u64) -> Option<u64> {
        if self.unseen_until_ns.is_some_and(|until_ns| begun_ns >= until_ns) {
            self.unseen_until_ns = None;
        }
        let busy = self.unseen_until_ns.is_some() || self.streams.values().any(Stream::outstanding);
        if busy || self.open_ns.is_some() {
            return None;
        }
        self.open_ns = Some(returned_ns);
        Some(returned_ns)
    }

    /// Removes from drained time what a submission within `call` puts in doubt: everything from its begin on.
    fn cut_drained(&mut self, call: Window) {
        if let Some(open_ns) = self.open_ns.take()
            && let Some(drained) = Window::new(open_ns, call.start_ns())
            && !drained.is_empty()
        {
            self.drained.push_back(drained);
        }
        while let Some(last) = self.drained.back().copied()
            && last.end_ns() > call.start_ns()
        {
            self.drained.pop_back();
            if let Some(kept) = Window::new(last.start_ns(), call.start_ns())
                && !kept.is_empty()
            {
                self.drained.push_back(kept);
                break;
            }
        }
        if self.drained.len() > MOST_DRAINED {
            self.drained.pop_front();
            self.forgotten += 1;
        }
    }

    /// Forgets streams with nothing outstanding; if that is not enough, nothing can be told any more until the whole
    /// context is synchronised.
    fn forget_streams(&mut self) {
        let before = self.streams.len();
        self.streams.retain(|_, stream| stream.outstanding());
        if self.streams.len() >= MOST_STREAMS / 2 {
            self.streams.clear();
            self.unseen_until_ns = Some(u64::MAX);
        }
        self.forgotten += (before - self.streams.len()) as u64;
    }

    fn forget_events(&mut self) {
        let streams = &self.streams;
        self.events.retain(|_, recorded| {
            recorded[1].is_some_and(|last| {
                streams
                    .get(&last.stream)
                    .is_some_and(|stream| last.position_ns > stream.covered_ns)
            })
        });
        if self.events.len() >= MOST_EVENTS / 2 {
            self.forgotten += self.events.len() as u64;
            self.events.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(at_ns: u64) -> Window {
        Window::new(at_ns, at_ns + 10).unwrap_or_default()
    }

    #[test]
    fn a_step_of_many_collectives_forgets_nothing_that_a_synchronisation_needs() {
        let (compute, comm, tid) = (16, 32, 7);
        let mut order = StreamOrder::new(0);
        order.synchronised(SyncTarget::Context, tid, call(0));
        // Each bucket's reduction waits for its gradients, and the optimiser for the last reduction.
        for bucket in 0..1_000 {
            let at_ns = 1_000 + bucket * 100;
            order.submit(compute, tid, call(at_ns));
            order.record(1 + bucket, compute, tid, call(at_ns + 20));
            order.wait(comm, tid, 1 + bucket, call(at_ns + 40));
            order.submit(comm, tid, call(at_ns + 60));
        }
        order.record(5_000, comm, tid, call(200_000));
        assert_eq!(order.forgotten(), 0);
        let drained = order.synchronised(SyncTarget::Event(5_000), tid, call(300_000));
        assert_eq!(drained, Some(300_010), "the reductions prove the gradients");
    }

    #[test]
    fn waits_for_too_many_streams_are_counted_and_prove_nothing() {
        let tid = 7;
        let mut order = StreamOrder::new(0);
        order.synchronised(SyncTarget::Context, tid, call(0));
        for stream in 0..200 {
            let at_ns = 1_000 + stream * 100;
            order.submit(100 + stream, tid, call(at_ns));
            order.record(1 + stream, 100 + stream, tid, call(at_ns + 20));
            order.wait(32, tid, 1 + stream, call(at_ns + 40));
        }
        assert_eq!(order.forgotten(), 200 - MOST_WAITS as u64);
        assert_eq!(
            order.synchronised(SyncTarget::Stream(32), tid, call(300_000)),
            None
        );
    }
}
