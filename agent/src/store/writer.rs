//! Events become numbered messages.

use std::sync::Arc;

use stallscope_attribution::facts::{GpuSubject, RecordGap};
use stallscope_attribution::time::Window;
use stallscope_proto::convert::{Payload, Record, SubjectEntry, SubjectNumbers};

use super::ring::{AppendError, Ring};
use crate::timeline::Event;

/// Writes one run of the agent into the store.
#[derive(Debug)]
pub struct Writer {
    ring: Arc<Ring>,
    node: String,
    boot_id: u64,
    subjects: SubjectNumbers,
    kinds: std::collections::BTreeMap<GpuSubject, String>,
    /// Messages that could not be written since the last that could.
    unwritten: u64,
    /// What those cover, `CLOCK_REALTIME` ns, as far as they say.
    unwritten_window: Option<Window>,
    lost: u64,
}

/// How a write went.
#[derive(Debug)]
pub enum Written {
    /// It is in the store, or needs not be.
    Yes,
    /// It is, and so is a gap that names what could not be written before.
    Again,
    /// It is lost. The reason is given when writing begins to fail, not each time.
    Lost(Option<AppendError>),
}

impl Writer {
    /// A writer of the run `boot_id`.
    #[must_use]
    pub fn new(ring: Arc<Ring>, node: impl Into<String>, boot_id: u64) -> Self {
        Self {
            ring,
            node: node.into(),
            boot_id,
            subjects: SubjectNumbers::default(),
            kinds: std::collections::BTreeMap::new(),
            unwritten: 0,
            unwritten_window: None,
            lost: 0,
        }
    }

    /// Messages lost because they could not be written, since the start.
    #[must_use]
    pub const fn lost(&self) -> u64 {
        self.lost
    }

    /// Writes an event.
    pub fn write(&mut self, event: &Event) -> Written {
        if self.ring.turn_page() {
            self.subjects.forget_announcements();
        }
        let result = match event {
            Event::Subject { subject, kind } => {
                self.kinds
                    .insert((**subject).clone(), kind.clone().unwrap_or_default());
                return Written::Yes;
            }
            Event::Gone { subject } => {
                // What was known of it at first is a subject of its own.
                self.kinds.retain(|known, _| known.pid != subject.pid);
                return Written::Yes;
            }
            Event::Step { subject, step } => self.of_subject(subject, |subject| Payload::Step {
                subject,
                step: step.clone(),
            }),
            Event::Span { subject, span } => self.of_subject(subject, |subject| Payload::Span {
                subject,
                span: span.clone(),
            }),
            Event::Port(port) => self.append(&Payload::Port((**port).clone())),
            Event::Hardware(facts) => self.append(&Payload::Hardware((**facts).clone())),
            Event::Gap(gap) => self.append(&Payload::Gap(gap.clone())),
        };
        match result {
            Ok(()) if self.unwritten > 0 => self.name_the_unwritten(),
            Ok(()) => Written::Yes,
            Err(error) => {
                self.lost += 1;
                self.unwritten += 1;
                self.unwritten_window = joined(self.unwritten_window, covers(event));
                Written::Lost((self.unwritten == 1).then_some(error))
            }
        }
    }

    fn name_the_unwritten(&mut self) -> Written {
        let gap = RecordGap {
            node: self.node.clone(),
            window: self.unwritten_window,
            what: "the store could not be written (see the agent's log): messages are missing".to_owned(),
            count: self.unwritten,
        };
        match self.append(&Payload::Gap(gap)) {
            Ok(()) => {
                self.unwritten = 0;
                self.unwritten_window = None;
                Written::Again
            }
            Err(_) => Written::Yes,
        }
    }

    /// Announces the subject if this segment does not know it, then writes the message.
    fn of_subject(
        &mut self,
        subject: &GpuSubject,
        payload: impl FnOnce(u32) -> Payload,
    ) -> Result<(), AppendError> {
        let Some((id, is_new)) = self.subjects.number(subject) else {
            return Err(AppendError::TooManySubjects);
        };
        if is_new {
            let entry = SubjectEntry {
                subject: subject.clone(),
                job_kind: self.kinds.get(subject).cloned().unwrap_or_default(),
            };
            if let Err(error) = self.append(&Payload::Subject { id, entry }) {
                self.subjects.forget_announcements();
                return Err(error);
            }
        }
        self.append(&payload(id))
    }

    fn append(&mut self, payload: &Payload) -> Result<(), AppendError> {
        let encode = |sequence| {
            let record = Record {
                node: self.node.clone(),
                boot_id: self.boot_id,
                sequence,
                payload: payload.clone(),
            };
            record.encode()
        };
        self.ring.append(encode).map(|_| ())
    }
}

/// When an event was, `CLOCK_REALTIME` ns.
fn covers(event: &Event) -> Option<Window> {
    let shifted = |window: Window, offset_ns: i64| {
        Window::new(
            window.start_ns().saturating_add_signed(offset_ns),
            window.end_ns().saturating_add_signed(offset_ns),
        )
    };
    match event {
        Event::Step { step, .. } => shifted(step.window, step.realtime_offset_ns),
        Event::Span { span, .. } => shifted(span.window, span.realtime_offset_ns),
        Event::Port(port) => shifted(port.window, port.realtime_offset_ns),
        Event::Hardware(facts) => shifted(facts.window, facts.realtime_offset_ns),
        Event::Gap(gap) => gap.window,
        Event::Subject { .. } | Event::Gone { .. } => None,
    }
}

fn joined(one: Option<Window>, other: Option<Window>) -> Option<Window> {
    match (one, other) {
        (Some(one), Some(other)) => Window::new(
            one.start_ns().min(other.start_ns()),
            one.end_ns().max(other.end_ns()),
        ),
        (one, other) => one.or(other),
    }
}
