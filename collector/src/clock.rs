//! The one place where the collector reads the wall clock.

use std::time::{SystemTime, UNIX_EPOCH};

/// `CLOCK_REALTIME` now, ns; 0 before 1970.
#[must_use]
pub(crate) fn realtime_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}
