//! How a traced call carries its arguments, on each CPU architecture.

use core::{ffi::c_void, ptr};

use aya_ebpf::{
    EbpfContext,
    helpers::{bpf_probe_read_user, generated::bpf_get_attach_cookie},
    programs::{ProbeContext, RetProbeContext},
};
use stallscope_records::abi::LAST_ARGUMENT;

const ARGUMENTS: usize = LAST_ARGUMENT as usize + 1;

/// Integer arguments 0 to 7 of the call at whose first instruction the program runs.
pub(crate) struct Arguments {
    values: [u64; ARGUMENTS],
    /// Whether those on the user stack could be read.
    pub(crate) readable: bool,
}

impl Arguments {
    /// The argument with this index; the index wraps, so that the verifier sees a bound.
    #[inline(always)]
    pub(crate) fn get(&self, index: u64) -> u64 {
        self.values[(index & LAST_ARGUMENT) as usize]
    }
}

/// What the agent attached with this program: one of the cookies of `stallscope_records::abi`.
#[inline(always)]
pub(crate) fn cookie(ctx: &impl EbpfContext) -> u64 {
    // SAFETY: the context is the one the program was called with.
    unsafe { bpf_get_attach_cookie(ctx.as_ptr().cast::<c_void>()) }
}

/// Reads a user address.
#[inline(always)]
pub(crate) fn read_user<T>(address: u64) -> Option<T> {
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_user(address as *const T) }.ok()
}

#[cfg(bpf_target_arch = "x86_64")]
mod arch {
    use super::*;

    /// Register arguments of the System V ABI.
    const REGISTERS: usize = 6;
    /// The return address lies between the stack pointer and the first stack argument.
    const STACK_ARGUMENTS: u64 = 8;
    /// `ret` has taken the return address off the stack.
    const RETURN_POPS: u64 = 8;

    #[inline(always)]
    pub(crate) fn arguments(ctx: &ProbeContext) -> Arguments {
        // SAFETY: the kernel passes valid registers.
        let regs = unsafe { &*ctx.regs };
        let stack = read_user::<[u64; 2]>(regs.rsp + STACK_ARGUMENTS);
        let readable = stack.is_some();
        let [seventh, eighth] = stack.unwrap_or([0; 2]);
        Arguments {
            values: [
                regs.rdi, regs.rsi, regs.rdx, regs.rcx, regs.r8, regs.r9, seventh, eighth,
            ],
            readable,
        }
    }

    /// One of the first five arguments, which are in registers on every ABI. Volatile, because the verifier takes no address
    /// in the context that was computed.
    #[inline(always)]
    pub(crate) fn register_argument<const INDEX: usize>(ctx: &ProbeContext) -> u64 {
        let regs = ctx.regs;
        // SAFETY: the kernel passes valid registers.
        unsafe {
            match INDEX {
                0 => ptr::read_volatile(&raw const (*regs).rdi),
                1 => ptr::read_volatile(&raw const (*regs).rsi),
                2 => ptr::read_volatile(&raw const (*regs).rdx),
                3 => ptr::read_volatile(&raw const (*regs).rcx),
                _ => ptr::read_volatile(&raw const (*regs).r8),
            }
        }
    }

    #[inline(always)]
    pub(crate) fn stack_argument(ctx: &ProbeContext, index: usize) -> Option<u64> {
        read_user(stack_pointer(ctx) + STACK_ARGUMENTS + 8 * (index - REGISTERS) as u64)
    }

    /// Where the 128 bytes of an `ncclUniqueId` passed by value lie: on the stack; they take no register.
    #[inline(always)]
    pub(crate) fn by_value_id(ctx: &ProbeContext, _index: u64) -> u64 {
        stack_pointer(ctx) + STACK_ARGUMENTS
    }

    /// Index of the register that holds the argument after an `ncclUniqueId` passed by value at `index`.
    pub(crate) const fn after_id(index: u64) -> u64 {
        index
    }

    #[inline(always)]
    pub(crate) fn stack_pointer(ctx: &ProbeContext) -> u64 {
        // SAFETY: the kernel passes valid registers.
        unsafe { (*ctx.regs).rsp }
    }

    /// The stack pointer that the call had at its entry.
    #[inline(always)]
    pub(crate) fn entry_stack_pointer(ctx: &RetProbeContext) -> u64 {
        // SAFETY: the kernel passes valid registers.
        unsafe { (*ctx.regs).rsp - RETURN_POPS }
    }
}

#[cfg(bpf_target_arch = "aarch64")]
mod arch {
    use aya_ebpf::bindings::user_pt_regs;

    use super::*;

    const REGISTERS: usize = 8;

    #[inline(always)]
    fn regs(pointer: *const c_void) -> &'static user_pt_regs {
        // SAFETY: a probe's context starts with the user registers.
        unsafe { &*pointer.cast::<user_pt_regs>() }
    }

    #[inline(always)]
    pub(crate) fn arguments(ctx: &ProbeContext) -> Arguments {
        let x = &regs(ctx.as_ptr()).regs;
        Arguments {
            values: [x[0], x[1], x[2], x[3], x[4], x[5], x[6], x[7]],
            readable: true,
        }
    }

    #[inline(always)]
    pub(crate) fn register_argument<const INDEX: usize>(ctx: &ProbeContext) -> u64 {
        // SAFETY: the reference is valid.
        unsafe { ptr::read_volatile(&raw const regs(ctx.as_ptr()).regs[INDEX]) }
    }

    #[inline(always)]
    pub(crate) fn stack_argument(ctx: &ProbeContext, index: usize) -> Option<u64> {
        read_user(stack_pointer(ctx) + 8 * (index - REGISTERS) as u64)
    }

    /// A composite larger than 16 bytes is copied by the caller and passed by reference.
    #[inline(always)]
    pub(crate) fn by_value_id(ctx: &ProbeContext, index: u64) -> u64 {
        regs(ctx.as_ptr()).regs[(index & 7) as usize]
    }

    pub(crate) const fn after_id(index: u64) -> u64 {
        index + 1
    }

    #[inline(always)]
    pub(crate) fn stack_pointer(ctx: &ProbeContext) -> u64 {
        regs(ctx.as_ptr()).sp
    }

    #[inline(always)]
    pub(crate) fn entry_stack_pointer(ctx: &RetProbeContext) -> u64 {
        regs(ctx.as_ptr()).sp
    }
}

pub(crate) use arch::{
    after_id, arguments, by_value_id, entry_stack_pointer, register_argument, stack_argument, stack_pointer,
};
