//! What network steps waited for, folded by process and over windows that follow each other: one record of all threads every
//! two seconds is what a job's analysis needs.

use std::collections::BTreeMap;

use stallscope_attribution::facts::{ProcessWaits, StepWaits};
use stallscope_attribution::time::Window;

use crate::observation::ProcessKey;

/// Windows of less than this wait for the next ones, ns.
const FOLD_NS: u64 = 1_900_000_000;
/// How long after its window a thread's record may come, ns.
const LATE_NS: u64 = 200_000_000;
/// How long after a short window the next one may end, ns.
const NEXT_NS: u64 = 1_500_000_000;

/// What one process's steps waited for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Folded {
    /// From the first window to the last; not all of it need have been watched.
    pub(super) window: Window,
    pub(super) waits: ProcessWaits,
}

impl Folded {
    const fn due_ns(&self) -> u64 {
        let grace_ns = if self.window.len_ns() >= FOLD_NS {
            LATE_NS
        } else {
            NEXT_NS
        };
        self.window.end_ns().saturating_add(grace_ns)
    }
}

/// The processes whose windows are not over; only those the timeline follows, so there are not many.
#[derive(Debug, Default)]
pub(super) struct Folding {
    open: BTreeMap<ProcessKey, Folded>,
    /// Nothing is due before, `CLOCK_MONOTONIC` ns.
    next_ns: u64,
}

impl Folding {
    /// Takes in what one thread's steps waited for.
    pub(super) fn add(&mut self, process: ProcessKey, window: Window, waits: &StepWaits) {
        let one = ProcessWaits {
            pid: process.pid,
            watched_ns: window.len_ns(),
            waits: *waits,
        };
        let folded = self
            .open
            .entry(process)
            .and_modify(|folded| {
                let start_ns = folded.window.start_ns().min(window.start_ns());
                let end_ns = folded.window.end_ns().max(window.end_ns());
                folded.window = Window::new(start_ns, end_ns).unwrap_or(folded.window);
                folded.waits.add(&one);
            })
            .or_insert(Folded { window, waits: one });
        self.next_ns = self.next_ns.min(folded.due_ns());
    }

    /// What is complete by `clock_ns`, by process.
    pub(super) fn due(&mut self, clock_ns: u64) -> Vec<Folded> {
        if clock_ns < self.next_ns {
            return Vec::new();
        }
        let mut due = Vec::new();
        self.open.retain(|_, folded| {
            let is_open = folded.due_ns() > clock_ns;
            if !is_open {
                due.push(folded.clone());
            }
            is_open
        });
        self.next_ns = self.open.values().map(Folded::due_ns).min().unwrap_or(u64::MAX);
        due
    }

    /// What is left of a process that is gone.
    pub(super) fn gone(&mut self, process: ProcessKey) -> Option<Folded> {
        self.open.remove(&process)
    }
}

#[cfg(test)]
mod tests {
    use stallscope_attribution::facts::StepWait;

    use super::*;

    const MS: u64 = 1_000_000;
    const ONE: ProcessKey = ProcessKey {
        pid: 7,
        start_ticks: 1,
    };

    fn window(start_ms: u64, end_ms: u64) -> Window {
        Window::new(start_ms * MS, end_ms * MS).expect("a window")
    }

    fn wire(ms: u64) -> StepWaits {
        StepWaits {
            send_wire: StepWait {
                steps_ns: 2 * ms * MS,
                any_ns: ms * MS,
                entered: 1,
            },
            sent: 1,
            ..StepWaits::default()
        }
    }

    #[test]
    fn windows_in_a_row_of_all_threads_become_one() {
        let mut folding = Folding::default();
        folding.add(ONE, window(0, 1_000), &wire(100));
        folding.add(ONE, window(0, 1_000), &wire(20));
        assert_eq!(folding.due(1_000 * MS), [], "another may follow");
        folding.add(ONE, window(1_000, 2_000), &wire(3));
        assert_eq!(folding.due(2_000 * MS), [], "another thread's may follow");
        folding.add(ONE, window(1_000, 2_000), &wire(0));
        let [folded] = &folding.due(2_300 * MS)[..] else {
            panic!("not one");
        };
        assert_eq!(folded.window, window(0, 2_000));
        assert_eq!(folded.waits.pid, 7);
        assert_eq!(folded.waits.watched_ns, 4_000 * MS, "two threads for two seconds");
        assert_eq!(folded.waits.waits.send_wire.any_ns, 123 * MS);
        assert_eq!(folded.waits.waits.sent, 4);
        assert_eq!(folding.due(u64::MAX), [], "told twice");
    }

    #[test]
    fn a_lone_window_before_a_pause_is_told_in_time() {
        let mut folding = Folding::default();
        folding.add(ONE, window(0, 1_000), &wire(100));
        assert_eq!(folding.due(2_400 * MS), []);
        assert_eq!(folding.due(2_600 * MS).len(), 1);
        folding.add(ONE, window(20_000, 21_000), &wire(100));
        assert_eq!(
            folding.gone(ONE).map(|folded| folded.window),
            Some(window(20_000, 21_000))
        );
        assert_eq!(folding.gone(ONE), None);
    }
}
