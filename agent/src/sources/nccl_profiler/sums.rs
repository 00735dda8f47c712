//! From steps to what a thread's steps waited for.

use std::collections::{BTreeMap, HashSet};

use stallscope_attribution::time::Window;
use stallscope_records::profiler::{Event, flag};
use stallscope_records::waits::Wait;

use crate::observation::{StepWait, StepWaits};

/// Most threads told apart; the steps of further ones count for the process.
const MAX_THREADS: usize = 256;

/// Sums over windows that follow one another.
#[derive(Debug, Default)]
pub(super) struct Sums {
    threads: BTreeMap<u32, StepWaits>,
    /// Steps that ended after the last window did.
    later: Vec<Event>,
}

/// From and to, ns.
type Span = (u64, u64);
/// The times in each wait of one thread.
type Spans = [Vec<Span>; Wait::ALL.len()];

impl Sums {
    /// Adds a window: the steps under way at its end, and those that ended since the one before, in any order.
    pub(super) fn add(&mut self, window: Window, open: &[Event], ended: &[Event]) {
        let later = std::mem::take(&mut self.later);
        let mut spans: BTreeMap<u32, Spans> = BTreeMap::new();
        let is_whole = |event: &Event| event.flags & flag::PART == 0;
        // A step that was under way and then ended is told by its end.
        let told: HashSet<u64> = ended
            .iter()
            .filter(|event| is_whole(event) || event.stop_ns > window.end_ns())
            .map(|event| event.token)
            .collect();
        let open = open.iter().filter(|event| !told.contains(&event.token));
        for event in later.iter().chain(ended).chain(open) {
            self.step(window, event, &mut spans);
        }
        for (tid, of) in spans {
            let waits = self.threads.entry(tid).or_default();
            for (wait, spans) in Wait::ALL.into_iter().zip(of) {
                cover(slot(waits, wait), spans);
            }
        }
        let is_later = |event: &&Event| event.stop_ns > window.end_ns();
        self.later = later.iter().chain(ended).filter(is_later).copied().collect();
    }

    fn step(&mut self, window: Window, event: &Event, spans: &mut BTreeMap<u32, Spans>) {
        let is_known = self.threads.contains_key(&event.tid);
        let tid = if is_known || self.threads.len() < MAX_THREADS {
            event.tid
        } else {
            0
        };
        let waits = self.threads.entry(tid).or_insert_with(none);
        let of = spans.entry(tid).or_default();
        let is_within = |at_ns: u64| window.start_ns() < at_ns && at_ns <= window.end_ns();
        let stop_ns = if event.stop_ns == 0 {
            window.end_ns()
        } else {
            event.stop_ns
        };
        let direction = if event.sends == 1 { 0 } else { 3 };
        for (at, entered_ns) in event
            .entered_ns
            .into_iter()
            .enumerate()
            .filter(|(_, ns)| *ns != 0)
        {
            let next_ns = event.entered_ns.iter().skip(at + 1).find(|ns| **ns != 0);
            let left_ns = next_ns.copied().unwrap_or(stop_ns);
            let (from, to) = (entered_ns.max(window.start_ns()), left_ns.min(window.end_ns()));
            if let Some(wait) = Wait::ALL.get(direction + at) {
                slot(waits, *wait).entered += u64::from(is_within(entered_ns));
                if from < to {
                    of[*wait as usize].push((from, to));
                }
            }
        }
        if is_within(event.stop_ns) {
            let ends = event.flags & flag::PART == 0;
            waits.sent += u64::from(ends && event.sends == 1);
            waits.received += u64::from(ends && event.sends == 0);
            waits.unknown += u64::from(event.flags & flag::STRANGE != 0);
        }
    }

    /// The sums by thread, as its own process numbers it; they begin anew.
    pub(super) fn take(&mut self) -> BTreeMap<u32, StepWaits> {
        std::mem::take(&mut self.threads)
    }
}

fn none() -> StepWaits {
    StepWaits {
        send_credit: Some(StepWait::default()),
        ..StepWaits::default()
    }
}

fn slot(waits: &mut StepWaits, wait: Wait) -> &mut StepWait {
    match wait {
        Wait::SendGpu => &mut waits.send_gpu,
        Wait::SendCredit => waits.send_credit.get_or_insert_default(),
        Wait::SendWire => &mut waits.send_wire,
        Wait::ReceiveWire => &mut waits.receive_wire,
        Wait::ReceiveFlush => &mut waits.receive_flush,
        Wait::ReceiveGpu => &mut waits.receive_gpu,
    }
}

/// Adds the sum of the spans and the time that they cover.
fn cover(wait: &mut StepWait, mut spans: Vec<Span>) {
    spans.sort_unstable();
    let mut covered_to = 0;
    for (from, to) in spans {
        wait.steps_ns = wait.steps_ns.saturating_add(to - from);
        wait.any_ns += to.saturating_sub(from.max(covered_to));
        covered_to = covered_to.max(to);
    }
}
