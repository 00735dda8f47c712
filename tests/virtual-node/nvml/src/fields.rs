//! `nvmlDeviceGetFieldValues`: many small values in one call.

use std::ffi::c_int;

use virtual_node_state::clock::{now_ns, unix_ns};
use virtual_node_state::gpu::Gpu;

use crate::api::{energy_mj, lately, mean_mw};
use crate::layout::FieldValue;
use crate::{Device, INVALID_ARGUMENT, NOT_SUPPORTED, SUCCESS, Status, device};

const UINT: c_int = 1;
const ULONGLONG: c_int = 3;

/// Type and value of a field; `None` when an H100 of this driver does not answer it.
fn field(gpu: &Gpu, id: u32) -> Option<(c_int, u64)> {
    let now = now_ns();
    Some(match id {
        // Time held back: power policy, thermal policy, sync boost.
        74 => (ULONGLONG, gpu.power_cap.total_ns(now)),
        75 => (
            ULONGLONG,
            gpu.sw_thermal.total_ns(now).max(gpu.hw_thermal.total_ns(now)),
        ),
        76..=79 => (ULONGLONG, 0),
        83 => (ULONGLONG, energy_mj(gpu)),
        // PCIe replays and their roll-overs.
        94 | 95 => (UINT, 0),
        // PCIe link recoveries and errors by kind.
        169 | 173..=182 => (UINT, 0),
        185 => (UINT, u64::from(mean_mw(gpu))),
        186 => (UINT, lately(gpu, 25_000_000).mean_mw()),
        // Bytes the GPU sent and received; 32 bits that wrap.
        197 => (UINT, gpu.since_boot(now).to_host_bytes & 0xffff_ffff),
        198 => (UINT, gpu.since_boot(now).to_device_bytes & 0xffff_ffff),
        // No recovery needed.
        230 => (UINT, 0),
        269 => (ULONGLONG, gpu.sw_thermal.total_ns(now)),
        270 => (ULONGLONG, gpu.hw_thermal.total_ns(now)),
        271 => (ULONGLONG, 0),
        _ => return None,
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetFieldValues(of: Device, count: c_int, values: *mut FieldValue) -> Status {
    let gpu = match device(of) {
        Ok(gpu) => gpu,
        Err(status) => return status,
    };
    let Some(count) = usize::try_from(count)
        .ok()
        .filter(|count| *count > 0 && !values.is_null())
    else {
        return INVALID_ARGUMENT;
    };
    // SAFETY: the caller's array of `count` entries.
    for value in unsafe { std::slice::from_raw_parts_mut(values, count) } {
        value.time_us = (unix_ns() / 1_000).cast_signed();
        value.latency_us = 0;
        match field(gpu, value.field) {
            Some((kind, number)) => {
                (value.value_type, value.status, value.value) = (kind, SUCCESS, number);
            }
            None => value.status = NOT_SUPPORTED,
        }
    }
    SUCCESS
}
