//! What a GPU's thread shares: its identity, the call it is in, and who computes on the device.

use std::sync::{Mutex, MutexGuard, PoisonError};

use stallscope_attribution::reading::Reading;

use crate::sources::clock::monotonic_ns;
use crate::sources::procs::GpuIdentity;

/// Shared between a GPU's thread and the reader; every lock is held for a copy only, never over a call.
#[derive(Debug)]
pub(super) struct GpuShared {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    identity: GpuIdentity,
    pci_device_id: u32,
    gpm: Option<bool>,
    answered: bool,
    call: Option<(&'static str, u64)>,
    processes: Reading<Vec<u32>>,
}

impl GpuShared {
    pub(super) fn new(index: u32) -> Self {
        let identity = GpuIdentity {
            index,
            ..GpuIdentity::default()
        };
        Self {
            state: Mutex::new(State {
                identity,
                ..State::default()
            }),
        }
    }

    /// Makes a call of the library under watch.
    pub(super) fn call<T>(&self, name: &'static str, call: impl FnOnce() -> T) -> T {
        self.lock().call = Some((name, monotonic_ns()));
        let result = call();
        self.lock().call = None;
        result
    }

    /// The call that is running, and since when.
    pub(super) fn in_call(&self) -> Option<(&'static str, u64)> {
        self.lock().call
    }

    pub(super) fn identify(&self, identity: GpuIdentity, pci_device_id: u32, gpm: bool) {
        let mut state = self.lock();
        state.identity = identity;
        state.pci_device_id = pci_device_id;
        state.gpm = Some(gpm);
    }

    /// The device answered, or its failure is known.
    pub(super) fn set_answered(&self) {
        self.lock().answered = true;
    }

    pub(super) fn answered(&self) -> bool {
        self.lock().answered
    }

    pub(super) fn identity(&self) -> GpuIdentity {
        self.lock().identity.clone()
    }

    pub(super) fn pci_device_id(&self) -> u32 {
        self.lock().pci_device_id
    }

    pub(super) fn gpm(&self) -> Option<bool> {
        self.lock().gpm
    }

    pub(super) fn processes(&self) -> Reading<Vec<u32>> {
        self.lock().processes.clone()
    }

    /// A failed read keeps what was known.
    pub(super) fn set_processes(&self, processes: &Reading<Vec<u32>>) {
        if !matches!(processes, Reading::Failed(_)) {
            self.lock().processes = processes.clone();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
