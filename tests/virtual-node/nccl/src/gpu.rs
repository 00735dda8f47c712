//! The part of the driver that collectives need, found in the process's own `libcuda.so.1`.

use std::ffi::{CStr, c_int, c_void};
use std::sync::OnceLock;

/// A collective's kernel; layout shared with the driver beside this library.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) start: extern "C" fn(*mut c_void, u64, u64),
    pub(crate) user: *mut c_void,
    pub(crate) sm_ppm: u64,
    pub(crate) bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) comm: u64,
    pub(crate) sequence: u64,
    pub(crate) ranks_nodes: u64,
}

/// How it ended; layout shared with the driver beside this library.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) arrived_ns: u64,
    pub(crate) all_arrived_ns: u64,
    pub(crate) moved_ns: u64,
    pub(crate) end_ns: u64,
}

type Enqueue = unsafe extern "C" fn(*mut c_void, *const Kernel) -> c_int;
type Ended = unsafe extern "C" fn(u64, *const End) -> c_int;
type CurrentDevice = unsafe extern "C" fn(*mut c_int) -> c_int;
type Allocate = unsafe extern "C" fn(*mut u64, usize) -> c_int;
type Free = unsafe extern "C" fn(u64) -> c_int;

struct Driver {
    enqueue: Enqueue,
    ended: Ended,
    current_device: CurrentDevice,
    allocate: Allocate,
    free: Free,
}

fn symbol(library: *mut c_void, name: &CStr) -> Option<*mut c_void> {
    // SAFETY: a live library handle and a text ended by zero.
    let found = unsafe { libc::dlsym(library, name.as_ptr()) };
    (!found.is_null()).then_some(found)
}

fn driver() -> Option<&'static Driver> {
    static DRIVER: OnceLock<Option<Driver>> = OnceLock::new();
    let load = || {
        // SAFETY: loads the driver as NCCL does; the handle is kept for the life of the process.
        let library = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            return None;
        }
        let enqueue = symbol(library, c"virtualGpuEnqueueCollective")?;
        let ended = symbol(library, c"virtualGpuCollectiveEnded")?;
        let current_device = symbol(library, c"cuCtxGetDevice")?;
        let allocate = symbol(library, c"cuMemAlloc_v2")?;
        let free = symbol(library, c"cuMemFree_v2")?;
        // SAFETY: the stand-in driver exports these with exactly these signatures.
        Some(unsafe {
            Driver {
                enqueue: std::mem::transmute::<*mut c_void, Enqueue>(enqueue),
                ended: std::mem::transmute::<*mut c_void, Ended>(ended),
                current_device: std::mem::transmute::<*mut c_void, CurrentDevice>(current_device),
                allocate: std::mem::transmute::<*mut c_void, Allocate>(allocate),
                free: std::mem::transmute::<*mut c_void, Free>(free),
            }
        })
    };
    DRIVER.get_or_init(load).as_ref()
}

/// Submits a collective's kernel; false when the driver refuses.
pub(crate) fn enqueue(stream: *mut c_void, kernel: &Kernel) -> bool {
    // SAFETY: `kernel` lives for the call; the driver copies it.
    driver().is_some_and(|driver| unsafe { (driver.enqueue)(stream, kernel) } == 0)
}

/// Tells the driver how a collective ended.
pub(crate) fn ended(number: u64, end: &End) {
    if let Some(driver) = driver() {
        // SAFETY: `end` lives for the call.
        unsafe { (driver.ended)(number, end) };
    }
}

/// Device of the calling thread's context; `None` when it has none or there is no driver.
pub(crate) fn current_device() -> Option<i32> {
    let mut device = 0;
    // SAFETY: the out-pointer is a live local.
    let status = unsafe { (driver()?.current_device)(&raw mut device) };
    (status == 0).then_some(device)
}

/// Device memory; `None` when there is no driver or not enough of it.
pub(crate) fn allocate(bytes: usize) -> Option<u64> {
    let mut address = 0;
    // SAFETY: the out-pointer is a live local.
    let status = unsafe { (driver()?.allocate)(&raw mut address, bytes) };
    (status == 0).then_some(address)
}

/// Gives device memory back; false when it is not the driver's.
pub(crate) fn free(address: u64) -> bool {
    // SAFETY: the driver checks the address against what it handed out.
    driver().is_some_and(|driver| unsafe { (driver.free)(address) } == 0)
}
