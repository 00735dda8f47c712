//! Which processes the kernel traces.

use aya::maps::{Array, HashMap, MapData, MapError};
use stallscope_records::{process_hint, role};

use crate::observation::ProcessRole;

/// Why a process cannot be traced.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The kernel refused; the usual cause is the limit of 8192 traced processes.
    #[error("process {tgid} cannot be traced, so its calls and waits stay unknown: {source}")]
    Add {
        /// Which.
        tgid: u32,
        /// Why.
        source: MapError,
    },
}

/// The map of traced processes, and the hints by which the kernel tells at once that a process is not in it.
pub(super) struct Filter {
    map: HashMap<MapData, u32, u32>,
    hints: Array<MapData, u32>,
}

impl Filter {
    pub(super) fn new(map: HashMap<MapData, u32, u32>, hints: Array<MapData, u32>) -> Self {
        Self { map, hints }
    }

    pub(super) fn add(&mut self, tgid: u32, role: ProcessRole) -> Result<(), FilterError> {
        let value = match role {
            ProcessRole::Gpu => role::GPU,
            ProcessRole::Helper => role::HELPER,
        };
        self.map
            .insert(tgid, value, 0)
            .and_then(|()| self.hints.set(process_hint(tgid), 1, 0))
            .map_err(|source| FilterError::Add { tgid, source })
    }

    /// A process that is gone was taken out by the kernel already.
    pub(super) fn remove(&mut self, tgid: u32) {
        let _ = self.map.remove(&tgid);
        let hint = process_hint(tgid);
        let shared = self
            .map
            .keys()
            .filter_map(Result::ok)
            .any(|other| process_hint(other) == hint);
        if !shared {
            // A child that the kernel adds in this instant is added again when discovery hears of it. A hint that stays
            // costs a lookup.
            let _ = self.hints.set(hint, 0, 0);
        }
    }

    /// Whether any process is traced, those that the kernel added included.
    pub(super) fn is_empty(&self) -> bool {
        self.map.keys().next().is_none()
    }
}
