//! What the devices of a node told about themselves and their links: RDMA ports and queue pairs, PCIe links, faults.

use super::ProcessWaits;
use crate::reading::Reading;
use crate::time::Window;

/// What one device of a node told over a window, or at a moment in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HardwareFacts {
    /// Node.
    pub node: String,
    /// When: between two reads of counters; for an event, the moment and the nanosecond after it.
    pub window: Window,
    /// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC`, ns.
    pub realtime_offset_ns: i64,
    /// What.
    pub fact: HardwareFact,
}

/// What was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HardwareFact {
    /// A port of an RDMA device.
    RdmaPort(RdmaPort),
    /// A queue pair of a traced process.
    QueuePair(QueuePair),
    /// What the network steps of a traced process waited for.
    Waits(Box<ProcessWaits>),
    /// A PCI device: where it sits, its link, its error counters.
    Pci(PciDevice),
    /// Something that happened at one moment.
    Event(DeviceEvent),
}

/// A counter over the window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counter {
    /// The name the device's driver gives it.
    pub name: String,
    /// By how much it grew; wrapping at 32 bits is undone. A counter that went backwards was reset: that is a failure,
    /// not a large number.
    pub growth: Reading<u64>,
}

/// A port of an InfiniBand, `RoCE` or EFA device.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RdmaPort {
    /// Device: `mlx5_3`.
    pub device: String,
    /// Port number of the device, as enumerated.
    pub port: u32,
    /// PCI address `dddd:bb:dd.f`; empty when it has none.
    pub pci: String,
    /// Network interface of the port; empty for native InfiniBand.
    pub netdev: String,
    /// `InfiniBand` or `Ethernet`, as the kernel says.
    pub link_layer: String,
    /// Whether the port can carry traffic (`ACTIVE`).
    pub active: Reading<bool>,
    /// Line rate, bytes/s per direction.
    pub rate_bytes_per_s: Reading<u64>,
    /// Every counter the device has, standard ones first. Data counters are in bytes.
    pub counters: Vec<Counter>,
}

impl RdmaPort {
    /// The growth of a counter; not measured when the device has none of that name.
    #[must_use]
    pub fn growth(&self, name: &str) -> Reading<u64> {
        growth(&self.counters, name)
    }
}

/// What a traced process gave one queue pair to send.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct QueuePair {
    /// Process id on the node.
    pub pid: u32,
    /// Device: `mlx5_3`; empty when unknown.
    pub device: String,
    /// Port of the device; 0 when unknown.
    pub port: u32,
    /// Number of the queue pair.
    pub number: u32,
    /// `RC`, `UC`, `UD`, ...; empty when unknown.
    pub transport: String,
    /// Address of the peer: its GID as an IPv6 or mapped IPv4 address, or `lid N`; empty when unknown.
    pub peer: String,
    /// Number of the peer's queue pair; 0 when unknown.
    pub peer_number: u32,
    /// Work requests posted to send.
    pub posts: u64,
    /// Bytes they carry; of reads, bytes asked for.
    pub posted_bytes: u64,
    /// Posts that the provider refused; 0 also where nobody watches for that, as the agent's probes do not.
    pub refused: u64,
    /// It was put into the error state.
    pub in_error: bool,
    /// Calls of which not everything is in `posts` and `posted_bytes`: they posted more at once than is followed.
    pub cut_calls: u64,
    /// Not everything posted in the window was seen: the probe on what posts came later, or could not be put there. `posts`
    /// and `posted_bytes` are then no measurement but a lower bound.
    pub posts_unseen: bool,
}

/// Kind of a PCI device, by its class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, PartialOrd, Ord)]
pub enum PciKind {
    /// Display or 3D controller, processing accelerator.
    Gpu,
    /// Network or InfiniBand controller.
    Nic,
    /// Mass storage.
    Storage,
    /// Bridge: root port or switch port.
    Bridge,
    /// Anything else.
    #[default]
    Other,
}

/// A PCI device: where it sits, its link, its error counters.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PciDevice {
    /// Address `dddd:bb:dd.f`.
    pub address: String,
    /// Kind.
    pub kind: PciKind,
    /// Name for people: RDMA device, interface, block device or GPU; empty when unknown.
    pub name: String,
    /// The link to the bridge above, of a PCI Express device.
    pub link: Reading<PciLink>,
    /// Bridges above it, nearest first, up to the root port.
    pub path: Vec<String>,
    /// NUMA node; not measured when the platform does not say.
    pub numa_node: Reading<u32>,
    /// Errors counted in the window (`aer_dev_correctable.RxErr`, ...).
    pub errors: Vec<Counter>,
}

/// A PCI Express link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PciLink {
    /// Rate of a lane now, megatransfers per second.
    pub rate_mt_per_s: u32,
    /// Lanes in use now.
    pub lanes: u32,
    /// Best rate that device and slot both have, megatransfers per second.
    pub best_rate_mt_per_s: u32,
    /// Lanes that device and slot both have.
    pub best_lanes: u32,
    /// The device was moving data when the link was read: an idle GPU lowers the rate of its link, so a low rate says
    /// something only then. Lanes are not given up when idle.
    pub under_load: bool,
}

impl PciLink {
    /// What the link moves of what it could, parts per million; the rate counts only under load.
    #[must_use]
    pub fn ppm(&self) -> u64 {
        let rate = if self.under_load {
            self.rate_mt_per_s
        } else {
            self.best_rate_mt_per_s
        };
        let now = u64::from(rate) * u64::from(self.lanes);
        let best = u64::from(self.best_rate_mt_per_s) * u64::from(self.best_lanes);
        if now == 0 || best == 0 {
            return super::PPM;
        }
        (now * super::PPM / best).min(super::PPM)
    }
}

/// How bad a PCI Express error is, by the code of the kernel's event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum AerSeverity {
    /// The link recovered by itself.
    Correctable,
    /// A transaction was lost.
    NonFatal,
    /// The link is down.
    Fatal,
}

/// Something that happened at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceEvent {
    /// PCI address of the device; empty when it has none.
    pub pci: String,
    /// What.
    pub kind: DeviceEventKind,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceEventKind {
    /// The PCI Express error handler reported an error.
    Aer {
        /// How bad.
        severity: AerSeverity,
        /// Bits of the status register, as in the kernel's event.
        status: u32,
    },
    /// The GPU's driver reported a fault.
    Xid {
        /// Its code.
        code: u32,
        /// Its text.
        message: String,
    },
    /// The RDMA stack reported something of a device, port or queue pair to a traced process.
    Verbs {
        /// Device; empty when unknown.
        device: String,
        /// Code of `enum ibv_event_type`.
        event: u32,
        /// Queue pair number or port; 0 when of the device.
        element: u32,
    },
}

fn growth(counters: &[Counter], name: &str) -> Reading<u64> {
    counters
        .iter()
        .find(|counter| counter.name == name)
        .map_or(Reading::NotMeasured, |counter| counter.growth.clone())
}

impl PciDevice {
    /// The growth of an error counter; not measured when the device has none of that name.
    #[must_use]
    pub fn growth(&self, name: &str) -> Reading<u64> {
        growth(&self.errors, name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_idle_device_is_judged_by_its_lanes_alone() {
        let link = PciLink {
            rate_mt_per_s: 2_500,
            lanes: 16,
            best_rate_mt_per_s: 32_000,
            best_lanes: 16,
            under_load: false,
        };
        assert_eq!(link.ppm(), 1_000_000);
        assert_eq!(
            PciLink {
                under_load: true,
                ..link
            }
            .ppm(),
            78_125
        );
        assert_eq!(PciLink { lanes: 8, ..link }.ppm(), 500_000);
        assert_eq!(PciLink::default().ppm(), 1_000_000);
    }
}
