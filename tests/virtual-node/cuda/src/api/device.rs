//! Devices and contexts.

use std::ffi::{c_char, c_int, c_uint};
use std::sync::atomic::Ordering::SeqCst;

use virtual_node_state::gpu::{Gpu, MEMORY_BYTES, SM_COUNT};
use virtual_node_state::power::MAX_MHZ;

use super::common::*;
use crate::engine::engine;

#[unsafe(no_mangle)]
extern "C" fn cuInit(flags: c_uint) -> Status {
    if flags != 0 {
        return INVALID_VALUE;
    }
    if Gpu::count() == 0 {
        return NO_DEVICE;
    }
    INITIALISED.store(true, SeqCst);
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { put(version, DRIVER_VERSION) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetCount(count: *mut c_int) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { put(count, Gpu::count().cast_signed()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    match device_index(ordinal) {
        // SAFETY: the caller's out-pointer.
        Ok(_) => unsafe { put(device, ordinal) },
        Err(status) => status,
    }
}

/// Copies a text into the caller's buffer, cut to fit and always ended by zero.
///
/// # Safety
/// `to` is null or valid for `len` bytes.
unsafe fn put_text(to: *mut c_char, len: c_int, text: &str) -> Status {
    let Some(room) = usize::try_from(len)
        .ok()
        .and_then(|len| len.checked_sub(1))
        .filter(|_| !to.is_null())
    else {
        return INVALID_VALUE;
    };
    let taken = text.len().min(room);
    // SAFETY: `taken` plus the closing zero fit into `len` bytes.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast(), taken);
        to.add(taken).write(0);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, device: c_int) -> Status {
    match device_index(device) {
        // SAFETY: the caller's buffer of `len` bytes.
        Ok(_) => unsafe { put_text(name, len, "NVIDIA H100 80GB HBM3") },
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetPCIBusId(text: *mut c_char, len: c_int, device: c_int) -> Status {
    match device_index(device).map(Gpu::open) {
        // SAFETY: the caller's buffer of `len` bytes.
        Ok(Ok(gpu)) => unsafe { put_text(text, len, &gpu.pci_address().to_uppercase()) },
        Ok(Err(_)) => INVALID_DEVICE,
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, device: c_int) -> Status {
    match device_index(device) {
        // SAFETY: the caller's out-pointer.
        Ok(_) => unsafe { put(bytes, usize::try_from(MEMORY_BYTES).unwrap_or(usize::MAX)) },
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) -> Status {
    let gpu = match device_index(device).map(Gpu::open) {
        Ok(Ok(gpu)) => gpu,
        Ok(Err(_)) => return INVALID_DEVICE,
        Err(status) => return status,
    };
    let answer = match attribute {
        1 => 1_024,                               // threads per block
        10 => 32,                                 // warp size
        13 => (MAX_MHZ * 1_000).cast_signed(),    // clock, kHz
        16 => SM_COUNT.cast_signed(),             // multiprocessors
        33 => gpu.bus.load(SeqCst).cast_signed(), // PCI bus
        34 | 50 => 0,                             // PCI device, domain
        39 => 2_048,                              // threads per multiprocessor
        75 => 9,                                  // compute capability 9.0
        76 => 0,
        _ => return INVALID_VALUE,
    };
    // SAFETY: the caller's out-pointer.
    unsafe { put(value, answer) }
}

fn open_context(device: c_int) -> Result<usize, Status> {
    let device = device_index(device)? as usize;
    if engine().open(device) {
        Ok(device)
    } else {
        Err(INVALID_DEVICE)
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuDevicePrimaryCtxRetain(context: *mut Handle, device: c_int) -> Status {
    match open_context(device) {
        // SAFETY: the caller's out-pointer.
        Ok(device) => unsafe { put(context, handle(Tag::Context, device)) },
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> Status {
    device_index(device).map_or_else(|status| status, |_| SUCCESS)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxCreate_v2(context: *mut Handle, _flags: c_uint, device: c_int) -> Status {
    match open_context(device) {
        Ok(device) => {
            CURRENT.set(Some(device));
            // SAFETY: the caller's out-pointer.
            unsafe { put(context, handle(Tag::Context, device)) }
        }
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxDestroy_v2(context: Handle) -> Status {
    match index(Tag::Context, context) {
        Some(device) => {
            engine().device_synchronize(device);
            SUCCESS
        }
        None => INVALID_CONTEXT,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSetCurrent(context: Handle) -> Status {
    if context.is_null() {
        CURRENT.set(None);
        return SUCCESS;
    }
    match index(Tag::Context, context) {
        Some(device) => {
            CURRENT.set(Some(device));
            SUCCESS
        }
        None => INVALID_CONTEXT,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetCurrent(context: *mut Handle) -> Status {
    let answer = current().map_or(std::ptr::null_mut(), |device| handle(Tag::Context, device));
    // SAFETY: the caller's out-pointer.
    unsafe { put(context, answer) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuCtxGetDevice(device: *mut c_int) -> Status {
    match current() {
        // SAFETY: the caller's out-pointer.
        Some(index) => unsafe { put(device, c_int::try_from(index).unwrap_or(0)) },
        None => INVALID_CONTEXT,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxSynchronize() -> Status {
    match current() {
        Some(device) => {
            engine().device_synchronize(device);
            SUCCESS
        }
        None => INVALID_CONTEXT,
    }
}
