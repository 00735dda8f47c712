//! What is on: the agent's wish, as long as there is an agent, and the thread that carries it to NCCL.

use std::ffi::c_void;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use stallscope_records::profiler::{PATIENCE_NS, asked, header, kind};

use crate::communicators;
use crate::shared::Memory;
use crate::thread;

/// Between two looks at the agent's wish, ns.
const LOOK_NS: i64 = 250_000_000;
/// Stack of the thread, bytes; the libraries' thread-local variables come out of it.
const STACK_BYTES: usize = 512 << 10;
/// Every kind there is.
const ALL: u32 = (1 << kind::END) - 1;

/// The kinds that are on.
static CURRENT: AtomicU32 = AtomicU32::new(0);
static PID: AtomicU32 = AtomicU32::new(0);
/// How far setting up is.
static SETUP: AtomicU32 = AtomicU32::new(NOT_YET);
/// Where the thread that set up found its id.
static ID_FOUND_AT: AtomicUsize = AtomicUsize::new(0);
/// The thread holds pointers to masks.
static WRITING: AtomicBool = AtomicBool::new(false);

const NOT_YET: u32 = 0;
const RUNNING: u32 = 1;
const DONE: u32 = 2;
const FAILED: u32 = 3;

/// The kinds of events that are on, as NCCL's mask.
pub(crate) fn current() -> u32 {
    CURRENT.load(Ordering::Relaxed)
}

/// The id of this process.
pub(crate) fn own_pid() -> u32 {
    PID.load(Ordering::Relaxed)
}

/// `CLOCK_MONOTONIC`, ns.
pub(crate) fn now_ns() -> u64 {
    let mut time = MaybeUninit::<libc::timespec>::uninit();
    // SAFETY: the call fills the structure, or fails, which this clock cannot.
    let time = unsafe {
        if libc::clock_gettime(libc::CLOCK_MONOTONIC, time.as_mut_ptr()) != 0 {
            return 0;
        }
        time.assume_init()
    };
    time.tv_sec
        .cast_unsigned()
        .wrapping_mul(1_000_000_000)
        .wrapping_add(time.tv_nsec.cast_unsigned())
}

/// Sets up memory and thread at the first call; whether they are there. Communicators are made by several threads at once.
pub(crate) fn set_up() -> bool {
    match SETUP.compare_exchange(NOT_YET, RUNNING, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => {
            let done = start();
            SETUP.store(if done { DONE } else { FAILED }, Ordering::Release);
            done
        }
        Err(RUNNING) => {
            // Mapping the memory takes milliseconds.
            for _ in 0..10_000 {
                match SETUP.load(Ordering::Acquire) {
                    RUNNING => pause(100_000),
                    state => return state == DONE,
                }
            }
            false
        }
        Err(state) => state == DONE && Memory::get().is_some(),
    }
}

fn start() -> bool {
    // SAFETY: no arguments.
    PID.store(unsafe { libc::getpid() }.cast_unsigned(), Ordering::Relaxed);
    if Memory::set_up().is_none() {
        return false;
    }
    ID_FOUND_AT.store(thread::find(), Ordering::Relaxed);
    // SAFETY: the handler only stores to static variables.
    let watched = unsafe { libc::pthread_atfork(None, None, Some(forked)) } == 0;
    let started = watched && start_thread();
    if !started {
        Memory::disown();
    }
    started
}

fn start_thread() -> bool {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    let mut thread = MaybeUninit::<libc::pthread_t>::uninit();
    let mut all = MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: every structure is initialised by the call that names it first.
    unsafe {
        if libc::pthread_attr_init(attributes.as_mut_ptr()) != 0 {
            return false;
        }
        libc::pthread_attr_setstacksize(attributes.as_mut_ptr(), STACK_BYTES);
        libc::pthread_attr_setdetachstate(attributes.as_mut_ptr(), libc::PTHREAD_CREATE_DETACHED);
        libc::sigfillset(all.as_mut_ptr());
        // The thread begins with the mask of its maker.
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr());
        let error = libc::pthread_create(thread.as_mut_ptr(), attributes.as_ptr(), look, ptr::null_mut());
        libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), ptr::null_mut());
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
        error == 0
    }
}

extern "C" fn forked() {
    CURRENT.store(0, Ordering::Relaxed);
    WRITING.store(false, Ordering::Relaxed);
    Memory::disown();
}

extern "C" fn look(_: *mut c_void) -> *mut c_void {
    // SAFETY: the name has an end.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"stallscope-nccl".as_ptr()) };
    thread::confirm(ID_FOUND_AT.load(Ordering::Relaxed));
    while let Some(memory) = Memory::get() {
        let now_ns = now_ns();
        switch_to(memory, wanted(memory, now_ns));
        memory.header(header::ALIVE).store(now_ns, Ordering::Relaxed);
        pause(LOOK_NS);
    }
    ptr::null_mut()
}

/// The kinds that the agent asks for; none without an agent, and none while its word is torn.
fn wanted(memory: Memory, now_ns: u64) -> u32 {
    let heard_ns = memory.header(header::HEARTBEAT).load(Ordering::Acquire);
    if heard_ns == 0 || now_ns.abs_diff(heard_ns) > PATIENCE_NS {
        return 0;
    }
    let word = memory.header(header::ASK).load(Ordering::Acquire);
    asked(word).map_or_else(current, |mask| mask & ALL)
}

/// Makes `mask` current, and shows it to NCCL and to the agent.
fn switch_to(memory: Memory, mask: u32) {
    if CURRENT.swap(mask, Ordering::Relaxed) != mask {
        memory.header(header::SWITCHED).store(now_ns(), Ordering::Relaxed);
        memory.header(header::MASK).store(mask.into(), Ordering::Release);
    }
    // Every time: a communicator may have come while the mask changed.
    WRITING.store(true, Ordering::SeqCst);
    communicators::switch_all(mask);
    WRITING.store(false, Ordering::SeqCst);
}

/// Returns when the thread no longer uses a pointer that was taken away before the call: it does no more than one store.
pub(crate) fn wait_until_unused() {
    for _ in 0..10_000 {
        if !WRITING.load(Ordering::SeqCst) {
            return;
        }
        pause(10_000);
    }
}

fn pause(ns: i64) {
    let time = libc::timespec {
        tv_sec: 0,
        tv_nsec: ns,
    };
    // SAFETY: the structure is whole; how long it really was does not matter.
    unsafe { libc::nanosleep(&time, ptr::null_mut()) };
}
