//! The exported functions.

use std::cell::Cell;
use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use virtual_node_state::gpu::{Gpu, MEMORY_BYTES, SM_COUNT};
use virtual_node_state::log::Kind;
use virtual_node_state::power::MAX_MHZ;

use crate::engine::{Collective, CollectiveEnd, engine};
use crate::module::{KernelSpec, parse};
use crate::{memory, symbols};

type Status = c_int;
type Handle = *mut c_void;

const SUCCESS: Status = 0;
const INVALID_VALUE: Status = 1;
const OUT_OF_MEMORY: Status = 2;
const NOT_INITIALIZED: Status = 3;
const NO_DEVICE: Status = 100;
const INVALID_DEVICE: Status = 101;
const INVALID_CONTEXT: Status = 201;
const NO_BINARY_FOR_GPU: Status = 209;
const INVALID_HANDLE: Status = 400;
const NOT_FOUND: Status = 500;
const NOT_READY: Status = 600;
const NOT_SUPPORTED: Status = 801;

/// CUDA 12.4.
const DRIVER_VERSION: c_int = 12_040;

static INITIALISED: AtomicBool = AtomicBool::new(false);

thread_local! {
    static CURRENT: Cell<Option<usize>> = const { Cell::new(None) };
}

/// Modules, functions and default streams of the process.
#[derive(Default)]
struct Objects {
    modules: Vec<Option<Vec<Arc<KernelSpec>>>>,
    functions: Vec<Arc<KernelSpec>>,
    default_streams: HashMap<usize, usize>,
}

fn objects() -> std::sync::MutexGuard<'static, Objects> {
    static OBJECTS: OnceLock<Mutex<Objects>> = OnceLock::new();
    OBJECTS
        .get_or_init(Mutex::default)
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// Handles look like addresses of a kind, so that one kind cannot pass for another.
#[derive(Clone, Copy)]
enum Tag {
    Context = 0x0c,
    Stream = 0x57,
    Event = 0xe0,
    Module = 0x30,
    Function = 0xf0,
}

fn handle(tag: Tag, index: usize) -> Handle {
    (((tag as usize) << 40) | ((index + 1) << 8)) as Handle
}

fn index(tag: Tag, handle: Handle) -> Option<usize> {
    let word = handle as usize;
    (word >> 40 == tag as usize && word & 0xff == 0)
        .then(|| (word >> 8 & 0xffff_ffff).checked_sub(1))
        .flatten()
}

/// Writes through an out-pointer of the caller.
///
/// # Safety
/// `to` is null or valid for a write of `T`.
unsafe fn put<T>(to: *mut T, value: T) -> Status {
    if to.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: not null, and valid by the caller's contract.
    unsafe { to.write(value) };
    SUCCESS
}

fn check(known: bool) -> Status {
    if known { SUCCESS } else { INVALID_HANDLE }
}

fn current() -> Option<usize> {
    CURRENT.get()
}

/// The stream behind a handle; null, 1 and 2 name the context's default stream.
fn stream_index(stream: Handle) -> Result<usize, Status> {
    if stream as usize > 2 {
        return index(Tag::Stream, stream).ok_or(INVALID_HANDLE);
    }
    let device = current().ok_or(INVALID_CONTEXT)?;
    Ok(*objects()
        .default_streams
        .entry(device)
        .or_insert_with(|| engine().stream_create(device)))
}

fn on_stream(stream: Handle, act: impl FnOnce(usize) -> bool) -> Status {
    match stream_index(stream) {
        Ok(stream) => check(act(stream)),
        Err(status) => status,
    }
}

fn device_index(device: c_int) -> Result<u32, Status> {
    if !INITIALISED.load(SeqCst) {
        return Err(NOT_INITIALIZED);
    }
    u32::try_from(device)
        .ok()
        .filter(|index| *index < Gpu::count())
        .ok_or(INVALID_DEVICE)
}

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
    on_stream(stream, |stream| engine().stream_synchronize(stream))
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
    on_stream(stream, |stream| engine().stream_wait(stream, event))
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
    on_stream(stream, |stream| engine().event_record(event, stream))
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

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const c_void) -> Status {
    if image.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: images are texts ended by zero (as PTX is); the caller vouches for that.
    let image = unsafe { CStr::from_ptr(image.cast()) };
    let Some(kernels) = image.to_str().ok().and_then(parse) else {
        return NO_BINARY_FOR_GPU;
    };
    let mut objects = objects();
    objects
        .modules
        .push(Some(kernels.into_iter().map(Arc::new).collect()));
    // SAFETY: the caller's out-pointer.
    unsafe { put(module, handle(Tag::Module, objects.modules.len() - 1)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> Status {
    let Some(module) = index(Tag::Module, module) else {
        return INVALID_HANDLE;
    };
    check(
        objects()
            .modules
            .get_mut(module)
            .is_some_and(|slot| slot.take().is_some()),
    )
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut Handle,
    module: Handle,
    name: *const c_char,
) -> Status {
    let Some(module) = index(Tag::Module, module) else {
        return INVALID_HANDLE;
    };
    if name.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's text, ended by zero.
    let name = unsafe { CStr::from_ptr(name) };
    let mut objects = objects();
    let Some(Some(kernels)) = objects.modules.get(module) else {
        return INVALID_HANDLE;
    };
    let Some(found) = kernels
        .iter()
        .find(|kernel| kernel.name.as_bytes() == name.to_bytes())
        .cloned()
    else {
        return NOT_FOUND;
    };
    objects.functions.push(found);
    // SAFETY: the caller's out-pointer.
    unsafe { put(function, handle(Tag::Function, objects.functions.len() - 1)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: Handle,
    _grid_x: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    _block_x: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared_bytes: c_uint,
    stream: Handle,
    _params: *mut Handle,
    _extra: *mut Handle,
) -> Status {
    let Some(function) = index(Tag::Function, function) else {
        return INVALID_HANDLE;
    };
    let Some(kernel) = objects().functions.get(function).cloned() else {
        return INVALID_HANDLE;
    };
    on_stream(stream, |stream| engine().launch(stream, kernel))
}

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
    on_stream(stream, |stream| engine().collective(stream, collective))
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
