//! Statuses, handles, and what the process has made so far.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use virtual_node_state::gpu::Gpu;

use crate::engine::{Graph, engine};
use crate::module::KernelSpec;

pub(super) type Status = c_int;
pub(super) type Handle = *mut c_void;

pub(super) const SUCCESS: Status = 0;
pub(super) const INVALID_VALUE: Status = 1;
pub(super) const OUT_OF_MEMORY: Status = 2;
pub(super) const NOT_INITIALIZED: Status = 3;
pub(super) const NO_DEVICE: Status = 100;
pub(super) const INVALID_DEVICE: Status = 101;
pub(super) const INVALID_CONTEXT: Status = 201;
pub(super) const NO_BINARY_FOR_GPU: Status = 209;
pub(super) const INVALID_HANDLE: Status = 400;
pub(super) const NOT_FOUND: Status = 500;
pub(super) const NOT_READY: Status = 600;
pub(super) const NOT_SUPPORTED: Status = 801;
pub(super) const CAPTURE_UNSUPPORTED: Status = 900;
pub(super) const CAPTURE_UNMATCHED: Status = 903;

/// CUDA 12.4.
pub(super) const DRIVER_VERSION: c_int = 12_040;

pub(super) static INITIALISED: AtomicBool = AtomicBool::new(false);

thread_local! {
    pub(super) static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Modules, functions, graphs and default streams of the process.
#[derive(Default)]
pub(super) struct Objects {
    pub(super) modules: Vec<Option<Vec<Arc<KernelSpec>>>>,
    pub(super) functions: Vec<Arc<KernelSpec>>,
    pub(super) graphs: Vec<Option<Graph>>,
    pub(super) executables: Vec<Option<Graph>>,
    default_streams: HashMap<usize, usize>,
}

pub(super) fn objects() -> std::sync::MutexGuard<'static, Objects> {
    static OBJECTS: OnceLock<Mutex<Objects>> = OnceLock::new();
    OBJECTS
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Handles look like addresses of a kind, so that one kind cannot pass for another.
#[derive(Clone, Copy)]
pub(super) enum Tag {
    Context = 0x0c,
    Stream = 0x57,
    Event = 0xe0,
    Module = 0x30,
    Function = 0xf0,
    Graph = 0x6a,
    GraphExec = 0x6e,
}

pub(super) fn handle(tag: Tag, index: usize) -> Handle {
    (((tag as usize) << 40) | ((index + 1) << 8)) as Handle
}

pub(super) fn index(tag: Tag, handle: Handle) -> Option<usize> {
    let word = handle as usize;
    (word >> 40 == tag as usize && word & 0xff == 0)
        .then(|| (word >> 8 & 0xffff_ffff).checked_sub(1))
        .flatten()
}

/// Writes through an out-pointer of the caller.
///
/// # Safety
/// `to` is null or valid for a write of `T`.
pub(super) unsafe fn put<T>(to: *mut T, value: T) -> Status {
    if to.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: not null, and valid by the caller's contract.
    unsafe { to.write(value) };
    SUCCESS
}

pub(super) fn check(known: bool) -> Status {
    if known { SUCCESS } else { INVALID_HANDLE }
}

pub(super) fn current() -> Option<usize> {
    CURRENT.get()
}

/// The stream behind a handle; null, 1 and 2 name the context's default stream.
pub(super) fn stream_index(stream: Handle) -> Result<usize, Status> {
    if stream as usize > 2 {
        return index(Tag::Stream, stream).ok_or(INVALID_HANDLE);
    }
    let device = current().ok_or(INVALID_CONTEXT)?;
    Ok(*objects()
        .default_streams
        .entry(device)
        .or_insert_with(|| engine().stream_create(device)))
}

pub(super) fn on_stream(stream: Handle, act: impl FnOnce(usize) -> bool) -> Status {
    match stream_index(stream) {
        Ok(stream) => check(act(stream)),
        Err(status) => status,
    }
}

/// As [`on_stream`], for what cannot be recorded into a graph.
pub(super) fn on_running_stream(stream: Handle, act: impl FnOnce(usize) -> bool) -> Status {
    match stream_index(stream) {
        Ok(stream) if engine().is_capturing(stream) == Some(true) => CAPTURE_UNSUPPORTED,
        Ok(stream) => check(act(stream)),
        Err(status) => status,
    }
}

pub(super) fn device_index(device: c_int) -> Result<u32, Status> {
    if !INITIALISED.load(SeqCst) {
        return Err(NOT_INITIALIZED);
    }
    u32::try_from(device)
        .ok()
        .filter(|index| *index < Gpu::count())
        .ok_or(INVALID_DEVICE)
}
