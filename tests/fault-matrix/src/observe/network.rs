//! What the nodes' ports and flows would tell.

use stallscope_attribution::facts::{FlowFacts, PortFacts};
use stallscope_attribution::reading::Reading;

use super::{LINE_BYTES_PER_S, NodeClock, node_name};
use crate::job::Job;
use crate::variant::{Fault, GPUS, NODES, Variant};
use crate::work::MS;

/// The windows of all ports, one per step.
pub(super) fn ports(variant: &Variant, job: &Job, clocks: &[NodeClock]) -> Vec<PortFacts> {
    let mut ports = Vec::with_capacity(job.steps.len() * NODES);
    for (index, step) in job.steps.iter().enumerate() {
        for (node, clock) in clocks.iter().enumerate() {
            let first = &step[node * GPUS];
            let acts = |fault: Fault| {
                variant
                    .faults
                    .iter()
                    .any(|injected| injected.fault == fault && injected.acts(index))
            };
            let (comm, net) = (first.work.facts.comm, first.work.net);
            let slow = acts(Fault::SlowNic { node });
            let hidden = if acts(Fault::HiddenSlowComm) {
                variant.dose.of(100 * MS)
            } else {
                0
            };
            let everywhere = acts(Fault::Fabric) || acts(Fault::LineDown { node });
            let traffic = Traffic {
                // At a masked dose the queue builds up a tenth of the time.
                held: slow && variant.dose.of(10) > (index as u64 + 3) % 10,
                wasteful: acts(Fault::WrongAlgorithm),
                congested: acts(Fault::Fabric),
                line_bytes_per_s: if acts(Fault::LineDown { node }) {
                    LINE_BYTES_PER_S / 2
                } else {
                    LINE_BYTES_PER_S
                },
                // Where the network is fast, flows have data to send only while collectives could move it.
                busy_ns: if slow || everywhere {
                    comm
                } else {
                    comm.min(300 * MS + waits(net) + hidden)
                },
                extra: variant.dose.of(1_000),
            };
            let window = clock.window(first.start, first.end);
            ports.push(traffic.port(node, window, clock.offset_ns));
        }
    }
    ports
}

/// Of what the network adds, the part in which a fast node's flows have data to send: half.
const fn waits(net: u64) -> u64 {
    net / 2
}

/// One node's traffic in one step.
struct Traffic {
    /// Packets queue in the node's own port.
    held: bool,
    /// More bytes go over the wire than the collectives need.
    wasteful: bool,
    /// Packets queue and are lost between the nodes.
    congested: bool,
    line_bytes_per_s: u64,
    /// Time the busiest flow had data to send, ns.
    busy_ns: u64,
    /// Dose, thousandths.
    extra: u64,
}

impl Traffic {
    fn port(&self, node: usize, window: stallscope_attribution::time::Window, offset_ns: i64) -> PortFacts {
        let needed = 300 * MS / 1_000 * (LINE_BYTES_PER_S / 1_000_000);
        let sent_bytes = if self.wasteful {
            needed + needed * 4 / 10 * self.extra / 1_000
        } else {
            needed
        };
        PortFacts {
            node: node_name(node),
            port: "eth0".into(),
            window,
            realtime_offset_ns: offset_ns,
            line_bytes_per_s: Reading::Value(self.line_bytes_per_s),
            sent_bytes,
            received_bytes: sent_bytes,
            backlog_bytes: Reading::Value(if self.held { 900_000 } else { 0 }),
            queue_overlimits: Reading::Value(if self.held { 1_200 } else { 0 }),
            flows: vec![FlowFacts {
                pid: 4_000,
                local: format!("10.0.0.{node}:41000"),
                peer: format!("10.0.0.{}:41000", (node + 1) % NODES),
                acked_bytes: sent_bytes,
                busy_ns: self.busy_ns,
                receiver_limited_ns: 0,
                unsent_bytes: if self.held { 2_000_000 } else { 0 },
                retransmits: if self.congested { 240 } else { 0 },
                rtt_us: if self.held || self.congested { 9_000 } else { 180 },
                min_rtt_us: 90,
                ..FlowFacts::default()
            }],
        }
    }
}
