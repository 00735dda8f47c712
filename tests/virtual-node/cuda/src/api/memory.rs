//! Memory and copies.

use std::ffi::c_void;

use virtual_node_state::gpu::MEMORY_BYTES;
use virtual_node_state::log::Kind;

use super::common::*;
use crate::engine::engine;
use crate::memory;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAlloc_v2(address: *mut u64, bytes: usize) -> Status {
    let Some(device) = current() else {
        return INVALID_CONTEXT;
    };
    if bytes == 0 || bytes as u64 > MEMORY_BYTES {
        return if bytes == 0 { INVALID_VALUE } else { OUT_OF_MEMORY };
    }
    engine().memory(device, i64::try_from(bytes).unwrap_or(0));
    // SAFETY: the caller's out-pointer.
    unsafe { put(address, memory::device_alloc(device, bytes)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> Status {
    match memory::device_free(address) {
        Some((device, bytes)) => {
            // Freeing waits for the device, as in the driver.
            engine().device_synchronize(device);
            engine().memory(device, -i64::try_from(bytes).unwrap_or(0));
            SUCCESS
        }
        None => INVALID_VALUE,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuMemAllocHost_v2(at: *mut Handle, bytes: usize) -> Status {
    let memory = memory::pinned_alloc(bytes);
    if memory.is_null() {
        return OUT_OF_MEMORY;
    }
    // SAFETY: the caller's out-pointer.
    unsafe { put(at, memory) }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(at: Handle) -> Status {
    if memory::pinned_free(at) {
        SUCCESS
    } else {
        INVALID_VALUE
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(_to: u64, _from: *const c_void, bytes: usize, stream: Handle) -> Status {
    on_stream(stream, |stream| {
        engine().copy(stream, Kind::ToDevice, bytes as u64)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(_to: *mut c_void, _from: u64, bytes: usize, stream: Handle) -> Status {
    on_stream(stream, |stream| engine().copy(stream, Kind::ToHost, bytes as u64))
}

fn copy_and_wait(kind: Kind, bytes: usize) -> Status {
    on_stream(std::ptr::null_mut(), |stream| {
        engine().copy(stream, kind, bytes as u64) && engine().stream_synchronize(stream)
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoD_v2(_to: u64, _from: *const c_void, bytes: usize) -> Status {
    copy_and_wait(Kind::ToDevice, bytes)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoH_v2(_to: *mut c_void, _from: u64, bytes: usize) -> Status {
    copy_and_wait(Kind::ToHost, bytes)
}
