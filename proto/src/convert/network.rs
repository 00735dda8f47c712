//! Ports, flows and gaps. A node name equal to the envelope's is left out on the wire.

use stallscope_attribution::facts::{FlowFacts, PortFacts, RecordGap};

use super::reading::uint_reading;
use super::{WireError, name, text_of};
use crate::v1;

pub(super) fn node_of(field: &'static str, wire: String, sender: &str) -> Result<String, WireError> {
    if wire.is_empty() {
        Ok(sender.to_owned())
    } else {
        name(field, wire)
    }
}

pub(super) fn node_to_wire(node: &str, sender: &str) -> String {
    if node == sender {
        String::new()
    } else {
        node.to_owned()
    }
}

impl From<&FlowFacts> for v1::FlowFacts {
    fn from(flow: &FlowFacts) -> Self {
        Self {
            pid: flow.pid,
            local: flow.local.clone(),
            peer: flow.peer.clone(),
            acked_bytes: flow.acked_bytes,
            busy_ns: flow.busy_ns,
            receiver_limited_ns: flow.receiver_limited_ns,
            unsent_bytes: flow.unsent_bytes,
            retransmits: flow.retransmits,
            rtt_us: flow.rtt_us,
            min_rtt_us: flow.min_rtt_us,
            receive_backlog_bytes: flow.receive_backlog_bytes,
            window_probes: flow.window_probes,
        }
    }
}

impl TryFrom<v1::FlowFacts> for FlowFacts {
    type Error = WireError;

    fn try_from(wire: v1::FlowFacts) -> Result<Self, WireError> {
        Ok(Self {
            pid: wire.pid,
            local: text_of("flow.local", wire.local)?,
            peer: text_of("flow.peer", wire.peer)?,
            acked_bytes: wire.acked_bytes,
            busy_ns: wire.busy_ns,
            receiver_limited_ns: wire.receiver_limited_ns,
            unsent_bytes: wire.unsent_bytes,
            retransmits: wire.retransmits,
            rtt_us: wire.rtt_us,
            min_rtt_us: wire.min_rtt_us,
            receive_backlog_bytes: wire.receive_backlog_bytes,
            window_probes: wire.window_probes,
        })
    }
}

impl v1::PortFacts {
    /// The port's window as `sender` tells it.
    #[must_use]
    pub fn new(sender: &str, port: &PortFacts) -> Self {
        Self {
            node: node_to_wire(&port.node, sender),
            port: port.port.clone(),
            window: Some(port.window.into()),
            realtime_offset_ns: port.realtime_offset_ns,
            line_bytes_per_s: uint_reading::to_wire(&port.line_bytes_per_s),
            sent_bytes: port.sent_bytes,
            received_bytes: port.received_bytes,
            backlog_bytes: uint_reading::to_wire(&port.backlog_bytes),
            queue_overlimits: uint_reading::to_wire(&port.queue_overlimits),
            flows: port.flows.iter().map(Into::into).collect(),
        }
    }

    /// The fact in a message of `sender`.
    ///
    /// # Errors
    /// When the message is not such a fact.
    pub fn into_facts(self, sender: &str) -> Result<PortFacts, WireError> {
        Ok(PortFacts {
            node: node_of("port.node", self.node, sender)?,
            port: name("port.port", self.port)?,
            window: self
                .window
                .ok_or(WireError::Missing { field: "port.window" })?
                .try_into()?,
            realtime_offset_ns: self.realtime_offset_ns,
            line_bytes_per_s: uint_reading::from_wire("port.line_bytes_per_s", self.line_bytes_per_s)?,
            sent_bytes: self.sent_bytes,
            received_bytes: self.received_bytes,
            backlog_bytes: uint_reading::from_wire("port.backlog_bytes", self.backlog_bytes)?,
            queue_overlimits: uint_reading::from_wire("port.queue_overlimits", self.queue_overlimits)?,
            flows: self
                .flows
                .into_iter()
                .map(TryInto::try_into)
                .collect::<Result<_, _>>()?,
        })
    }
}

impl v1::RecordGap {
    /// The gap as `sender` tells it.
    #[must_use]
    pub fn new(sender: &str, gap: &RecordGap) -> Self {
        Self {
            node: node_to_wire(&gap.node, sender),
            window: gap.window.map(Into::into),
            what: gap.what.clone(),
            count: gap.count,
        }
    }

    /// The gap in a message of `sender`.
    ///
    /// # Errors
    /// When the message is not a gap.
    pub fn into_gap(self, sender: &str) -> Result<RecordGap, WireError> {
        Ok(RecordGap {
            node: node_of("gap.node", self.node, sender)?,
            window: self.window.map(TryInto::try_into).transpose()?,
            what: name("gap.what", self.what)?,
            count: self.count,
        })
    }
}
