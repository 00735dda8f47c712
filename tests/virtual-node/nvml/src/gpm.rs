//! GPU performance monitoring: activity between two samples. A sample here is a moment; the ring holds the rest.

use std::ffi::c_void;

use virtual_node_state::activity::Totals;
use virtual_node_state::clock::now_ns;

use crate::layout::{GpmMetricsGet, GpmSupport};
use crate::{Device, INVALID_ARGUMENT, NOT_SUPPORTED, SUCCESS, Status, VERSION_MISMATCH, answer, device};

#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    device: usize,
    at_ns: u64,
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlGpmQueryDeviceSupport(of: Device, to: *mut GpmSupport) -> Status {
    if let Err(status) = device(of) {
        return status;
    }
    if to.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller's structure.
    let support = unsafe { &mut *to };
    if support.version != 1 {
        return VERSION_MISMATCH;
    }
    support.supported = 1;
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlGpmSampleAlloc(to: *mut *mut c_void) -> Status {
    // SAFETY: the caller's out-pointer; the box is given back in `nvmlGpmSampleFree`.
    unsafe { answer(to, Ok(Box::into_raw(Box::new(Sample::default())).cast())) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlGpmSampleFree(sample: *mut c_void) -> Status {
    if sample.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: allocated by `nvmlGpmSampleAlloc`, and the caller does not use it again.
    drop(unsafe { Box::from_raw(sample.cast::<Sample>()) });
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlGpmSampleGet(of: Device, sample: *mut c_void) -> Status {
    if let Err(status) = device(of) {
        return status;
    }
    // SAFETY: allocated by `nvmlGpmSampleAlloc`.
    unsafe {
        answer(
            sample.cast(),
            Ok(Sample {
                device: of as usize,
                at_ns: now_ns(),
            }),
        )
    }
}

/// A metric from the activity between two samples; `None` when this GPU does not have it.
fn metric(id: u32, totals: &Totals) -> Option<f64> {
    let percent = |part_ns: u64| part_ns as f64 * 100.0 / totals.window_ns as f64;
    let mib_per_s = |bytes: u64| bytes as f64 * 1e9 / totals.window_ns as f64 / f64::from(1 << 20);
    Some(match id {
        1 => percent(totals.busy_ns),
        2 => percent(totals.sm_ns),
        3 => percent(totals.occupancy_ns),
        5 | 7 => percent(totals.tensor_ns),
        // Other tensor types and the scalar pipes lie idle in this model.
        4 | 6 | 8 | 9 | 11 | 12 | 13 => 0.0,
        10 => percent(totals.dram_ns),
        20 => mib_per_s(totals.to_host_bytes),
        21 => mib_per_s(totals.to_device_bytes),
        _ => return None,
    })
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlGpmMetricsGet(request: *mut GpmMetricsGet) -> Status {
    if request.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: the caller's structure; only its head is borrowed here.
    let (version, count, first, second) = unsafe {
        (
            (*request).version,
            (*request).count,
            (*request).first,
            (*request).second,
        )
    };
    if version != 1 {
        return VERSION_MISMATCH;
    }
    if first.is_null() || second.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: both were allocated by `nvmlGpmSampleAlloc`.
    let (first, second) = unsafe { (*first.cast::<Sample>(), *second.cast::<Sample>()) };
    if first.device != second.device || second.at_ns <= first.at_ns {
        return INVALID_ARGUMENT;
    }
    let gpu = match device(first.device as Device) {
        Ok(gpu) => gpu,
        Err(status) => return status,
    };
    let totals = gpu.activity.integrate(first.at_ns, second.at_ns);
    // SAFETY: the caller's array of `count` metrics lies behind the head.
    let metrics = unsafe {
        std::slice::from_raw_parts_mut(
            (&raw mut (*request).metrics).cast::<crate::layout::GpmMetric>(),
            count as usize,
        )
    };
    for entry in metrics {
        match metric(entry.metric, &totals) {
            Some(value) => (entry.status, entry.value) = (SUCCESS, value),
            None => entry.status = NOT_SUPPORTED,
        }
    }
    SUCCESS
}
