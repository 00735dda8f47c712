//! The steps of the proxy, told to the hooks of NCCL's profiler at each change of what they wait for.
//!
//! NCCL calls these hooks whether a profiler is loaded or not, and its library names them among its local symbols. Here they
//! do what the real ones do without a profiler: look whether there is one, and return.

use std::ffi::{c_int, c_void};

/// Bytes that the proxy carries and tells of at once: a slice, which is two of the eight parts of a channel's buffer of 4 MiB.
const STEP_BYTES: u64 = 1 << 20;

/// States of a step, by their numbers in `nccl_profiler.h`.
const SEND_GPU_WAIT: c_int = 8;
const SEND_PEER_WAIT: c_int = 20;
const SEND_WAIT: c_int = 9;
const RECEIVE_WAIT: c_int = 10;
const RECEIVE_FLUSH_WAIT: c_int = 11;
const RECEIVE_GPU_WAIT: c_int = 12;

// Hidden symbols are local ones in the linked library, as NCCL's are. The first instruction reads memory relative to itself,
// as theirs do: a probe on it costs as much.
#[cfg(target_arch = "x86_64")]
macro_rules! body {
    () => {
        "mov rax, qword ptr [rip + virtual_nccl_profiler]\n test rax, rax\n xor eax, eax\n ret"
    };
}
#[cfg(target_arch = "aarch64")]
macro_rules! body {
    () => {
        "adrp x8, virtual_nccl_profiler\n ldr x8, [x8, :lo12:virtual_nccl_profiler]\n mov w0, wzr\n ret"
    };
}
macro_rules! hook {
    ($name:literal) => {
        std::arch::global_asm!(
            concat!(".globl ", $name),
            concat!(".hidden ", $name),
            concat!(".type ", $name, ", @function"),
            concat!($name, ":"),
            body!(),
            concat!(".size ", $name, ", . - ", $name),
        );
    };
}

std::arch::global_asm!(
    ".pushsection .bss.virtual_nccl_profiler, \"aw\", @nobits",
    ".balign 8",
    ".globl virtual_nccl_profiler",
    ".hidden virtual_nccl_profiler",
    "virtual_nccl_profiler:",
    ".zero 8",
    ".popsection",
);
hook!("_Z37ncclProfilerRecordProxyStepEventStateiP13ncclProxyArgsi24ncclProfilerEventState_t");
hook!("_Z30ncclProfilerStopProxyStepEventiP13ncclProxyArgsi");

unsafe extern "C" {
    #[link_name = "_Z37ncclProfilerRecordProxyStepEventStateiP13ncclProxyArgsi24ncclProfilerEventState_t"]
    fn record_state(sub: c_int, args: *mut c_void, step: c_int, state: c_int) -> c_int;
    #[link_name = "_Z30ncclProfilerStopProxyStepEventiP13ncclProxyArgsi"]
    fn stop(sub: c_int, args: *mut c_void, step: c_int) -> c_int;
}

/// The steps of one direction of one operation, one after the other.
#[derive(Debug)]
pub(crate) struct Steps {
    /// The operation, which the hooks tell apart by its address.
    args: *mut c_void,
    sub: c_int,
    sends: bool,
    step: c_int,
    /// Bytes moved of the step under way; `None` when none is.
    moved: Option<u64>,
}

impl Steps {
    /// Of the operation at that address, the direction with that number.
    pub(crate) fn new<T>(operation: &T, sub: usize, sends: bool) -> Self {
        Self {
            args: std::ptr::from_ref(operation).cast_mut().cast(),
            sub: c_int::try_from(sub).unwrap_or(c_int::MAX),
            sends,
            step: 0,
            moved: None,
        }
    }

    /// The next step is posted: it waits for the GPU to give its data, or for the data to come.
    pub(crate) fn post(&mut self) {
        if self.moved.is_none() {
            self.moved = Some(0);
            self.enter(if self.sends { SEND_GPU_WAIT } else { RECEIVE_WAIT });
        }
    }

    /// The data is there to be sent, and sockets always have room.
    pub(crate) fn ready(&mut self) {
        self.post();
        if self.sends {
            self.enter(SEND_PEER_WAIT);
            self.enter(SEND_WAIT);
        }
    }

    /// Bytes moved, after which that many are left of the transfer.
    pub(crate) fn moved(&mut self, bytes: u64, left: u64) {
        let moved = self.moved.unwrap_or(0) + bytes;
        self.moved = Some(moved);
        if moved < STEP_BYTES && left > 0 {
            return;
        }
        if !self.sends {
            // The virtual GPU takes at once what has come.
            self.enter(RECEIVE_FLUSH_WAIT);
            self.enter(RECEIVE_GPU_WAIT);
        }
        // SAFETY: the hook touches none of its arguments.
        unsafe { stop(self.sub, self.args, self.step) };
        self.moved = None;
        self.step += 1;
        if left > 0 {
            self.ready();
        }
    }

    fn enter(&self, state: c_int) {
        // SAFETY: the hook touches none of its arguments.
        unsafe { record_state(self.sub, self.args, self.step, state) };
    }
}
