//! What a call of the plugin costs the thread that makes it: `cost LIBRARY`.
//!
//! Plays a proxy thread's steps: begin, waiting for the GPU, for credit (told three times), for the wire, end.

use std::error::Error;
use std::ffi::{c_char, c_int, c_void};
use std::fs::OpenOptions;
use std::hint::black_box;
use std::os::unix::fs::FileExt as _;
use std::ptr;
use std::time::{Duration, Instant};

use libloading::os::unix::Library;
use stallscope_records::profiler::{NAME, ask, header};

/// `ncclProfiler_v4_t`
#[repr(C)]
struct Plugin {
    name: *const c_char,
    init: unsafe extern "C" fn(
        *mut *mut c_void,
        *mut c_int,
        *const c_char,
        u64,
        c_int,
        c_int,
        c_int,
        *const c_void,
    ) -> c_int,
    start: unsafe extern "C" fn(*mut c_void, *mut *mut c_void, *const Descriptor) -> c_int,
    stop: unsafe extern "C" fn(*mut c_void) -> c_int,
    record: unsafe extern "C" fn(*mut c_void, c_int, *const u64) -> c_int,
    finalize: unsafe extern "C" fn(*mut c_void) -> c_int,
}

/// `ncclProfilerEventDescr_v4_t` of a step.
#[repr(C)]
struct Descriptor {
    kind: u8,
    parent: *mut c_void,
    rank: c_int,
    step: c_int,
    rest: [u64; 10],
}

const STEPS: u32 = 300_000;
/// As [`STEPS`] say: begin, five changes, end.
const CALLS: u32 = 7;
const PROXY_STEP: u32 = 16;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("the library is missing")?;
    // SAFETY: the plugin's own library, whose table has this form.
    let plugin = unsafe {
        let library = Library::new(path)?;
        let table = library.get::<*const Plugin>(b"ncclProfiler_v4")?;
        let table = *table;
        std::mem::forget(library);
        &*table.cast::<Plugin>()
    };
    let mut mask: c_int = 0;
    let mut context = ptr::null_mut();
    // SAFETY: as NCCL calls it.
    let result = unsafe { (plugin.init)(&mut context, &mut mask, ptr::null(), 1, 1, 2, 0, ptr::null()) };
    if result != 0 {
        return Err("the plugin did not set up".into());
    }
    let empty = Plugin {
        start: empty_start,
        stop: empty_stop,
        record: empty_record,
        ..*plugin
    };
    print("empty functions", measure(&empty, context), None);
    let base = measure(&empty, context);
    print("plugin, nothing asked", measure(plugin, context), Some(base));
    switch_on()?;
    print("plugin, steps asked", measure(plugin, context), Some(base));
    // SAFETY: as NCCL calls it.
    unsafe { (plugin.finalize)(context) };
    Ok(())
}

fn print(what: &str, ns: f64, base: Option<f64>) {
    let ratio = base.map(|base| format!(", {:.1} times an empty call", ns / base));
    println!("{what}: {ns:.1} ns per call{}", ratio.unwrap_or_default());
}

/// The best of some runs, ns per call.
fn measure(plugin: &Plugin, context: *mut c_void) -> f64 {
    let run = || {
        let before = Instant::now();
        for step in 0..STEPS {
            one(black_box(plugin), context, step.cast_signed());
        }
        before.elapsed().as_secs_f64() * 1e9 / f64::from(STEPS * CALLS)
    };
    (0..5).map(|_| run()).fold(f64::INFINITY, f64::min)
}

fn one(plugin: &Plugin, context: *mut c_void, step: c_int) {
    let descriptor = Descriptor {
        kind: PROXY_STEP as u8,
        parent: ptr::null_mut(),
        rank: 0,
        step,
        rest: [0; 10],
    };
    let mut handle = ptr::null_mut();
    let bytes = 65_536;
    // SAFETY: as NCCL calls it.
    unsafe {
        (plugin.start)(context, &mut handle, &descriptor);
        for state in [8, 20, 20, 20, 9] {
            (plugin.record)(handle, state, &bytes);
        }
        (plugin.stop)(handle);
    }
}

/// As the agent does, and waits until it has come about.
fn switch_on() -> Result<(), Box<dyn Error>> {
    let name = format!("/memfd:{NAME} (deleted)");
    let mut files = std::fs::read_dir("/proc/self/fd")?
        .flatten()
        .map(|entry| entry.path());
    let path = files
        .find(|path| std::fs::read_link(path).is_ok_and(|to| to.to_string_lossy() == name))
        .ok_or("the plugin has no memory")?;
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    std::thread::spawn(move || {
        loop {
            let mut now = libc::timespec {
                tv_sec: 0,
                tv_nsec: 0,
            };
            // SAFETY: the structure is whole.
            unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
            let ns = now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned();
            let bytes = [ns.to_ne_bytes(), ask(PROXY_STEP).to_ne_bytes()].concat();
            if file.write_all_at(&bytes, 8 * header::HEARTBEAT as u64).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(250));
        }
    });
    std::thread::sleep(Duration::from_secs(1));
    Ok(())
}

unsafe extern "C" fn empty_start(_: *mut c_void, handle: *mut *mut c_void, _: *const Descriptor) -> c_int {
    // SAFETY: the caller's own variable.
    unsafe { handle.write(ptr::null_mut()) };
    0
}

unsafe extern "C" fn empty_stop(_: *mut c_void) -> c_int {
    0
}

unsafe extern "C" fn empty_record(_: *mut c_void, _: c_int, _: *const u64) -> c_int {
    0
}
