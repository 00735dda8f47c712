//! What could not be looked at, so that nobody takes it for healthy.

use std::collections::{BTreeMap, BTreeSet};

use super::Unseen;
use super::gather::{Hardware, name};
use crate::facts::{GpuSubject, PciKind};
use crate::reading::Reading;

impl Hardware {
    /// What could not be looked at.
    pub(super) fn unseen(&self, subjects: &[&GpuSubject]) -> Vec<Unseen> {
        let mut unseen = Vec::new();
        let mut say = |node: &str, what: String| {
            unseen.push(Unseen {
                node: node.to_owned(),
                what,
            });
        };
        let nodes: BTreeSet<&str> = subjects.iter().map(|subject| subject.node.as_str()).collect();
        for node in nodes.into_iter().filter(|node| !self.nodes.contains(*node)) {
            say(
                node,
                "RDMA ports, PCIe links and faults of devices: nothing was told".into(),
            );
        }
        for node in &self.nodes {
            if !self.devices.values().any(|device| device.node == *node) {
                say(node, "PCIe links: no device told about its own".into());
            }
        }
        for port in self.ports.values() {
            let name = name(&port.last);
            if port.last.active.value().is_none() {
                say(
                    &port.node,
                    format!("{name}: whether the port is active{}", because(&port.last.active)),
                );
            }
            if port.last.rate_bytes_per_s.value().is_none() {
                say(
                    &port.node,
                    format!("{name}: its rate{}", because(&port.last.rate_bytes_per_s)),
                );
            }
            if port.counters.is_empty() {
                say(
                    &port.node,
                    format!("{name}: it has no counters, so loss and congestion are not seen"),
                );
            }
            for (counter, why) in port.failed.iter().take(4) {
                say(
                    &port.node,
                    format!("{name}: {counter} in part of the time: {why}"),
                );
            }
        }
        self.unseen_posts(&mut say);
        for device in self.devices.values() {
            let wanted = matches!(device.last.kind, PciKind::Gpu | PciKind::Nic);
            if wanted && device.last.link.value().is_none() {
                let what = format!(
                    "{}: its PCIe link{}",
                    device.last.address,
                    because(&device.last.link)
                );
                say(&device.node, what);
            }
            for (counter, why) in device.failed.iter().take(4) {
                let what = format!("{}: {counter} in part of the time: {why}", device.last.address);
                say(&device.node, what);
            }
        }
        unseen
    }

    /// Queue pairs of which not everything posted was counted: what they are told to have sent is too little.
    fn unseen_posts(&self, say: &mut impl FnMut(&str, String)) {
        let mut by_device: BTreeMap<(&str, &str), (u64, u64)> = BTreeMap::new();
        for ((node, ..), pair) in &self.queue_pairs {
            let (unseen, cut) = by_device.entry((node, &pair.device)).or_default();
            *unseen += u64::from(pair.posts_unseen);
            *cut = cut.saturating_add(pair.cut_calls);
        }
        for ((node, device), (unseen, cut)) in by_device {
            let device = if device.is_empty() {
                "an RDMA device"
            } else {
                device
            };
            if unseen > 0 {
                say(
                    node,
                    format!(
                        "{device}: part of what {unseen} queue pairs sent, because the probe on it came later or could \
                         not be put there"
                    ),
                );
            }
            if cut > 0 {
                say(
                    node,
                    format!("{device}: the end of {cut} posts that held more at once than is followed"),
                );
            }
        }
    }
}

fn because<T>(reading: &Reading<T>) -> String {
    match reading {
        Reading::Value(_) => String::new(),
        Reading::NotMeasured => " was not measured".into(),
        Reading::Unsupported => " is not told by device or driver".into(),
        Reading::Failed(why) => format!(" could not be read: {why}"),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use crate::facts::{HardwareFact, HardwareFacts, QueuePair};
    use crate::time::Window;

    #[test]
    fn what_queue_pairs_sent_unseen_is_no_measurement() {
        let told = |second: u64, number, posts_unseen, cut_calls| HardwareFacts {
            node: "a".into(),
            window: Window::new(second, second + 1).unwrap(),
            realtime_offset_ns: 0,
            fact: HardwareFact::QueuePair(QueuePair {
                pid: 7,
                device: "mlx5_3".into(),
                number,
                posts_unseen,
                cut_calls,
                ..QueuePair::default()
            }),
        };
        let unseen = |facts: &[HardwareFacts]| -> Vec<String> {
            let unseen = Hardware::gather(facts, &[]).unseen(&[]);
            unseen
                .into_iter()
                .map(|unseen| unseen.what)
                .filter(|what| what.contains("mlx5_3"))
                .collect()
        };
        assert_eq!(unseen(&[told(0, 1, false, 0)]), [""; 0]);
        let partly = unseen(&[told(0, 1, true, 2), told(1, 1, false, 3), told(1, 2, true, 0)]);
        let [late, cut] = &partly[..] else {
            panic!("{partly:?}");
        };
        assert!(late.contains("2 queue pairs"), "{late}");
        assert!(cut.contains("5 posts"), "{cut}");
    }
}
