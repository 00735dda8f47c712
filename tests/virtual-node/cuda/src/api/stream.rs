//! Streams and events.

use std::ffi::{c_int, c_uint};

use super::common::*;
use crate::engine::engine;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreate(stream: *mut Handle, _flags: c_uint) -> Status {
    match current() {
        // SAFETY: the caller's out-pointer.
        Some(device) => unsafe { put(stream, handle(Tag::Stream, engine().stream_create(device))) },
        None => INVALID_CONTEXT,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamCreateWithPriority(
    stream: *mut Handle,
    flags: c_uint,
    _priority: c_int,
) -> Status {
    // SAFETY: handed on as it came.
    unsafe { cuStreamCreate(stream, flags) }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: Handle) -> Status {
    index(Tag::Stream, stream).map_or(INVALID_HANDLE, |stream| check(engine().stream_destroy(stream)))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamSynchronize(stream: Handle) -> Status {
    on_running_stream(stream, |stream| engine().stream_synchronize(stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamQuery(stream: Handle) -> Status {
    match stream_index(stream).map(|stream| engine().stream_idle(stream)) {
        Ok(Some(true)) => SUCCESS,
        Ok(Some(false)) => NOT_READY,
        Ok(None) => INVALID_HANDLE,
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: Handle, event: Handle, _flags: c_uint) -> Status {
    let Some(event) = index(Tag::Event, event) else {
        return INVALID_HANDLE;
    };
    on_running_stream(stream, |stream| engine().stream_wait(stream, event))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventCreate(event: *mut Handle, _flags: c_uint) -> Status {
    if current().is_none() {
        return INVALID_CONTEXT;
    }
    // SAFETY: the caller's out-pointer.
    unsafe { put(event, handle(Tag::Event, engine().event_create())) }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: Handle) -> Status {
    index(Tag::Event, event).map_or(INVALID_HANDLE, |event| check(engine().event_destroy(event)))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: Handle, stream: Handle) -> Status {
    let Some(event) = index(Tag::Event, event) else {
        return INVALID_HANDLE;
    };
    on_running_stream(stream, |stream| engine().event_record(event, stream))
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: Handle) -> Status {
    match index(Tag::Event, event).and_then(|event| engine().event_done(event)) {
        Some(true) => SUCCESS,
        Some(false) => NOT_READY,
        None => INVALID_HANDLE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventSynchronize(event: Handle) -> Status {
    index(Tag::Event, event).map_or(INVALID_HANDLE, |event| check(engine().event_synchronize(event)))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuEventElapsedTime(ms: *mut f32, start: Handle, end: Handle) -> Status {
    let (Some(start), Some(end)) = (index(Tag::Event, start), index(Tag::Event, end)) else {
        return INVALID_HANDLE;
    };
    match engine().elapsed_ms(start, end) {
        // SAFETY: the caller's out-pointer.
        Some(elapsed) => unsafe { put(ms, elapsed) },
        None => INVALID_HANDLE,
    }
}
