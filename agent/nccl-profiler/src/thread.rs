//! The calling thread's id without a system call.
//!
//! The thread pointer leads to glibc's own record of a thread, which holds the id the kernel gave it. Where in the record
//! is found when the plugin is set up, and believed only if a second thread finds its own id in the same place.

use std::arch::asm;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes of the record that are looked at: glibc's has more than twice as many.
const LOOKED_AT: usize = 1024;

/// Where the id lies in a thread's record; 0 when unknown.
static ID_AT: AtomicUsize = AtomicUsize::new(0);

/// The calling thread's id; 0 when unknown.
pub(crate) fn id() -> u32 {
    match ID_AT.load(Ordering::Relaxed) {
        0 => 0,
        // SAFETY: the offset was found within the record.
        at => unsafe { read(at) },
    }
}

/// Looks for the place, which another thread has to [`confirm`].
pub(crate) fn find() -> usize {
    let own = own_id();
    (4..LOOKED_AT)
        .step_by(4)
        // SAFETY: within the record.
        .find(|&at| unsafe { read(at) } == own)
        .unwrap_or(0)
}

/// Believes in the place that another thread found, if it holds for the calling thread.
pub(crate) fn confirm(at: usize) {
    // SAFETY: `find` gives places within the record.
    if at != 0 && unsafe { read(at) } == own_id() {
        ID_AT.store(at, Ordering::Relaxed);
    }
}

fn own_id() -> u32 {
    // SAFETY: no arguments.
    let id = unsafe { libc::syscall(libc::SYS_gettid) };
    id as u32
}

/// Reads 32 bits of the calling thread's record.
///
/// # Safety
/// `at` is below [`LOOKED_AT`].
unsafe fn read(at: usize) -> u32 {
    let value: u32;
    // SAFETY: reads memory of the thread itself, by the contract within its record.
    unsafe {
        asm!("mov {value:e}, fs:[{at}]", value = out(reg) value, at = in(reg) at, options(nostack, readonly, preserves_flags));
    }
    value
}
