//! Errors of devices, as the kernel's own events tell them: PCI Express errors, and faults that the GPU's driver reports.
//!
//! They are rare and belong to no process. Every field is read at the offset that this kernel's `format` file gives.

use aya_ebpf::{
    EbpfContext as _,
    helpers::{bpf_ktime_get_ns, bpf_probe_read_kernel_str_bytes},
    macros::{map, tracepoint},
    maps::{PerCpuArray, RingBuf},
    programs::TracePointContext,
};
use stallscope_records::device::{DeviceError, MESSAGE_BYTES, NAME_BYTES, kind};

use crate::settings::{AER_DEVICE, AER_SEVERITY, AER_STATUS, XID_CODE, XID_DEVICE, XID_MESSAGE};

#[map]
static DEVICE_ERRORS: RingBuf = RingBuf::with_byte_size(1 << 16, 0);
/// Errors that found the ring full.
#[map]
static DEVICE_ERROR_DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

const NO_WAKEUP: u64 = 1;

#[tracepoint]
fn pcie_error(ctx: TracePointContext) -> u32 {
    // SAFETY: the helper checks the address; the offsets come from this kernel's format file.
    let (status, severity) = unsafe {
        (
            ctx.read_at::<u32>(AER_STATUS.get() as usize),
            ctx.read_at::<u8>(AER_SEVERITY.get() as usize),
        )
    };
    let (Ok(code), Ok(severity)) = (status, severity) else {
        return 0;
    };
    let mut error = empty(kind::PCIE, code, u32::from(severity));
    read_text(&ctx, AER_DEVICE.get() as usize, &mut error.device);
    tell(&error);
    0
}

#[tracepoint]
fn gpu_fault(ctx: TracePointContext) -> u32 {
    // SAFETY: the helper checks the address; the offset comes from this kernel's format file.
    let Ok(code) = (unsafe { ctx.read_at::<u32>(XID_CODE.get() as usize) }) else {
        return 0;
    };
    let mut error = empty(kind::XID, code, 0);
    read_text(&ctx, XID_DEVICE.get() as usize, &mut error.device);
    read_text(&ctx, XID_MESSAGE.get() as usize, &mut error.message);
    tell(&error);
    0
}

#[inline(always)]
fn empty(kind: u32, code: u32, severity: u32) -> DeviceError {
    DeviceError {
        device: [0; NAME_BYTES],
        message: [0; MESSAGE_BYTES],
        // SAFETY: the helper has no preconditions.
        at_ns: unsafe { bpf_ktime_get_ns() },
        kind,
        code,
        severity,
        spare: 0,
    }
}

/// Reads a string whose place in the record (`__data_loc`: offset in the lower half) stands at `at`.
#[inline(always)]
fn read_text(ctx: &TracePointContext, at: usize, to: &mut [u8]) {
    // SAFETY: the helper checks the address.
    let Ok(place) = (unsafe { ctx.read_at::<u32>(at) }) else {
        return;
    };
    // SAFETY: the pointer is not read here; the helper checks it.
    let _ = unsafe {
        let text = ctx.as_ptr().cast::<u8>().add((place & 0xffff) as usize);
        bpf_probe_read_kernel_str_bytes(text, to)
    };
}

#[inline(always)]
fn tell(error: &DeviceError) {
    if DEVICE_ERRORS.output::<DeviceError>(error, NO_WAKEUP).is_err()
        && let Some(drops) = DEVICE_ERROR_DROPS.get_ptr_mut(0)
    {
        // SAFETY: the slot belongs to this CPU, and a program that interrupts this one loses at most one count.
        unsafe { *drops += 1 };
    }
}
