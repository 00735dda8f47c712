//! NVIDIA's management library: one thread for all GPUs, another when a call does not return.
//!
//! # Facade
//! - [`NvmlSource::open`]`(&config.nvml) -> Result<NvmlSource, NvmlError>`: loads the library and starts
//!   sampling; takes at most [`OPEN_DEADLINE`] even when a GPU is sick. On an error the agent goes on without.
//! - [`NvmlSource::poll`]`(now_ns) -> Vec<Observation>`: everything that arrived, call about every 100 ms. A GPU whose
//!   call does not return has readings `Failed(..)` once a second until it does.
//! - [`NvmlSource::view`]`() -> GpuView`: devices and compute processes for `procs::Discovery::set_gpus`.
//! - [`NvmlSource::take_faults`]`()`: faults (XIDs) that the driver told as events.
//! - [`NvmlSource::dropped`]`() -> u64`: readings lost because nobody polled.
//!
//! A reading's window lies between two samples of the counters. `process_sm_ppm` (once a second), `processes` (every
//! 5 s), temperature and memory (once a second) are in the reading in which they were read and `NotMeasured` in the
//! others: keep the last.
//!
//! A hung call delays the other GPUs by [`PATIENCE`]; then they get another thread, and the one that hangs ends when its
//! call returns. No second thread ever calls for a GPU that hangs, so a sick driver cannot make them pile up.

mod convert;
mod device;
mod faults;
mod links;
mod rounds;
#[cfg(test)]
mod tests;
pub mod trial;
mod watch;

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use nvml_wrapper::Nvml;
use stallscope_attribution::time::Window;

use self::faults::Faults;
use self::rounds::Rounds;
use self::watch::GpuShared;
use super::clock::monotonic_ns;
use super::procs::GpuView;
use super::xid::Xid;
use crate::config;
use crate::observation::{Fact, Observation};

/// How long loading the library, and finding the devices, may take each.
pub const OPEN_DEADLINE: Duration = Duration::from_secs(10);
/// How long one call may take before its GPU counts as stuck.
pub const CALL_DEADLINE: Duration = Duration::from_secs(2);
/// How long one call may take before the other GPUs are read by another thread.
pub const PATIENCE: Duration = Duration::from_millis(250);
/// Readings kept for a reader that is late: 12 s of 8 GPUs at 10 a second, some 500 bytes each.
const QUEUE: usize = 1024;
/// How often a stuck GPU says so.
const STUCK_REPORT_NS: u64 = 1_000_000_000;

/// Why there are no GPU counters.
#[derive(Debug, thiserror::Error)]
pub enum NvmlError {
    /// The library cannot be loaded.
    #[error(
        "no GPU counters: {library} cannot be loaded ({why}); install the NVIDIA driver or set nvml.library"
    )]
    Library {
        /// As configured.
        library: String,
        /// What the loader said.
        why: String,
    },
    /// The library refuses to start.
    #[error("no GPU counters: {library} does not start ({why}); see whether nvidia-smi works on this node")]
    Init {
        /// As configured.
        library: String,
        /// The library's own error.
        why: String,
    },
    /// Starting the library ends the process that tries.
    #[error(
        "no GPU counters: {library} crashes as it starts (signal {signal}); it is damaged or does not fit the driver: \
         install the driver again"
    )]
    Crashed {
        /// As configured.
        library: String,
        /// The signal.
        signal: i32,
    },
    /// Starting the library did not end in time.
    #[error("no GPU counters: {library} did not start within {} s; the driver hangs, see the kernel's log", OPEN_DEADLINE.as_secs())]
    Hung {
        /// As configured.
        library: String,
    },
    /// A thread or process cannot be started.
    #[error(
        "no GPU counters: a thread or process cannot be started ({0}); raise the limits of tasks and files"
    )]
    Thread(#[from] std::io::Error),
}

/// The running source.
#[derive(Debug)]
pub struct NvmlSource {
    driver_version: String,
    gpus: Vec<Gpu>,
    rounds: Arc<Rounds>,
    thread: JoinHandle<()>,
    readings: Receiver<Observation>,
    /// `None` when no thread could be started for them.
    faults: Option<Faults>,
}

#[derive(Debug)]
struct Gpu {
    index: u32,
    shared: Arc<GpuShared>,
    /// Begin of the call for which another thread took over the rounds.
    left_alone_ns: Option<u64>,
    /// The thread that read it panicked.
    ended: bool,
    stuck_since_ns: Option<u64>,
    reported_ns: u64,
}

/// What one GPU can tell; for `doctor`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuSummary {
    /// Index as the driver counts.
    pub index: u32,
    /// Device name; empty while the device does not answer.
    pub name: String,
    /// PCI address.
    pub pci: String,
    /// Whether it has GPM counters; `None` while it does not answer.
    pub gpm: Option<bool>,
    /// What is wrong with it now.
    pub trouble: Option<String>,
}

struct Opened {
    nvml: Nvml,
    devices: u32,
    driver_version: String,
}

impl NvmlSource {
    /// [`NvmlSource::open`], after `program`, the agent's own binary, survived starting the library in a child.
    ///
    /// # Errors
    /// When the library is missing, crashes, refuses to start, or hangs.
    pub fn open_tried(program: &Path, settings: &config::Nvml) -> Result<Self, NvmlError> {
        trial::try_in_child(program, &settings.library)?;
        Self::open(settings)
    }

    /// Loads the library and starts sampling.
    ///
    /// # Errors
    /// When the library is missing, refuses to start, or hangs.
    pub fn open(settings: &config::Nvml) -> Result<Self, NvmlError> {
        let Opened {
            nvml,
            devices,
            driver_version,
        } = open_library(&settings.library)?;
        let (send, readings) = mpsc::sync_channel(QUEUE);
        let gpus: Vec<Gpu> = (0..devices).map(Gpu::new).collect();
        let shared: Vec<_> = gpus.iter().map(|gpu| Arc::clone(&gpu.shared)).collect();
        let sample = Duration::from_millis(settings.sample_ms);
        let rounds = Arc::new(Rounds::new(nvml, &shared, sample, send));
        let mut source = Self {
            driver_version,
            gpus,
            thread: rounds.start()?,
            rounds,
            readings,
            faults: None,
        };
        source.await_devices();
        source.faults = source.rounds.faults(devices).ok();
        Ok(source)
    }

    /// The driver's version; empty when it does not say.
    #[must_use]
    pub fn driver_version(&self) -> &str {
        &self.driver_version
    }

    /// Everything that arrived since the last call, and the failures of GPUs that are stuck.
    pub fn poll(&mut self, now_ns: u64) -> Vec<Observation> {
        self.keep_going(now_ns);
        let mut observations: Vec<Observation> = self.readings.try_iter().take(QUEUE).collect();
        observations.extend(self.gpus.iter_mut().filter_map(|gpu| gpu.check(now_ns)));
        observations
    }

    /// Faults that the driver told since the last call, and when.
    pub fn take_faults(&mut self) -> Vec<(u64, Xid)> {
        self.faults.as_ref().map_or_else(Vec::new, Faults::take)
    }

    /// The devices and who computes on them.
    #[must_use]
    pub fn view(&self) -> GpuView {
        let mut processes = None;
        for gpu in &self.gpus {
            if let Some(pids) = gpu.shared.processes().value() {
                processes
                    .get_or_insert_with(Vec::new)
                    .extend(pids.iter().map(|&pid| (gpu.index, pid)));
            }
        }
        GpuView {
            devices: self.gpus.iter().map(|gpu| gpu.shared.identity()).collect(),
            processes,
        }
    }

    /// Readings lost because the queue was full, since the start.
    #[must_use]
    pub fn dropped(&self) -> u64 {
        self.rounds.dropped()
    }

    /// Whether any device is listed.
    #[must_use]
    pub fn has_devices(&self) -> bool {
        !self.gpus.is_empty()
    }

    /// One line per GPU, for `doctor` and status.
    #[must_use]
    pub fn summaries(&self) -> Vec<GpuSummary> {
        let summary = |gpu: &Gpu| {
            let identity = gpu.shared.identity();
            GpuSummary {
                index: gpu.index,
                name: identity.name,
                pci: identity.pci,
                gpm: gpu.shared.gpm(),
                trouble: gpu.trouble(monotonic_ns()),
            }
        };
        self.gpus.iter().map(summary).collect()
    }

    /// Starts another thread when the present one hangs or ended.
    fn keep_going(&mut self, now_ns: u64) {
        let mut wanted = false;
        if self.thread.is_finished() {
            wanted = true;
            for (index, gpu) in self.gpus.iter_mut().enumerate() {
                gpu.ended |= self.rounds.is_taken(index) && gpu.shared.in_call().is_none();
            }
        }
        for gpu in &mut self.gpus {
            wanted |= gpu.hangs_anew(now_ns);
        }
        if !wanted {
            return;
        }
        match self.rounds.start() {
            Ok(thread) => self.thread = thread,
            Err(error) => {
                tracing::error!(%error, "no thread reads the GPUs any more");
                self.gpus.iter_mut().for_each(|gpu| gpu.left_alone_ns = None);
            }
        }
    }

    /// Waits until every device answered once or is stuck.
    fn await_devices(&mut self) {
        let until = monotonic_ns().saturating_add(ns(OPEN_DEADLINE));
        let waiting = |gpu: &Gpu, now| !gpu.shared.answered() && gpu.trouble(now).is_none();
        loop {
            let now = monotonic_ns();
            if now >= until || !self.gpus.iter().any(|gpu| waiting(gpu, now)) {
                return;
            }
            self.keep_going(now);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for NvmlSource {
    fn drop(&mut self) {
        self.rounds.stop();
    }
}

impl Gpu {
    fn new(index: u32) -> Self {
        Self {
            index,
            shared: Arc::new(GpuShared::new(index)),
            left_alone_ns: None,
            ended: false,
            stuck_since_ns: None,
            reported_ns: 0,
        }
    }

    /// Whether a call hangs for which no other thread was started yet.
    fn hangs_anew(&mut self, now_ns: u64) -> bool {
        let hung_since_ns = self.shared.in_call().and_then(|(_, since_ns)| {
            let hangs = now_ns.saturating_sub(since_ns) > ns(PATIENCE);
            hangs.then_some(since_ns)
        });
        let before = std::mem::replace(&mut self.left_alone_ns, hung_since_ns);
        hung_since_ns.is_some() && hung_since_ns != before
    }

    fn trouble(&self, now_ns: u64) -> Option<String> {
        if self.ended {
            return Some("its sampling ended abnormally; restart the agent".to_owned());
        }
        let (call, since_ns) = self.shared.in_call()?;
        let waited_ns = now_ns.saturating_sub(since_ns);
        (waited_ns > ns(CALL_DEADLINE))
            .then(|| format!("{call} has not returned for {} s", waited_ns / 1_000_000_000))
    }

    /// A failed reading, once a second while the GPU is stuck.
    fn check(&mut self, now_ns: u64) -> Option<Observation> {
        let Some(trouble) = self.trouble(now_ns) else {
            if self.stuck_since_ns.take().is_some() {
                tracing::info!(gpu = self.index, "NVML answers again");
            }
            return None;
        };
        if self.stuck_since_ns.is_none() {
            tracing::warn!(gpu = self.index, "no counters of this GPU: {trouble}");
            self.stuck_since_ns = Some(now_ns);
            self.reported_ns = now_ns.saturating_sub(ns(CALL_DEADLINE));
        } else if now_ns < self.reported_ns.saturating_add(STUCK_REPORT_NS) {
            return None;
        }
        let window = Window::new(self.reported_ns, now_ns)?;
        self.reported_ns = now_ns;
        Some(Observation {
            window,
            fact: Fact::Gpu(Box::new(convert::failed_reading(&self.shared, &trouble))),
        })
    }
}

/// Loads and starts the library in a thread of its own, which is left behind when it hangs.
fn open_library(library: &str) -> Result<Opened, NvmlError> {
    let (send, opened) = mpsc::sync_channel(1);
    let name = library.to_owned();
    std::thread::Builder::new()
        .name("nvml-open".to_owned())
        .spawn(move || {
            // The receiver is gone when this took too long.
            let _ = send.send(start_library(&name));
        })?;
    match opened.recv_timeout(OPEN_DEADLINE) {
        Ok(result) => result,
        Err(RecvTimeoutError::Timeout) => Err(NvmlError::Hung {
            library: library.to_owned(),
        }),
        Err(RecvTimeoutError::Disconnected) => Err(NvmlError::Init {
            library: library.to_owned(),
            why: "its start ended abnormally".to_owned(),
        }),
    }
}

fn start_library(library: &str) -> Result<Opened, NvmlError> {
    use nvml_wrapper::error::NvmlError as Raw;
    let refused = |error: Raw| match error {
        Raw::LibloadingError(why) => NvmlError::Library {
            library: library.to_owned(),
            why: why.to_string(),
        },
        Raw::FailedToLoadSymbol(why) => NvmlError::Library {
            library: library.to_owned(),
            why,
        },
        other => NvmlError::Init {
            library: library.to_owned(),
            why: other.to_string(),
        },
    };
    let nvml = Nvml::builder()
        .lib_path(library.as_ref())
        .init()
        .map_err(refused)?;
    let devices = nvml.device_count().map_err(refused)?;
    let driver_version = nvml.sys_driver_version().unwrap_or_default();
    Ok(Opened {
        nvml,
        devices,
        driver_version,
    })
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
