//! Devices, clocks, power, memory.

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong};
use std::sync::atomic::Ordering::Relaxed;

use virtual_node_state::activity::Totals;
use virtual_node_state::clock::now_ns;
use virtual_node_state::gpu::{Gpu, MEMORY_BYTES, PCI_DEVICE_ID, PCIE_LANES, reason};
use virtual_node_state::power::LIMIT_MW;

use crate::layout::{Memory, MemoryV2, PciInfo, Utilization};
use crate::{
    Device, INVALID_ARGUMENT, NOT_FOUND, NOT_SUPPORTED, Status, all, answer, answer_text, device, handle,
    start, stop,
};

const MEMORY_MHZ: u32 = 2_619;

/// What the GPU did over the last `window_ns`.
pub(crate) fn lately(gpu: &Gpu, window_ns: u64) -> Totals {
    let now = now_ns();
    gpu.activity.integrate(now.saturating_sub(window_ns), now)
}

/// Parts per million as whole percent.
pub(crate) fn percent(ppm: u64) -> u32 {
    u32::try_from((ppm + 5_000) / 10_000).unwrap_or(100)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlInit_v2() -> Status {
    start()
}

#[unsafe(no_mangle)]
extern "C" fn nvmlInitWithFlags(_flags: c_uint) -> Status {
    start()
}

#[unsafe(no_mangle)]
extern "C" fn nvmlShutdown() -> Status {
    stop()
}

#[unsafe(no_mangle)]
extern "C" fn nvmlErrorString(status: Status) -> *const c_char {
    let text = match status {
        0 => c"Success",
        1 => c"Uninitialized",
        2 => c"Invalid Argument",
        3 => c"Not Supported",
        6 => c"Not Found",
        7 => c"Insufficient Size",
        9 => c"Driver Not Loaded",
        10 => c"Timeout",
        25 => c"Argument version mismatch",
        _ => c"Unknown Error",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetDriverVersion(to: *mut c_char, length: c_uint) -> Status {
    // SAFETY: the caller's buffer.
    unsafe { answer_text(to, length, all().map(|_| "550.54.15".into())) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetNVMLVersion(to: *mut c_char, length: c_uint) -> Status {
    // SAFETY: the caller's buffer.
    unsafe { answer_text(to, length, Ok("12.550.54.15".into())) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetCudaDriverVersion_v2(to: *mut c_int) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, Ok(12_040)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlSystemGetCudaDriverVersion(to: *mut c_int) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, Ok(12_040)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCount_v2(to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, all().map(|gpus| u32::try_from(gpus.len()).unwrap_or(0))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, to: *mut Device) -> Status {
    let known = |gpus: &[_]| {
        if (index as usize) < gpus.len() {
            Ok(handle(index as usize))
        } else {
            Err(INVALID_ARGUMENT)
        }
    };
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, all().and_then(known)) }
}

fn find(wanted: impl Fn(&Gpu) -> bool) -> Result<Device, Status> {
    all()?
        .iter()
        .position(|gpu| wanted(gpu))
        .map(handle)
        .ok_or(NOT_FOUND)
}

/// # Safety
/// `text` is null or ends with a zero.
unsafe fn text<'a>(text: *const c_char) -> Result<&'a str, Status> {
    if text.is_null() {
        return Err(INVALID_ARGUMENT);
    }
    // SAFETY: not null, and ended by zero by the caller's contract.
    unsafe { CStr::from_ptr(text) }
        .to_str()
        .map_err(|_| INVALID_ARGUMENT)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByPciBusId_v2(address: *const c_char, to: *mut Device) -> Status {
    // SAFETY: the caller's text.
    let wanted = unsafe { text(address) };
    // The domain may have four or eight digits.
    let tail = |address: &str| {
        address
            .rsplit_once(':')
            .and_then(|(rest, last)| Some((rest.rsplit(':').next()?.to_owned(), last.to_owned())))
    };
    let found =
        wanted.and_then(|wanted| find(|gpu| tail(&wanted.to_lowercase()) == tail(&gpu.pci_address())));
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, found) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetHandleByUUID(uuid: *const c_char, to: *mut Device) -> Status {
    // SAFETY: the caller's text.
    let found = unsafe { text(uuid) }.and_then(|wanted| find(|gpu| gpu.uuid() == wanted));
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, found) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetIndex(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|gpu| gpu.index.load(Relaxed))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMinorNumber(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|gpu| gpu.index.load(Relaxed))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetName(of: Device, to: *mut c_char, length: c_uint) -> Status {
    // SAFETY: the caller's buffer.
    unsafe { answer_text(to, length, device(of).map(|_| "NVIDIA H100 80GB HBM3".into())) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetUUID(of: Device, to: *mut c_char, length: c_uint) -> Status {
    // SAFETY: the caller's buffer.
    unsafe { answer_text(to, length, device(of).map(Gpu::uuid)) }
}

fn fixed<const N: usize>(text: &str) -> [c_char; N] {
    let mut to = [0; N];
    for (to, from) in to[..N - 1].iter_mut().zip(text.bytes()) {
        *to = from.cast_signed();
    }
    to
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPciInfo_v3(of: Device, to: *mut PciInfo) -> Status {
    let info = device(of).map(|gpu| {
        let address = gpu.pci_address().to_uppercase();
        PciInfo {
            bus_id_legacy: fixed(&address),
            domain: 0,
            bus: gpu.bus.load(Relaxed),
            device: 0,
            pci_device_id: PCI_DEVICE_ID,
            pci_subsystem_id: 0x16c1_10de,
            bus_id: fixed(&format!("0000{address}")),
        }
    });
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, info) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCudaComputeCapability(
    of: Device,
    major: *mut c_int,
    minor: *mut c_int,
) -> Status {
    // SAFETY: the caller's out-pointers.
    unsafe {
        match answer(major, device(of).map(|_| 9)) {
            0 => answer(minor, Ok(0)),
            status => status,
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetNumGpuCores(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|_| 132 * 128)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetUtilizationRates(of: Device, to: *mut Utilization) -> Status {
    let rates = device(of).map(|gpu| {
        let totals = lately(gpu, 500_000_000);
        Utilization {
            gpu: percent(totals.ppm(totals.busy_ns)),
            memory: percent(totals.ppm(totals.dram_ns)),
        }
    });
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, rates) }
}

/// Mean power over the last second, as NVML reports it, milliwatts.
pub(crate) fn mean_mw(gpu: &Gpu) -> u32 {
    u32::try_from(lately(gpu, 1_000_000_000).mean_mw()).unwrap_or(u32::MAX)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPowerUsage(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(mean_mw)) }
}

/// Energy since the GPU was made, millijoules.
pub(crate) fn energy_mj(gpu: &Gpu) -> u64 {
    gpu.since_boot(now_ns()).energy_uj / 1_000
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTotalEnergyConsumption(of: Device, to: *mut c_ulonglong) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(energy_mj)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPowerManagementLimit(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe {
        answer(
            to,
            device(of).map(|_| u32::try_from(LIMIT_MW).unwrap_or(u32::MAX)),
        )
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetEnforcedPowerLimit(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: handed on as it came.
    unsafe { nvmlDeviceGetPowerManagementLimit(of, to) }
}

fn clock(gpu: &Gpu, kind: c_uint, sm_mhz: u32) -> Result<u32, Status> {
    let _alive = gpu;
    match kind {
        0 | 1 | 3 => Ok(sm_mhz),
        2 => Ok(MEMORY_MHZ),
        _ => Err(INVALID_ARGUMENT),
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetClockInfo(of: Device, kind: c_uint, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe {
        answer(
            to,
            device(of).and_then(|gpu| clock(gpu, kind, gpu.sm_mhz.load(Relaxed))),
        )
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMaxClockInfo(of: Device, kind: c_uint, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).and_then(|gpu| clock(gpu, kind, gpu.max_mhz()))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCurrentClocksEventReasons(of: Device, to: *mut c_ulonglong) -> Status {
    let reasons = device(of).map(|gpu| {
        let idle = lately(gpu, 200_000_000).busy_ns == 0;
        gpu.reasons.load(Relaxed) | if idle { reason::IDLE } else { 0 }
    });
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, reasons) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCurrentClocksThrottleReasons(of: Device, to: *mut c_ulonglong) -> Status {
    // SAFETY: handed on as it came; the older name of the same function.
    unsafe { nvmlDeviceGetCurrentClocksEventReasons(of, to) }
}

/// Reasons an H100 can report.
const KNOWN_REASONS: u64 = 0x1ff;

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetSupportedClocksEventReasons(of: Device, to: *mut c_ulonglong) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|_| KNOWN_REASONS)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetSupportedClocksThrottleReasons(of: Device, to: *mut c_ulonglong) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|_| KNOWN_REASONS)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPerformanceState(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|_| 0)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTemperature(of: Device, sensor: c_uint, to: *mut c_uint) -> Status {
    let value = device(of).and_then(|gpu| match sensor {
        0 => Ok(gpu.temperature_c.load(Relaxed)),
        _ => Err(INVALID_ARGUMENT),
    });
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, value) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetTemperatureThreshold(of: Device, kind: c_uint, to: *mut c_uint) -> Status {
    let threshold = match kind {
        0 => Ok(95), // shutdown
        1 => Ok(87), // slowdown
        3 => Ok(85), // highest GPU temperature before the clock is lowered
        _ => Err(NOT_SUPPORTED),
    };
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).and(threshold)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo(of: Device, to: *mut Memory) -> Status {
    let memory = device(of).map(|gpu| {
        let used = gpu.memory_used_bytes().min(MEMORY_BYTES);
        Memory {
            total: MEMORY_BYTES,
            free: MEMORY_BYTES - used,
            used,
        }
    });
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, memory) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMemoryInfo_v2(of: Device, to: *mut MemoryV2) -> Status {
    const RESERVED: u64 = 600 << 20;
    let memory = device(of).map(|gpu| {
        let used = gpu.memory_used_bytes().min(MEMORY_BYTES - RESERVED);
        let version = u32::try_from(size_of::<MemoryV2>()).unwrap_or(0) | 2 << 24;
        MemoryV2 {
            version,
            total: MEMORY_BYTES,
            reserved: RESERVED,
            free: MEMORY_BYTES - RESERVED - used,
            used,
        }
    });
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, memory) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPcieThroughput(of: Device, counter: c_uint, to: *mut c_uint) -> Status {
    // KB/s over the last 20 ms; 0 is what the GPU sends, 1 what it receives.
    let rate = device(of).and_then(|gpu| {
        let totals = lately(gpu, 20_000_000);
        let bytes = match counter {
            0 => totals.to_host_bytes,
            1 => totals.to_device_bytes,
            _ => return Err(INVALID_ARGUMENT),
        };
        Ok(u32::try_from(bytes * 50 / 1_000).unwrap_or(u32::MAX))
    });
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, rate) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCurrPcieLinkGeneration(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|_| 5)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMaxPcieLinkGeneration(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|_| 5)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetCurrPcieLinkWidth(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|gpu| gpu.pcie_lanes.load(Relaxed))) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMaxPcieLinkWidth(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|_| PCIE_LANES)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetPcieReplayCounter(of: Device, to: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { answer(to, device(of).map(|_| 0)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvmlDeviceGetMigMode(of: Device, current: *mut c_uint, pending: *mut c_uint) -> Status {
    // SAFETY: the caller's out-pointers.
    unsafe {
        match answer(current, device(of).map(|_| 0)) {
            0 => answer(pending, Ok(0)),
            status => status,
        }
    }
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetNvLinkState(of: Device, _link: c_uint, _active: *mut c_uint) -> Status {
    device(of).map_or_else(|status| status, |_| NOT_SUPPORTED)
}

#[unsafe(no_mangle)]
extern "C" fn nvmlDeviceGetViolationStatus(of: Device, _policy: c_uint, _time: *mut u64) -> Status {
    device(of).map_or_else(|status| status, |_| NOT_SUPPORTED)
}
