//! What the agent's threads share.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use stallscope_attribution::facts::RecordGap;
use tokio::sync::Notify;

use super::own;
use super::status::SharedStatus;
use crate::observation::ProcessKey;
use crate::sources::procs::GpuView;

/// Gaps waiting to be told; more are only counted in the log.
const MOST_GAPS: usize = 256;

/// Traced processes by pid.
pub(super) type Keys = HashMap<u32, ProcessKey>;

/// State that more than one thread needs.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) node: String,
    /// Drawn anew at every start.
    pub(super) boot_id: u64,
    pub(super) status: SharedStatus,
    /// Observations that found the queue to history full.
    pub(super) dropped: AtomicU64,
    stop: AtomicBool,
    stopped: Notify,
    keys: Mutex<Arc<Keys>>,
    gpus: Mutex<Option<GpuView>>,
    gaps: Mutex<Vec<RecordGap>>,
}

impl Shared {
    pub(super) fn new(node: String) -> Self {
        let status = SharedStatus::default();
        {
            let mut status = status.lock();
            status.node.clone_from(&node);
            status.started_ns = super::now_ns();
            status.updated_ns = status.started_ns;
        }
        Self {
            node,
            boot_id: own::random(),
            status,
            dropped: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            stopped: Notify::new(),
            keys: Mutex::default(),
            gpus: Mutex::default(),
            gaps: Mutex::default(),
        }
    }

    /// Tells every thread to end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        self.stopped.notify_one();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Ends when some thread asked to stop.
    pub(super) async fn stopped(&self) {
        self.stopped.notified().await;
    }

    /// The traced processes now.
    pub(super) fn keys(&self) -> Arc<Keys> {
        Arc::clone(&locked(&self.keys))
    }

    pub(super) fn set_keys(&self, keys: Keys) {
        *locked(&self.keys) = Arc::new(keys);
    }

    /// What NVML knows, if it is new since the last call.
    pub(super) fn take_gpus(&self) -> Option<GpuView> {
        locked(&self.gpus).take()
    }

    pub(super) fn set_gpus(&self, view: GpuView) {
        *locked(&self.gpus) = Some(view);
    }

    /// Something is missing from the record.
    pub(super) fn add_gap(&self, gap: RecordGap) {
        let mut gaps = locked(&self.gaps);
        if gaps.len() < MOST_GAPS {
            gaps.push(gap);
        } else {
            tracing::warn!(what = gap.what, count = gap.count, "a gap is only in this log");
        }
    }

    pub(super) fn take_gaps(&self) -> Vec<RecordGap> {
        std::mem::take(&mut *locked(&self.gaps))
    }
}

/// A thread that panicked leaves what it had written.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
