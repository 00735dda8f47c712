//! NVML's structures. Sizes and offsets are checked against the bindings' in the tests.

use std::ffi::{c_char, c_int, c_void};

#[repr(C)]
pub(crate) struct PciInfo {
    pub(crate) bus_id_legacy: [c_char; 16],
    pub(crate) domain: u32,
    pub(crate) bus: u32,
    pub(crate) device: u32,
    pub(crate) pci_device_id: u32,
    pub(crate) pci_subsystem_id: u32,
    pub(crate) bus_id: [c_char; 32],
}

#[repr(C)]
pub(crate) struct Utilization {
    pub(crate) gpu: u32,
    pub(crate) memory: u32,
}

#[repr(C)]
pub(crate) struct ProcessInfo {
    pub(crate) pid: u32,
    pub(crate) used_memory: u64,
    pub(crate) gpu_instance: u32,
    pub(crate) compute_instance: u32,
}

#[repr(C)]
pub(crate) struct ProcessUtilizationSample {
    pub(crate) pid: u32,
    pub(crate) time_us: u64,
    pub(crate) sm: u32,
    pub(crate) memory: u32,
    pub(crate) encoder: u32,
    pub(crate) decoder: u32,
}

#[repr(C)]
pub(crate) struct Memory {
    pub(crate) total: u64,
    pub(crate) free: u64,
    pub(crate) used: u64,
}

#[repr(C)]
pub(crate) struct MemoryV2 {
    pub(crate) version: u32,
    pub(crate) total: u64,
    pub(crate) reserved: u64,
    pub(crate) free: u64,
    pub(crate) used: u64,
}

#[repr(C)]
pub(crate) struct FieldValue {
    pub(crate) field: u32,
    pub(crate) scope: u32,
    pub(crate) time_us: i64,
    pub(crate) latency_us: i64,
    pub(crate) value_type: c_int,
    pub(crate) status: c_int,
    /// A union of numbers up to eight bytes; small ones lie in its first bytes.
    pub(crate) value: u64,
}

#[repr(C)]
pub(crate) struct GpmMetric {
    pub(crate) metric: u32,
    pub(crate) status: c_int,
    pub(crate) value: f64,
    pub(crate) names: [*mut c_char; 3],
}

/// The head of `nvmlGpmMetricsGet_t`; `count` metrics follow. The array grows with the header's version.
#[repr(C)]
pub(crate) struct GpmMetricsGet {
    pub(crate) version: u32,
    pub(crate) count: u32,
    pub(crate) first: *mut c_void,
    pub(crate) second: *mut c_void,
    pub(crate) metrics: [GpmMetric; 0],
}

#[repr(C)]
pub(crate) struct GpmSupport {
    pub(crate) version: u32,
    pub(crate) supported: u32,
}

#[repr(C)]
pub(crate) struct EventData {
    pub(crate) device: *mut c_void,
    pub(crate) kind: u64,
    pub(crate) data: u64,
    pub(crate) gpu_instance: u32,
    pub(crate) compute_instance: u32,
}
