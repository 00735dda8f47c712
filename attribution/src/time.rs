//! Windows of time, in integer nanoseconds of one monotonic clock.

/// A half-open interval `[start_ns, end_ns)` of `CLOCK_MONOTONIC`; never negative in length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Window {
    start_ns: u64,
    end_ns: u64,
}

impl Window {
    /// The window from `start_ns` to `end_ns`, or `None` when it would end before it starts.
    #[must_use]
    pub const fn new(start_ns: u64, end_ns: u64) -> Option<Self> {
        if end_ns < start_ns {
            None
        } else {
            Some(Self { start_ns, end_ns })
        }
    }

    /// The window of a fact known to hold at one instant.
    #[must_use]
    pub const fn instant(at_ns: u64) -> Self {
        Self {
            start_ns: at_ns,
            end_ns: at_ns,
        }
    }

    /// First nanosecond inside the window.
    #[must_use]
    pub const fn start_ns(self) -> u64 {
        self.start_ns
    }

    /// First nanosecond after the window.
    #[must_use]
    pub const fn end_ns(self) -> u64 {
        self.end_ns
    }

    /// Length in nanoseconds.
    #[must_use]
    pub const fn len_ns(self) -> u64 {
        self.end_ns - self.start_ns
    }

    /// Whether the window holds no time.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.start_ns == self.end_ns
    }

    /// The time both windows share, or `None` when they share none.
    #[must_use]
    pub fn intersect(self, other: Self) -> Option<Self> {
        let start_ns = self.start_ns.max(other.start_ns);
        let end_ns = self.end_ns.min(other.end_ns);
        (start_ns < end_ns).then_some(Self { start_ns, end_ns })
    }
}
