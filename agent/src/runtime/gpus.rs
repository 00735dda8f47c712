//! NVML as the gathering thread has it: still being opened, read, or missing.
//!
//! A driver may take long to start, or hang while it does. It is opened in a thread of its own, so that everything
//! else begins meanwhile.

use std::path::Path;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, sync_channel};
use std::time::Duration;

use super::shared::Shared;
use super::status::Condition;
use crate::config;
use crate::observation::Observation;
use crate::sources::nvml::{NvmlError, NvmlSource};
use crate::sources::xid::Xid;

/// The agent's own binary, also after a newer one took its place on disk.
const OWN_BINARY: &str = "/proc/self/exe";
/// How long the other sources wait for the driver, so that processes are met with their GPUs known where it is quick.
const PATIENCE: Duration = Duration::from_secs(1);

const PART: &str = "nvml";

/// The GPUs' counters.
#[derive(Debug)]
pub(super) enum Gpus {
    Opening(Receiver<Result<NvmlSource, NvmlError>>),
    /// Open, and no device has said anything yet.
    Silent(NvmlSource),
    Read(NvmlSource),
    Missing,
}

impl Gpus {
    /// Begins to open the library; gives it a moment.
    pub(super) fn open(settings: &config::Nvml, shared: &Shared) -> Self {
        let (send, opened) = sync_channel(1);
        let settings = settings.clone();
        let opening = move || {
            // Nobody listens any more when the agent stops meanwhile.
            let _ = send.send(NvmlSource::open_tried(Path::new(OWN_BINARY), &settings));
        };
        shared.status.lock().set_health(PART, Condition::Starting);
        let thread = std::thread::Builder::new().name("nvml-open".to_owned());
        if let Err(error) = thread.spawn(opening) {
            return Self::opened(Err(error.into()), shared);
        }
        match opened.recv_timeout(PATIENCE) {
            Ok(result) => Self::opened(result, shared),
            Err(RecvTimeoutError::Timeout) => {
                tracing::info!("the driver takes its time to start; everything else begins meanwhile");
                Self::Opening(opened)
            }
            Err(RecvTimeoutError::Disconnected) => Self::lost(shared),
        }
    }

    fn opened(result: Result<NvmlSource, NvmlError>, shared: &Shared) -> Self {
        match result {
            Ok(source) if source.has_devices() => Self::Silent(source),
            Ok(source) => {
                super::works(shared, PART);
                Self::Read(source)
            }
            Err(error) => {
                super::missing(shared, PART, &error);
                Self::Missing
            }
        }
    }

    fn lost(shared: &Shared) -> Self {
        let why = "no GPU counters: the thread that opens the library ended; restart the agent";
        super::missing(shared, PART, &why);
        Self::Missing
    }

    /// Everything that arrived since the last call.
    pub(super) fn poll(&mut self, now_ns: u64, shared: &Shared) -> Vec<Observation> {
        if let Self::Opening(opened) = self {
            *self = match opened.try_recv() {
                Ok(result) => Self::opened(result, shared),
                Err(TryRecvError::Empty) => return Vec::new(),
                Err(TryRecvError::Disconnected) => Self::lost(shared),
            };
        }
        match self {
            Self::Opening(_) | Self::Missing => Vec::new(),
            Self::Read(source) => source.poll(now_ns),
            Self::Silent(source) => {
                let observations = source.poll(now_ns);
                if !observations.is_empty()
                    && let Self::Silent(source) = std::mem::replace(self, Self::Missing)
                {
                    *self = Self::Read(source);
                }
                observations
            }
        }
    }

    /// Faults that the driver told since the last call, and when.
    pub(super) fn take_faults(&mut self) -> Vec<(u64, Xid)> {
        match self {
            Self::Silent(source) | Self::Read(source) => source.take_faults(),
            Self::Opening(_) | Self::Missing => Vec::new(),
        }
    }

    /// The source, once it is open.
    pub(super) const fn source(&self) -> Option<&NvmlSource> {
        match self {
            Self::Silent(source) | Self::Read(source) => Some(source),
            Self::Opening(_) | Self::Missing => None,
        }
    }

    /// Whether the devices are known to say something.
    pub(super) const fn is_read(&self) -> bool {
        matches!(self, Self::Read(_))
    }
}
