//! The library's hooks for its network steps, called as its proxy thread calls them.

use std::ffi::{c_int, c_void};
use std::thread::sleep;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use super::{Image, Outcome};

const STATE: &str = "_Z37ncclProfilerRecordProxyStepEventStateiP13ncclProxyArgsi24ncclProfilerEventState_t";
const STOP: &str = "_Z30ncclProfilerStopProxyStepEventiP13ncclProxyArgsi";
/// Numbers of nccl_profiler.h.
const SEND_GPU: c_int = 8;
const SEND_CREDIT: c_int = 20;
const SEND_WIRE: c_int = 9;
const RECEIVE_WIRE: c_int = 10;
const RECEIVE_FLUSH: c_int = 11;
const RECEIVE_GPU: c_int = 12;

type State = unsafe extern "C" fn(c_int, *mut c_void, c_int, c_int) -> c_int;
type Stop = unsafe extern "C" fn(c_int, *mut c_void, c_int) -> c_int;

fn now() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

/// When the clock was read before and after a call.
#[derive(Clone, Copy)]
struct Moment(i64, i64);

/// Between two calls: at least and at most, ns.
fn between(first: Moment, then: Moment) -> (i64, i64) {
    (then.0 - first.1, then.1 - first.0)
}

/// Sends two steps that overlap and receives one, then leaves one waiting for data.
///
/// Says, of each wait in the order of their numbers, at least and at most how long all steps were in it; then when the last step
/// began to wait, before and after.
pub(crate) fn walk(image: &Image) -> Outcome {
    let local = |name: &str| image.local(name).ok_or_else(|| format!("there is no {name}"));
    // SAFETY: the names carry the types.
    let (state, stop) = unsafe {
        (
            std::mem::transmute::<usize, State>(local(STATE)?),
            std::mem::transmute::<usize, Stop>(local(STOP)?),
        )
    };
    // The real one has a few ten thousand bytes.
    let args: *mut c_void = vec![0u64; 1 << 14].leak().as_mut_ptr().cast();
    let enter = |sub, step, wait| {
        let before = now();
        // SAFETY: the hook finds no profiler and touches nothing.
        unsafe { state(sub, args, step, wait) };
        Moment(before, now())
    };
    let end = |sub, step| {
        let before = now();
        // SAFETY: as above.
        unsafe { stop(sub, args, step) };
        Moment(before, now())
    };
    let pause = |ms| sleep(Duration::from_millis(ms));

    let first_gpu = enter(0, 0, SEND_GPU);
    pause(20);
    let second_gpu = enter(0, 2, SEND_GPU);
    pause(10);
    let first_credit = enter(0, 0, SEND_CREDIT);
    for _ in 0..500 {
        enter(0, 0, SEND_CREDIT);
    }
    pause(15);
    let first_wire = enter(0, 0, SEND_WIRE);
    let second_wire = enter(0, 2, SEND_WIRE);
    pause(5);
    let first_end = end(0, 0);
    pause(5);
    let second_end = end(0, 2);
    let arriving = enter(1, 0, RECEIVE_WIRE);
    pause(12);
    let flushing = enter(1, 0, RECEIVE_FLUSH);
    pause(3);
    let consuming = enter(1, 0, RECEIVE_GPU);
    pause(8);
    let received = end(1, 0);
    let left = enter(2, 4, RECEIVE_WIRE);
    // An end of a step that nobody saw begin.
    end(7, 0);

    let both = |a: (i64, i64), b: (i64, i64)| (a.0 + b.0, a.1 + b.1);
    let spans = [
        both(between(first_gpu, first_credit), between(second_gpu, second_wire)),
        between(first_credit, first_wire),
        both(between(first_wire, first_end), between(second_wire, second_end)),
        between(arriving, flushing),
        between(flushing, consuming),
        between(consuming, received),
        (left.0, left.1),
    ];
    let words: Vec<String> = spans
        .iter()
        .map(|(least, most)| format!("{least} {most}"))
        .collect();
    Ok(words.join(" "))
}
