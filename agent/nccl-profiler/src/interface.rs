//! The tables by which NCCL finds the plugin: one per version of its profiler interface.

use std::ffi::{CStr, c_char, c_int, c_ulong, c_void};
use std::sync::atomic::Ordering;

use stallscope_records::profiler::header;

use crate::abi::{Arguments, Descriptor, Descriptor2, Descriptor3, Descriptor4, Descriptor5, Descriptor6};
use crate::communicators::{self, Communicator};
use crate::shared::Memory;
use crate::{events, switch};

/// `ncclResult_t`
type Outcome = c_int;
const SUCCESS: Outcome = 0;
const SYSTEM_ERROR: Outcome = 2;

const NAME: &CStr = c"stallscope";

/// `ncclDebugLogger_t`. It writes where the job's log goes, and is not used.
type Logger = Option<unsafe extern "C" fn(c_int, c_ulong, *const c_char, c_int, *const c_char, ...)>;

/// Versions 2 and 3.
type Init2 = unsafe extern "C" fn(*mut *mut c_void, *mut c_int) -> Outcome;
/// Version 4.
type Init4 = unsafe extern "C" fn(
    *mut *mut c_void,
    *mut c_int,
    *const c_char,
    u64,
    c_int,
    c_int,
    c_int,
    Logger,
) -> Outcome;
/// Versions 5 and 6.
type Init5 = unsafe extern "C" fn(
    *mut *mut c_void,
    u64,
    *mut c_int,
    *const c_char,
    c_int,
    c_int,
    c_int,
    Logger,
) -> Outcome;

/// `ncclProfiler_vN_t`
#[repr(C)]
struct Plugin<Init, D> {
    name: *const c_char,
    init: Init,
    start_event: unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *const D) -> Outcome,
    stop_event: unsafe extern "C" fn(*mut c_void) -> Outcome,
    record_state: unsafe extern "C" fn(*mut c_void, c_int, *const Arguments) -> Outcome,
    finalize: unsafe extern "C" fn(*mut c_void) -> Outcome,
}

// SAFETY: a table of functions and a constant text.
unsafe impl<Init, D> Sync for Plugin<Init, D> {}

const fn plugin<const INTERFACE: u8, Init, D: Descriptor>(init: Init) -> Plugin<Init, D> {
    Plugin {
        name: NAME.as_ptr(),
        init,
        start_event: start_event::<INTERFACE, D>,
        stop_event,
        record_state,
        finalize,
    }
}

macro_rules! export {
    ($($(#[$meta:meta])* $name:ident: $interface:literal, $init_type:ty, $descriptor:ty, $init:ident;)*) => {$(
        $(#[$meta])*
        // SAFETY: the name is NCCL's for a table of this form.
        #[unsafe(no_mangle)]
        static $name: Plugin<$init_type, $descriptor> =
            plugin::<$interface, $init_type, $descriptor>($init::<$interface>);
    )*};
}

export! {
    /// For NCCL 2.24 and 2.25.
    ncclProfiler_v2: 2, Init2, Descriptor2, init2;
    /// For NCCL 2.26.
    ncclProfiler_v3: 3, Init2, Descriptor3, init2;
    /// For NCCL 2.27.
    ncclProfiler_v4: 4, Init4, Descriptor4, init4;
    /// For NCCL 2.28.
    ncclProfiler_v5: 5, Init5, Descriptor5, init5;
    /// For NCCL 2.29 and later.
    ncclProfiler_v6: 6, Init5, Descriptor6, init5;
}

unsafe extern "C" fn init2<const INTERFACE: u8>(context: *mut *mut c_void, mask: *mut c_int) -> Outcome {
    // SAFETY: NCCL's pointers.
    unsafe { init(INTERFACE, context, mask, Communicator::default()) }
}

unsafe extern "C" fn init4<const INTERFACE: u8>(
    context: *mut *mut c_void,
    mask: *mut c_int,
    _name: *const c_char,
    hash: u64,
    _nodes: c_int,
    ranks: c_int,
    rank: c_int,
    _log: Logger,
) -> Outcome {
    let communicator = Communicator {
        hash,
        rank: rank.cast_unsigned(),
        ranks: ranks.cast_unsigned(),
    };
    // SAFETY: NCCL's pointers.
    unsafe { init(INTERFACE, context, mask, communicator) }
}

unsafe extern "C" fn init5<const INTERFACE: u8>(
    context: *mut *mut c_void,
    hash: u64,
    mask: *mut c_int,
    name: *const c_char,
    nodes: c_int,
    ranks: c_int,
    rank: c_int,
    log: Logger,
) -> Outcome {
    // SAFETY: as given.
    unsafe { init4::<INTERFACE>(context, mask, name, hash, nodes, ranks, rank, log) }
}

/// # Safety
/// The pointers are null or NCCL's.
unsafe fn init(
    interface: u8,
    context: *mut *mut c_void,
    mask: *mut c_int,
    communicator: Communicator,
) -> Outcome {
    if context.is_null() || mask.is_null() || !switch::set_up() {
        return SYSTEM_ERROR;
    }
    let Some(memory) = Memory::get() else {
        return SYSTEM_ERROR;
    };
    let given = communicators::add(communicator, mask);
    if given == 0 {
        return SYSTEM_ERROR;
    }
    memory
        .header(header::INTERFACE)
        .store(interface.into(), Ordering::Relaxed);
    memory.count(header::COMMUNICATORS);
    events::made_known(memory, interface, communicator);
    communicators::set(mask, switch::current());
    // SAFETY: by the contract, and not null.
    unsafe { context.write(given as *mut c_void) };
    SUCCESS
}

unsafe extern "C" fn start_event<const INTERFACE: u8, D: Descriptor>(
    context: *mut c_void,
    handle: *mut *mut c_void,
    descriptor: *const D,
) -> Outcome {
    // SAFETY: NCCL's pointers; a descriptor is aligned.
    let descriptor = unsafe { descriptor.as_ref() };
    let token = match descriptor {
        // Nothing of it is read while nobody asks.
        Some(descriptor) if switch::current() != 0 => {
            // SAFETY: NCCL filled it.
            let started = unsafe { descriptor.read() };
            started.map_or(0, |started| events::start(INTERFACE, context.addr(), started))
        }
        _ => 0,
    };
    if !handle.is_null() {
        // SAFETY: NCCL's pointer.
        unsafe { handle.write(token as *mut c_void) };
    }
    SUCCESS
}

unsafe extern "C" fn stop_event(handle: *mut c_void) -> Outcome {
    if !handle.is_null() {
        events::stop(handle.addr() as u64);
    }
    SUCCESS
}

unsafe extern "C" fn record_state(handle: *mut c_void, state: c_int, arguments: *const Arguments) -> Outcome {
    if !handle.is_null() {
        // SAFETY: null, or NCCL's union, of which every version has eight bytes.
        let arguments = unsafe { arguments.as_ref() };
        events::record(handle.addr() as u64, state.cast_unsigned(), arguments);
    }
    SUCCESS
}

unsafe extern "C" fn finalize(context: *mut c_void) -> Outcome {
    communicators::remove(context.addr());
    SUCCESS
}
