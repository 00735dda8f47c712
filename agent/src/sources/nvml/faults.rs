//! Faults that the driver tells as events. A thread of its own waits for them: the library blocks while there are none.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use nvml_wrapper::bitmasks::event::EventTypes;
use nvml_wrapper::enums::event::XidError;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{EventSet, Nvml};

use crate::sources::clock::monotonic_ns;
use crate::sources::xid::Xid;

/// How long the library waits for one event, ms: how often the thread wakes for nothing.
const WAIT_MS: u32 = 5_000;
/// After an error of the library it is asked again this much later.
const PAUSE: Duration = Duration::from_secs(5);
/// Faults kept for a reader that is late.
const QUEUE: usize = 1024;

/// Faults, as they come.
#[derive(Debug)]
pub(super) struct Faults {
    told: Receiver<(u64, Xid)>,
    stopped: Arc<AtomicBool>,
}

impl Faults {
    /// Begins to wait for faults of the first `devices` devices.
    pub(super) fn start(nvml: &'static Nvml, devices: u32) -> std::io::Result<Self> {
        let (send, told) = sync_channel(QUEUE);
        let stopped = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&stopped);
        std::thread::Builder::new()
            .name("nvml-events".to_owned())
            .spawn(move || {
                if let Err(error) = listen(nvml, devices, &send, &stop) {
                    tracing::info!(%error, "NVML tells no faults; the driver's tracepoint and the kernel's log do");
                }
            })?;
        Ok(Self { told, stopped })
    }

    /// Faults since the last call, and when each was told.
    pub(super) fn take(&self) -> Vec<(u64, Xid)> {
        self.told.try_iter().take(QUEUE).collect()
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
    }
}

fn listen(
    nvml: &'static Nvml,
    devices: u32,
    send: &SyncSender<(u64, Xid)>,
    stop: &AtomicBool,
) -> Result<(), NvmlError> {
    let set = register(nvml, devices)?;
    while !stop.load(Ordering::Acquire) {
        let event = match set.wait(WAIT_MS) {
            Ok(event) => event,
            Err(NvmlError::Timeout) => continue,
            Err(error @ (NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_))) => return Err(error),
            Err(error) => {
                tracing::debug!(%error, "waiting for faults failed");
                std::thread::sleep(PAUSE);
                continue;
            }
        };
        let at_ns = monotonic_ns();
        let Some(XidError::Value(code)) = event.event_data else {
            continue;
        };
        let pci = event.device.pci_info().map_or_else(
            |_| String::new(),
            |pci| format!("{:04x}:{:02x}:{:02x}.0", pci.domain, pci.bus, pci.device),
        );
        let xid = Xid {
            pci,
            code: u32::try_from(code).unwrap_or(u32::MAX),
            message: String::new(),
        };
        // Nobody reads any more when the agent stops.
        let _ = send.try_send((at_ns, xid));
    }
    Ok(())
}

/// A set with every device that takes part.
fn register(nvml: &'static Nvml, devices: u32) -> Result<EventSet<'static>, NvmlError> {
    let mut wanted: Vec<u32> = (0..devices).collect();
    loop {
        match register_all(nvml, &wanted) {
            Ok(set) => return Ok(set),
            // A refusal frees the set, so the others are registered anew.
            Err((Some(index), error)) if wanted.len() > 1 => {
                tracing::debug!(index, %error, "a device tells no faults by NVML");
                wanted.retain(|other| *other != index);
            }
            Err((_, error)) => return Err(error),
        }
    }
}

/// A set with all of these devices, or the one that refused.
fn register_all(nvml: &'static Nvml, wanted: &[u32]) -> Result<EventSet<'static>, (Option<u32>, NvmlError)> {
    let mut set = nvml.create_event_set().map_err(|error| (None, error))?;
    for &index in wanted {
        let device = nvml
            .device_by_index(index)
            .map_err(|error| (Some(index), error))?;
        set = device
            .register_events(EventTypes::CRITICAL_XID_ERROR, set)
            .map_err(|error| (Some(index), error.error))?;
    }
    Ok(set)
}
