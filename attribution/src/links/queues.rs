//! RDMA in software goes through the kernel's own queue of the interface: what that holds back is the sender's.

use super::gather::{Hardware, OwnQueue, Port};
use super::{Finding, FindingCost, Severity, Side, evidence, ruled_out};
use crate::cause::{Cause, Place};

/// Windows in which packets were held back, at least.
const LEAST_WINDOWS: u64 = 2;
/// Packets held back over a limit in all of them, at least.
const LEAST_OVERLIMITS: u64 = 20;
/// One queue stands out when it held back in this many times the windows of the others.
const STANDS_OUT: u64 = 2;

impl Hardware {
    /// The kernel's queue of a port's interface.
    pub(super) fn queue_of(&self, port: &Port) -> Option<&OwnQueue> {
        self.queues.get(&(port.node.clone(), port.last.netdev.clone()))
    }

    /// Whether the port's own queue held back by its rate what the port sent.
    pub(super) fn is_limited(&self, port: &Port) -> bool {
        let limited =
            |queue: &&OwnQueue| queue.limited >= LEAST_WINDOWS && queue.overlimits >= LEAST_OVERLIMITS;
        self.queue_of(port)
            .filter(limited)
            .is_some_and(|queue| self.stands_out(port, queue.limited, |queue| queue.limited))
    }

    /// Whether packets waited in the port's own queue although no rate held them: a delay on the way.
    pub(super) fn is_delayed(&self, port: &Port) -> bool {
        self.queue_of(port)
            .filter(|queue| queue.limited == 0 && queue.waiting >= LEAST_WINDOWS)
            .is_some_and(|queue| self.stands_out(port, queue.waiting, |queue| queue.waiting))
    }

    fn stands_out(&self, port: &Port, own: u64, of: fn(&OwnQueue) -> u64) -> bool {
        let others = self
            .ports
            .values()
            .filter(|other| (&other.node, &other.last.netdev) != (&port.node, &port.last.netdev));
        others
            .filter_map(|other| self.queue_of(other))
            .all(|other| own >= of(other).saturating_mul(STANDS_OUT))
    }
}

pub(super) fn find(seen: &Hardware, findings: &mut Vec<Finding>) {
    for port in seen.ports.values() {
        let Some(queue) = seen.queue_of(port) else {
            continue;
        };
        let place = Place {
            node: Some(port.node.clone()),
            nic_port: Some(port.name()),
            ..Place::default()
        };
        let rate =
            crate::budget::arith::mul_div(queue.sent_bytes, 1_000_000_000, queue.window_ns) / 1_000_000;
        let held = evidence(
            format!(
                "packets held back in the queue of {} ({})",
                port.last.netdev,
                port.name()
            ),
            format!(
                "{} over its rate, in {} of {} windows; backlog up to {} KiB; {rate} MB/s sent",
                queue.overlimits,
                queue.limited.max(queue.waiting),
                queue.windows,
                queue.backlog_bytes / 1024,
            ),
            "none, as on the other ports",
        );
        let (cause, side, summary, not) = if seen.is_limited(port) {
            let why = "packets wait before they reach the wire, over a rate set on this node's own interface";
            (
                Cause::NetworkNic,
                Side::Sender,
                format!(
                    "{} on {} sends less than it is given: its own queue limits it",
                    port.name(),
                    port.node
                ),
                ruled_out(Cause::NetworkFabric, why),
            )
        } else if seen.is_delayed(port) {
            (
                Cause::NetworkFabric,
                Side::Path,
                format!(
                    "what {} on {} sends is delayed on its way",
                    port.name(),
                    port.node
                ),
                ruled_out(
                    Cause::NetworkNic,
                    "no packet was held back by a rate of the interface",
                ),
            )
        } else {
            continue;
        };
        findings.push(Finding {
            cause,
            place,
            side,
            severity: Severity::Degraded,
            summary,
            evidence: vec![held],
            ruled_out: vec![not],
            window: queue.span.unwrap_or(port.window),
            carries_ppm: None,
            cost: FindingCost::NotMeasured,
        });
    }
}
