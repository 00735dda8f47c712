//! Ports of RDMA devices: congestion, back-pressure, slow receivers, bad links, ports that are down or slow.

use super::gather::{Hardware, Port};
use super::{Finding, FindingCost, Middle, Severity, Side, evidence, ppb, ruled_out, share};
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Place};
use crate::time::Window;

/// The receiver had no buffer ready for what arrived.
pub(super) const SLOW_RECEIVER: &[&str] = &[
    "out_of_buffer",
    "send_rnr_err",
    "res_rnr_nak",
    "responder_rnr_nak",
];
/// Errors of the link to the next switch.
pub(super) const LINK_ERRORS: &[&str] = &[
    "symbol_error",
    "link_error_recovery",
    "link_downed",
    "port_rcv_errors",
    "port_rcv_remote_physical_errors",
    "local_link_integrity_errors",
    "excessive_buffer_overrun_errors",
    "rx_icrc_encapsulated",
];
/// Notifications of congestion that a receiver sends.
const NOTIFIED: &[&str] = &["np_cnp_sent"];
/// Ticks in which a port had data and no credit to send it.
const WAITED: &[&str] = &["port_xmit_wait"];
/// The link went down.
const DOWNED: &[&str] = &["link_downed"];

/// One port stands out when it shows this many times what the others show.
const STANDS_OUT: u64 = 4;
/// Notifications of congestion per packet that cost something, parts per billion: one in 10,000.
const CONGESTED_PPB: u64 = 100_000;
/// Packets that found no buffer, parts per billion: one in 100,000.
const NO_BUFFER_PPB: u64 = 10_000;
/// Fewer than this are an accident.
const LEAST_EVENTS: u64 = 20;
/// Time a port waited to send, of the time it sent, parts per billion: a tenth.
const WAITING_PPB: u64 = 100_000_000;
/// A port's rate below this share of its likes' was negotiated down, percent.
const SLOWER_PERCENT: u64 = 90;

pub(super) fn find(seen: &Hardware, findings: &mut Vec<Finding>) {
    let marked = Shares::new(seen, |port| Some((port.sum(NOTIFIED)?, port.received_packets())));
    let waiting = Shares::new(seen, |port| {
        let (wait, words) = (port.sum(WAITED)?, sent_words(port)?);
        Some((wait, wait.saturating_add(words)))
    });
    let refused = Shares::new(seen, |port| {
        Some((port.sum(SLOW_RECEIVER)?, port.received_packets()))
    });
    let mut obeyed: Option<String> = None;
    for port in seen.ports.values() {
        findings.extend(down(seen, port));
        findings.extend(slow(seen, port));
        findings.extend(bad_link(seen, port));
        findings.extend(congested(seen, port, &marked, &mut obeyed));
        findings.extend(back_pressure(port, &waiting));
        findings.extend(slow_receiver(port, &refused));
    }
}

/// What a rule looks at, of one port: an amount and what it is a share of; `None` where that was not measured.
type Measure = fn(&Port) -> Option<(u64, u64)>;

/// What a rule looks at, of all ports.
struct Shares {
    of: Measure,
    all: Middle,
}

impl Shares {
    fn new(seen: &Hardware, of: Measure) -> Self {
        let all = Middle::of(seen.ports.values().filter_map(|port| own_share(port, of)));
        Self { of, all }
    }

    /// The port's own share, with what the others and its own past show of these counters.
    fn beside(&self, port: &Port, names: &[&str], total: u64) -> Option<Beside> {
        let own = own_share(port, self.of)?;
        let tallies = names.iter().filter_map(|name| port.counters.get(*name));
        let early: u64 = tallies.map(|tally| tally.early).fold(0, u64::saturating_add);
        Some(Beside {
            own,
            others: self.all.without(own),
            early: mul_div(own, early.saturating_mul(2), total.max(1)),
        })
    }
}

fn own_share(port: &Port, of: Measure) -> Option<u64> {
    of(port).map(|(part, whole)| ppb(part, whole.max(part).max(1)))
}

/// One port's share beside what is normal.
struct Beside {
    own: u64,
    /// The middle one of the others; `None` without others that can be compared.
    others: Option<u64>,
    /// The port's own share in the first half of the record.
    early: u64,
}

impl Beside {
    /// Large beside the others; where there are none, beside the port's own past.
    fn stands_out(&self, least: u64) -> bool {
        let normal = self.others.unwrap_or(self.early);
        self.own >= least && self.own >= normal.saturating_mul(STANDS_OUT)
    }

    fn expected(&self, least: u64) -> String {
        match self.others {
            Some(others) => format!("{}, as on the other ports", share(others.min(least))),
            None => format!("below {}, as before", share(least)),
        }
    }
}

fn finding(port: &Port, cause: Cause, side: Side, severity: Severity, summary: String) -> Finding {
    Finding {
        cause,
        place: Place {
            node: Some(port.node.clone()),
            nic_port: Some(port.name()),
            ..Place::default()
        },
        side,
        severity,
        summary,
        evidence: Vec::new(),
        ruled_out: Vec::new(),
        window: port.window,
        carries_ppm: None,
        cost: FindingCost::NotMeasured,
    }
}

/// A port that carried traffic and no longer does, or that its likes on other nodes carry.
fn down(seen: &Hardware, port: &Port) -> Option<Finding> {
    if port.last.active.value() != Some(&false) {
        return None;
    }
    let mut likes = likes(seen, port)
        .filter_map(|other| other.last.active.value())
        .peekable();
    let expected = if port.went_down.is_some() {
        "active, as before"
    } else if likes.peek().is_some() && likes.all(|active| *active) {
        "active, as the same port of the other nodes"
    } else {
        return None;
    };
    let summary = format!("{} on {} is down", port.name(), port.node);
    Some(Finding {
        evidence: vec![evidence(
            format!("state of {}", port.name()),
            "not active",
            expected,
        )],
        window: port.went_down.unwrap_or(port.window),
        ..finding(port, Cause::NetworkNic, Side::Device, Severity::Failed, summary)
    })
}

/// The same device and port number of the other nodes.
fn likes<'a>(seen: &'a Hardware, port: &'a Port) -> impl Iterator<Item = &'a Port> {
    seen.alike(&port.last.device, port.last.port)
        .filter(|other| other.node != port.node)
}

/// A port whose rate is below that of the same port of every other node; on one node alone, below that of all other
/// ports of its kind that carry traffic, when it carries traffic too: a slow port for management is none of the job's.
fn slow(seen: &Hardware, port: &Port) -> Option<Finding> {
    let own = *port.last.rate_bytes_per_s.value().filter(|rate| **rate > 0)?;
    if port.last.active.value() == Some(&false) {
        return None;
    }
    let family = |port: &Port| {
        port.last
            .device
            .trim_end_matches(|c: char| c.is_ascii_digit())
            .to_owned()
    };
    let busy = |port: &Port| port.sent_packets().max(port.received_packets());
    let elsewhere: Vec<&Port> = likes(seen, port).collect();
    let beside: Vec<&Port> = if elsewhere.is_empty() {
        let alike = |other: &&Port| {
            other.node == port.node
                && other.name() != port.name()
                && family(other) == family(port)
                && other.last.link_layer == port.last.link_layer
                && busy(other) > 0
                && busy(port).saturating_mul(10) >= busy(other)
        };
        seen.ports_of(&port.node).filter(alike).collect()
    } else {
        elsewhere
    };
    let rates: Vec<u64> = beside
        .iter()
        .filter_map(|other| other.last.rate_bytes_per_s.value().copied())
        .collect();
    let least = *rates.iter().min()?;
    if rates.len() < beside.len() || own.saturating_mul(100) >= least.saturating_mul(SLOWER_PERCENT) {
        return None;
    }
    let gigabits = |bytes: u64| format!("{} Gbit/s", bytes.saturating_mul(8) / 1_000_000_000);
    let summary = format!(
        "{} on {} runs at {}, its likes at {}",
        port.name(),
        port.node,
        gigabits(own),
        gigabits(least)
    );
    Some(Finding {
        evidence: vec![evidence(
            format!("rate of {}", port.name()),
            gigabits(own),
            format!("{}, as {} ports like it", gigabits(least), rates.len()),
        )],
        carries_ppm: Some(mul_div(own, crate::facts::PPM, least)),
        ..finding(
            port,
            Cause::NetworkConfig,
            Side::Device,
            Severity::Degraded,
            summary,
        )
    })
}

fn bad_link(seen: &Hardware, port: &Port) -> Option<Finding> {
    let total = port.sum(LINK_ERRORS)?;
    let downed = port.sum(DOWNED).unwrap_or(0);
    let others = seen
        .ports
        .values()
        .filter(|other| (&other.node, other.name()) != (&port.node, port.name()))
        .filter_map(|other| other.sum(LINK_ERRORS))
        .max();
    // Errors of a link are few or the link is bad: a handful may come with a cable that was touched.
    let is_bad = total >= LEAST_EVENTS || downed > 0;
    if !is_bad || others.is_some_and(|others| total < others.saturating_mul(2)) {
        return None;
    }
    let counted: Vec<String> = LINK_ERRORS
        .iter()
        .filter_map(|name| {
            port.total(name)
                .filter(|total| *total > 0)
                .map(|total| format!("{name} {total}"))
        })
        .collect();
    let severity = if downed > 0 {
        Severity::Failed
    } else {
        Severity::Degraded
    };
    let summary = format!("the link of {} on {} is bad", port.name(), port.node);
    Some(Finding {
        evidence: vec![evidence(
            format!("errors of the link of {}", port.name()),
            counted.join(", "),
            others.map_or_else(
                || "0".into(),
                |others| format!("at most {others}, as on the other ports"),
            ),
        )],
        window: grew(port, LINK_ERRORS),
        ..finding(port, Cause::NetworkNic, Side::Device, severity, summary)
    })
}

fn grew(port: &Port, names: &[&str]) -> Window {
    port.grew(names).unwrap_or(port.window)
}

/// Congestion notifications: a receiver that sends them is flooded, a sender that obeys them is held back.
fn congested(seen: &Hardware, port: &Port, marked: &Shares, obeyed: &mut Option<String>) -> Option<Finding> {
    let total = port.sum(NOTIFIED).filter(|total| *total >= LEAST_EVENTS)?;
    let beside = marked.beside(port, NOTIFIED, total)?;
    if !beside.stands_out(CONGESTED_PPB) {
        return None;
    }
    let throttled = obeyed.get_or_insert_with(|| who_obeyed(seen)).clone();
    let mut seen_here = vec![evidence(
        format!("packets marked by congested switches, at {}", port.name()),
        format!(
            "{total} notifications sent back, {} of packets received",
            share(beside.own)
        ),
        beside.expected(CONGESTED_PPB),
    )];
    if !throttled.is_empty() {
        seen_here.push(evidence("senders held back by notifications", throttled, "none"));
    }
    let mut not = Vec::new();
    if port.sum(SLOW_RECEIVER) == Some(0) {
        not.push(ruled_out(
            Cause::HostReceiver,
            "the receiver never ran out of buffers",
        ));
    }
    if port.sum(LINK_ERRORS) == Some(0) {
        not.push(ruled_out(
            Cause::NetworkNic,
            "the port counts no errors of its link",
        ));
    }
    let summary = format!(
        "more is sent to {} on {} than its link takes",
        port.name(),
        port.node
    );
    Some(Finding {
        evidence: seen_here,
        ruled_out: not,
        window: grew(port, NOTIFIED),
        ..finding(
            port,
            Cause::NetworkFabric,
            Side::Receiver,
            Severity::Degraded,
            summary,
        )
    })
}

/// The first senders that notifications held back.
fn who_obeyed(seen: &Hardware) -> String {
    let handled = seen.ports.values().filter_map(|port| {
        let handled = port.total("rp_cnp_handled")?;
        (handled >= LEAST_EVENTS).then(|| format!("{} {} obeyed {handled}", port.node, port.name()))
    });
    handled.take(4).collect::<Vec<_>>().join("; ")
}

fn sent_words(port: &Port) -> Option<u64> {
    // A tick is the time of a word of four bytes.
    port.total("port_xmit_data").map(|bytes| bytes / 4)
}

/// Time a port waited for the next hop's credit, without any notification: back-pressure of the link.
fn back_pressure(port: &Port, waiting: &Shares) -> Option<Finding> {
    let total = port.sum(WAITED).filter(|total| *total > 0)?;
    if port.sum(&["np_cnp_sent", "rp_cnp_handled"]).unwrap_or(0) >= LEAST_EVENTS {
        return None;
    }
    sent_words(port).filter(|words| *words > 0)?;
    let beside = waiting.beside(port, WAITED, total)?;
    if !beside.stands_out(WAITING_PPB) {
        return None;
    }
    let summary = format!(
        "{} on {} waits for the next hop to take its packets",
        port.name(),
        port.node
    );
    Some(Finding {
        evidence: vec![
            evidence(
                format!("time {} had data and no credit to send it", port.name()),
                format!("{} of the time it had data", share(beside.own)),
                beside.expected(WAITING_PPB),
            ),
            evidence(
                "congestion notifications",
                "none",
                "some, if a switch further on were congested",
            ),
        ],
        window: grew(port, WAITED),
        ..finding(
            port,
            Cause::NetworkFabric,
            Side::Path,
            Severity::Degraded,
            summary,
        )
    })
}

/// A receiver without buffers: the process on this node is late, the network is not.
fn slow_receiver(port: &Port, refused: &Shares) -> Option<Finding> {
    let total = port.sum(SLOW_RECEIVER).filter(|total| *total >= LEAST_EVENTS)?;
    let beside = refused.beside(port, SLOW_RECEIVER, total)?;
    if !beside.stands_out(NO_BUFFER_PPB) {
        return None;
    }
    let summary = format!(
        "a process on {} takes in slower than its peers send, at {}",
        port.node,
        port.name()
    );
    Some(Finding {
        evidence: vec![evidence(
            format!("packets that found no buffer, at {}", port.name()),
            format!("{total}, {} of packets received", share(beside.own)),
            beside.expected(NO_BUFFER_PPB),
        )],
        ruled_out: vec![ruled_out(
            Cause::NetworkFabric,
            "the packets arrived; nobody had made room for them",
        )],
        window: grew(port, SLOW_RECEIVER),
        ..finding(
            port,
            Cause::HostReceiver,
            Side::Receiver,
            Severity::Degraded,
            summary,
        )
    })
}
