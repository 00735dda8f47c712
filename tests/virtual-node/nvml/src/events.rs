//! Event sets: virtual GPUs raise none, so a wait always runs out.

use std::ffi::{c_uint, c_void};
use std::time::Duration;

use crate::layout::EventData;
use crate::{Device, INVALID_ARGUMENT, SUCCESS, Status, TIMEOUT, all, answer, device};

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlEventSetCreate(to: *mut *mut c_void) -> Status {
    // SAFETY: the caller's out-pointer; the box is given back in `nvmlEventSetFree`.
    unsafe { answer(to, all().map(|_| Box::into_raw(Box::new(0_u8)).cast())) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlEventSetFree(set: *mut c_void) -> Status {
    if set.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: allocated by `nvmlEventSetCreate`, and the caller does not use it again.
    drop(unsafe { Box::from_raw(set.cast::<u8>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceRegisterEvents(of: Device, _kinds: u64, set: *mut c_void) -> Status {
    match device(of) {
        Ok(_) if set.is_null() => INVALID_ARGUMENT,
        Ok(_) => SUCCESS,
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetSupportedEventTypes(of: Device, to: *mut u64) -> Status {
    // XID, double-bit errors, clock changes.
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|_| 0x8 | 0x2 | 0x10)) }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlEventSetWait_v2(set: *mut c_void, _data: *mut EventData, timeout_ms: c_uint) -> Status {
    if set.is_null() {
        return INVALID_ARGUMENT;
    }
    std::thread::sleep(Duration::from_millis(u64::from(timeout_ms)));
    TIMEOUT
}
