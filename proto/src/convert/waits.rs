//! What network steps waited for.

use stallscope_attribution::facts::{ProcessWaits, StepWait, StepWaits};

use super::WireError;
use crate::v1;

impl From<StepWait> for v1::StepWait {
    fn from(wait: StepWait) -> Self {
        Self {
            steps_ns: wait.steps_ns,
            any_ns: wait.any_ns,
            entered: wait.entered,
        }
    }
}

impl From<v1::StepWait> for StepWait {
    fn from(wire: v1::StepWait) -> Self {
        Self {
            steps_ns: wire.steps_ns,
            any_ns: wire.any_ns,
            entered: wire.entered,
        }
    }
}

/// Without a thread.
impl From<&StepWaits> for v1::StepWaits {
    fn from(waits: &StepWaits) -> Self {
        Self {
            thread: None,
            send_gpu: Some(waits.send_gpu.into()),
            send_credit: waits.send_credit.map(Into::into),
            send_wire: Some(waits.send_wire.into()),
            receive_wire: Some(waits.receive_wire.into()),
            receive_flush: Some(waits.receive_flush.into()),
            receive_gpu: Some(waits.receive_gpu.into()),
            sent: waits.sent,
            received: waits.received,
            unknown: waits.unknown,
        }
    }
}

/// A wait that is absent was not told apart, which only one of them may be.
impl TryFrom<&v1::StepWaits> for StepWaits {
    type Error = WireError;

    fn try_from(wire: &v1::StepWaits) -> Result<Self, WireError> {
        let needed = |of: Option<v1::StepWait>, field| of.map(Into::into).ok_or(WireError::Missing { field });
        Ok(Self {
            send_gpu: needed(wire.send_gpu, "step_waits.send_gpu")?,
            send_credit: wire.send_credit.map(Into::into),
            send_wire: needed(wire.send_wire, "step_waits.send_wire")?,
            receive_wire: needed(wire.receive_wire, "step_waits.receive_wire")?,
            receive_flush: needed(wire.receive_flush, "step_waits.receive_flush")?,
            receive_gpu: needed(wire.receive_gpu, "step_waits.receive_gpu")?,
            sent: wire.sent,
            received: wire.received,
            unknown: wire.unknown,
        })
    }
}

impl From<&ProcessWaits> for v1::ProcessWaits {
    fn from(of: &ProcessWaits) -> Self {
        Self {
            pid: of.pid,
            watched_ns: of.watched_ns,
            waits: Some((&of.waits).into()),
        }
    }
}

impl TryFrom<&v1::ProcessWaits> for ProcessWaits {
    type Error = WireError;

    fn try_from(wire: &v1::ProcessWaits) -> Result<Self, WireError> {
        let waits = wire.waits.as_ref().ok_or(WireError::Missing {
            field: "process_waits.waits",
        })?;
        Ok(Self {
            pid: wire.pid,
            watched_ns: wire.watched_ns,
            waits: waits.try_into()?,
        })
    }
}
