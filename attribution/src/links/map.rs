//! Which GPU reaches the network through which port.

use std::collections::{BTreeMap, BTreeSet};

use super::gather::{Hardware, Port, name};
use crate::cause::Place;
use crate::facts::{GpuSubject, PciDevice, PciKind, PortFacts};
use crate::reading::Reading;

/// Most peers told of one port.
const MOST_PEERS: usize = 16;

/// How far a port is from a GPU, nearest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Distance {
    /// Below one PCIe switch.
    Switch,
    /// Below one root port.
    Root,
    /// On one NUMA node.
    Numa,
    /// Across the host.
    Host,
    /// The platform does not tell.
    Unknown,
}

impl Distance {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Switch => "same_switch",
            Self::Root => "same_root",
            Self::Numa => "same_numa",
            Self::Host => "across_host",
            Self::Unknown => "unknown",
        }
    }
}

/// A port that a GPU is nearest to, or that its process uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathPort {
    /// `mlx5_3:1`, or the interface.
    pub port: String,
    /// Its PCI address; empty when unknown.
    pub pci: String,
    /// Its interface; empty when it has none.
    pub netdev: String,
    /// How far from the GPU.
    pub distance: Distance,
    /// Whether the rank's process was seen to send by it; not measured where nobody could look.
    pub is_used: Reading<bool>,
    /// Nodes (with their port) or addresses at the other end.
    pub peers: Vec<String>,
}

/// A GPU, its rank, and its ports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuPath {
    /// Node.
    pub node: String,
    /// Job; empty when no process uses the GPU.
    pub job: String,
    /// Rank; `None` when no process uses the GPU.
    pub rank: Option<u32>,
    /// GPU index as the driver counts; `None` when only the bus told of it.
    pub gpu: Option<u32>,
    /// Its PCI address; empty when unknown.
    pub pci: String,
    /// Its ports, nearest first.
    pub ports: Vec<PathPort>,
}

/// Adds GPU and rank to a place that has only a PCI address.
pub(super) fn complete(place: &mut Place, subjects: &[&GpuSubject]) {
    let (Some(node), Some(pci)) = (&place.node, &place.pci) else {
        return;
    };
    let subject = subjects
        .iter()
        .find(|subject| subject.node == *node && subject.pci.eq_ignore_ascii_case(pci));
    if let Some(subject) = subject {
        place.gpu = Some(subject.gpu);
        place.rank = Some(subject.rank);
    }
}

/// By which interfaces a process's TCP flows leave, and to whom.
#[derive(Default)]
struct Tcp<'a> {
    /// By node, process and interface: the peers' addresses.
    flows: BTreeMap<(&'a str, u32, &'a str), BTreeSet<&'a str>>,
    /// Node and interface by address.
    owners: BTreeMap<&'a str, (&'a str, &'a str)>,
}

impl<'a> Tcp<'a> {
    fn of(ports: &'a [PortFacts]) -> Self {
        let mut tcp = Self::default();
        for facts in ports {
            for flow in &facts.flows {
                let key = (facts.node.as_str(), flow.pid, facts.port.as_str());
                tcp.flows.entry(key).or_default().insert(address(&flow.peer));
                tcp.owners
                    .insert(address(&flow.local), (&facts.node, &facts.port));
            }
        }
        tcp
    }

    /// The node and interface that have an address, else the address.
    fn name(&self, peer: &str) -> String {
        self.owners
            .get(peer)
            .map_or_else(|| peer.to_owned(), |(node, port)| format!("{node} {port}"))
    }
}

/// An address without its port.
fn address(of: &str) -> &str {
    of.rsplit_once(':').map_or(of, |(address, _)| address)
}

/// One path per GPU: of every rank, and of GPUs that only the bus told of.
pub(super) fn paths(seen: &Hardware, ports: &[PortFacts], subjects: &[&GpuSubject]) -> Vec<GpuPath> {
    let tcp = Tcp::of(ports);
    let mut paths: Vec<GpuPath> = subjects
        .iter()
        .map(|subject| of_rank(seen, &tcp, subject))
        .collect();
    let known: BTreeSet<(&str, String)> = subjects
        .iter()
        .map(|subject| (subject.node.as_str(), subject.pci.to_lowercase()))
        .collect();
    let gpus = seen
        .devices
        .iter()
        .filter(|(_, device)| device.last.kind == PciKind::Gpu);
    for ((node, address), device) in gpus {
        if !known.contains(&(node.as_str(), address.clone())) {
            paths.push(GpuPath {
                node: node.clone(),
                job: String::new(),
                rank: None,
                gpu: None,
                pci: device.last.address.clone(),
                ports: nearest(seen, node, Some(&device.last)),
            });
        }
    }
    paths.retain(|path| path.rank.is_none() || !path.ports.is_empty() || !path.pci.is_empty());
    paths.sort_by(|a, b| {
        (&a.job, a.rank.is_none(), a.rank, &a.node, &a.pci).cmp(&(
            &b.job,
            b.rank.is_none(),
            b.rank,
            &b.node,
            &b.pci,
        ))
    });
    paths
}

fn of_rank(seen: &Hardware, tcp: &Tcp<'_>, subject: &GpuSubject) -> GpuPath {
    let key = (subject.node.clone(), subject.pci.to_lowercase());
    let device = seen.devices.get(&key).map(|device| &device.last);
    let mut all = nearest(seen, &subject.node, device);
    // Queue pairs are seen on a node or they are not: only where any are, a port without one is unused.
    let are_seen = seen.pairs_of(&subject.node, None).next().is_some();
    let mut used: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for pair in seen.pairs_of(&subject.node, Some(subject.pid)) {
        let peers = used.entry(&pair.device).or_default();
        let peer = seen
            .other_end(&subject.node, pair)
            .unwrap_or_else(|| pair.peer.clone());
        if !peer.is_empty() {
            peers.insert(peer);
        }
    }
    for port in seen.ports_of(&subject.node) {
        let peers = used.get(port.last.device.as_str());
        let list = || peers.into_iter().flatten().take(MOST_PEERS).cloned().collect();
        match all.iter_mut().find(|known| known.port == port.name()) {
            Some(known) if are_seen => {
                known.peers = list();
                known.is_used = Reading::Value(peers.is_some());
            }
            None if peers.is_some() => all.push(PathPort {
                peers: list(),
                is_used: Reading::Value(true),
                ..path_port(seen, port, device)
            }),
            _ => {}
        }
    }
    add_tcp(&mut all, tcp, subject);
    all.sort_by(|a, b| (a.distance, &a.port).cmp(&(b.distance, &b.port)));
    GpuPath {
        node: subject.node.clone(),
        job: subject.job.clone(),
        rank: Some(subject.rank),
        gpu: Some(subject.gpu),
        pci: subject.pci.clone(),
        ports: all,
    }
}

/// Interfaces by which the process's TCP flows leave, where they are no port of an RDMA device already listed.
fn add_tcp(all: &mut Vec<PathPort>, tcp: &Tcp<'_>, subject: &GpuSubject) {
    let node = subject.node.as_str();
    let own = tcp.flows.range((node, subject.pid, "")..);
    for ((.., port), peers) in own.take_while(|((of, pid, _), _)| (*of, *pid) == (node, subject.pid)) {
        let names: BTreeSet<String> = peers.iter().map(|peer| tcp.name(peer)).collect();
        let known = all
            .iter_mut()
            .find(|known| known.port == *port || known.netdev == *port);
        match known {
            Some(known) => {
                known.is_used = Reading::Value(true);
                let new = names.into_iter().filter(|name| !known.peers.contains(name));
                let new: Vec<String> = new.collect();
                known.peers.extend(new);
                known.peers.truncate(MOST_PEERS);
            }
            None => all.push(PathPort {
                port: (*port).to_owned(),
                pci: String::new(),
                netdev: (*port).to_owned(),
                distance: Distance::Unknown,
                is_used: Reading::Value(true),
                peers: names.into_iter().take(MOST_PEERS).collect(),
            }),
        }
    }
}

/// Ports at the least distance from a device; all of the node when the platform does not tell how far they are.
fn nearest(seen: &Hardware, node: &str, device: Option<&PciDevice>) -> Vec<PathPort> {
    let on_node = seen.ports_of(node);
    let mut all: Vec<PathPort> = on_node.map(|port| path_port(seen, port, device)).collect();
    let least = all.iter().map(|port| port.distance).min();
    all.retain(|port| Some(port.distance) == least);
    all
}

fn path_port(seen: &Hardware, port: &Port, device: Option<&PciDevice>) -> PathPort {
    let key = (port.node.clone(), port.last.pci.to_lowercase());
    let own = seen.devices.get(&key).map(|device| &device.last);
    PathPort {
        port: name(&port.last),
        pci: port.last.pci.clone(),
        netdev: port.last.netdev.clone(),
        distance: device
            .zip(own)
            .map_or(Distance::Unknown, |(device, port)| distance(device, port)),
        is_used: Reading::NotMeasured,
        peers: Vec::new(),
    }
}

/// How far two devices of a node are apart: by the bridges they share, else by NUMA node.
fn distance(one: &PciDevice, other: &PciDevice) -> Distance {
    let shared: Vec<&String> = one
        .path
        .iter()
        .filter(|bridge| other.path.contains(bridge))
        .collect();
    match (shared.as_slice(), one.numa_node.value(), other.numa_node.value()) {
        // What is below one switch shares its upstream port and the root port above it.
        ([_, _, ..], ..) => Distance::Switch,
        ([_], ..) => Distance::Root,
        ([], Some(one), Some(other)) if one == other => Distance::Numa,
        ([], Some(_), Some(_)) => Distance::Host,
        ([], ..) => Distance::Unknown,
    }
}
