//! Which GPU of which job a process stands for, from what is known so far.

use stallscope_attribution::facts::{DeviceProfile, GpuSubject};
use stallscope_attribution::peaks;
use stallscope_attribution::reading::Reading;
use stallscope_proto::convert::MAX_NAME_BYTES;

use crate::observation::{GpuReading, ProcessFacts};

/// What one GPU is, as its readings tell.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct DeviceIdentity {
    pci: String,
    name: String,
    pci_device_id: u32,
    sm_max_mhz: Option<u32>,
}

impl DeviceIdentity {
    /// Whether the reading tells something else than is known; if so it is taken over.
    pub(super) fn learn(&mut self, reading: &GpuReading) -> bool {
        let sm_max_mhz = reading.sm_max_mhz.value().copied().or(self.sm_max_mhz);
        if self.pci == reading.pci && self.name == reading.device && self.sm_max_mhz == sm_max_mhz {
            return false;
        }
        self.pci.clone_from(&reading.pci);
        self.name.clone_from(&reading.device);
        self.pci_device_id = reading.pci_device_id;
        self.sm_max_mhz = sm_max_mhz;
        true
    }

    /// Whether it is the device with this PCI address.
    pub(super) fn is_at(&self, pci: &str) -> bool {
        !pci.is_empty() && self.pci.eq_ignore_ascii_case(pci)
    }

    /// What the device can do, with the model FLOPs the job declares. A device that is in no table is measured
    /// against its own largest clock.
    pub(super) fn profile(&self, model_flops_per_step: Option<u64>) -> DeviceProfile {
        let known = peaks::profile(self.pci_device_id, &self.name);
        DeviceProfile {
            reference_sm_mhz: known.reference_sm_mhz.or(self.sm_max_mhz),
            model_flops_per_step,
            ..known
        }
    }
}

/// The subject of a GPU process. What is not known: rank falls back to the rank on the node, then to the communicator's
/// (`comm_rank`); the job is named after the process.
pub(super) fn subject(
    node: &str,
    process: &ProcessFacts,
    gpu: u32,
    device: &DeviceIdentity,
    comm_rank: Option<(u32, u32)>,
) -> GpuSubject {
    let rank = process
        .rank
        .or(comm_rank.map(|(rank, _)| rank))
        .or(process.local_rank)
        .unwrap_or(0);
    GpuSubject {
        job: process
            .job
            .as_deref()
            .and_then(name)
            .unwrap_or_else(|| format!("process-{}", process.key.pid)),
        node: node.to_owned(),
        gpu,
        pci: name(&device.pci).unwrap_or_default(),
        device: name(&device.name).unwrap_or_default(),
        rank,
        world: process.world.or(comm_rank.map(|(_, ranks)| ranks)).unwrap_or(0),
        pid: process.key.pid,
    }
}

/// Text from a process's environment or a driver as a name: one line, not too long, not empty.
pub(super) fn name(text: &str) -> Option<String> {
    let mut name: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    while name.len() > MAX_NAME_BYTES {
        name.pop();
    }
    let name = name.trim();
    (!name.is_empty()).then(|| name.to_owned())
}

/// The GPU on which readings see the process, if any does.
pub(super) fn sees_process(reading: &GpuReading, pid: u32) -> bool {
    let listed = matches!(&reading.processes, Reading::Value(pids) if pids.contains(&pid));
    listed
        || matches!(&reading.process_sm_ppm, Reading::Value(shares) if shares.iter().any(|(p, _)| *p == pid))
}
