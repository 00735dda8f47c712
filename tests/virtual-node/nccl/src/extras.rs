//! What trainers use beside communicators and collectives: memory, registration of buffers, reduction operators.

use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicI32, Ordering::Relaxed};

use crate::api::{Handle, INVALID_ARGUMENT, INVALID_USAGE, SUCCESS, Status, UNHANDLED_CUDA, find, put};
use crate::gpu;

/// The first number that is no operator of NCCL's own.
const FIRST_CUSTOM_OPERATOR: c_int = 5;

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclMemAlloc(pointer: *mut *mut c_void, bytes: usize) -> Status {
    match gpu::allocate(bytes) {
        // SAFETY: the caller's out-pointer.
        Some(address) => unsafe { put(pointer, address as *mut c_void) },
        None => UNHANDLED_CUDA,
    }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclMemFree(pointer: *mut c_void) -> Status {
    if pointer.is_null() || gpu::free(pointer as u64) {
        SUCCESS
    } else {
        UNHANDLED_CUDA
    }
}

/// Registration makes transfers cheaper, and here they cost what the link costs: the buffer itself is the handle.
///
/// # Safety
/// `registration` is null or valid for a write.
unsafe fn register(comm: Handle, buffer: *mut c_void, registration: *mut Handle) -> Status {
    if find(comm).is_none() || buffer.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: valid by the caller's contract.
    unsafe { put(registration, buffer) }
}

fn deregister(comm: Handle) -> Status {
    if find(comm).is_some() {
        SUCCESS
    } else {
        INVALID_ARGUMENT
    }
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommRegister(
    comm: Handle,
    buffer: *mut c_void,
    _bytes: usize,
    registration: *mut Handle,
) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { register(comm, buffer, registration) }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclCommDeregister(comm: Handle, _registration: Handle) -> Status {
    deregister(comm)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclCommWindowRegister(
    comm: Handle,
    buffer: *mut c_void,
    _bytes: usize,
    window: *mut Handle,
    _flags: c_int,
) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { register(comm, buffer, window) }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclCommWindowDeregister(comm: Handle, _window: Handle) -> Status {
    deregister(comm)
}

#[unsafe(no_mangle)]
pub(crate) unsafe extern "C" fn ncclRedOpCreatePreMulSum(
    operator: *mut c_int,
    scalar: *mut c_void,
    _datatype: c_int,
    _residence: c_int,
    comm: Handle,
) -> Status {
    static NEXT: AtomicI32 = AtomicI32::new(FIRST_CUSTOM_OPERATOR);
    if scalar.is_null() || find(comm).is_none() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller's out-pointer.
    unsafe { put(operator, NEXT.fetch_add(1, Relaxed)) }
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclRedOpDestroy(operator: c_int, comm: Handle) -> Status {
    if operator < FIRST_CUSTOM_OPERATOR || find(comm).is_none() {
        return INVALID_ARGUMENT;
    }
    SUCCESS
}

/// Estimates of a group's time need NCCL's own model of its algorithms, which is not played here.
#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclGroupSimulateEnd(_estimate: *mut c_void) -> Status {
    INVALID_USAGE
}

#[unsafe(no_mangle)]
pub(crate) extern "C" fn ncclResetDebugInit() {}
