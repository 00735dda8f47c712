//! Which devices move data now, as other sources see it: a link's rate says something only under load.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// A pause longer than this ends a run of load, ns.
const PAUSE_NS: u64 = 2_500_000_000;
/// A device is under load when it has been for this long: an idle one takes some time to raise its link's rate, ns.
const SETTLED_NS: u64 = 1_000_000_000;
/// Devices remembered.
const MOST: usize = 512;

/// Devices by name: PCI address or network interface.
#[derive(Debug, Default)]
pub struct Load {
    runs: Mutex<BTreeMap<String, Run>>,
}

#[derive(Debug, Clone, Copy)]
struct Run {
    first_ns: u64,
    last_ns: u64,
}

impl Load {
    /// The device was seen to move data, or to compute.
    pub fn mark(&self, device: &str, now_ns: u64) {
        if device.is_empty() {
            return;
        }
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(run) = runs.get_mut(device) {
            if now_ns.saturating_sub(run.last_ns) > PAUSE_NS {
                run.first_ns = now_ns;
            }
            run.last_ns = run.last_ns.max(now_ns);
            return;
        }
        if runs.len() >= MOST {
            runs.retain(|_, run| now_ns.saturating_sub(run.last_ns) <= PAUSE_NS);
        }
        if runs.len() < MOST {
            let run = Run {
                first_ns: now_ns,
                last_ns: now_ns,
            };
            runs.insert(device.to_owned(), run);
        }
    }

    /// Whether the device has been under load for a while and still is.
    #[must_use]
    pub fn lasts(&self, device: &str, now_ns: u64) -> bool {
        let runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        runs.get(device).is_some_and(|run| {
            now_ns.saturating_sub(run.last_ns) <= PAUSE_NS
                && run.last_ns.saturating_sub(run.first_ns) >= SETTLED_NS
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn load_must_last_and_end() {
        let load = Load::default();
        load.mark("a", 10 * S);
        assert!(!load.lasts("a", 10 * S), "just begun");
        load.mark("a", 11 * S);
        assert!(load.lasts("a", 12 * S));
        assert!(!load.lasts("a", 14 * S), "it ended");
        load.mark("a", 20 * S);
        assert!(!load.lasts("a", 20 * S), "another run");
        assert!(!load.lasts("b", 20 * S));
        load.mark("", 20 * S);
        for device in 0..2 * MOST {
            load.mark(&device.to_string(), 30 * S);
        }
        assert!(
            load.runs
                .lock()
                .map(|runs| runs.len())
                .is_ok_and(|len| len <= MOST)
        );
    }
}
