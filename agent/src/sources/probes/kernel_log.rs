//! What the programs say in development builds, passed on to the agent's log.

use aya::Ebpf;
use aya_log::EbpfLogger;
use log::{Level, Log, Metadata, Record};

/// Passes records of the `log` crate on to `tracing`.
struct ToTracing;

impl Log for ToTracing {
    fn enabled(&self, _metadata: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let (program, text) = (record.target(), record.args());
        match record.level() {
            Level::Error => tracing::error!(program, "{text}"),
            Level::Warn => tracing::warn!(program, "{text}"),
            Level::Info => tracing::info!(program, "{text}"),
            Level::Debug | Level::Trace => tracing::debug!(program, "{text}"),
        }
    }

    fn flush(&self) {}
}

/// The reader of what the programs say.
pub(super) struct KernelLog(Option<EbpfLogger<ToTracing>>);

impl KernelLog {
    /// An object without log records gives a reader of nothing.
    pub(super) fn new(ebpf: &mut Ebpf) -> Self {
        let logger = EbpfLogger::init_with_logger(ebpf, ToTracing);
        Self(
            logger
                .inspect_err(|error| tracing::debug!(%error, "the programs are built without a log"))
                .ok(),
        )
    }

    /// Passes on what there is.
    pub(super) fn pass_on(&mut self) {
        if let Some(logger) = &mut self.0 {
            logger.flush();
        }
    }
}
