//! What devices told. A node name equal to the envelope's is left out on the wire.

use stallscope_attribution::facts::{
    AerSeverity, Counter, DeviceEvent, DeviceEventKind, HardwareFact, HardwareFacts, PciDevice, PciKind,
    PciLink, QueuePair, RdmaPort,
};
use stallscope_attribution::reading::Reading;

use super::network::{node_of, node_to_wire};
use super::reading::{pci_link_reading, uint_reading};
use super::{WireError, name, text_of};
use crate::v1;
use crate::v1::hardware_facts::Fact;

/// Counters of one device, and bridges above it, that are accepted: real devices have tens, real paths under ten.
const MAX_PARTS: usize = 1024;

impl v1::HardwareFacts {
    /// The facts as `sender` tells them.
    #[must_use]
    pub fn new(sender: &str, facts: &HardwareFacts) -> Self {
        Self {
            node: node_to_wire(&facts.node, sender),
            window: Some(facts.window.into()),
            realtime_offset_ns: facts.realtime_offset_ns,
            fact: Some(match &facts.fact {
                HardwareFact::RdmaPort(port) => Fact::RdmaPort(port.into()),
                HardwareFact::QueuePair(pair) => Fact::QueuePair(pair.into()),
                HardwareFact::Pci(device) => Fact::Pci(device.into()),
                HardwareFact::Waits(waits) => Fact::Waits((&**waits).into()),
                HardwareFact::Event(event) => event_to_wire(event),
            }),
        }
    }

    /// The facts in a message of `sender`.
    ///
    /// # Errors
    /// When the message is no such fact.
    pub fn into_facts(self, sender: &str) -> Result<HardwareFacts, WireError> {
        let fact = self.fact.ok_or(WireError::Unknown {
            field: "hardware.fact",
            value: 0,
        })?;
        Ok(HardwareFacts {
            node: node_of("hardware.node", self.node, sender)?,
            window: self
                .window
                .ok_or(WireError::Missing {
                    field: "hardware.window",
                })?
                .try_into()?,
            realtime_offset_ns: self.realtime_offset_ns,
            fact: match fact {
                Fact::RdmaPort(port) => HardwareFact::RdmaPort(port.try_into()?),
                Fact::QueuePair(pair) => HardwareFact::QueuePair(pair.try_into()?),
                Fact::Pci(device) => HardwareFact::Pci(device.try_into()?),
                Fact::Waits(waits) => HardwareFact::Waits(Box::new((&waits).try_into()?)),
                Fact::Aer(event) => event_of(
                    event.pci,
                    DeviceEventKind::Aer {
                        severity: severity_of(event.severity)?,
                        status: event.status,
                    },
                )?,
                Fact::Xid(event) => event_of(
                    event.pci,
                    DeviceEventKind::Xid {
                        code: event.code,
                        message: text_of("xid.message", event.message)?,
                    },
                )?,
                Fact::Verbs(event) => event_of(
                    event.pci,
                    DeviceEventKind::Verbs {
                        device: text_of("verbs.device", event.device)?,
                        event: event.event,
                        element: event.element,
                    },
                )?,
            },
        })
    }
}

fn event_to_wire(event: &DeviceEvent) -> Fact {
    let pci = event.pci.clone();
    match &event.kind {
        DeviceEventKind::Aer { severity, status } => Fact::Aer(v1::AerEvent {
            pci,
            severity: severity_to_wire(*severity).into(),
            status: *status,
        }),
        DeviceEventKind::Xid { code, message } => Fact::Xid(v1::XidEvent {
            pci,
            code: *code,
            message: message.clone(),
        }),
        DeviceEventKind::Verbs {
            device,
            event,
            element,
        } => Fact::Verbs(v1::VerbsEvent {
            pci,
            device: device.clone(),
            event: *event,
            element: *element,
        }),
    }
}

fn event_of(pci: String, kind: DeviceEventKind) -> Result<HardwareFact, WireError> {
    let pci = text_of("event.pci", pci)?;
    Ok(HardwareFact::Event(DeviceEvent { pci, kind }))
}

const fn severity_to_wire(severity: AerSeverity) -> v1::AerSeverity {
    match severity {
        AerSeverity::Correctable => v1::AerSeverity::Correctable,
        AerSeverity::NonFatal => v1::AerSeverity::NonFatal,
        AerSeverity::Fatal => v1::AerSeverity::Fatal,
    }
}

fn severity_of(wire: i32) -> Result<AerSeverity, WireError> {
    match v1::AerSeverity::try_from(wire) {
        Ok(v1::AerSeverity::Correctable) => Ok(AerSeverity::Correctable),
        Ok(v1::AerSeverity::NonFatal) => Ok(AerSeverity::NonFatal),
        Ok(v1::AerSeverity::Fatal) => Ok(AerSeverity::Fatal),
        Ok(v1::AerSeverity::Unspecified) | Err(_) => Err(WireError::Unknown {
            field: "aer.severity",
            value: wire.into(),
        }),
    }
}

const fn kind_to_wire(kind: PciKind) -> v1::PciKind {
    match kind {
        PciKind::Gpu => v1::PciKind::Gpu,
        PciKind::Nic => v1::PciKind::Nic,
        PciKind::Storage => v1::PciKind::Storage,
        PciKind::Bridge => v1::PciKind::Bridge,
        PciKind::Other => v1::PciKind::Other,
    }
}

fn kind_of(wire: i32) -> PciKind {
    match v1::PciKind::try_from(wire) {
        Ok(v1::PciKind::Gpu) => PciKind::Gpu,
        Ok(v1::PciKind::Nic) => PciKind::Nic,
        Ok(v1::PciKind::Storage) => PciKind::Storage,
        Ok(v1::PciKind::Bridge) => PciKind::Bridge,
        // A newer sender's finer kind is still a device.
        Ok(v1::PciKind::Other) | Err(_) => PciKind::Other,
    }
}

fn narrow(field: &'static str, reading: Reading<u64>) -> Result<Reading<u32>, WireError> {
    let fits = |value: u64| {
        u32::try_from(value).map_err(|_| WireError::Unknown {
            field,
            value: i64::MAX,
        })
    };
    Ok(match reading {
        Reading::Value(value) => Reading::Value(fits(value)?),
        Reading::NotMeasured => Reading::NotMeasured,
        Reading::Unsupported => Reading::Unsupported,
        Reading::Failed(why) => Reading::Failed(why),
    })
}

fn counters_to_wire(counters: &[Counter]) -> Vec<v1::Counter> {
    let counter = |counter: &Counter| v1::Counter {
        name: counter.name.clone(),
        growth: uint_reading::to_wire(&counter.growth),
    };
    counters.iter().map(counter).collect()
}

fn counters_of(wire: Vec<v1::Counter>) -> Result<Vec<Counter>, WireError> {
    at_most("hardware.counters", wire.len())?;
    let counter = |counter: v1::Counter| {
        Ok(Counter {
            name: name("counter.name", counter.name)?,
            growth: uint_reading::from_wire("counter.growth", counter.growth)?,
        })
    };
    wire.into_iter().map(counter).collect()
}

fn at_most(field: &'static str, parts: usize) -> Result<(), WireError> {
    if parts > MAX_PARTS {
        return Err(WireError::Name {
            field,
            why: "too many of them",
        });
    }
    Ok(())
}

impl From<&RdmaPort> for v1::RdmaPort {
    fn from(port: &RdmaPort) -> Self {
        Self {
            device: port.device.clone(),
            port: port.port,
            pci: port.pci.clone(),
            netdev: port.netdev.clone(),
            link_layer: port.link_layer.clone(),
            active: uint_reading::to_wire(&port.active.clone().map(u64::from)),
            rate_bytes_per_s: uint_reading::to_wire(&port.rate_bytes_per_s),
            counters: counters_to_wire(&port.counters),
        }
    }
}

impl TryFrom<v1::RdmaPort> for RdmaPort {
    type Error = WireError;

    fn try_from(wire: v1::RdmaPort) -> Result<Self, WireError> {
        Ok(Self {
            device: name("rdma.device", wire.device)?,
            port: wire.port,
            pci: text_of("rdma.pci", wire.pci)?,
            netdev: text_of("rdma.netdev", wire.netdev)?,
            link_layer: text_of("rdma.link_layer", wire.link_layer)?,
            active: uint_reading::from_wire("rdma.active", wire.active)?.map(|active| active != 0),
            rate_bytes_per_s: uint_reading::from_wire("rdma.rate_bytes_per_s", wire.rate_bytes_per_s)?,
            counters: counters_of(wire.counters)?,
        })
    }
}

impl From<&QueuePair> for v1::QueuePair {
    fn from(pair: &QueuePair) -> Self {
        Self {
            pid: pair.pid,
            device: pair.device.clone(),
            port: pair.port,
            number: pair.number,
            transport: pair.transport.clone(),
            peer: pair.peer.clone(),
            peer_number: pair.peer_number,
            posts: pair.posts,
            posted_bytes: pair.posted_bytes,
            refused: pair.refused,
            in_error: pair.in_error,
            cut_calls: pair.cut_calls,
            posts_unseen: pair.posts_unseen,
        }
    }
}

impl TryFrom<v1::QueuePair> for QueuePair {
    type Error = WireError;

    fn try_from(wire: v1::QueuePair) -> Result<Self, WireError> {
        Ok(Self {
            pid: wire.pid,
            device: text_of("queue_pair.device", wire.device)?,
            port: wire.port,
            number: wire.number,
            transport: text_of("queue_pair.transport", wire.transport)?,
            peer: text_of("queue_pair.peer", wire.peer)?,
            peer_number: wire.peer_number,
            posts: wire.posts,
            posted_bytes: wire.posted_bytes,
            refused: wire.refused,
            in_error: wire.in_error,
            cut_calls: wire.cut_calls,
            posts_unseen: wire.posts_unseen,
        })
    }
}

impl From<PciLink> for v1::PciLink {
    fn from(link: PciLink) -> Self {
        Self {
            rate_mt_per_s: link.rate_mt_per_s,
            lanes: link.lanes,
            best_rate_mt_per_s: link.best_rate_mt_per_s,
            best_lanes: link.best_lanes,
            under_load: link.under_load,
        }
    }
}

impl From<v1::PciLink> for PciLink {
    fn from(wire: v1::PciLink) -> Self {
        Self {
            rate_mt_per_s: wire.rate_mt_per_s,
            lanes: wire.lanes,
            best_rate_mt_per_s: wire.best_rate_mt_per_s,
            best_lanes: wire.best_lanes,
            under_load: wire.under_load,
        }
    }
}

impl From<&PciDevice> for v1::PciDevice {
    fn from(device: &PciDevice) -> Self {
        Self {
            address: device.address.clone(),
            kind: kind_to_wire(device.kind).into(),
            name: device.name.clone(),
            link: pci_link_reading::to_wire(&device.link),
            path: device.path.clone(),
            numa_node: uint_reading::to_wire(&device.numa_node.clone().map(u64::from)),
            errors: counters_to_wire(&device.errors),
        }
    }
}

impl TryFrom<v1::PciDevice> for PciDevice {
    type Error = WireError;

    fn try_from(wire: v1::PciDevice) -> Result<Self, WireError> {
        at_most("pci.path", wire.path.len())?;
        Ok(Self {
            address: name("pci.address", wire.address)?,
            kind: kind_of(wire.kind),
            name: text_of("pci.name", wire.name)?,
            link: pci_link_reading::from_wire("pci.link", wire.link)?,
            path: wire
                .path
                .into_iter()
                .map(|bridge| name("pci.path", bridge))
                .collect::<Result<_, _>>()?,
            numa_node: narrow(
                "pci.numa_node",
                uint_reading::from_wire("pci.numa_node", wire.numa_node)?,
            )?,
            errors: counters_of(wire.errors)?,
        })
    }
}
