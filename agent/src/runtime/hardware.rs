//! What only the running agent knows of a device that probes told of.

use std::fs;
use std::path::Path;

use stallscope_attribution::facts::{DeviceEventKind, HardwareFact, HardwareFacts};

use crate::sources::clock;

/// Adds node, clock offset, and the PCI address of an event's device.
pub(super) fn complete(facts: &mut HardwareFacts, node: &str) {
    node.clone_into(&mut facts.node);
    facts.realtime_offset_ns = clock::realtime_offset_ns();
    if let HardwareFact::Event(event) = &mut facts.fact
        && event.pci.is_empty()
        && let DeviceEventKind::Verbs { device, .. } = &event.kind
        && !device.is_empty()
    {
        event.pci = pci_of(Path::new("/sys/class/infiniband"), device);
    }
}

/// The PCI address of an RDMA device; empty when it has none, as devices made of software.
fn pci_of(class: &Path, device: &str) -> String {
    let target = fs::read_link(class.join(device).join("device")).unwrap_or_default();
    let name = target.file_name().and_then(|name| name.to_str()).unwrap_or("");
    if name.split(':').count() == 3 && name.contains('.') {
        name.to_owned()
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_device_on_the_bus_has_an_address_and_another_has_none() {
        let class = tempfile::tempdir().unwrap();
        for (device, target) in [("mlx5_0", "../../../0000:3b:00.1"), ("rxe0", "../../../virtual")] {
            fs::create_dir(class.path().join(device)).unwrap();
            symlink(target, class.path().join(device).join("device")).unwrap();
        }
        assert_eq!(pci_of(class.path(), "mlx5_0"), "0000:3b:00.1");
        assert_eq!(pci_of(class.path(), "rxe0"), "");
        assert_eq!(pci_of(class.path(), "absent"), "");
    }
}
