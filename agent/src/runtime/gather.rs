//! The thread that reads every source in turn and hands over batches.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError};
use std::time::Duration;

use stallscope_attribution::facts::RecordGap;
use stallscope_attribution::time::Window;

use super::shared::Shared;
use super::status::Condition;
use crate::observation::{Fact, Observation, ProcessKey};
use crate::sources::clock;
use crate::sources::net::NetSource;
use crate::sources::nvml::NvmlSource;
use crate::sources::probes::{Decoded, Decoder, Reader};
use crate::sources::procs::{CpuTimeReader, ProcessEvent, QuotaReader};

/// Longest time between two looks at the rings.
const DRAIN: Duration = Duration::from_millis(50);
/// Between two samples of the network, ns.
const NET_NS: u64 = 200_000_000;
/// Between two looks at the clocks and at what NVML knows of processes, ns.
const SLOW_NS: u64 = 1_000_000_000;

/// Where facts come from and go to.
pub(super) struct Sources {
    pub(super) reader: Option<Reader>,
    pub(super) nvml: Option<NvmlSource>,
    pub(super) net: Option<NetSource>,
    /// Facts about processes, from discovery.
    pub(super) found: Receiver<Observation>,
    /// News for discovery.
    pub(super) events: SyncSender<ProcessEvent>,
    /// Everything that one turn gave; what belongs together is in one batch.
    pub(super) batches: SyncSender<Vec<Observation>>,
}

/// Reads the sources.
pub(super) struct Gather {
    shared: Arc<Shared>,
    sources: Sources,
    decoder: Decoder,
    quota: QuotaReader,
    cpu_time: CpuTimeReader,
    gpu_processes: BTreeSet<ProcessKey>,
    traced: BTreeSet<u32>,
    net_due_ns: u64,
    slow_due_ns: u64,
    net_trouble: Option<String>,
    events_dropped: u64,
    dropped: u64,
}

impl Gather {
    pub(super) fn new(shared: Arc<Shared>, sources: Sources) -> Self {
        Self {
            shared,
            sources,
            decoder: Decoder::new(),
            quota: QuotaReader::new("/proc"),
            cpu_time: CpuTimeReader::new("/proc"),
            gpu_processes: BTreeSet::new(),
            traced: BTreeSet::new(),
            net_due_ns: 0,
            slow_due_ns: 0,
            net_trouble: None,
            events_dropped: 0,
            dropped: 0,
        }
    }

    pub(super) fn run(mut self) {
        let mut batch = Vec::new();
        while !self.shared.is_stopping() {
            self.drain_rings(&mut batch);
            self.poll(&mut batch);
            self.hand_over(&mut batch);
        }
        // What the kernel still holds belongs to the last windows.
        self.drain_rings(&mut batch);
        self.poll(&mut batch);
        self.hand_over(&mut batch);
    }

    fn drain_rings(&mut self, batch: &mut Vec<Observation>) {
        let Some(reader) = &mut self.sources.reader else {
            std::thread::sleep(2 * DRAIN);
            return;
        };
        let wait = if self.shared.is_stopping() {
            Duration::ZERO
        } else {
            DRAIN
        };
        let (decoder, events, dropped) = (&mut self.decoder, &self.sources.events, &mut self.events_dropped);
        let cpu_time = &mut self.cpu_time;
        // Taken when the first record needs it: processes may have become known while waiting.
        let (mut keys, shared) = (None, &self.shared);
        let drained = reader.drain(wait, &mut |event| {
            let keys = keys.get_or_insert_with(|| shared.keys());
            decoder.decode(
                event,
                &mut |tgid| keys.get(&tgid).copied(),
                &mut |decoded| match decoded {
                    Decoded::Observation(observation) => {
                        if let Fact::OffCpu { thread, .. } | Fact::FileIo { thread, .. } = &observation.fact {
                            cpu_time.heard(*thread, observation.window.end_ns());
                        }
                        batch.push(observation);
                    }
                    Decoded::Process(event) => *dropped += u64::from(events.try_send(event).is_err()),
                },
            );
        });
        if let Err(error) = drained {
            tracing::error!(%error, "the probes' records cannot be read any more");
            self.shared
                .status
                .lock()
                .set_health("probes", Condition::Missing(error.to_string()));
            self.sources.reader = None;
        }
    }

    fn poll(&mut self, batch: &mut Vec<Observation>) {
        while let Ok(observation) = self.sources.found.try_recv() {
            self.note(&observation);
            batch.push(observation);
        }
        let now_ns = super::now_ns();
        if let Some(nvml) = &mut self.sources.nvml {
            batch.extend(nvml.poll(now_ns));
        }
        batch.extend(self.cpu_time.poll(now_ns));
        batch.extend(self.quota.poll(now_ns, self.gpu_processes.iter().copied()));
        if now_ns >= self.net_due_ns {
            self.net_due_ns = now_ns + NET_NS;
            self.poll_net(now_ns, batch);
        }
        if now_ns >= self.slow_due_ns {
            self.slow_due_ns = now_ns + SLOW_NS;
            self.poll_slow(now_ns, batch);
        }
    }

    fn note(&mut self, observation: &Observation) {
        match &observation.fact {
            Fact::Process(facts) => {
                self.traced.insert(facts.key.pid);
                if facts.role == crate::observation::ProcessRole::Gpu {
                    self.gpu_processes.insert(facts.key);
                    self.cpu_time.forget(facts.key);
                } else {
                    self.cpu_time.watch(facts.key, observation.window.end_ns());
                }
            }
            Fact::ProcessGone(key) => {
                self.traced.remove(&key.pid);
                self.gpu_processes.remove(key);
                self.decoder.forget(*key);
                self.cpu_time.forget(*key);
            }
            _ => {}
        }
    }

    fn poll_net(&mut self, now_ns: u64, batch: &mut Vec<Observation>) {
        let Some(net) = &mut self.sources.net else { return };
        batch.extend(net.poll(now_ns, clock::realtime_offset_ns(), &self.traced));
        if net.trouble() == self.net_trouble.as_deref() {
            return;
        }
        self.net_trouble = net.trouble().map(str::to_owned);
        let condition = match &self.net_trouble {
            Some(why) => {
                tracing::warn!(why, "network evidence is incomplete");
                Condition::Degraded(why.clone())
            }
            None => Condition::Works,
        };
        self.shared.status.lock().set_health("net", condition);
    }

    fn poll_slow(&mut self, now_ns: u64, batch: &mut Vec<Observation>) {
        let ns = clock::realtime_offset_ns();
        batch.push(Observation {
            window: Window::instant(now_ns),
            fact: Fact::RealtimeOffset { ns },
        });
        let Some(nvml) = &self.sources.nvml else { return };
        self.shared.set_gpus(nvml.view());
        let troubles: Vec<String> = nvml
            .summaries()
            .into_iter()
            .filter_map(|gpu| gpu.trouble.map(|why| format!("GPU {}: {why}", gpu.index)))
            .collect();
        let condition = if troubles.is_empty() {
            Condition::Works
        } else {
            Condition::Degraded(troubles.join("; "))
        };
        self.shared.status.lock().set_health("nvml", condition);
    }

    /// Gives the batch to history. When history is behind by all its queue holds, the batch is dropped and counted.
    fn hand_over(&mut self, batch: &mut Vec<Observation>) {
        if batch.is_empty() {
            return;
        }
        if self.dropped > 0 {
            let fact = Fact::Lost {
                ring: "agent",
                count: self.dropped,
            };
            batch.push(Observation {
                window: Window::instant(super::now_ns()),
                fact,
            });
        }
        let capacity = batch.len();
        match self
            .sources
            .batches
            .try_send(std::mem::replace(batch, Vec::with_capacity(capacity.min(4_096))))
        {
            Ok(()) => self.dropped = 0,
            Err(TrySendError::Full(lost)) => {
                let lost = lost.len() as u64;
                self.dropped += lost;
                self.shared.dropped.fetch_add(lost, Ordering::Relaxed);
            }
            Err(TrySendError::Disconnected(_)) => self.shared.stop(),
        }
        if self.events_dropped > 0 {
            let count = std::mem::take(&mut self.events_dropped);
            self.shared.add_gap(RecordGap {
                node: self.shared.node.clone(),
                window: None,
                what: "more processes started at once than discovery could follow: new ones are found up to 5 s late"
                    .to_owned(),
                count,
            });
        }
    }
}
