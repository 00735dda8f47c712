//! The thread that reads every source in turn and hands over batches.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError};
use std::time::Duration;

use stallscope_attribution::facts::{HardwareFact, RecordGap};
use stallscope_attribution::time::Window;

use super::devices::Devices;
use super::gpus::Gpus;
use super::queue::Giver;
use super::shared::Shared;
use super::status::Condition;
use crate::observation::{Fact, Observation, ProcessKey};
use crate::sources::clock;
use crate::sources::net::NetSource;
use crate::sources::probes::{Decoded, Decoder, Reader};
use crate::sources::procs::{CpuTimeReader, ProcessEvent, QuotaReader};

/// Longest time between two looks at the rings: a wake-up costs more than what it brings on a quiet node, and a busy ring
/// wakes the reader before.
const DRAIN: Duration = Duration::from_millis(100);
/// Between two samples of the network, ns.
const NET_NS: u64 = 200_000_000;
/// How observations lost on the way to history are named.
const AGENT: &str = "agent";
/// Most facts about processes kept from batches that were dropped.
const MOST_KEPT: usize = 4_096;
/// Between two looks at the clocks and at what NVML knows of processes, ns.
const SLOW_NS: u64 = 1_000_000_000;

/// Where facts come from and go to.
pub(super) struct Sources {
    pub(super) reader: Option<Reader>,
    pub(super) gpus: Gpus,
    pub(super) net: Option<NetSource>,
    pub(super) devices: Devices,
    /// Facts about processes, from discovery.
    pub(super) found: Receiver<Observation>,
    /// News for discovery.
    pub(super) events: SyncSender<ProcessEvent>,
    /// Everything that one turn gave; what belongs together is in one batch.
    pub(super) batches: Giver,
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
    /// Facts of dropped batches that are told only once; they go with the next batch.
    kept: Vec<Observation>,
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
            kept: Vec::new(),
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
            std::thread::sleep(DRAIN);
            return;
        };
        let wait = if self.shared.is_stopping() {
            Duration::ZERO
        } else {
            DRAIN
        };
        let (decoder, events, dropped) = (&mut self.decoder, &self.sources.events, &mut self.events_dropped);
        let (cpu_time, devices) = (&mut self.cpu_time, &self.sources.devices);
        // Taken when the first record needs it: processes may have become known while waiting.
        let (mut keys, shared) = (None, &self.shared);
        let drained = reader.drain(wait, &mut |event| {
            let keys = keys.get_or_insert_with(|| shared.keys());
            decoder.decode(
                event,
                &mut |tgid| keys.get(&tgid).copied(),
                &mut |decoded| match decoded {
                    Decoded::Observation(mut observation) => {
                        if let Fact::Hardware(facts) = &mut observation.fact {
                            devices.complete(facts, &shared.node);
                        }
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
        // What waits in the channel is not lost, so discovery is read no further than can be kept.
        for _ in self.kept.len()..MOST_KEPT {
            let Ok(observation) = self.sources.found.try_recv() else {
                break;
            };
            if self.sources.devices.is_repeated(&observation) {
                continue;
            }
            self.note(&observation);
            batch.push(observation);
        }
        let now_ns = super::now_ns();
        let read_from = batch.len();
        batch.extend(self.sources.gpus.poll(now_ns, &self.shared));
        batch.extend(self.cpu_time.poll(now_ns));
        batch.extend(self.quota.poll(now_ns, self.gpu_processes.iter().copied()));
        if now_ns >= self.net_due_ns {
            self.net_due_ns = now_ns + NET_NS;
            self.poll_net(now_ns, batch);
        }
        let read = batch[read_from..].iter();
        read.for_each(|observation| self.sources.devices.note(observation));
        let faults = self.sources.gpus.take_faults();
        self.sources.devices.take_faults(faults, batch, &self.shared);
        self.sources.devices.poll(now_ns, batch, &self.shared);
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
                // The pid may belong to another process by now, which was told of first.
                if self.shared.keys().get(&key.pid).is_none_or(|now| now == key) {
                    self.traced.remove(&key.pid);
                }
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
        let Some(nvml) = self.sources.gpus.source() else {
            return;
        };
        self.shared.set_gpus(nvml.view());
        if !self.sources.gpus.is_read() {
            return;
        }
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

    /// Gives the batch to history. When history is behind by all its queue holds, the batch is dropped and counted, but
    /// for what is told only once: without it a process would stay unseen for as long as it lives.
    fn hand_over(&mut self, batch: &mut Vec<Observation>) {
        batch.append(&mut self.kept);
        if batch.is_empty() {
            return;
        }
        if self.dropped > 0 {
            let fact = Fact::Lost {
                ring: AGENT,
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
                let (mut kept, mut lost): (Vec<_>, Vec<_>) = lost.into_iter().partition(is_told_once);
                lost.extend(kept.drain(kept.len().min(2 * MOST_KEPT)..));
                self.kept = kept;
                // Losses of this queue itself are not observations, and are counted on.
                let of_queue = |lost: &&Observation| matches!(lost.fact, Fact::Lost { ring: AGENT, .. });
                let lost = (lost.len() - lost.iter().filter(of_queue).count()) as u64;
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

/// Whether no later observation tells the same. Losses of this queue itself are told anew with every batch.
fn is_told_once(observation: &Observation) -> bool {
    match &observation.fact {
        Fact::Process(_) | Fact::ProcessGone(_) => true,
        Fact::Hardware(facts) => matches!(facts.fact, HardwareFact::Event(_)),
        Fact::Lost { ring, .. } => *ring != AGENT,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::sync::mpsc::sync_channel;

    use super::super::queue;
    use super::*;

    fn at(at_ns: u64, fact: Fact) -> Observation {
        Observation {
            window: Window::instant(at_ns),
            fact,
        }
    }

    #[test]
    fn a_process_that_took_a_dead_ones_pid_stays_traced() {
        let (_facts, found) = sync_channel(1);
        let (events, _news) = sync_channel(1);
        let (batches, _history) = queue::bounded(1);
        let sources = Sources {
            reader: None,
            gpus: Gpus::Missing,
            net: None,
            devices: Devices::none(),
            found,
            events,
            batches,
        };
        let shared = Arc::new(Shared::new("node".to_owned()));
        let mut gather = Gather::new(Arc::clone(&shared), sources);
        let [old, new] = [70, 71].map(|start_ticks| ProcessKey { pid: 7, start_ticks });
        gather.traced.insert(7);
        shared.set_keys([(7, new)].into());
        gather.note(&at(1, Fact::ProcessGone(old)));
        assert!(gather.traced.contains(&7));
        gather.note(&at(2, Fact::ProcessGone(new)));
        assert!(gather.traced.is_empty());
    }

    #[test]
    fn what_is_told_once_outlives_a_full_queue() {
        let (facts, found) = sync_channel(8);
        let (events, _news) = sync_channel(8);
        let (batches, history) = queue::bounded(1);
        let next = || history.recv_timeout(Duration::ZERO).ok();
        let sources = Sources {
            reader: None,
            gpus: Gpus::Missing,
            net: None,
            devices: Devices::none(),
            found,
            events,
            batches,
        };
        let mut gather = Gather::new(Arc::new(Shared::new("node".to_owned())), sources);
        let clock = || at(1, Fact::RealtimeOffset { ns: 0 });
        gather.hand_over(&mut vec![clock()]);
        let process = ProcessKey {
            pid: 7,
            start_ticks: 70,
        };
        let lost = at(
            2,
            Fact::Lost {
                ring: "nccl",
                count: 5,
            },
        );
        facts.send(at(3, Fact::ProcessGone(process))).unwrap();
        let mut batch = vec![lost.clone(), clock(), clock()];
        batch.extend(gather.sources.found.try_iter());
        gather.hand_over(&mut batch);
        gather.hand_over(&mut vec![clock()]);
        assert_eq!(std::iter::from_fn(next).count(), 1, "the queue was full");
        gather.hand_over(&mut vec![clock()]);
        let told: Vec<Observation> = std::iter::from_fn(next).flatten().collect();
        let once: Vec<_> = told
            .iter()
            .filter(|observation| is_told_once(observation))
            .collect();
        assert_eq!(once, [&lost, &at(3, Fact::ProcessGone(process))]);
        let dropped = told.iter().find_map(|observation| match observation.fact {
            Fact::Lost { ring: AGENT, count } => Some(count),
            _ => None,
        });
        assert_eq!(dropped, Some(3), "two of the first batch, one of the second");
    }
}
