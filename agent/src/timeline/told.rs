//! What devices and libraries tell beside the calls that steps are made of: kept for the steps, or passed on.

use stallscope_attribution::facts::{DeviceEvent, DeviceEventKind, HardwareFact, HardwareFacts};
use stallscope_attribution::links;
use stallscope_attribution::time::Window;

use super::process::{LONGEST_STEP_NS, SEARCH_NS};
use super::subject::{self, DeviceIdentity};
use super::{Event, Timeline, waits};
use crate::observation::GpuReading;

/// How long GPU readings are kept, ns: as long as a window can still ask for them.
const KEEP_READINGS_NS: u64 = LONGEST_STEP_NS + 2 * SEARCH_NS;

impl Timeline {
    pub(super) fn gpu_reading(&mut self, window: Window, reading: &GpuReading) {
        let counters = self.gpus.entry(reading.gpu).or_default();
        counters.add(window, reading);
        counters.prune(self.clock_ns.saturating_sub(KEEP_READINGS_NS));
        self.devices.entry(reading.gpu).or_default().learn(reading);
        for process in self.processes.values_mut() {
            if process.facts.gpu.is_none() && subject::sees_process(reading, process.facts.key.pid) {
                process.gpu_seen = Some(reading.gpu);
            }
            if process.gpu() == Some(reading.gpu) {
                process.ratio.add(reading);
            }
        }
    }

    /// Passes on what a device told. A fault of a GPU is evidence of its steps too.
    pub(super) fn hardware(&mut self, facts: Box<HardwareFacts>, events: &mut Vec<Event>) {
        if let HardwareFact::Event(DeviceEvent {
            pci,
            kind: DeviceEventKind::Xid { code, .. },
        }) = &facts.fact
            && links::accuses_gpu(*code)
        {
            let of_gpu = |device: &DeviceIdentity| device.is_at(pci);
            let gpu = self.devices.iter().find(|(_, device)| of_gpu(device));
            if let Some(counters) = gpu.and_then(|(gpu, _)| self.gpus.get_mut(gpu)) {
                counters.fault(facts.window.start_ns(), *code);
            }
        }
        events.push(Event::Hardware(facts));
    }

    /// Passes on what a process's network steps waited for.
    pub(super) fn tell_waits(&self, folded: waits::Folded, events: &mut Vec<Event>) {
        events.push(Event::Hardware(Box::new(HardwareFacts {
            node: self.node.clone(),
            window: folded.window,
            realtime_offset_ns: self.realtime_offset_ns,
            fact: HardwareFact::Waits(Box::new(folded.waits)),
        })));
    }
}
