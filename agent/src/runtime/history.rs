//! The thread that turns batches into history and writes it.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use stallscope_attribution::facts::GpuSubject;

use super::own::{OwnMeter, clean};
use super::queue::Taker;
use super::shared::Shared;
use super::status::{Condition, GpuStatus};
use crate::observation::{Fact, GpuReading, Observation};
use crate::record::Recorder;
use crate::sources::clock;
use crate::store::{Ring, Scope, Spool, Writer, Written, read_back};
use crate::timeline::{Event, Timeline};

const TICK: Duration = Duration::from_millis(500);
/// Between two updates of what the agent costs, ns.
const METER_NS: u64 = 1_000_000_000;
/// Between two times everything written is brought to the disk, ns.
const SYNC_NS: u64 = 5_000_000_000;
/// What of the store is read at start, bytes: so that a report after a restart knows what came before.
const READ_BACK_BYTES: u64 = 16 << 20;
/// Readings over which throttling is summed for the fitness check: about ten seconds.
const RECENT_NS: u64 = 10_000_000_000;

/// Makes history.
pub(super) struct History {
    shared: Arc<Shared>,
    timeline: Timeline,
    events: Vec<Event>,
    writer: Option<Writer>,
    ring: Option<Arc<Ring>>,
    store_dir: PathBuf,
    recorder: Option<Recorder>,
    batches: Taker,
    throttling: BTreeMap<u32, VecDeque<Throttled>>,
    /// Whether messages waited for the disk when last looked.
    disk_refuses: bool,
    meter: OwnMeter,
    metered_ns: u64,
    synced_ns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Throttled {
    window_ns: u64,
    thermal_ns: u64,
    power_ns: u64,
}

impl History {
    pub(super) fn new(
        shared: Arc<Shared>,
        store_dir: &Path,
        ring: Option<Arc<Ring>>,
        recorder: Option<Recorder>,
        batches: Taker,
    ) -> Self {
        let writer = ring
            .as_ref()
            .map(|ring| Writer::new(Arc::clone(ring), shared.node.clone(), shared.boot_id));
        Self {
            timeline: Timeline::new(shared.node.clone()),
            events: Vec::new(),
            writer,
            ring,
            store_dir: store_dir.to_owned(),
            recorder,
            batches,
            throttling: BTreeMap::new(),
            disk_refuses: false,
            meter: OwnMeter::default(),
            metered_ns: 0,
            synced_ns: 0,
            shared,
        }
    }

    pub(super) fn run(mut self) {
        if self.ring.is_some() {
            self.take_up_the_past();
        }
        loop {
            match self.batches.recv_timeout(TICK) {
                Ok(batch) => self.take(batch),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            let gaps = self.shared.take_gaps();
            self.events.extend(gaps.into_iter().map(Event::Gap));
            self.deliver();
            self.keep_house();
        }
        self.timeline.finish(&mut self.events);
        self.deliver();
        self.finish();
    }

    /// What an earlier run left: shown in reports, and where it left off is where unobserved time begins.
    fn take_up_the_past(&mut self) {
        let scope = Scope {
            newest_bytes: READ_BACK_BYTES,
            most: super::status::RECENT_STEPS,
            ..Scope::default()
        };
        let stored = match read_back(&self.store_dir, scope) {
            Ok(stored) => stored,
            Err(error) => {
                tracing::warn!(%error, "the past in the store cannot be read: reports begin now");
                return;
            }
        };
        let (now_ns, offset_ns) = (super::now_ns(), clock::realtime_offset_ns());
        let monotonic = |realtime_ns: i128| u64::try_from(realtime_ns - i128::from(offset_ns)).ok();
        let left_off: Vec<(GpuSubject, u64)> = stored
            .left_off()
            .into_iter()
            .filter_map(|(subject, realtime_ns)| Some((subject, monotonic(realtime_ns)?)))
            .filter(|(_, left_off_ns)| *left_off_ns < now_ns)
            .collect();
        self.timeline.resume_from(left_off);
        let mut status = self.shared.status.lock();
        for (subject, kind, steps, spans) in stored.histories() {
            status.recent.set_kind(&subject.job, kind);
            steps
                .iter()
                .for_each(|step| status.recent.push_step(subject, step.clone()));
            spans
                .iter()
                .for_each(|span| status.recent.push_span(subject, span.clone()));
        }
        stored
            .ports()
            .iter()
            .for_each(|port| status.recent.push_port(port.clone()));
        stored
            .hardware()
            .iter()
            .for_each(|facts| status.recent.push_hardware(facts.clone()));
        stored
            .gaps()
            .iter()
            .for_each(|gap| status.recent.push_gap(gap.clone()));
    }

    fn take(&mut self, batch: Vec<Observation>) {
        if let Some(recorder) = &mut self.recorder
            && let Err(error) = recorder.write(&batch)
        {
            tracing::error!(%error, "recording stops");
            self.shared
                .status
                .lock()
                .set_health("record", Condition::Missing(error.to_string()));
            self.recorder = None;
        }
        for observation in batch {
            match &observation.fact {
                Fact::Gpu(reading) => self.show_reading(observation.window, reading),
                Fact::RealtimeOffset { ns } => self.shared.status.lock().realtime_offset_ns = *ns,
                _ => {}
            }
            self.timeline.push(observation);
        }
        self.timeline.advance(&mut self.events);
    }

    fn show_reading(&mut self, window: stallscope_attribution::time::Window, reading: &GpuReading) {
        let recent = self.throttling.entry(reading.gpu).or_default();
        recent.push_back(Throttled {
            window_ns: window.len_ns(),
            thermal_ns: reading.thermal_ns.value().copied().unwrap_or(0),
            power_ns: reading.power_limit_ns.value().copied().unwrap_or(0),
        });
        let mut total_ns: u64 = recent.iter().map(|throttled| throttled.window_ns).sum();
        while total_ns > RECENT_NS && recent.len() > 1 {
            total_ns -= recent.pop_front().map_or(0, |oldest| oldest.window_ns);
        }
        let sum = |part: fn(&Throttled) -> u64| recent.iter().map(part).sum();
        let mut status = self.shared.status.lock();
        let before = status.gpus.get(&reading.gpu);
        let (failures, readings) = before.map_or((0, 0), |gpu| (gpu.failures, gpu.readings));
        let now = GpuStatus {
            reading: held(reading, before),
            read_ns: window.end_ns(),
            recent_thermal_ns: sum(|throttled| throttled.thermal_ns),
            recent_power_limit_ns: sum(|throttled| throttled.power_ns),
            recent_window_ns: total_ns,
            failures: if nothing_read(reading) {
                failures.saturating_add(1)
            } else {
                0
            },
            readings: readings + 1,
        };
        status.gpus.insert(reading.gpu, now);
    }

    /// Hands every event to the store and the status.
    fn deliver(&mut self) {
        if self.events.is_empty() {
            return;
        }
        let mut events = std::mem::take(&mut self.events);
        for event in &mut events {
            if let Event::Gap(gap) = event {
                gap.what = clean(&gap.what);
            }
            if let Some(writer) = &mut self.writer {
                let written = writer.write(event);
                self.show_write(&written);
            }
        }
        let mut status = self.shared.status.lock();
        for event in events.drain(..) {
            match event {
                Event::Subject { subject, kind } => {
                    tracing::info!(
                        job = subject.job,
                        rank = subject.rank,
                        gpu = subject.gpu,
                        "accounted for"
                    );
                    status
                        .recent
                        .set_kind(&subject.job, kind.as_deref().unwrap_or_default());
                }
                Event::Step { subject, step } => status.recent.push_step(&subject, *step),
                Event::Span { subject, span } => status.recent.push_span(&subject, *span),
                Event::Port(port) => status.recent.push_port(*port),
                Event::Hardware(facts) => status.recent.push_hardware(*facts),
                Event::Gap(gap) => status.recent.push_gap(gap),
                Event::Gone { .. } => {}
            }
        }
        drop(status);
        self.events = events;
    }

    fn show_write(&self, written: &Written) {
        match written {
            Written::Yes | Written::Lost(None) => {}
            Written::Again => {
                tracing::info!("the store is written again");
                self.shared.status.lock().set_health("store", Condition::Works);
            }
            Written::Lost(Some(error)) => {
                tracing::error!(%error, "history is lost");
                self.shared
                    .status
                    .lock()
                    .set_health("store", Condition::Degraded(error.to_string()));
            }
        }
    }

    fn keep_house(&mut self) {
        let now_ns = super::now_ns();
        if now_ns.saturating_sub(self.metered_ns) >= METER_NS {
            self.metered_ns = now_ns;
            self.measure(now_ns);
            self.show_disk();
        }
        if now_ns.saturating_sub(self.synced_ns) >= SYNC_NS {
            self.synced_ns = now_ns;
            if let Some(Err(error)) = self.ring.as_ref().map(|ring| ring.sync()) {
                tracing::warn!(%error, "the store may lose its last seconds if the node crashes now");
            }
        }
    }

    /// Says when the disk stops and begins to take messages.
    fn show_disk(&mut self) {
        let refused = self.ring.as_ref().and_then(|ring| ring.refused());
        let condition = match &refused {
            None if !self.disk_refuses => return,
            None => {
                tracing::info!("the store is written again; nothing is lost");
                Condition::Works
            }
            Some((waiting, why)) => {
                if !self.disk_refuses {
                    tracing::warn!(
                        why,
                        "the store cannot be written: history waits in memory, and is streamed from there; make room on \
                         the disk of store.dir"
                    );
                }
                Condition::Degraded(format!(
                    "the store cannot be written ({why}): {waiting} messages wait in memory and are lost if the agent \
                     ends before there is room"
                ))
            }
        };
        self.disk_refuses = refused.is_some();
        self.shared.status.lock().set_health("store", condition);
    }

    fn measure(&mut self, now_ns: u64) {
        let counters = self.timeline.counters();
        let mut own = self.meter.measure(now_ns, counters.observations);
        own.lost_records = counters.lost_records;
        own.late_observations = counters.late;
        own.dropped_observations = self.shared.dropped.load(Ordering::Relaxed) + counters.forgotten;
        own.dropped_messages = self.ring.as_ref().map_or(0, |ring| ring.dropped_unacked())
            + self.writer.as_ref().map_or(0, Writer::lost);
        let mut status = self.shared.status.lock();
        status.updated_ns = now_ns;
        status.own = own;
    }

    fn finish(&mut self) {
        if let Some(Err(error)) = self.ring.as_ref().map(|ring| ring.sync()) {
            tracing::warn!(%error, "the store may lose its last seconds if the node crashes now");
        }
        if let Some(recorder) = self.recorder.take()
            && let Err(error) = recorder.finish()
        {
            tracing::error!(%error, "the recording is incomplete");
        }
        if let Some((waiting, why)) = self.ring.as_ref().and_then(|ring| ring.refused()) {
            tracing::error!(
                why,
                "{waiting} messages could not be written: those that the collector does not have are lost"
            );
        }
        let counters = self.timeline.counters();
        tracing::info!(
            observations = counters.observations,
            late = counters.late,
            lost = counters.lost_records,
            forgotten = counters.forgotten,
            "history is written"
        );
    }
}

/// The reading with what is read seldom kept from before.
fn held(reading: &GpuReading, before: Option<&GpuStatus>) -> GpuReading {
    use stallscope_attribution::reading::Reading::NotMeasured;
    let mut now = reading.clone();
    let Some(before) = before.map(|status| &status.reading) else {
        return now;
    };
    if now.temperature_c == NotMeasured {
        now.temperature_c.clone_from(&before.temperature_c);
    }
    if now.memory_used_bytes == NotMeasured {
        now.memory_used_bytes.clone_from(&before.memory_used_bytes);
    }
    if now.process_sm_ppm == NotMeasured {
        now.process_sm_ppm.clone_from(&before.process_sm_ppm);
    }
    if now.processes == NotMeasured {
        now.processes.clone_from(&before.processes);
    }
    now
}

fn nothing_read(reading: &GpuReading) -> bool {
    reading.busy_ppm.value().is_none()
        && reading.sm_mhz.value().is_none()
        && reading.energy_mj.value().is_none()
}
