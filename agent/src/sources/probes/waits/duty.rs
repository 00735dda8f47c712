//! When the hooks are attached: a share of the time that keeps their cost within a budget.

/// Settings of the wait states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitsConfig {
    /// Time that the hooks may take of any proxy thread, parts per million; 0 switches them off. Default 5000 (0.5 %).
    pub budget_ppm: u64,
    /// How long they stay attached at a time, ns. Default 1 s.
    pub window_ns: u64,
}

impl Default for WaitsConfig {
    fn default() -> Self {
        Self {
            budget_ppm: 5_000,
            window_ns: 1_000_000_000,
        }
    }
}

/// The longest pause, ns: even a thread that does nothing but hit hooks is looked at now and then.
const LONGEST_PAUSE_NS: u64 = 600_000_000_000;

/// The pause after a window in which the busiest thread hit hooks `hits` times at `hit_ns` each, such that over window and
/// pause the hits take at most the budget.
pub(in crate::sources) fn pause_ns(config: &WaitsConfig, window_ns: u64, hits: u64, hit_ns: u64) -> u64 {
    if config.budget_ppm == 0 {
        return LONGEST_PAUSE_NS;
    }
    let cost_ns = u128::from(hits).saturating_mul(hit_ns.into());
    let cycle_ns = cost_ns.saturating_mul(1_000_000) / u128::from(config.budget_ppm);
    u64::try_from(cycle_ns)
        .unwrap_or(u64::MAX)
        .saturating_sub(window_ns)
        .min(LONGEST_PAUSE_NS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_thread_within_its_budget_needs_no_pause() {
        // 5,000 hits of 1 us in a second are exactly 0.5 %.
        assert_eq!(pause_ns(&WaitsConfig::default(), SECOND, 5_000, 1_000), 0);
        assert_eq!(pause_ns(&WaitsConfig::default(), SECOND, 0, 1_000), 0);
    }

    #[test]
    fn over_window_and_pause_the_cost_is_the_budget() {
        // 100,000 hits of 1 us are 100 ms: 0.5 % of 20 s.
        assert_eq!(
            pause_ns(&WaitsConfig::default(), SECOND, 100_000, 1_000),
            19 * SECOND
        );
    }

    #[test]
    fn no_numbers_upset_it() {
        let config = WaitsConfig::default();
        assert_eq!(pause_ns(&config, SECOND, u64::MAX, u64::MAX), LONGEST_PAUSE_NS);
        let off = WaitsConfig {
            budget_ppm: 0,
            ..config
        };
        assert_eq!(pause_ns(&off, SECOND, 0, 0), LONGEST_PAUSE_NS);
    }
}
