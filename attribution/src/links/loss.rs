//! Packets of RDMA connections that got lost on their way, and in which direction.
//!
//! The receiver counts what came out of order, the sender counts what it had to send again: together they tell whose
//! packets are lost. Names as the drivers give them: mlx5 (`drivers/infiniband/hw/mlx5/counters.c`), soft-`RoCE`
//! (`sw/rxe/rxe_hw_counters.c`), `bnxt_re`, EFA, MANA.

use std::collections::BTreeSet;

use super::gather::{Hardware, Port, join};
use super::{Finding, FindingCost, Middle, Severity, Side, evidence, ppb, ruled_out, share};
use crate::cause::{Cause, Place};
use crate::job::{Evidence, RuledOut};

/// The peer asked for packets again that it had missed.
const SENT_AGAIN: &[&str] = &[
    "packet_seq_err",
    "rcvd_seq_err",
    "seq_err_naks_rcvd",
    "retrans_pkts",
    "roce_adp_retrans",
];
/// The peer did not answer in time: a packet or its acknowledgement was lost.
const TIMED_OUT: &[&str] = &[
    "local_ack_timeout_err",
    "completer_retry_err",
    "to_retransmits",
    "retrans_timeout_events",
    "requester_timeout",
];
/// Packets that came out of order: one before them is missing.
const OUT_OF_ORDER: &[&str] = &[
    "out_of_sequence",
    "out_of_seq_request",
    "implied_nak_seq_err",
    "res_oos_drop_count",
    "responder_out_of_sequence",
];
/// Packets that came twice: the acknowledgement of the first got lost, or was late.
const TWICE: &[&str] = &["duplicate_request", "dup_req", "responder_dup_request"];
/// Connections that gave up.
const GAVE_UP: &[&str] = &[
    "req_transport_retries_exceeded",
    "retry_exceeded_err",
    "max_retry_exceeded",
];

/// Losses below this share of packets cost nothing: parts per billion, one in 100,000.
const LEAST_PPB: u64 = 10_000;
/// Fewer losses than this are an accident.
const LEAST_EVENTS: u64 = 8;
/// One port stands out when it loses this many times what the others lose.
const STANDS_OUT: u64 = 4;

/// What one port tells of loss, shares in parts per billion of its packets.
struct Told<'a> {
    port: &'a Port,
    sent_again: u64,
    timed_out: u64,
    out_of_order: u64,
    twice: u64,
    gave_up: u64,
    /// Of what it sends.
    out_ppb: u64,
    /// Of what it takes in.
    in_ppb: u64,
}

impl<'a> Told<'a> {
    fn of(port: &'a Port) -> Self {
        let sum = |names| port.sum(names).unwrap_or(0);
        let (sent_again, timed_out) = (sum(SENT_AGAIN), sum(TIMED_OUT));
        let (out_of_order, gave_up) = (sum(OUT_OF_ORDER), sum(GAVE_UP));
        let lost_out = sent_again.saturating_add(timed_out).saturating_add(gave_up);
        let enough = |events: u64, packets: u64| {
            if events >= LEAST_EVENTS || gave_up > 0 {
                ppb(events, packets.max(events).max(1))
            } else {
                0
            }
        };
        Self {
            port,
            sent_again,
            timed_out,
            out_of_order,
            twice: sum(TWICE),
            gave_up,
            out_ppb: enough(lost_out, port.sent_packets()),
            in_ppb: enough(out_of_order, port.received_packets()),
        }
    }

    /// `node-a mlx5_3:1`.
    fn label(&self) -> String {
        format!("{} {}", self.port.node, self.port.name())
    }
}

pub(super) fn find(seen: &Hardware, findings: &mut Vec<Finding>) {
    let told: Vec<Told<'_>> = seen.ports.values().map(Told::of).collect();
    let out: Vec<usize> = standing_out(&told, |told| told.out_ppb);
    let into: Vec<usize> = standing_out(&told, |told| told.in_ppb);
    if out.is_empty() && into.is_empty() {
        everywhere(&told, findings);
        return;
    }
    // Many lose what they send and one alone misses packets: the way into that one.
    if let ([only], true) = (into.as_slice(), out.len() >= 2) {
        findings.push(one(seen, &told, None, Some(*only), Side::Receiver));
        return;
    }
    let mut explained: BTreeSet<usize> = BTreeSet::new();
    for sender in out {
        let peers = peers(seen, &told, sender);
        let missing: Vec<usize> = peers.iter().copied().filter(|at| into.contains(at)).collect();
        explained.extend(&missing);
        if seen.is_limited(told[sender].port) {
            continue; // Its own queue dropped them: that is told already.
        }
        if missing.is_empty() && seen.is_delayed(told[sender].port) {
            continue; // What it sends is late, not lost: that is told already.
        }
        // Nobody misses anything, and the peer got packets twice: the answers are lost, not the packets.
        let twice = |at: &usize| told[*at].twice >= LEAST_EVENTS;
        let answers: Vec<usize> = peers.iter().copied().filter(twice).collect();
        let nothing_missed = told[sender].sent_again == 0 && missing.is_empty();
        if let ([answers], true) = (answers.as_slice(), nothing_missed) {
            findings.push(one(seen, &told, Some(*answers), Some(sender), Side::Sender));
            continue;
        }
        let receiver = match (missing.as_slice(), peers.as_slice()) {
            ([only], _) | ([], [only]) => Some(*only),
            _ => None,
        };
        findings.push(one(seen, &told, Some(sender), receiver, Side::Sender));
    }
    for receiver in into.into_iter().filter(|at| !explained.contains(at)) {
        let senders = peers(seen, &told, receiver);
        if senders.iter().any(|at| seen.is_limited(told[*at].port)) {
            continue;
        }
        let (sender, side) = match senders.as_slice() {
            [only] => (Some(*only), Side::Sender),
            _ => (None, Side::Receiver),
        };
        findings.push(one(seen, &told, sender, Some(receiver), side));
    }
}

/// Positions of the ports that may talk to one.
fn peers(seen: &Hardware, told: &[Told<'_>], of: usize) -> Vec<usize> {
    let others = told.iter().map(|told| told.port).enumerate();
    seen.peers(told[of].port, others.filter(|(at, _)| *at != of))
}

/// Positions of those whose share is large by itself and beside that of the others.
fn standing_out(told: &[Told<'_>], of: fn(&Told<'_>) -> u64) -> Vec<usize> {
    let beside = Middle::of(told.iter().map(of));
    (0..told.len())
        .filter(|at| of(&told[*at]) >= LEAST_PPB)
        .filter(|at| {
            let own = of(&told[*at]);
            own >= beside.without(own).unwrap_or(0).saturating_mul(STANDS_OUT)
        })
        .collect()
}

/// Every port loses about as much: the network between them all.
fn everywhere(told: &[Told<'_>], findings: &mut Vec<Finding>) {
    let lossy: Vec<&Told<'_>> = told
        .iter()
        .filter(|told| told.out_ppb.max(told.in_ppb) >= LEAST_PPB)
        .collect();
    let [first, .., last] = lossy.as_slice() else {
        return;
    };
    let both = lossy.len() == 2;
    let window = lossy.iter().map(|told| grew(told.port)).reduce(join);
    findings.push(Finding {
        cause: Cause::NetworkFabric,
        place: Place {
            link: both.then(|| format!("{} <-> {}", first.label(), last.label())),
            ..Place::default()
        },
        side: Side::Path,
        severity: severity(&lossy),
        summary: format!("packets are lost in all directions between {} ports", lossy.len()),
        evidence: lossy.iter().take(4).map(|told| lost(told, &[])).collect(),
        ruled_out: vec![ruled_out(Cause::NetworkNic, "no port loses more than the others")],
        window: window.unwrap_or(first.port.window),
        carries_ppm: None,
        cost: FindingCost::NotMeasured,
    });
}

fn severity(told: &[&Told<'_>]) -> Severity {
    if told.iter().any(|told| told.gave_up > 0) {
        Severity::Failed
    } else {
        Severity::Degraded
    }
}

fn grew(port: &Port) -> crate::time::Window {
    let names: Vec<&str> = [SENT_AGAIN, TIMED_OUT, OUT_OF_ORDER, GAVE_UP].concat();
    port.grew(&names).unwrap_or(port.window)
}

/// Loss on the way from a sender to a receiver, as far as both are known.
fn one(
    seen: &Hardware,
    told: &[Told<'_>],
    sender: Option<usize>,
    receiver: Option<usize>,
    side: Side,
) -> Finding {
    let label = |at: Option<usize>| at.map_or_else(|| "its peers".to_owned(), |at| told[at].label());
    let own = match side {
        Side::Receiver => receiver.or(sender),
        _ => sender.or(receiver),
    };
    let ends: Vec<&Told<'_>> = [sender, receiver]
        .into_iter()
        .flatten()
        .map(|at| &told[at])
        .collect();
    let others: Vec<&Told<'_>> = (0..told.len())
        .filter(|at| ![sender, receiver].contains(&Some(*at)))
        .map(|at| &told[at])
        .collect();
    let place = own.map_or_else(Place::default, |at| Place {
        node: Some(told[at].port.node.clone()),
        nic_port: Some(told[at].port.name()),
        link: Some(format!("{} -> {}", label(sender), label(receiver))),
        ..Place::default()
    });
    Finding {
        cause: Cause::NetworkFabric,
        place,
        side,
        severity: severity(&ends),
        summary: format!("packets are lost from {} to {}", label(sender), label(receiver)),
        evidence: ends
            .iter()
            .map(|told| lost(told, &others))
            .chain(congestion(&ends))
            .collect(),
        ruled_out: not(seen, &ends),
        window: ends
            .iter()
            .map(|told| grew(told.port))
            .reduce(join)
            .unwrap_or_default(),
        carries_ppm: None,
        cost: FindingCost::NotMeasured,
    }
}

fn lost(told: &Told<'_>, others: &[&Told<'_>]) -> Evidence {
    let mut seen = Vec::new();
    let mut say = |count: u64, what: &str| {
        if count > 0 {
            seen.push(format!("{count} {what}"));
        }
    };
    say(told.sent_again, "packets asked for again");
    say(told.timed_out, "timeouts");
    say(told.out_of_order, "gaps in what it received");
    say(told.twice, "packets received twice");
    say(told.gave_up, "connections given up");
    if seen.is_empty() {
        seen.push("no loss counted".into());
    }
    seen.push(format!(
        "{} of sent, {} of received",
        share(told.out_ppb),
        share(told.in_ppb)
    ));
    let worst = others.iter().map(|told| told.out_ppb.max(told.in_ppb)).max();
    evidence(
        format!("packets lost, by {}", told.label()),
        seen.join(", "),
        worst.map_or_else(
            || format!("below {}", share(LEAST_PPB)),
            |worst| format!("at most {}, as on the other ports", share(worst.max(LEAST_PPB))),
        ),
    )
}

/// Whether the loss came with congestion: then switches marked packets, where they are told to.
fn congestion(ends: &[&Told<'_>]) -> Option<Evidence> {
    let names: &[&str] = &["np_cnp_sent", "rp_cnp_handled", "np_ecn_marked_roce_packets"];
    let counted: Vec<u64> = ends.iter().filter_map(|told| told.port.sum(names)).collect();
    let total = counted.iter().copied().reduce(u64::saturating_add)?;
    let expected = if total == 0 {
        "more, if queues of switches overflowed"
    } else {
        "0, if the link itself loses packets"
    };
    Some(evidence(
        "congestion notifications on both ends",
        total.to_string(),
        expected,
    ))
}

/// What it was not, as far as that was measured on the ends.
fn not(seen: &Hardware, ends: &[&Told<'_>]) -> Vec<RuledOut> {
    let mut out = Vec::new();
    let clean = |names: &[&str]| {
        let sums: Option<Vec<u64>> = ends.iter().map(|told| told.port.sum(names)).collect();
        sums.is_some_and(|sums| sums.iter().all(|sum| *sum == 0))
    };
    let unlimited = |told: &&Told<'_>| seen.queue_of(told.port).is_none_or(|queue| queue.limited == 0);
    if clean(super::ports::LINK_ERRORS) && ends.iter().all(unlimited) {
        let why = "the ends count no errors of their own links, and no queue of theirs held packets back";
        out.push(ruled_out(Cause::NetworkNic, why));
    }
    if clean(super::ports::SLOW_RECEIVER) {
        let why = "no receiver ran out of buffers";
        out.push(ruled_out(Cause::HostReceiver, why));
    }
    out
}
