//! What a node told over windows of time, as far back as it is kept.

use std::collections::VecDeque;

use stallscope_attribution::facts::{HardwareFacts, PortFacts};

use super::realtime;

/// Something told over a window.
pub(super) trait Windowed {
    /// When the window ended, `CLOCK_REALTIME` of the node.
    fn end_ns(&self) -> u64;
}

impl Windowed for PortFacts {
    fn end_ns(&self) -> u64 {
        realtime(self.window.end_ns(), self.realtime_offset_ns)
    }
}

impl Windowed for HardwareFacts {
    fn end_ns(&self) -> u64 {
        realtime(self.window.end_ns(), self.realtime_offset_ns)
    }
}

/// The newest, at most `MOST`.
#[derive(Debug)]
pub(super) struct Windows<T, const MOST: usize> {
    kept: VecDeque<T>,
}

impl<T, const MOST: usize> Default for Windows<T, MOST> {
    fn default() -> Self {
        Self {
            kept: VecDeque::new(),
        }
    }
}

impl<T: Windowed, const MOST: usize> Windows<T, MOST> {
    /// Keeps it, and forgets what ended longer than `keep_ns` before.
    pub(super) fn add(&mut self, told: T, keep_ns: u64) {
        let from_ns = told.end_ns().saturating_sub(keep_ns);
        self.kept.push_back(told);
        while self.kept.len() > MOST || self.kept.front().is_some_and(|oldest| oldest.end_ns() < from_ns) {
            self.kept.pop_front();
        }
    }

    /// What ended after a time.
    pub(super) fn since(&self, since_ns: u64) -> impl Iterator<Item = &T> {
        self.kept.iter().filter(move |told| told.end_ns() > since_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Told(u64);

    impl Windowed for Told {
        fn end_ns(&self) -> u64 {
            self.0
        }
    }

    #[test]
    fn what_is_kept_is_bounded_in_time_and_in_number() {
        let mut windows = Windows::<Told, 3>::default();
        let ends =
            |windows: &Windows<Told, 3>, since| windows.since(since).map(|told| told.0).collect::<Vec<_>>();
        windows.add(Told(10), 100);
        windows.add(Told(60), 100);
        assert_eq!(ends(&windows, 0), [10, 60]);
        assert_eq!(ends(&windows, 10), [60], "it ended then");
        windows.add(Told(111), 100);
        assert_eq!(ends(&windows, 0), [60, 111], "too long ago");
        windows.add(Told(112), 100);
        windows.add(Told(113), 100);
        assert_eq!(ends(&windows, 0), [111, 112, 113], "too many");
    }
}
