//! What a device is and where it sits.

use std::path::Path;

use stallscope_attribution::facts::PciKind;
use stallscope_attribution::reading::Reading;

use super::super::sysfs::{is_pci_address, names, number, shown, text};

/// Bridges above a device; more than any machine has.
const MOST_BRIDGES: usize = 32;
/// Names that a device may have in one class.
const MOST_NAMES: usize = 16;

/// Kind by class: `0xccssii`, class, subclass, interface.
pub(super) fn kind(device: &Path) -> PciKind {
    let Ok(class) = number(&device.join("class")) else {
        return PciKind::Other;
    };
    match class >> 16 {
        0x03 | 0x12 => PciKind::Gpu,
        0x02 => PciKind::Nic,
        0x01 => PciKind::Storage,
        0x06 if class >> 8 & 0xff == 0x04 => PciKind::Bridge,
        _ => PciKind::Other,
    }
}

/// Addresses of the bridges above, nearest first: the parts of the device's real path.
pub(super) fn bridges(device: &Path) -> Vec<String> {
    let Ok(path) = device.canonicalize() else {
        return Vec::new();
    };
    let parts = path.iter().rev().skip(1).filter_map(|part| part.to_str());
    parts
        .take_while(|part| is_pci_address(part))
        .take(MOST_BRIDGES)
        .map(str::to_owned)
        .collect()
}

/// The name people know it by: RDMA device, interface, block device; empty when it has none.
pub(super) fn name(device: &Path) -> String {
    let first = |class: &str| {
        names(&device.join(class), MOST_NAMES)
            .ok()?
            .names
            .into_iter()
            .next()
    };
    let name = ["infiniband", "net", "nvme", "block"]
        .iter()
        .find_map(|class| first(class));
    shown(&name.unwrap_or_default())
}

/// Network interfaces of the device, by which others know that it moves data.
pub(super) fn interfaces(device: &Path) -> Vec<String> {
    names(&device.join("net"), MOST_NAMES).unwrap_or_default().names
}

/// NUMA node; -1 is a platform that does not say.
pub(super) fn numa_node(device: &Path) -> Reading<u32> {
    match text(&device.join("numa_node")) {
        Ok(text) => text.parse().map_or(Reading::NotMeasured, Reading::Value),
        Err(_) => Reading::NotMeasured,
    }
}
