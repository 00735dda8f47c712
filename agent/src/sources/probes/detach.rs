//! Detaching away from the caller.
//!
//! The kernel lets every closing probe wait until no CPU can still be in it: 10 to 100 ms each, one after the other under one
//! lock (measured on 6.18: 17 function probes 1.8 s, 31 tracepoints 2.0 s, closing them from many threads no faster).

use std::thread::{self, JoinHandle};

/// Runs `detach` in the background. Without a thread it runs here, and there is nothing to wait for.
pub(super) fn in_background(detach: impl FnOnce() + Send + 'static) -> Option<JoinHandle<()>> {
    thread::Builder::new()
        .name("detach".to_owned())
        .spawn(detach)
        .ok()
}
