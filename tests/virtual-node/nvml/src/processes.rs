//! Processes on a GPU and what they use of it.

use std::ffi::c_uint;
use std::sync::atomic::Ordering::Relaxed;

use virtual_node_state::clock::unix_ns;
use virtual_node_state::gpu::Gpu;

use crate::api::{lately, percent};
use crate::layout::{ProcessInfo, ProcessUtilizationSample};
use crate::{Device, INSUFFICIENT_SIZE, INVALID_ARGUMENT, NOT_FOUND, SUCCESS, Status, device};

/// Copies a list into the caller's array by NVML's rule: `count` says how many fit and comes back as how many there
/// are; too few is an error that tells the number.
///
/// # Safety
/// `count` is null or valid; `to` is null or valid for `*count` entries.
unsafe fn fill<T>(list: Vec<T>, count: *mut c_uint, to: *mut T) -> Status {
    if count.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: not null, and valid by the caller's contract.
    let room = unsafe { *count } as usize;
    // SAFETY: as above.
    unsafe { *count = u32::try_from(list.len()).unwrap_or(u32::MAX) };
    if list.is_empty() {
        return SUCCESS;
    }
    if room < list.len() || to.is_null() {
        return INSUFFICIENT_SIZE;
    }
    for (index, entry) in list.into_iter().enumerate() {
        // SAFETY: `index` is below `room`.
        unsafe { to.add(index).write(entry) };
    }
    SUCCESS
}

fn processes(gpu: &Gpu) -> Vec<ProcessInfo> {
    let info = |(slot, pid): (usize, u32)| ProcessInfo {
        pid,
        used_memory: gpu.clients[slot].memory_bytes.load(Relaxed),
        gpu_instance: u32::MAX,
        compute_instance: u32::MAX,
    };
    gpu.processes().into_iter().map(info).collect()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v3(
    of: Device,
    count: *mut c_uint,
    to: *mut ProcessInfo,
) -> Status {
    match device(of) {
        // SAFETY: the caller's array and count.
        Ok(gpu) => unsafe { fill(processes(gpu), count, to) },
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetComputeRunningProcesses_v2(
    of: Device,
    count: *mut c_uint,
    to: *mut ProcessInfo,
) -> Status {
    // SAFETY: handed on as it came; the structure did not change.
    unsafe { nvmlDeviceGetComputeRunningProcesses_v3(of, count, to) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetGraphicsRunningProcesses_v3(
    of: Device,
    count: *mut c_uint,
    to: *mut ProcessInfo,
) -> Status {
    match device(of) {
        // SAFETY: the caller's array and count.
        Ok(_) => unsafe { fill(Vec::new(), count, to) },
        Err(status) => status,
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetProcessUtilization(
    of: Device,
    to: *mut ProcessUtilizationSample,
    count: *mut c_uint,
    last_seen_us: u64,
) -> Status {
    let gpu = match device(of) {
        Ok(gpu) => gpu,
        Err(status) => return status,
    };
    let time_us = unix_ns() / 1_000;
    let totals = lately(gpu, 1_000_000_000);
    let sample = |(slot, pid): (usize, u32)| {
        let sm = totals.ppm(totals.client_sm_ns[slot]);
        // Memory activity is not kept by process: share it out as the SM time is.
        let memory = (totals.ppm(totals.dram_ns) * sm)
            .checked_div(totals.ppm(totals.sm_ns))
            .unwrap_or(0);
        ProcessUtilizationSample {
            pid,
            time_us,
            sm: percent(sm),
            memory: percent(memory),
            encoder: 0,
            decoder: 0,
        }
    };
    let samples: Vec<_> = gpu.processes().into_iter().map(sample).collect();
    if samples.is_empty() || time_us <= last_seen_us {
        return NOT_FOUND;
    }
    // SAFETY: the caller's array and count.
    unsafe { fill(samples, count, to) }
}
