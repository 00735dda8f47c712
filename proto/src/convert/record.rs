//! Envelopes as facts.

use bytes::Bytes;
use prost::Message;
use stallscope_attribution::facts::{GpuStep, HardwareFacts, PortFacts, RecordGap, Span};

use super::{SubjectEntry, WireError, name, text_of};
use crate::v1;
use crate::v1::envelope::Body;

/// One message of one agent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Node name.
    pub node: String,
    /// Drawn anew whenever the agent starts.
    pub boot_id: u64,
    /// Position in the node's store, from 1.
    pub sequence: u64,
    /// What it says.
    pub payload: Payload,
}

/// What a message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// A subject gets its number.
    Subject {
        /// The number, from 1.
        id: u32,
        /// The subject.
        entry: SubjectEntry,
    },
    /// A step of the subject announced under this number.
    Step {
        /// Number of the subject.
        subject: u32,
        /// The step.
        step: Box<GpuStep>,
    },
    /// Time outside steps of the subject announced under this number.
    Span {
        /// Number of the subject.
        subject: u32,
        /// The span.
        span: Box<Span>,
    },
    /// A port's window.
    Port(PortFacts),
    /// What a device told over a window.
    Hardware(HardwareFacts),
    /// Something is missing.
    Gap(RecordGap),
}

impl Payload {
    /// The choice of an envelope's body, told by `sender`.
    #[must_use]
    pub fn to_body(&self, sender: &str) -> Body {
        match self {
            Self::Subject { id, entry } => Body::Subject(v1::SubjectAnnounced {
                id: *id,
                subject: Some(v1::GpuSubject::new(sender, &entry.subject)),
                job_kind: entry.job_kind.clone(),
            }),
            Self::Step { subject, step } => Body::Step(v1::GpuStep::new(*subject, step)),
            Self::Span { subject, span } => Body::Span(v1::Span::new(*subject, span)),
            Self::Port(port) => Body::Port(v1::PortFacts::new(sender, port)),
            Self::Hardware(facts) => Body::Hardware(v1::HardwareFacts::new(sender, facts)),
            Self::Gap(gap) => Body::Gap(v1::RecordGap::new(sender, gap)),
        }
    }

    fn from_body(body: Body, sender: &str) -> Result<Self, WireError> {
        Ok(match body {
            Body::Subject(announced) => Self::Subject {
                id: announced.id,
                entry: SubjectEntry {
                    subject: announced
                        .subject
                        .ok_or(WireError::Missing { field: "subject" })?
                        .into_subject(sender)?,
                    job_kind: text_of("job_kind", announced.job_kind)?,
                },
            },
            Body::Step(step) => Self::Step {
                subject: step.subject,
                step: Box::new(step.try_into()?),
            },
            Body::Span(span) => Self::Span {
                subject: span.subject,
                span: Box::new(span.try_into()?),
            },
            Body::Port(port) => Self::Port(port.into_facts(sender)?),
            Body::Hardware(facts) => Self::Hardware(facts.into_facts(sender)?),
            Body::Gap(gap) => Self::Gap(gap.into_gap(sender)?),
        })
    }
}

impl Record {
    /// The record as the bytes of an envelope.
    #[must_use]
    pub fn encode(&self) -> Bytes {
        v1::Envelope::from(self).encode_to_vec().into()
    }

    /// The record in the bytes of an envelope.
    ///
    /// # Errors
    /// When the bytes are not an envelope, or what it says is not a fact.
    pub fn decode(bytes: Bytes) -> Result<Self, WireError> {
        v1::Envelope::decode(bytes)
            .map_err(|source| WireError::Malformed {
                what: "envelope",
                source,
            })?
            .try_into()
    }
}

impl From<&Record> for v1::Envelope {
    fn from(record: &Record) -> Self {
        Self {
            node: record.node.clone(),
            agent_boot_id: record.boot_id,
            sequence: record.sequence,
            body: Some(record.payload.to_body(&record.node)),
        }
    }
}

impl TryFrom<v1::Envelope> for Record {
    type Error = WireError;

    fn try_from(wire: v1::Envelope) -> Result<Self, WireError> {
        let node = name("node", wire.node)?;
        if wire.sequence == 0 {
            return Err(WireError::Missing { field: "sequence" });
        }
        let body = wire.body.ok_or(WireError::Unknown {
            field: "envelope.body",
            value: 0,
        })?;
        let payload = Payload::from_body(body, &node)?;
        Ok(Self {
            node,
            boot_id: wire.agent_boot_id,
            sequence: wire.sequence,
            payload,
        })
    }
}
