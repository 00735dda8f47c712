//! The one door to the clocks. Everything behind it takes times as arguments.

use rustix::time::{ClockId, Timespec, clock_gettime};

const NS_PER_S: i64 = 1_000_000_000;

/// `CLOCK_MONOTONIC` now, ns.
#[must_use]
pub fn monotonic_ns() -> u64 {
    u64::try_from(ns(clock_gettime(ClockId::Monotonic))).unwrap_or(0)
}

/// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC` now, ns: the reading between two monotonic ones lies at their middle.
#[must_use]
pub fn realtime_offset_ns() -> i64 {
    let before = ns(clock_gettime(ClockId::Monotonic));
    let real = ns(clock_gettime(ClockId::Realtime));
    let after = ns(clock_gettime(ClockId::Monotonic));
    real - (before + (after - before) / 2)
}

fn ns(time: Timespec) -> i64 {
    time.tv_sec.saturating_mul(NS_PER_S).saturating_add(time.tv_nsec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn monotonic_never_goes_back_and_the_offset_joins_the_clocks() {
        let first = monotonic_ns();
        let offset = realtime_offset_ns();
        let unix = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .map_or(0, |d| d.as_nanos());
        let second = monotonic_ns();
        assert!(second >= first);
        let joined = i128::from(second) + i128::from(offset);
        assert!((joined - unix as i128).abs() < 1_000_000_000, "{joined} {unix}");
    }
}
