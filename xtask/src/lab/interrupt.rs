//! Ctrl-C and termination as a flag, so that the normal way out cleans up.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Result, bail};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn remember(_signal: libc::c_int) {
    INTERRUPTED.store(true, Ordering::Relaxed);
}

/// From now on SIGINT, SIGTERM and SIGHUP only set the flag that [`check`] reads.
pub fn catch() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let handler: extern "C" fn(libc::c_int) = remember;
        // SAFETY: the handler only stores to an atomic, which is async-signal-safe; SIGINT, SIGTERM and SIGHUP may be
        // caught.
        unsafe { libc::signal(signal, handler as libc::sighandler_t) };
    }
}

/// Whether to stop.
///
/// # Errors
/// A signal came.
pub fn check() -> Result<()> {
    if INTERRUPTED.load(Ordering::Relaxed) {
        bail!("interrupted; everything that was started is being stopped");
    }
    Ok(())
}
