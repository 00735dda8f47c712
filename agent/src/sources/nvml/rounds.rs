//! One thread reads all GPUs in turn: woken once for all of them, it finds its code and the library's in the cache for
//! every GPU but the first. A GPU whose call hangs keeps that thread to itself, and another goes on with the others.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvml_wrapper::Nvml;
use stallscope_attribution::time::Window;

use super::convert::failed_reading;
use super::device::{Sample, Sampler};
use super::faults::Faults;
use super::watch::GpuShared;
use crate::observation::{Fact, GpuReading, Observation};
use crate::sources::clock::monotonic_ns;

/// How often a device that cannot be opened is tried again.
const RETRY_NS: u64 = 1_000_000_000;

/// What the threads of all rounds share.
pub(super) struct Rounds {
    /// Never dropped: a call that hangs may return after everything else has ended.
    nvml: &'static Nvml,
    turns: Vec<Turn>,
    sample: Duration,
    readings: SyncSender<Observation>,
    dropped: AtomicU64,
    /// Number of the thread that goes the rounds; an older one ends when its call returns.
    number: AtomicU64,
    stopped: Mutex<bool>,
    stop: Condvar,
}

impl std::fmt::Debug for Rounds {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rounds")
            .field("number", &self.number)
            .field("dropped", &self.dropped)
            .finish_non_exhaustive()
    }
}

/// One GPU's turn in a round.
struct Turn {
    gpu: Arc<GpuShared>,
    /// Taken while a thread is in it.
    state: Mutex<Option<State>>,
}

enum State {
    /// Not open yet, without readings since.
    Closed {
        since_ns: u64,
        due_ns: u64,
    },
    Open(Box<Open>),
}

struct Open {
    sampler: Sampler<'static>,
    before: Sample<'static>,
}

impl Rounds {
    pub(super) fn new(
        nvml: Nvml,
        gpus: &[Arc<GpuShared>],
        sample: Duration,
        readings: SyncSender<Observation>,
    ) -> Self {
        let turn = |gpu: &Arc<GpuShared>| Turn {
            gpu: Arc::clone(gpu),
            state: Mutex::new(Some(State::Closed {
                since_ns: monotonic_ns(),
                due_ns: 0,
            })),
        };
        Self {
            nvml: Box::leak(Box::new(nvml)),
            turns: gpus.iter().map(turn).collect(),
            sample,
            readings,
            dropped: AtomicU64::new(0),
            number: AtomicU64::new(0),
            stopped: Mutex::new(false),
            stop: Condvar::new(),
        }
    }

    /// Goes the rounds in a new thread. The one before ends as soon as it can.
    pub(super) fn start(self: &Arc<Self>) -> std::io::Result<std::thread::JoinHandle<()>> {
        let rounds = Arc::clone(self);
        let number = self.number.fetch_add(1, Ordering::AcqRel) + 1;
        std::thread::Builder::new()
            .name("nvml".to_owned())
            .spawn(move || rounds.run(number))
    }

    /// Begins to wait for faults of the devices.
    pub(super) fn faults(&self, devices: u32) -> std::io::Result<Faults> {
        Faults::start(self.nvml, devices)
    }

    pub(super) fn stop(&self) {
        *locked(&self.stopped) = true;
        self.stop.notify_all();
    }

    pub(super) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    /// Whether a thread is in this GPU's turn, or ended in it.
    pub(super) fn is_taken(&self, index: usize) -> bool {
        self.turns
            .get(index)
            .is_some_and(|turn| locked(&turn.state).is_none())
    }

    fn run(&self, number: u64) {
        loop {
            for turn in &self.turns {
                let Some(state) = locked(&turn.state).take() else {
                    continue;
                };
                let state = self.take_turn(&turn.gpu, state);
                *locked(&turn.state) = Some(state);
                if self.number.load(Ordering::Acquire) != number {
                    return;
                }
            }
            if self.stops_within(self.sample) {
                return;
            }
        }
    }

    fn take_turn(&self, gpu: &Arc<GpuShared>, state: State) -> State {
        match state {
            State::Closed { since_ns, due_ns } if monotonic_ns() >= due_ns => self.open(gpu, since_ns),
            State::Closed { .. } => state,
            State::Open(mut open) => {
                let now = open.sampler.sample();
                let reading = open.sampler.reading(&open.before, &now);
                self.send(open.before.at_ns, now.at_ns, reading);
                open.before = now;
                State::Open(open)
            }
        }
    }

    fn open(&self, gpu: &Arc<GpuShared>, since_ns: u64) -> State {
        let index = gpu.identity().index;
        let opened = gpu.call("nvmlDeviceGetHandleByIndex_v2", || {
            self.nvml.device_by_index(index)
        });
        let state = match opened {
            Ok(device) => {
                let sampler = Sampler::new(self.nvml, device, gpu);
                let before = sampler.sample();
                State::Open(Box::new(Open { sampler, before }))
            }
            Err(error) => {
                let now_ns = monotonic_ns();
                let why = format!("the device cannot be opened: {error}");
                self.send(since_ns, now_ns, failed_reading(gpu, &why));
                State::Closed {
                    since_ns: now_ns,
                    due_ns: now_ns.saturating_add(RETRY_NS),
                }
            }
        };
        gpu.set_answered();
        state
    }

    pub(super) fn send(&self, start_ns: u64, end_ns: u64, reading: GpuReading) {
        let Some(window) = Window::new(start_ns, end_ns) else {
            return;
        };
        let fact = Fact::Gpu(Box::new(reading));
        if self.readings.try_send(Observation { window, fact }).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn stops_within(&self, duration: Duration) -> bool {
        let waited = self
            .stop
            .wait_timeout_while(locked(&self.stopped), duration, |stopped| !*stopped)
            .unwrap_or_else(PoisonError::into_inner);
        *waited.0
    }
}

/// Every lock here is held for a move only, never over a call.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
