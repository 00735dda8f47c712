//! Device and pinned memory. Device addresses are names only: nothing on the host may read behind them.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Mutex, OnceLock, PoisonError};

#[derive(Default)]
struct Table {
    next_address: u64,
    device: HashMap<u64, (usize, usize)>,
    pinned: HashMap<usize, Layout>,
}

fn table() -> std::sync::MutexGuard<'static, Table> {
    static TABLE: OnceLock<Mutex<Table>> = OnceLock::new();
    TABLE
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Names `bytes` of memory on `device`.
pub(crate) fn device_alloc(device: usize, bytes: usize) -> u64 {
    let mut table = table();
    if table.next_address == 0 {
        table.next_address = 0x7f00_0000_0000;
    }
    let address = table.next_address;
    table.next_address += (bytes as u64).next_multiple_of(1 << 21).max(1 << 21);
    table.device.insert(address, (device, bytes));
    address
}

/// Forgets device memory: device and size, or `None` when the address was never given out.
pub(crate) fn device_free(address: u64) -> Option<(usize, usize)> {
    table().device.remove(&address)
}

/// Pinned host memory, zeroed; null when there is none left.
pub(crate) fn pinned_alloc(bytes: usize) -> *mut c_void {
    let Ok(layout) = Layout::from_size_align(bytes.max(1), 4096) else {
        return std::ptr::null_mut();
    };
    // SAFETY: the layout is not empty.
    let at = unsafe { alloc_zeroed(layout) };
    if !at.is_null() {
        table().pinned.insert(at as usize, layout);
    }
    at.cast()
}

/// Gives pinned memory back; false when the pointer is not one of ours.
pub(crate) fn pinned_free(at: *mut c_void) -> bool {
    let Some(layout) = table().pinned.remove(&(at as usize)) else {
        return false;
    };
    // SAFETY: allocated by `pinned_alloc` with this layout and removed from the table, so freed once.
    unsafe { dealloc(at.cast(), layout) };
    true
}
