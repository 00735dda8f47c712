//! Faults that the GPU driver reports (XIDs), from whoever tells of them here.
//!
//! # Facade
//! - [`XidSource::open`]`()`: begins to read the kernel's log where that is allowed.
//! - [`XidSource::poll`]`()`: XIDs in the kernel's log since the last call.
//! - [`XidSource::offer`]`(Teller, xid, at_ns) -> bool`: whether an XID told by the driver's tracepoint or by NVML is new.
//!
//! Three tell of the same faults: the driver's tracepoint, when its module has one; the kernel's log; and NVML, which may
//! drop the first of a burst. Each is heard, and an XID is passed on once: as often as the one that told it most often.

mod kmsg;
mod merge;

use std::path::Path;

use self::kmsg::KernelLog;
use self::merge::Merger;
pub use self::merge::{Teller, Xid};

/// The kernel's log.
pub const KERNEL_LOG: &str = "/dev/kmsg";

/// Everyone who tells of XIDs.
#[derive(Debug)]
pub struct XidSource {
    log: Result<KernelLog, String>,
    merger: Merger,
}

impl XidSource {
    /// Begins to read the kernel's log, from now on.
    #[must_use]
    pub fn open() -> Self {
        Self {
            log: KernelLog::open(Path::new(KERNEL_LOG)),
            merger: Merger::default(),
        }
    }

    /// Only what is offered.
    #[must_use]
    pub fn without_log() -> Self {
        Self {
            log: Err("not asked for".to_owned()),
            merger: Merger::default(),
        }
    }

    /// New XIDs in the kernel's log.
    pub fn poll(&mut self, now_ns: u64) -> Vec<Xid> {
        let told = match &mut self.log {
            Ok(log) => log.read(),
            Err(_) => return Vec::new(),
        };
        told.into_iter()
            .filter(|xid| self.merger.is_new(Teller::Log, xid, now_ns))
            .collect()
    }

    /// Whether an XID that another tells is new.
    pub fn offer(&mut self, teller: Teller, xid: &Xid, at_ns: u64) -> bool {
        self.merger.is_new(teller, xid, at_ns)
    }

    /// Why the kernel's log is not read.
    #[must_use]
    pub fn no_log(&self) -> Option<&str> {
        self.log.as_ref().err().map(String::as_str)
    }

    /// Records of the kernel's log that were overwritten before they were read, since the last call: how often.
    pub fn take_overruns(&mut self) -> u64 {
        self.log.as_mut().map_or(0, KernelLog::take_overruns)
    }
}
