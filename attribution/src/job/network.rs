//! Whether the network held the collectives back, and where.
//!
//! A queue that builds up in a node's own port while flows have data to send is that node's transmit side. Flows
//! that are busy while no local queue holds them are waiting for the fabric. A rank that arrives late leaves no such
//! trace: its peers' flows have nothing to send.

use std::collections::{BTreeMap, BTreeSet};

use super::rollup::counts_for;
use super::waits::Slow;
use crate::budget::arith::mul_div;
use crate::cause::Cause;
use crate::facts::{FlowFacts, PPM, PortFacts};
use crate::time::Window;

/// A port that held packets back in this share of its windows is under pressure, parts per million.
const HELD_PPM: u64 = 250_000;
/// One port stands out when its pressure is this many times the others'.
const STANDS_OUT: u64 = 2;
/// Flows that had data to send for this share of the time kept the fabric busy, parts per million.
const BUSY_PPM: u64 = 350_000;
/// A port on which flows of the job had data to send for less than this is none of the job's, parts per million.
const USED_PPM: u64 = 10_000;
/// A line at this share of the others' was negotiated down, percent.
const SLOWER_LINE_PERCENT: u64 = 60;
/// Round trips this many hundredths of the smallest show queues on the way.
const CONGESTED_RTT_PERCENT: u64 = 300;
/// Share of the busy time in which the receiver, not the network, was the limit, parts per million.
const RECEIVER_PPM: u64 = 500_000;

/// What has arrived and lies unread in a window shows a process that does not keep up, bytes: a whole burst of a collective
/// may arrive between two reads of one that does.
const BEHIND_BYTES: u64 = 512 << 10;
/// A process does not keep up when it is behind in this share of the windows, parts per million.
const BEHIND_PPM: u64 = 500_000;
/// Segments sent again of those sent that show a lossy way, parts per million.
const LOSSY_PPM: u64 = 1_000;
/// One way is lossy, or one receiver slow, when it shows this many times what the others show.
const LOSSIER: u64 = 4;
/// What a way or a receiver shows in itself began with the loss when it is this share of what it was before, percent. No
/// more, because a fault that comes and goes is partly in the time before it was noticed; that it stands out from its
/// likes at the same time is asked besides.
const BEGAN_PERCENT: u64 = 150;
/// Bytes of a full segment on Ethernet with time stamps.
const SEGMENT_BYTES: u64 = 1_448;

/// One port over a stretch of time.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct PortLoad {
    pub(super) node: String,
    pub(super) port: String,
    pub(super) windows: u64,
    /// Windows in which the port's own queue held packets back.
    pub(super) held_windows: u64,
    pub(super) backlog_bytes: u64,
    pub(super) overlimits: u64,
    /// Time of the busiest flow with data to send, ns.
    pub(super) busy_ns: u64,
    /// Of that, limited by the receiver, ns.
    pub(super) receiver_limited_ns: u64,
    pub(super) unsent_bytes: u64,
    pub(super) retransmits: u64,
    /// Most probes in a row of a receiver's closed window that did not open it.
    pub(super) window_probes: u32,
    /// Highest round trip of a flow over its smallest, hundredths; 0 when unknown.
    pub(super) rtt_percent: u64,
    pub(super) sent_bytes: u64,
    pub(super) window_ns: u64,
    pub(super) line_bytes_per_s: Option<u64>,
    /// Time flows had data to send and their receiver took none, ns, by the receiver.
    pub(super) limited_by: BTreeMap<Receiver, u64>,
    /// Windows in which a process of the node left unread what had arrived.
    pub(super) behind_windows: u64,
    /// The same by process.
    pub(super) behind: BTreeMap<u32, u64>,
}

/// Who takes in what a flow sends.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Receiver {
    /// Its node; its address when no record of it is there.
    pub(super) node: String,
    /// Its process, where only one of that node talks to the sender's.
    pub(super) pid: Option<u32>,
}

impl PortLoad {
    pub(super) fn held_ppm(&self) -> u64 {
        mul_div(PPM, self.held_windows, self.windows)
    }

    pub(super) fn busy_ppm(&self) -> u64 {
        mul_div(self.busy_ns, PPM, self.window_ns)
    }

    pub(super) fn sent_bytes_per_s(&self) -> u64 {
        mul_div(self.sent_bytes, 1_000_000_000, self.window_ns)
    }

    /// Segments sent again of those sent, parts per million.
    pub(super) fn lost_ppm(&self) -> u64 {
        mul_div(
            self.retransmits,
            PPM,
            (self.sent_bytes / SEGMENT_BYTES).max(self.retransmits).max(1),
        )
    }

    /// Share of the time in which a receiver took nothing of what the busiest flow had to send, parts per million.
    pub(super) fn limited_ppm(&self) -> u64 {
        mul_div(self.receiver_limited_ns, PPM, self.window_ns)
    }

    /// Share of the windows in which a process of the node left unread what had arrived, parts per million.
    pub(super) fn behind_ppm(&self) -> u64 {
        mul_div(PPM, self.behind_windows, self.windows)
    }

    /// The process that left most unread.
    pub(super) fn most_behind(&self) -> Option<u32> {
        let most = self.behind.iter().max_by_key(|(_, windows)| **windows);
        most.map(|(pid, _)| *pid)
    }

    /// Who took in most slowly.
    pub(super) fn slowest_receiver(&self) -> Option<&Receiver> {
        self.limited_by
            .iter()
            .max_by_key(|(_, ns)| **ns)
            .map(|(receiver, _)| receiver)
    }

    /// Whether the network itself makes flows slow: packets are lost or wait in queues on their way. Flows that tell
    /// neither may be.
    fn is_congested(&self) -> bool {
        self.rtt_percent == 0 || self.rtt_percent >= CONGESTED_RTT_PERCENT || self.retransmits > self.windows
    }

    fn add(&mut self, facts: &PortFacts, owners: &Owners<'_>) {
        let backlog = facts.backlog_bytes.value().copied().unwrap_or(0);
        let overlimits = facts.queue_overlimits.value().copied().unwrap_or(0);
        self.windows += 1;
        self.held_windows += u64::from(backlog > 0 || overlimits > 0);
        self.backlog_bytes = self.backlog_bytes.max(backlog);
        self.overlimits = self.overlimits.saturating_add(overlimits);
        if let Some(busiest) = facts.flows.iter().max_by_key(|flow| flow.busy_ns) {
            self.busy_ns = self
                .busy_ns
                .saturating_add(busiest.busy_ns.min(facts.window.len_ns()));
            self.receiver_limited_ns = self
                .receiver_limited_ns
                .saturating_add(busiest.receiver_limited_ns);
        }
        let behind = |flow: &&FlowFacts| flow.receive_backlog_bytes >= BEHIND_BYTES;
        let pids: BTreeSet<u32> = facts.flows.iter().filter(behind).map(|flow| flow.pid).collect();
        self.behind_windows += u64::from(!pids.is_empty());
        for pid in pids {
            *self.behind.entry(pid).or_default() += 1;
        }
        // Of one that only receives, round trips are measured too seldom to say anything.
        let sends = |flow: &&FlowFacts| flow.acked_bytes > 0 || flow.busy_ns > 0 || flow.unsent_bytes > 0;
        for flow in facts.flows.iter().filter(sends) {
            if flow.receiver_limited_ns > 0 {
                let limited = self.limited_by.entry(owners.receiver(flow)).or_default();
                *limited = limited.saturating_add(flow.receiver_limited_ns);
            }
            self.unsent_bytes = self.unsent_bytes.max(flow.unsent_bytes);
            self.retransmits = self.retransmits.saturating_add(flow.retransmits);
            self.window_probes = self.window_probes.max(flow.window_probes);
            self.rtt_percent =
                self.rtt_percent
                    .max(mul_div(u64::from(flow.rtt_us), 100, u64::from(flow.min_rtt_us)));
        }
        self.sent_bytes = self.sent_bytes.saturating_add(facts.sent_bytes);
        self.window_ns = self.window_ns.saturating_add(facts.window.len_ns());
        if let Some(line) = facts.line_bytes_per_s.value().filter(|line| **line > 0) {
            self.line_bytes_per_s = Some(self.line_bytes_per_s.map_or(*line, |other| other.min(*line)));
        }
    }
}

/// Which processes have flows between two addresses, by the sending and the receiving one.
struct Owners<'a> {
    nodes: BTreeMap<&'a str, &'a str>,
    pids: BTreeMap<(&'a str, &'a str), BTreeSet<u32>>,
}

impl<'a> Owners<'a> {
    fn of(ports: &'a [PortFacts]) -> Self {
        let mut owners = Self {
            nodes: BTreeMap::new(),
            pids: BTreeMap::new(),
        };
        for facts in ports {
            for flow in &facts.flows {
                let (local, peer) = (address(&flow.local), address(&flow.peer));
                owners.nodes.insert(local, &facts.node);
                owners.pids.entry((local, peer)).or_default().insert(flow.pid);
            }
        }
        owners
    }

    /// The end that takes in what a flow sends.
    fn receiver(&self, flow: &FlowFacts) -> Receiver {
        let (local, peer) = (address(&flow.local), address(&flow.peer));
        let pids = self.pids.get(&(peer, local));
        Receiver {
            node: self.nodes.get(peer).map_or(peer, |node| *node).to_owned(),
            pid: pids
                .filter(|pids| pids.len() == 1)
                .and_then(|pids| pids.first().copied()),
        }
    }
}

/// An address without its port.
fn address(of: &str) -> &str {
    of.rsplit_once(':').map_or(of, |(address, _)| address)
}

/// Where the network is slow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pressure {
    /// Transmit side of one port, by its position in the loads.
    Port(usize),
    /// On the way from one port, by its position in the loads: what it sends gets lost.
    Lossy(usize),
    /// Nowhere: who takes in what one port sends, by its position in the loads, does so slowly.
    Receiver(usize),
    /// Nowhere: what arrives by one port, by its position in the loads, is left unread.
    Behind(usize),
    /// Where the devices say: a port, a link or the way between two, which is that cause.
    Link(Cause),
    /// Where the ranks' network steps say, by what they waited for.
    Waits(Slow),
    /// Between the ports.
    Fabric,
    /// Between the GPUs of a node.
    Nvlink,
    /// Nowhere: the collectives send more than they did before for the same payload.
    Config,
    /// Nowhere.
    None,
}

/// Leaves the ports that the job's flows use in any of the stretches. What a node's other ports do, one for its management or
/// its backup, is not the job's; one that was used and now waits for the others is what these are compared with.
pub(super) fn retain_used(stretches: &mut [&mut Vec<PortLoad>]) {
    let used: BTreeSet<(String, String)> = stretches
        .iter()
        .flat_map(|loads| loads.iter())
        .filter(|load| load.busy_ppm() >= USED_PPM)
        .map(|load| (load.node.clone(), load.port.clone()))
        .collect();
    for loads in stretches {
        loads.retain(|load| used.contains(&(load.node.clone(), load.port.clone())));
    }
}

/// The loads of all ports within a stretch of `CLOCK_REALTIME`: windows count where their middle lies in it.
pub(super) fn loads(ports: &[PortFacts], within: Window) -> Vec<PortLoad> {
    let owners = Owners::of(ports);
    let mut loads: Vec<PortLoad> = Vec::new();
    for facts in ports {
        if !counts_for(within, facts.window, facts.realtime_offset_ns) {
            continue;
        }
        let at = loads
            .iter()
            .position(|load| load.node == facts.node && load.port == facts.port);
        let at = at.unwrap_or_else(|| {
            loads.push(PortLoad {
                node: facts.node.clone(),
                port: facts.port.clone(),
                ..PortLoad::default()
            });
            loads.len() - 1
        });
        loads[at].add(facts, &owners);
    }
    loads.sort_by(|a, b| (&a.node, &a.port).cmp(&(&b.node, &b.port)));
    loads
}

/// Where the network held data back in a regime; `before` are the loads of a healthy one, if there is one.
pub(super) fn pressure(loads: &[PortLoad], before: Option<&[PortLoad]>) -> Pressure {
    let normal = |load: &PortLoad| {
        before
            .and_then(|before| {
                before
                    .iter()
                    .find(|other| other.node == load.node && other.port == load.port)
            })
            .map_or((0, 0, 0), |other| {
                (other.held_ppm(), other.backlog_bytes, other.busy_ppm())
            })
    };
    let held: Vec<u64> = loads
        .iter()
        .map(|load| load.held_ppm().saturating_sub(normal(load).0))
        .collect();
    if let Some(at) = standing_out(loads, &held, HELD_PPM) {
        return Pressure::Port(at);
    }
    if let Some(at) = slower_line(loads) {
        return Pressure::Port(at);
    }
    // Shaped ports hold packets back all the time: then the depth of the queue tells them apart.
    if loads.iter().any(|load| load.held_ppm() >= HELD_PPM) {
        let depth: Vec<u64> = loads
            .iter()
            .map(|load| load.backlog_bytes.max(load.unsent_bytes))
            .collect();
        let deeper = |at: &usize| depth[*at] / STANDS_OUT >= normal(&loads[*at]).1;
        if let Some(at) = standing_out(loads, &depth, 1).filter(deeper) {
            return Pressure::Port(at);
        }
    }
    if let Some(at) = lossy(loads, before) {
        return Pressure::Lossy(at);
    }
    if let Some(at) = slow_receiver(loads, before) {
        return Pressure::Receiver(at);
    }
    if let Some(at) = behind(loads, before) {
        return Pressure::Behind(at);
    }
    let busy = loads.iter().any(|load| {
        let more = load.busy_ppm() >= BUSY_PPM && load.busy_ppm() * 2 >= normal(load).2 * 3;
        more && load.is_congested()
            && mul_div(load.receiver_limited_ns, PPM, load.busy_ns.max(1)) < RECEIVER_PPM
    });
    let evident = loads.iter().any(|load| {
        let lossy = load.rtt_percent >= CONGESTED_RTT_PERCENT && load.retransmits > load.windows;
        lossy && load.busy_ppm() * 10 >= normal(load).2 * 11
    });
    let local = held.iter().any(|held| *held >= HELD_PPM);
    if busy || local || evident {
        Pressure::Fabric
    } else {
        Pressure::None
    }
}

fn earlier<'a>(load: &PortLoad, before: Option<&'a [PortLoad]>) -> Option<&'a PortLoad> {
    before?
        .iter()
        .find(|other| other.node == load.node && other.port == load.port)
}

/// The one port that has to send again far more of what it sends than the other nodes' ports, and than it used to.
/// Acknowledgements are not sent again, so this tells the direction.
fn lossy(loads: &[PortLoad], before: Option<&[PortLoad]>) -> Option<usize> {
    let lost: Vec<u64> = loads.iter().map(PortLoad::lost_ppm).collect();
    let at = standing_out_by(loads, &lost, LOSSY_PPM, LOSSIER)?;
    let normal = earlier(&loads[at], before).map_or(0, PortLoad::lost_ppm);
    (loads[at].retransmits >= loads[at].windows && began(lost[at], normal)).then_some(at)
}

/// Whether a share now is not what it was before.
fn began(now: u64, before: u64) -> bool {
    now >= mul_div(before, BEGAN_PERCENT, 100)
}

/// The one port whose flows wait for their receiver, and not for the network, far more than the other nodes', and than
/// they used to.
fn slow_receiver(loads: &[PortLoad], before: Option<&[PortLoad]>) -> Option<usize> {
    let limited: Vec<u64> = loads.iter().map(PortLoad::limited_ppm).collect();
    let at = standing_out_by(loads, &limited, BUSY_PPM / 2, STANDS_OUT)?;
    let load = &loads[at];
    let by_receiver = mul_div(load.receiver_limited_ns, PPM, load.busy_ns.max(1)) >= RECEIVER_PPM;
    let normal = earlier(load, before).map_or(0, PortLoad::limited_ppm);
    (by_receiver && began(limited[at], normal)).then_some(at)
}

/// The one port with a process that leaves unread what arrives, far more than the other nodes', and than it used to. Deep
/// buffers hide such a process from its senders for long.
fn behind(loads: &[PortLoad], before: Option<&[PortLoad]>) -> Option<usize> {
    let shares: Vec<u64> = loads.iter().map(PortLoad::behind_ppm).collect();
    let at = standing_out(loads, &shares, BEHIND_PPM)?;
    let normal = earlier(&loads[at], before).map_or(0, PortLoad::behind_ppm);
    began(shares[at], normal).then_some(at)
}

/// The one port whose line is far slower than every other node's, and that sends no less of the time than they do.
fn slower_line(loads: &[PortLoad]) -> Option<usize> {
    let line = |load: &PortLoad| load.line_bytes_per_s.unwrap_or(u64::MAX);
    let slowest = (0..loads.len()).min_by_key(|at| line(&loads[*at]))?;
    let mut others = loads
        .iter()
        .filter(|load| load.node != loads[slowest].node)
        .peekable();
    others.peek()?;
    others
        .all(|other| {
            let far = mul_div(line(other), SLOWER_LINE_PERCENT, 100) >= line(&loads[slowest]);
            far && other.line_bytes_per_s.is_some() && loads[slowest].busy_ppm() >= other.busy_ppm()
        })
        .then_some(slowest)
}

/// The one load whose value is at least `least` and stands out from every other node's.
fn standing_out(loads: &[PortLoad], values: &[u64], least: u64) -> Option<usize> {
    standing_out_by(loads, values, least, STANDS_OUT)
}

/// The same for another factor.
fn standing_out_by(loads: &[PortLoad], values: &[u64], least: u64, factor: u64) -> Option<usize> {
    let top = (0..loads.len()).max_by_key(|at| values[*at])?;
    let others = (0..loads.len())
        .filter(|at| loads[*at].node != loads[top].node)
        .map(|at| values[at])
        .max();
    let alone = others.is_none_or(|other| values[top] >= other.saturating_mul(factor));
    (values[top] >= least && alone && others.is_some()).then_some(top)
}

#[cfg(test)]
mod tests;
