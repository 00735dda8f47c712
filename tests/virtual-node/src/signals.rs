//! Ways in which a run is told to stop early: SIGTERM, SIGINT, or the end of its standard input.
#![expect(unsafe_code, reason = "installs signal handlers")]

use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_signal: libc::c_int) {
    ASKED.store(true, SeqCst);
}

/// Starts to listen.
pub(crate) fn listen() -> anyhow::Result<()> {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic.
        unsafe { libc::signal(signal, note as *const () as libc::sighandler_t) };
    }
    std::thread::Builder::new().name("stdin".into()).spawn(|| {
        let mut sink = [0; 64];
        while std::io::stdin()
            .lock()
            .read(&mut sink)
            .is_ok_and(|count| count > 0)
        {}
        ASKED.store(true, SeqCst);
    })?;
    Ok(())
}

/// Whether the run was told to stop.
pub(crate) fn asked() -> bool {
    ASKED.load(SeqCst)
}
