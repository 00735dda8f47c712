//! The facts of all windows, summed by port and by device.

use std::collections::{BTreeMap, BTreeSet};

use crate::facts::{
    AerSeverity, Counter, DeviceEventKind, HardwareFact, HardwareFacts, PciDevice, PciKind, PciLink,
    PortFacts, QueuePair, RdmaPort,
};
use crate::reading::Reading;
use crate::time::Window;

/// A counter grew much in a window in which it grew by this part of the most it ever does.
const MUCH: u64 = 4;

/// One counter over all windows.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tally {
    pub(super) total: u64,
    /// The same in the first half of the windows.
    pub(super) early: u64,
    /// The most it grew in one window.
    pub(super) most: u64,
    /// From the first window in which it grew much, for this counter, to the last: some of it there is always.
    pub(super) grew: Option<Window>,
}

/// A port or device, told about in several windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Port {
    pub(super) node: String,
    /// As told last.
    pub(super) last: RdmaPort,
    pub(super) window: Window,
    pub(super) windows: u32,
    /// Since when it carries nothing, when it did before.
    pub(super) went_down: Option<Window>,
    pub(super) counters: BTreeMap<String, Tally>,
    pub(super) failed: BTreeMap<String, String>,
}

/// Packets that a port's own queue of the kernel held back: only what the kernel sends itself passes it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct OwnQueue {
    pub(super) windows: u64,
    /// Windows in which packets waited although a rate allowed no more.
    pub(super) limited: u64,
    /// Windows in which packets waited.
    pub(super) waiting: u64,
    pub(super) overlimits: u64,
    pub(super) backlog_bytes: u64,
    pub(super) sent_bytes: u64,
    pub(super) window_ns: u64,
    pub(super) span: Option<Window>,
}

/// A PCI device, told about in several windows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) node: String,
    pub(super) last: PciDevice,
    pub(super) window: Window,
    /// The link at its worst, and in which windows it was below its best.
    pub(super) worst: Option<(PciLink, Window)>,
    pub(super) counters: BTreeMap<String, Tally>,
    pub(super) failed: BTreeMap<String, String>,
}

/// An event with its place and moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Happened {
    pub(super) node: String,
    pub(super) pci: String,
    pub(super) window: Window,
    pub(super) kind: DeviceEventKind,
}

/// One end of a queue pair.
#[derive(Debug, Clone, PartialEq, Eq)]
struct End {
    node: String,
    device: String,
    port: u32,
}

/// Everything told, by node.
#[derive(Debug, Default)]
pub(super) struct Hardware {
    /// By node, device and port number.
    pub(super) ports: BTreeMap<(String, String, u32), Port>,
    /// By node and address.
    pub(super) devices: BTreeMap<(String, String), Device>,
    /// By node, process, device and number; what was posted is summed.
    pub(super) queue_pairs: BTreeMap<(String, u32, String, u32), QueuePair>,
    pub(super) events: Vec<Happened>,
    /// Ends of queue pairs, by their own number and the peer's.
    ends: BTreeMap<(u32, u32), Vec<End>>,
    /// Nodes by device and port number.
    alike: BTreeMap<(String, u32), BTreeSet<String>>,
    /// Nodes and devices of which queue pairs were told.
    paired: BTreeSet<(String, String)>,
    /// By node and interface.
    pub(super) queues: BTreeMap<(String, String), OwnQueue>,
    pub(super) nodes: BTreeSet<String>,
}

impl Hardware {
    pub(super) fn gather(facts: &[HardwareFacts], ports: &[PortFacts]) -> Self {
        let mut all = Self::default();
        let windows = facts.iter().map(realtime);
        let span = windows.reduce(join);
        let middle_ns = span.map_or(0, |span| span.start_ns() + span.len_ns() / 2);
        for facts in facts {
            all.take(facts, middle_ns);
        }
        for facts in facts {
            all.mark(facts);
        }
        all.events.sort_by_key(|event| event.window.start_ns());
        ports.iter().for_each(|port| all.queue(port));
        all.find_ends();
        all
    }

    /// The ports of that device and number, of whatever node.
    pub(super) fn alike(&self, device: &str, port: u32) -> impl Iterator<Item = &Port> {
        let key = (device.to_owned(), port);
        let nodes = self.alike.get(&key).into_iter().flatten();
        nodes.filter_map(move |node| self.ports.get(&(node.clone(), key.0.clone(), port)))
    }

    fn find_ends(&mut self) {
        for (node, device, port) in self.ports.keys() {
            let nodes = self.alike.entry((device.clone(), *port)).or_default();
            nodes.insert(node.clone());
        }
        for ((node, ..), pair) in &self.queue_pairs {
            self.paired.insert((node.clone(), pair.device.clone()));
            if pair.peer_number != 0 {
                let end = End {
                    node: node.clone(),
                    device: pair.device.clone(),
                    port: pair.port,
                };
                let ends = self.ends.entry((pair.number, pair.peer_number)).or_default();
                ends.push(end);
            }
        }
    }

    /// The ports of a node.
    pub(super) fn ports_of(&self, node: &str) -> impl Iterator<Item = &Port> {
        let first = (node.to_owned(), String::new(), 0);
        let own = first.0.clone();
        self.ports
            .range(first..)
            .take_while(move |((node, ..), _)| *node == own)
            .map(|(_, port)| port)
    }

    /// The queue pairs of a node, or of one of its processes.
    pub(super) fn pairs_of(&self, node: &str, pid: Option<u32>) -> impl Iterator<Item = &QueuePair> {
        let first = (node.to_owned(), pid.unwrap_or(0), String::new(), 0);
        let own = first.0.clone();
        self.queue_pairs
            .range(first..)
            .take_while(move |((node, of, ..), _)| *node == own && pid.is_none_or(|pid| *of == pid))
            .map(|(_, pair)| pair)
    }

    fn ends_of(&self, node: &str, pair: &QueuePair) -> impl Iterator<Item = &End> {
        let ends = self.ends.get(&(pair.peer_number, pair.number));
        let own = node.to_owned();
        ends.into_iter().flatten().filter(move |end| end.node != own)
    }

    /// Node and port of the other end of a queue pair, where its own record tells.
    pub(super) fn other_end(&self, node: &str, pair: &QueuePair) -> Option<String> {
        let end = self.ends_of(node, pair).next()?;
        Some(format!("{} {}:{}", end.node, end.device, end.port))
    }

    /// Those of these ports that may talk to a port: as queue pairs say, else every one of another node.
    pub(super) fn peers<'a>(&self, port: &Port, all: impl Iterator<Item = (usize, &'a Port)>) -> Vec<usize> {
        let mut known: BTreeSet<(&str, &str)> = BTreeSet::new();
        let own = self.pairs_of(&port.node, None);
        for pair in own.filter(|pair| pair.device == port.last.device) {
            let ends = self.ends_of(&port.node, pair);
            known.extend(ends.map(|end| (end.node.as_str(), end.device.as_str())));
        }
        let may_be = |other: &Port| {
            let key = (other.node.clone(), other.last.device.clone());
            if known.is_empty() || !self.paired.contains(&key) {
                other.node != port.node
            } else {
                known.contains(&(other.node.as_str(), other.last.device.as_str()))
            }
        };
        all.filter(|(_, other)| may_be(other)).map(|(at, _)| at).collect()
    }

    fn take(&mut self, facts: &HardwareFacts, middle_ns: u64) {
        let window = realtime(facts);
        let node = facts.node.clone();
        self.nodes.insert(node.clone());
        let is_early = window.start_ns() + window.len_ns() / 2 < middle_ns;
        match &facts.fact {
            HardwareFact::RdmaPort(port) => self.port(node, window, is_early, port),
            HardwareFact::Pci(device) => self.device(node, window, is_early, device),
            HardwareFact::QueuePair(pair) => {
                let key = (node, pair.pid, pair.device.clone(), pair.number);
                let known = self.queue_pairs.entry(key).or_insert_with(|| QueuePair {
                    posts: 0,
                    posted_bytes: 0,
                    refused: 0,
                    cut_calls: 0,
                    ..pair.clone()
                });
                known.posts = known.posts.saturating_add(pair.posts);
                known.posted_bytes = known.posted_bytes.saturating_add(pair.posted_bytes);
                known.refused = known.refused.saturating_add(pair.refused);
                known.cut_calls = known.cut_calls.saturating_add(pair.cut_calls);
                known.posts_unseen |= pair.posts_unseen;
                known.in_error |= pair.in_error;
                if !pair.peer.is_empty() {
                    known.peer.clone_from(&pair.peer);
                    known.peer_number = pair.peer_number;
                }
            }
            // What they mean depends on the job's regimes.
            HardwareFact::Waits(_) => {}
            HardwareFact::Event(event) => self.events.push(Happened {
                node,
                pci: event.pci.to_lowercase(),
                window,
                kind: event.kind.clone(),
            }),
        }
    }

    /// Notes when counters grew, now that it is known by how much they grow at most.
    fn mark(&mut self, facts: &HardwareFacts) {
        let (tallies, counters) = match &facts.fact {
            HardwareFact::RdmaPort(port) => {
                let key = (facts.node.clone(), port.device.clone(), port.port);
                (
                    self.ports.get_mut(&key).map(|port| &mut port.counters),
                    &port.counters,
                )
            }
            HardwareFact::Pci(device) => {
                let key = (facts.node.clone(), device.address.to_lowercase());
                let known = self.devices.get_mut(&key);
                (known.map(|device| &mut device.counters), &device.errors)
            }
            HardwareFact::QueuePair(_) | HardwareFact::Waits(_) | HardwareFact::Event(_) => return,
        };
        let Some(tallies) = tallies else { return };
        let window = realtime(facts);
        for counter in counters {
            let (Some(tally), Some(growth)) = (tallies.get_mut(&counter.name), counter.growth.value()) else {
                continue;
            };
            if *growth > 0 && growth.saturating_mul(MUCH) >= tally.most {
                tally.grew = Some(tally.grew.map_or(window, |grew| join(grew, window)));
            }
        }
    }

    fn port(&mut self, node: String, window: Window, is_early: bool, port: &RdmaPort) {
        let key = (node.clone(), port.device.clone(), port.port);
        let known = self.ports.entry(key).or_insert_with(|| Port {
            node,
            last: port.clone(),
            window,
            windows: 0,
            went_down: None,
            counters: BTreeMap::new(),
            failed: BTreeMap::new(),
        });
        match (known.last.active.value(), port.active.value()) {
            (Some(true), Some(false)) => known.went_down = Some(window),
            (_, Some(false)) => known.went_down = known.went_down.map(|down| join(down, window)),
            _ => {}
        }
        // One that came back was not down at the end: it is told by its `link_downed`.
        known.went_down = known.went_down.filter(|_| port.active.value() != Some(&true));
        known.window = join(known.window, window);
        known.windows += 1;
        known.last = port.clone();
        add(&mut known.counters, &mut known.failed, &port.counters, is_early);
    }

    fn device(&mut self, node: String, window: Window, is_early: bool, device: &PciDevice) {
        let address = device.address.to_lowercase();
        let known = self
            .devices
            .entry((node.clone(), address))
            .or_insert_with(|| Device {
                node,
                last: device.clone(),
                window,
                worst: None,
                counters: BTreeMap::new(),
                failed: BTreeMap::new(),
            });
        if let Some(link) = device.link.value().filter(|link| link.ppm() < crate::facts::PPM) {
            let worst = known.worst.map_or((*link, window), |(worst, since)| {
                let worse = if link.ppm() < worst.ppm() { *link } else { worst };
                (worse, join(since, window))
            });
            known.worst = Some(worst);
        }
        known.window = join(known.window, window);
        known.last = device.clone();
        add(&mut known.counters, &mut known.failed, &device.errors, is_early);
    }

    fn queue(&mut self, facts: &PortFacts) {
        let key = (facts.node.clone(), facts.port.clone());
        let queue = self.queues.entry(key).or_default();
        let overlimits = facts.queue_overlimits.value().copied().unwrap_or(0);
        let backlog = facts.backlog_bytes.value().copied().unwrap_or(0);
        queue.windows += 1;
        // What the queue drops is counted too, as on a way that loses packets; only what a rate holds back waits.
        queue.limited += u64::from(overlimits > 0 && backlog > 0);
        queue.waiting += u64::from(backlog > 0);
        queue.overlimits = queue.overlimits.saturating_add(overlimits);
        queue.backlog_bytes = queue.backlog_bytes.max(backlog);
        queue.sent_bytes = queue.sent_bytes.saturating_add(facts.sent_bytes);
        queue.window_ns = queue.window_ns.saturating_add(facts.window.len_ns());
        if overlimits > 0 || backlog > 0 {
            let window = shifted(facts.window, facts.realtime_offset_ns);
            queue.span = Some(queue.span.map_or(window, |span| join(span, window)));
        }
    }

    /// The device a PCI address is of; a bridge stands for what lies below it, by kind: what the job uses first.
    pub(super) fn behind(&self, node: &str, pci: &str) -> Option<&Device> {
        let own = self.devices.get(&(node.to_owned(), pci.to_owned()));
        let is_bridge = own.is_none_or(|device| device.last.kind == PciKind::Bridge);
        if !is_bridge {
            return own;
        }
        let below = |device: &&Device| device.node == node && device.last.path.iter().any(|on| on == pci);
        let rank = |device: &&Device| match device.last.kind {
            PciKind::Nic => 0,
            PciKind::Gpu => 1,
            PciKind::Storage => 2,
            PciKind::Bridge | PciKind::Other => 3,
        };
        self.devices
            .values()
            .filter(below)
            .min_by_key(rank)
            .filter(|device| rank(device) < 3)
            .or(own)
    }
}

impl Port {
    /// The growth of a counter over all windows; `None` when the device has none of that name.
    pub(super) fn total(&self, name: &str) -> Option<u64> {
        self.counters.get(name).map(|tally| tally.total)
    }

    /// The growth of those of these counters that the device has; `None` when it has none of them.
    pub(super) fn sum(&self, names: &[&str]) -> Option<u64> {
        names
            .iter()
            .filter_map(|name| self.total(name))
            .reduce(u64::saturating_add)
    }

    /// When any of these counters grew.
    pub(super) fn grew(&self, names: &[&str]) -> Option<Window> {
        let tallies = names.iter().filter_map(|name| self.counters.get(*name));
        tallies.filter_map(|tally| tally.grew).reduce(join)
    }

    /// Packets sent, by whichever counter the device has; bytes stand for packets of 4 KiB, the largest there are.
    pub(super) fn sent_packets(&self) -> u64 {
        let counted = [
            "port_xmit_packets",
            "sent_pkts",
            "tx_pkts",
            "unicast_xmit_packets",
        ];
        let bytes = ["port_xmit_data", "tx_bytes", "rdma_tx_bytes"];
        self.packets(&counted, &bytes)
    }

    /// Packets received, likewise.
    pub(super) fn received_packets(&self) -> u64 {
        let counted = ["port_rcv_packets", "rcvd_pkts", "rx_pkts", "unicast_rcv_packets"];
        let bytes = ["port_rcv_data", "rx_bytes", "rdma_rx_bytes"];
        self.packets(&counted, &bytes)
    }

    fn packets(&self, counted: &[&str], bytes: &[&str]) -> u64 {
        let first = |names: &[&str]| {
            names
                .iter()
                .filter_map(|name| self.total(name))
                .max()
                .unwrap_or(0)
        };
        first(counted).max(first(bytes) / 4_096)
    }

    /// Device and port number: `mlx5_3:1`.
    pub(super) fn name(&self) -> String {
        name(&self.last)
    }
}

/// Device and port number: `mlx5_3:1`.
pub(super) fn name(port: &RdmaPort) -> String {
    format!("{}:{}", port.device, port.port)
}

fn add(
    tallies: &mut BTreeMap<String, Tally>,
    failed: &mut BTreeMap<String, String>,
    counters: &[Counter],
    is_early: bool,
) {
    for counter in counters {
        match &counter.growth {
            Reading::Value(growth) => {
                let tally = tallies.entry(counter.name.clone()).or_default();
                tally.total = tally.total.saturating_add(*growth);
                tally.early = tally.early.saturating_add(if is_early { *growth } else { 0 });
                tally.most = tally.most.max(*growth);
            }
            Reading::Failed(why) => {
                failed.insert(counter.name.clone(), why.clone());
            }
            Reading::NotMeasured | Reading::Unsupported => {}
        }
    }
}

fn realtime(facts: &HardwareFacts) -> Window {
    shifted(facts.window, facts.realtime_offset_ns)
}

fn shifted(window: Window, offset_ns: i64) -> Window {
    Window::new(
        window.start_ns().saturating_add_signed(offset_ns),
        window.end_ns().saturating_add_signed(offset_ns),
    )
    .unwrap_or_default()
}

/// The window from the earlier beginning to the later end.
pub(super) fn join(one: Window, other: Window) -> Window {
    Window::new(
        one.start_ns().min(other.start_ns()),
        one.end_ns().max(other.end_ns()),
    )
    .unwrap_or(one)
}

impl AerSeverity {
    /// In a word.
    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Correctable => "correctable",
            Self::NonFatal => "non-fatal",
            Self::Fatal => "fatal",
        }
    }
}
