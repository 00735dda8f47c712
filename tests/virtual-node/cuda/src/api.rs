//! The exported functions, and those for the communication library beside this one.

mod common;
mod device;
mod graph;
mod memory;
mod module;
mod stream;

use std::ffi::{CStr, c_char, c_int};

use crate::engine::{Collective, CollectiveEnd, engine};
use crate::symbols;
use common::*;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorString(status: Status, text: *mut *const c_char) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { put(text, describe(status).1.as_ptr()) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetErrorName(status: Status, text: *mut *const c_char) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { put(text, describe(status).0.as_ptr()) }
}

fn describe(status: Status) -> (&'static CStr, &'static CStr) {
    match status {
        SUCCESS => (c"CUDA_SUCCESS", c"no error"),
        INVALID_VALUE => (c"CUDA_ERROR_INVALID_VALUE", c"invalid argument"),
        OUT_OF_MEMORY => (c"CUDA_ERROR_OUT_OF_MEMORY", c"out of memory"),
        NOT_INITIALIZED => (c"CUDA_ERROR_NOT_INITIALIZED", c"initialization error"),
        NO_DEVICE => (c"CUDA_ERROR_NO_DEVICE", c"no CUDA-capable device is detected"),
        INVALID_DEVICE => (c"CUDA_ERROR_INVALID_DEVICE", c"invalid device ordinal"),
        INVALID_CONTEXT => (c"CUDA_ERROR_INVALID_CONTEXT", c"invalid device context"),
        NO_BINARY_FOR_GPU => (
            c"CUDA_ERROR_NO_BINARY_FOR_GPU",
            c"no kernel image is available for execution",
        ),
        INVALID_HANDLE => (c"CUDA_ERROR_INVALID_HANDLE", c"invalid resource handle"),
        NOT_FOUND => (c"CUDA_ERROR_NOT_FOUND", c"named symbol not found"),
        NOT_READY => (c"CUDA_ERROR_NOT_READY", c"device not ready"),
        NOT_SUPPORTED => (c"CUDA_ERROR_NOT_SUPPORTED", c"operation not supported"),
        CAPTURE_UNSUPPORTED => (
            c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
            c"operation not permitted when stream is capturing",
        ),
        CAPTURE_UNMATCHED => (
            c"CUDA_ERROR_STREAM_CAPTURE_UNMATCHED",
            c"the capture was not initiated in this stream",
        ),
        _ => (c"CUDA_ERROR_UNKNOWN", c"unknown error"),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGetProcAddress_v2(
    symbol: *const c_char,
    function: *mut Handle,
    _cuda_version: c_int,
    _flags: u64,
    found: *mut c_int,
) -> Status {
    if symbol.is_null() || function.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's text, ended by zero.
    let symbol = unsafe { CStr::from_ptr(symbol) };
    let address = symbols::lookup(symbol);
    if !found.is_null() {
        // SAFETY: the caller's out-pointer; 0 means found, 1 means no such symbol.
        unsafe { found.write(c_int::from(address.is_null())) };
    }
    // SAFETY: the caller's out-pointer.
    let written = unsafe { put(function, address) };
    if address.is_null() { NOT_FOUND } else { written }
}

/// For the communication library beside this one: submits a collective's kernel. Not a CUDA function.
#[unsafe(no_mangle)]
unsafe extern "C" fn virtualGpuEnqueueCollective(stream: Handle, collective: *const Collective) -> Status {
    if collective.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: not null, and the caller passes a live `Collective`.
    let collective = unsafe { *collective };
    on_running_stream(stream, |stream| engine().collective(stream, collective))
}

/// For the communication library beside this one: says how a collective ended. Not a CUDA function.
#[unsafe(no_mangle)]
unsafe extern "C" fn virtualGpuCollectiveEnded(number: u64, end: *const CollectiveEnd) -> Status {
    if end.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: not null, and the caller passes a live `CollectiveEnd`.
    let end = unsafe { &*end };
    check(engine().collective_ended(number, end))
}
