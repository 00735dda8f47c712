//! What the library does with a profiler plugin that it loaded.

use std::ffi::{c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicI32, Ordering};

use super::{Image, Outcome};

/// Numbers of nccl_profiler.h.
const APPEND: c_int = 17;
const APPEND_END: c_int = 18;
/// What a proxy thread took up, as told to the plugin.
const APPENDED: c_int = 7;

/// Says the library's mask of events.
pub(crate) fn mask(image: &Image) -> Outcome {
    let at = image.local("ncclProfilerEventMask").ok_or("there is no mask")?;
    // SAFETY: an `int` of the library, which is never unloaded.
    let mask = unsafe { AtomicI32::from_ptr(at as *mut c_int) };
    Ok(mask.load(Ordering::Relaxed).to_string())
}

/// Tells of a proxy thread that took up work, through the library's own functions; says whether the plugin gave a handle.
pub(crate) fn control(image: &Image) -> Outcome {
    type Start = extern "C" fn(*mut c_void, *mut *mut c_void) -> c_int;
    type Record = extern "C" fn(*mut c_void, c_int, c_int) -> c_int;
    type Stop = extern "C" fn(*mut c_void) -> c_int;
    let local = |name: &str| image.local(name).ok_or_else(|| format!("there is no {name}"));
    let start = local("_Z31ncclProfilerStartProxyCtrlEventPvPS_")?;
    let record = local("_Z37ncclProfilerRecordProxyCtrlEventStatePvi24ncclProfilerEventState_t")?;
    let stop = local("_Z30ncclProfilerStopProxyCtrlEventPv")?;
    // SAFETY: the names carry the types.
    let (start, record, stop) = unsafe {
        (
            std::mem::transmute::<usize, Start>(start),
            std::mem::transmute::<usize, Record>(record),
            std::mem::transmute::<usize, Stop>(stop),
        )
    };
    let mut handle = ptr::null_mut();
    start(ptr::null_mut(), &mut handle);
    record(handle, 0, APPEND);
    record(handle, APPENDED, APPEND_END);
    stop(handle);
    Ok(u8::from(!handle.is_null()).to_string())
}
