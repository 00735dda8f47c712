//! Steps, their signals, and spans.

use stallscope_attribution::budget::Budget;
use stallscope_attribution::facts::{GpuStep, Span, SpanKind, StepMethod, StepSignals};
use stallscope_attribution::time::Window;

use super::WireError;
use super::reading::{activity_reading, clock_reading, foreign_reading, link_reading, uint_reading};
use crate::v1;

impl From<StepMethod> for v1::StepMethod {
    fn from(method: StepMethod) -> Self {
        match method {
            StepMethod::CollectivePeriod => Self::CollectivePeriod,
            StepMethod::LaunchPeriod => Self::LaunchPeriod,
            StepMethod::Declared => Self::Declared,
            StepMethod::FixedWindow => Self::FixedWindow,
        }
    }
}

impl From<SpanKind> for v1::SpanKind {
    fn from(kind: SpanKind) -> Self {
        match kind {
            SpanKind::Checkpoint => Self::Checkpoint,
            SpanKind::Startup => Self::Startup,
            SpanKind::Other => Self::Other,
            SpanKind::Unobserved => Self::Unobserved,
        }
    }
}

fn method(value: i32) -> Result<StepMethod, WireError> {
    match v1::StepMethod::try_from(value) {
        Ok(v1::StepMethod::CollectivePeriod) => Ok(StepMethod::CollectivePeriod),
        Ok(v1::StepMethod::LaunchPeriod) => Ok(StepMethod::LaunchPeriod),
        Ok(v1::StepMethod::Declared) => Ok(StepMethod::Declared),
        Ok(v1::StepMethod::FixedWindow) => Ok(StepMethod::FixedWindow),
        Ok(v1::StepMethod::Unspecified) | Err(_) => Err(WireError::Unknown {
            field: "step.method",
            value: value.into(),
        }),
    }
}

fn span_kind(value: i32) -> Result<SpanKind, WireError> {
    match v1::SpanKind::try_from(value) {
        Ok(v1::SpanKind::Checkpoint) => Ok(SpanKind::Checkpoint),
        Ok(v1::SpanKind::Startup) => Ok(SpanKind::Startup),
        Ok(v1::SpanKind::Other) => Ok(SpanKind::Other),
        Ok(v1::SpanKind::Unobserved) => Ok(SpanKind::Unobserved),
        Ok(v1::SpanKind::Unspecified) | Err(_) => Err(WireError::Unknown {
            field: "span.kind",
            value: value.into(),
        }),
    }
}

/// The window of a budget that starts at `start_ns`.
fn window_of(field: &'static str, start_ns: u64, len_ns: u64) -> Result<Window, WireError> {
    start_ns
        .checked_add(len_ns)
        .and_then(|end_ns| Window::new(start_ns, end_ns))
        .ok_or(WireError::Time { field })
}

impl From<&StepSignals> for v1::StepSignals {
    fn from(signals: &StepSignals) -> Self {
        Self {
            host_on_cpu_ns: signals.host_on_cpu_ns,
            host_runnable_ns: signals.host_runnable_ns,
            host_sync_ns: signals.host_sync_ns,
            quota_throttled_ns: uint_reading::to_wire(&signals.quota_throttled_ns),
            worker_cpu_ns: signals.worker_cpu_ns,
            worker_io_ns: signals.worker_io_ns,
            launches: signals.launches,
            comm_bytes: signals.comm_bytes,
            collectives: signals.collectives,
            first_collective_ns: signals.first_collective_ns,
            last_collective_ns: signals.last_collective_ns,
            activity: activity_reading::to_wire(&signals.activity),
            clock: clock_reading::to_wire(&signals.clock),
            reference_sm_mhz: signals.reference_sm_mhz,
            foreign: foreign_reading::to_wire(&signals.foreign),
            links: link_reading::to_wire(&signals.links),
            lost_records: signals.lost_records,
        }
    }
}

impl TryFrom<v1::StepSignals> for StepSignals {
    type Error = WireError;

    fn try_from(wire: v1::StepSignals) -> Result<Self, WireError> {
        Ok(Self {
            host_on_cpu_ns: wire.host_on_cpu_ns,
            host_runnable_ns: wire.host_runnable_ns,
            host_sync_ns: wire.host_sync_ns,
            quota_throttled_ns: uint_reading::from_wire(
                "signals.quota_throttled_ns",
                wire.quota_throttled_ns,
            )?,
            worker_cpu_ns: wire.worker_cpu_ns,
            worker_io_ns: wire.worker_io_ns,
            launches: wire.launches,
            comm_bytes: wire.comm_bytes,
            collectives: wire.collectives,
            first_collective_ns: wire.first_collective_ns,
            last_collective_ns: wire.last_collective_ns,
            activity: activity_reading::from_wire("signals.activity", wire.activity)?,
            clock: clock_reading::from_wire("signals.clock", wire.clock)?,
            reference_sm_mhz: wire.reference_sm_mhz,
            foreign: foreign_reading::from_wire("signals.foreign", wire.foreign)?,
            links: link_reading::from_wire("signals.links", wire.links)?,
            lost_records: wire.lost_records,
        })
    }
}

impl v1::GpuStep {
    /// The step of the subject announced under this number.
    #[must_use]
    pub fn new(subject: u32, step: &GpuStep) -> Self {
        Self {
            subject,
            index: step.index,
            start_ns: step.window.start_ns(),
            realtime_offset_ns: step.realtime_offset_ns,
            method: v1::StepMethod::from(step.method).into(),
            period_calls: step.period_calls,
            budget: Some((&step.budget).into()),
            signals: Some((&step.signals).into()),
        }
    }
}

impl TryFrom<v1::GpuStep> for GpuStep {
    type Error = WireError;

    fn try_from(wire: v1::GpuStep) -> Result<Self, WireError> {
        let budget: Budget = wire
            .budget
            .ok_or(WireError::Missing { field: "step.budget" })?
            .try_into()?;
        let signals = wire
            .signals
            .ok_or(WireError::Missing {
                field: "step.signals",
            })?
            .try_into()?;
        Ok(Self {
            index: wire.index,
            window: window_of("step window", wire.start_ns, budget.window_ns())?,
            realtime_offset_ns: wire.realtime_offset_ns,
            method: method(wire.method)?,
            period_calls: wire.period_calls,
            budget,
            signals,
        })
    }
}

impl v1::Span {
    /// The span of the subject announced under this number.
    #[must_use]
    pub fn new(subject: u32, span: &Span) -> Self {
        Self {
            subject,
            kind: v1::SpanKind::from(span.kind).into(),
            start_ns: span.window.start_ns(),
            realtime_offset_ns: span.realtime_offset_ns,
            budget: Some((&span.budget).into()),
        }
    }
}

impl TryFrom<v1::Span> for Span {
    type Error = WireError;

    fn try_from(wire: v1::Span) -> Result<Self, WireError> {
        let budget: Budget = wire
            .budget
            .ok_or(WireError::Missing { field: "span.budget" })?
            .try_into()?;
        Ok(Self {
            kind: span_kind(wire.kind)?,
            window: window_of("span window", wire.start_ns, budget.window_ns())?,
            realtime_offset_ns: wire.realtime_offset_ns,
            budget,
        })
    }
}

impl From<Window> for v1::Window {
    fn from(window: Window) -> Self {
        Self {
            start_ns: window.start_ns(),
            len_ns: window.len_ns(),
        }
    }
}

impl TryFrom<v1::Window> for Window {
    type Error = WireError;

    fn try_from(wire: v1::Window) -> Result<Self, WireError> {
        window_of("window", wire.start_ns, wire.len_ns)
    }
}
