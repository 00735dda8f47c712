//! One GPU: samples of its counters, and readings made of two of them.

use std::sync::Arc;

use nvml_wrapper::enum_wrappers::device::{Clock, TemperatureSensor};
use nvml_wrapper::enums::gpm::GpmMetricId;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::gpm::gpm_metrics_get;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id;
use nvml_wrapper::{Device, GpmSample, Nvml};
use stallscope_attribution::reading::Reading;

use super::convert::{
    Lack, advance, and_then, counter, empty_reading, lack, lacking, longest, mib_to_bytes, percent_to_ppm,
    process_shares, reading, whole_percent_to_ppm,
};
use super::links::Links;
use super::watch::GpuShared;
use crate::observation::GpuReading;
use crate::sources::clock::monotonic_ns;
use crate::sources::procs::GpuIdentity;

/// How often what changes slowly is read.
const SLOW_NS: u64 = 1_000_000_000;
/// How often the list of compute processes is read.
const PROCESSES_NS: u64 = 5_000_000_000;

/// Metrics read between each two GPM samples, in this order.
const METRICS: [GpmMetricId; 7] = [
    GpmMetricId::GraphicsUtil,
    GpmMetricId::SmUtil,
    GpmMetricId::SmOccupancy,
    GpmMetricId::AnyTensorUtil,
    GpmMetricId::DramBwUtil,
    GpmMetricId::PcieTxPerSec,
    GpmMetricId::PcieRxPerSec,
];

/// Accumulated nanoseconds of throttling, in this order: by heat (software, hardware, and as drivers before the two
/// count it), by power (cap, brake). The wrapper translates the numbers to the loaded driver's.
const THROTTLE: [u32; 5] = [
    field_id::NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_THERM_SLOWDOWN,
    field_id::NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_THERM_SLOWDOWN,
    field_id::NVML_FI_DEV_PERF_POLICY_THERMAL,
    field_id::NVML_FI_DEV_CLOCKS_EVENT_REASON_SW_POWER_CAP,
    field_id::NVML_FI_DEV_CLOCKS_EVENT_REASON_HW_POWER_BRAKE_SLOWDOWN,
];

/// Reads one device.
pub(super) struct Sampler<'nvml> {
    nvml: &'nvml Nvml,
    device: Device<'nvml>,
    shared: Arc<GpuShared>,
    gpm: Result<(), Lack>,
    max_mhz: Reading<u32>,
    next_slow_ns: u64,
    next_processes_ns: u64,
    utilization_seen_us: u64,
    links: Links,
}

/// Counters at one instant.
pub(super) struct Sample<'nvml> {
    pub(super) at_ns: u64,
    gpm: Result<GpmSample<'nvml>, Lack>,
    energy_mj: Reading<u64>,
    throttle_ns: [Reading<u64>; 5],
}

impl<'nvml> Sampler<'nvml> {
    pub(super) fn new(nvml: &'nvml Nvml, device: Device<'nvml>, shared: &Arc<GpuShared>) -> Self {
        let gpm = match shared.call("nvmlGpmQueryDeviceSupport", || device.gpm_support()) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Lack::Unsupported),
            Err(error) => Err(lack(error)),
        };
        let pci = shared.call("nvmlDeviceGetPciInfo_v3", || device.pci_info()).ok();
        let identity = GpuIdentity {
            index: shared.identity().index,
            uuid: shared
                .call("nvmlDeviceGetUUID", || device.uuid())
                .unwrap_or_default(),
            pci: pci.as_ref().map_or_else(String::new, |pci| {
                format!("{:04x}:{:02x}:{:02x}.0", pci.domain, pci.bus, pci.device)
            }),
            name: shared
                .call("nvmlDeviceGetName", || device.name())
                .unwrap_or_default(),
        };
        let pci_device_id = pci.map_or(0, |pci| pci.pci_device_id);
        shared.identify(identity, pci_device_id, gpm.is_ok());
        let max_mhz = reading(shared.call("nvmlDeviceGetMaxClockInfo", || device.max_clock_info(Clock::SM)));
        let processes = compute_processes(shared, &device);
        shared.set_processes(&processes);
        Self {
            nvml,
            device,
            shared: Arc::clone(shared),
            gpm,
            max_mhz,
            next_slow_ns: 0,
            next_processes_ns: 0,
            utilization_seen_us: 0,
            links: Links::default(),
        }
    }

    pub(super) fn sample(&self) -> Sample<'nvml> {
        let at_ns = monotonic_ns();
        let gpm = self.gpm.clone().and_then(|()| {
            self.shared
                .call("nvmlGpmSampleGet", || self.device.gpm_sample())
                .map_err(lack)
        });
        let energy = self.shared.call("nvmlDeviceGetTotalEnergyConsumption", || {
            self.device.total_energy_consumption()
        });
        Sample {
            at_ns,
            gpm,
            energy_mj: reading(energy),
            throttle_ns: self.throttle(),
        }
    }

    fn throttle(&self) -> [Reading<u64>; 5] {
        let fields = THROTTLE.map(FieldId);
        let values = self.shared.call("nvmlDeviceGetFieldValues", || {
            self.device.field_values_for(&fields)
        });
        let mut values = match values {
            Ok(values) => values.into_iter(),
            Err(error) => {
                let failed: Reading<u64> = reading(Err(error));
                return [(); 5].map(|()| failed.clone());
            }
        };
        [(); 5].map(|()| match values.next() {
            Some(Ok(sample)) => match sample.value {
                Ok(value) => counter(value),
                Err(error) => reading(Err(error)),
            },
            Some(Err(error)) => reading(Err(error)),
            None => Reading::Failed("the driver answered fewer fields than asked".to_owned()),
        })
    }

    pub(super) fn reading(&mut self, before: &Sample<'nvml>, now: &Sample<'nvml>) -> GpuReading {
        let window_ns = now.at_ns.saturating_sub(before.at_ns);
        let [software, hardware, policy, cap, brake] =
            std::array::from_fn(|which| advance(&before.throttle_ns[which], &now.throttle_ns[which]));
        let mut out = GpuReading {
            sm_mhz: reading(
                self.shared
                    .call("nvmlDeviceGetClockInfo", || self.device.clock_info(Clock::SM)),
            ),
            sm_max_mhz: self.max_mhz.clone(),
            clock_reasons: self.clock_reasons(),
            thermal_ns: longest(&[software, hardware, policy], window_ns),
            power_limit_ns: longest(&[cap, brake], window_ns),
            energy_mj: advance(&before.energy_mj, &now.energy_mj),
            ..empty_reading(&self.shared)
        };
        self.activity(before, now, &mut out);
        if now.at_ns >= self.next_slow_ns {
            self.next_slow_ns = now.at_ns + SLOW_NS;
            self.slow(&mut out);
            out.links = self
                .links
                .read(&self.shared, &self.device, &out.busy_ppm, now.at_ns);
        }
        if now.at_ns >= self.next_processes_ns {
            self.next_processes_ns = now.at_ns + PROCESSES_NS;
            out.processes = compute_processes(&self.shared, &self.device);
            self.shared.set_processes(&out.processes);
        }
        out
    }

    fn clock_reasons(&self) -> Reading<u64> {
        let reasons = self.shared.call("nvmlDeviceGetCurrentClocksThrottleReasons", || {
            self.device.current_throttle_reasons()
        });
        reading(reasons.map(|reasons| reasons.bits()))
    }

    fn activity(&self, before: &Sample<'nvml>, now: &Sample<'nvml>, out: &mut GpuReading) {
        let (first, second) = match (&before.gpm, &now.gpm) {
            (Ok(first), Ok(second)) => (first, second),
            (Err(why), _) | (_, Err(why)) => return self.without_gpm(why, out),
        };
        let metrics = self
            .shared
            .call("nvmlGpmMetricsGet", || {
                gpm_metrics_get(self.nvml, first, second, &METRICS)
            })
            .map(|metrics| {
                metrics
                    .into_iter()
                    .map(|metric| reading(metric.map(|metric| metric.value)))
            });
        let mut metrics = match metrics {
            Ok(metrics) => metrics,
            Err(error) => return self.without_gpm(&lack(error), out),
        };
        let mut next = || metrics.next().unwrap_or_default();
        let share = |value: Reading<f64>| and_then(value, percent_to_ppm);
        out.busy_ppm = share(next());
        out.sm_ppm = share(next());
        out.occupancy_ppm = share(next());
        out.tensor_ppm = share(next());
        out.dram_ppm = share(next());
        out.pcie_tx_bytes_per_s = and_then(next(), mib_to_bytes);
        out.pcie_rx_bytes_per_s = and_then(next(), mib_to_bytes);
    }

    /// Before Hopper there is only the driver's own utilisation: time with any kernel, over its last sampling period.
    fn without_gpm(&self, why: &Lack, out: &mut GpuReading) {
        let utilization = self.shared.call("nvmlDeviceGetUtilizationRates", || {
            self.device.utilization_rates()
        });
        out.busy_ppm = reading(utilization.map(|rates| whole_percent_to_ppm(rates.gpu)));
        out.sm_ppm = lacking(why);
        out.occupancy_ppm = lacking(why);
        out.tensor_ppm = lacking(why);
        out.dram_ppm = lacking(why);
        out.pcie_tx_bytes_per_s = lacking(why);
        out.pcie_rx_bytes_per_s = lacking(why);
    }

    fn slow(&mut self, out: &mut GpuReading) {
        let temperature = self.shared.call("nvmlDeviceGetTemperature", || {
            self.device.temperature(TemperatureSensor::Gpu)
        });
        let memory = self
            .shared
            .call("nvmlDeviceGetMemoryInfo_v2", || self.device.memory_info());
        out.temperature_c = reading(temperature);
        out.memory_used_bytes = reading(memory.map(|memory| memory.used));
        let samples = self.shared.call("nvmlDeviceGetProcessUtilization", || {
            self.device.process_utilization_stats(self.utilization_seen_us)
        });
        out.process_sm_ppm = match samples {
            // The driver's way to say that nothing ran.
            Err(NvmlError::NotFound) => Reading::Value(Vec::new()),
            other => reading(other).map(|samples| {
                let (shares, newest) = process_shares(&samples, self.utilization_seen_us);
                self.utilization_seen_us = newest;
                shares
            }),
        };
    }
}

fn compute_processes(shared: &GpuShared, device: &Device<'_>) -> Reading<Vec<u32>> {
    let processes = shared.call("nvmlDeviceGetComputeRunningProcesses_v3", || {
        device.running_compute_processes()
    });
    reading(processes.map(|processes| processes.into_iter().map(|process| process.pid).collect()))
}
