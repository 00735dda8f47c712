//! `libnvidia-ml.so.1` without the silicon: NVML's names, structures and return codes, answered from the shared state
//! of the virtual GPUs.

mod api;
mod events;
mod fields;
mod gpm;
mod layout;
mod processes;

use std::ffi::{c_char, c_int};
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::sync::{Mutex, OnceLock, PoisonError};

use virtual_node_state::gpu::Gpu;
use virtual_node_state::map::Shared;

pub(crate) type Status = c_int;
pub(crate) const SUCCESS: Status = 0;
pub(crate) const UNINITIALIZED: Status = 1;
pub(crate) const INVALID_ARGUMENT: Status = 2;
pub(crate) const NOT_SUPPORTED: Status = 3;
pub(crate) const NOT_FOUND: Status = 6;
pub(crate) const INSUFFICIENT_SIZE: Status = 7;
pub(crate) const DRIVER_NOT_LOADED: Status = 9;
pub(crate) const TIMEOUT: Status = 10;
pub(crate) const VERSION_MISMATCH: Status = 25;

/// A device handle: its index plus one, shifted so that it looks like an address.
pub(crate) type Device = *mut std::ffi::c_void;

static USERS: AtomicU32 = AtomicU32::new(0);

fn gpus() -> &'static [Shared<Gpu>] {
    static GPUS: OnceLock<Mutex<&'static [Shared<Gpu>]>> = OnceLock::new();
    let mut found = GPUS
        .get_or_init(|| Mutex::new(&[]))
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    if found.is_empty() {
        let all: Vec<Shared<Gpu>> = (0..Gpu::count())
            .map_while(|index| Gpu::open(index).ok())
            .collect();
        // Mapped once for the life of the process, as handles are.
        *found = Vec::leak(all);
    }
    *found
}

/// Counts a user of the library.
pub(crate) fn start() -> Status {
    if gpus().is_empty() {
        return DRIVER_NOT_LOADED;
    }
    USERS.fetch_add(1, SeqCst);
    SUCCESS
}

/// Counts one less.
pub(crate) fn stop() -> Status {
    match USERS.fetch_update(SeqCst, SeqCst, |users| users.checked_sub(1)) {
        Ok(_) => SUCCESS,
        Err(_) => UNINITIALIZED,
    }
}

/// All GPUs, once the library is initialised.
pub(crate) fn all() -> Result<&'static [Shared<Gpu>], Status> {
    if USERS.load(SeqCst) == 0 {
        Err(UNINITIALIZED)
    } else {
        Ok(gpus())
    }
}

/// The handle of GPU `index`.
pub(crate) fn handle(index: usize) -> Device {
    ((0x6e00 + index + 1) << 12) as Device
}

/// The GPU behind a handle.
pub(crate) fn device(handle: Device) -> Result<&'static Gpu, Status> {
    let index = (handle as usize >> 12)
        .checked_sub(0x6e01)
        .ok_or(INVALID_ARGUMENT)?;
    all()?.get(index).map(|gpu| &**gpu).ok_or(INVALID_ARGUMENT)
}

/// A status, or what to write through an out-pointer of the caller.
///
/// # Safety
/// `to` is null or valid for a write of `T`.
pub(crate) unsafe fn answer<T>(to: *mut T, value: Result<T, Status>) -> Status {
    match value {
        Ok(_) if to.is_null() => INVALID_ARGUMENT,
        Ok(value) => {
            // SAFETY: not null, and valid by the caller's contract.
            unsafe { to.write(value) };
            SUCCESS
        }
        Err(status) => status,
    }
}

/// A status, or a text to write into the caller's buffer.
///
/// # Safety
/// `to` is null or valid for `length` bytes.
pub(crate) unsafe fn answer_text(to: *mut c_char, length: u32, value: Result<String, Status>) -> Status {
    let text = match value {
        Ok(text) => text,
        Err(status) => return status,
    };
    if to.is_null() {
        return INVALID_ARGUMENT;
    }
    if text.len() >= length as usize {
        return INSUFFICIENT_SIZE;
    }
    // SAFETY: text and closing zero fit into the buffer.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast(), text.len());
        to.add(text.len()).write(0);
    }
    SUCCESS
}

#[cfg(test)]
mod tests;
