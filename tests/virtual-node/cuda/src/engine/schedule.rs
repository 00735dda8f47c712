//! Streams, and when what they hold begins and ends.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use virtual_node_state::PPM;
use virtual_node_state::activity::Load;
use virtual_node_state::gpu::{Gpu, PCIE_BYTES_PER_S, PCIE_LANES};
use virtual_node_state::log::{Kind, Record, Writer};
use virtual_node_state::map::Shared;
use virtual_node_state::power::{REFERENCE_MHZ, active_mw};

use super::capture::Node;
use super::{Collective, CollectiveEnd};
use crate::module::KernelSpec;

/// How far ahead of its start an operation may be committed. Clock and neighbours are sampled at that moment.
const LOOKAHEAD_NS: u64 = 25_000_000;
/// The engine thread wakes when the next operation is this close.
const WAKE_BEFORE_NS: u64 = 6_000_000;
/// A running collective's activity is added at this interval.
const COLLECTIVE_TICK_NS: u64 = 20_000_000;
/// Latency of a copy beyond its bytes.
pub(super) const COPY_LATENCY_NS: u64 = 4_000;
/// Operations a stream may hold; a host that runs further ahead waits, as it does in the driver.
pub(super) const QUEUE_LIMIT: usize = 4_096;

#[derive(Debug)]
pub(super) enum Work {
    Kernel(Arc<KernelSpec>),
    Copy { kind: Kind, bytes: u64 },
    Record { event: usize, version: u64 },
    Wait { event: usize, version: u64 },
    Collective(Collective),
}

#[derive(Debug)]
pub(super) struct Op {
    pub(super) work: Work,
    pub(super) enqueued_ns: u64,
}

/// A collective that has begun and has not been told its end.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) number: u64,
    pub(super) start_ns: u64,
    pub(super) added_until_ns: u64,
    pub(super) enqueued_ns: u64,
    pub(super) collective: Collective,
}

#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) device: usize,
    pub(super) queue: VecDeque<Op>,
    pub(super) running: Option<Running>,
    /// What was submitted since the stream began to record; nothing of it runs.
    pub(super) capture: Option<Vec<Node>>,
    /// End of the last committed operation.
    pub(super) cursor_ns: u64,
    pub(super) submitted: u64,
    pub(super) committed: u64,
}

#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Event {
    /// Recordings asked for, and recordings whose time is known.
    pub(super) asked: u64,
    pub(super) known: u64,
    pub(super) at_ns: u64,
}

pub(super) struct Device {
    pub(super) gpu: Shared<Gpu>,
    pub(super) client: usize,
}

pub(super) struct State {
    pub(super) devices: Vec<Option<Device>>,
    pub(super) streams: Vec<Option<Stream>>,
    pub(super) events: Vec<Option<Event>>,
    pub(super) log: Option<Writer>,
    pub(super) log_flushed_ns: u64,
    pub(super) next_collective: u64,
    /// When the engine thread will wake by itself.
    pub(super) wake_ns: u64,
    pub(super) waiters: usize,
    /// Something that a waiter may wait for has happened since the last notification.
    pub(super) news: bool,
    pub(super) thread: bool,
}

impl State {
    /// Commits all that is within reach; returns when something next comes within reach.
    pub(super) fn pump_all(&mut self, now: u64) -> u64 {
        loop {
            let (mut next, mut moved) = (u64::MAX, false);
            for index in 0..self.streams.len() {
                let Some(mut stream) = self.streams[index].take() else {
                    continue;
                };
                let before = stream.committed;
                next = next.min(self.pump(index, &mut stream, now));
                moved |= stream.committed != before;
                self.streams[index] = Some(stream);
            }
            // A recorded event may have released another stream.
            if !moved {
                return next;
            }
        }
    }

    fn pump(&mut self, index: usize, stream: &mut Stream, now: u64) -> u64 {
        loop {
            if let Some(running) = &mut stream.running {
                let from = running.added_until_ns;
                if now >= from + COLLECTIVE_TICK_NS {
                    let (collective, device) = (running.collective, stream.device);
                    running.added_until_ns = now;
                    self.add_collective(device, &collective, from, now);
                }
                return now + COLLECTIVE_TICK_NS;
            }
            let Some(op) = stream.queue.front() else {
                return u64::MAX;
            };
            let start = stream.cursor_ns.max(op.enqueued_ns);
            let reach = if matches!(op.work, Work::Collective(_)) {
                0
            } else {
                LOOKAHEAD_NS
            };
            if start > now + reach {
                return start - reach.min(WAKE_BEFORE_NS);
            }
            match &op.work {
                Work::Kernel(kernel) => {
                    let kernel = Arc::clone(kernel);
                    stream.cursor_ns = self.kernel(index, stream.device, &kernel, op.enqueued_ns, start);
                }
                Work::Copy { kind, bytes } => {
                    stream.cursor_ns = self.copy(index, stream.device, *kind, *bytes, op.enqueued_ns, start);
                }
                Work::Record { event, version } => {
                    stream.cursor_ns = start;
                    if let Some(Some(found)) = self.events.get_mut(*event) {
                        (found.known, found.at_ns) = (*version, start);
                    }
                }
                Work::Wait { event, version } => match self.events.get(*event) {
                    Some(Some(found)) if found.known < *version => return u64::MAX,
                    Some(Some(found)) => stream.cursor_ns = stream.cursor_ns.max(found.at_ns),
                    _ => {}
                },
                Work::Collective(collective) => {
                    let (number, collective) = (self.next_collective, *collective);
                    self.next_collective += 1;
                    let enqueued_ns = op.enqueued_ns;
                    stream.running = Some(Running {
                        number,
                        start_ns: start,
                        added_until_ns: start,
                        enqueued_ns,
                        collective,
                    });
                    stream.queue.pop_front();
                    (collective.start)(collective.user, number, start);
                    continue;
                }
            }
            self.news |= matches!(op.work, Work::Record { .. });
            stream.queue.pop_front();
            stream.committed += 1;
            self.news |= stream.queue.is_empty() || stream.queue.len() == QUEUE_LIMIT / 2;
        }
    }

    fn write(&mut self, record: &Record) {
        if self.log.as_mut().is_some_and(|log| log.write(record).is_err()) {
            // A log with a hole would be a lie; a missing log is an error where the truth is told.
            self.log = None;
        }
    }

    pub(super) fn flush(&mut self, now: u64) {
        if now.saturating_sub(self.log_flushed_ns) > 1_000_000_000 {
            self.log_flushed_ns = now;
            if self.log.as_mut().is_some_and(|log| log.flush().is_err()) {
                self.log = None;
            }
        }
    }

    fn kernel(
        &mut self,
        stream: usize,
        device: usize,
        kernel: &KernelSpec,
        enqueued_ns: u64,
        start_ns: u64,
    ) -> u64 {
        let Some(Some(held)) = self.devices.get(device) else {
            return start_ns;
        };
        let clock_mhz = held.gpu.sm_mhz.load(Relaxed).max(1);
        let foreign_ppm = if kernel.claim_ppm > 0 {
            0
        } else {
            held.gpu.foreign_ppm(held.client, start_ns)
        };
        let alone_ns = match kernel.clocked {
            true => kernel.dur_ns * u64::from(REFERENCE_MHZ) / u64::from(clock_mhz),
            false => kernel.dur_ns,
        };
        let got_ppm = PPM - foreign_ppm;
        let end_ns = start_ns + alone_ns * PPM / got_ppm;
        if kernel.claim_ppm > 0 {
            let client = &held.gpu.clients[held.client];
            client.claim_ppm.store(kernel.claim_ppm, Relaxed);
            client.claimed_until_ns.fetch_max(end_ns, Relaxed);
        }
        held.gpu
            .activity
            .add(start_ns, end_ns, &kernel.load.at(got_ppm, clock_mhz, held.client));
        self.write(&Record {
            stream: stream as u64,
            enqueued_ns,
            start_ns,
            end_ns,
            reference_ns: kernel.dur_ns,
            alone_ns,
            flops: kernel.flops,
            tensor_ppm: kernel.load.tensor,
            clock_mhz: u64::from(clock_mhz),
            ..Record::new(Kind::Kernel)
        });
        end_ns
    }

    fn copy(
        &mut self,
        stream: usize,
        device: usize,
        kind: Kind,
        bytes: u64,
        enqueued_ns: u64,
        start_ns: u64,
    ) -> u64 {
        let Some(Some(held)) = self.devices.get(device) else {
            return start_ns;
        };
        let wire_ns = u128::from(bytes) * 1_000_000_000 / u128::from(PCIE_BYTES_PER_S);
        let wire_ns = u64::try_from(wire_ns).unwrap_or(u64::MAX / 32);
        let reference_ns = wire_ns + COPY_LATENCY_NS;
        let lanes = held.gpu.pcie_lanes.load(Relaxed).clamp(1, PCIE_LANES);
        let alone_ns = wire_ns.saturating_mul(PCIE_LANES.into()) / u64::from(lanes) + COPY_LATENCY_NS;
        let end_ns = start_ns + alone_ns;
        let (to_device_bytes, to_host_bytes) = if kind == Kind::ToDevice {
            (bytes, 0)
        } else {
            (0, bytes)
        };
        let load = Load {
            to_device_bytes,
            to_host_bytes,
            client: held.client,
            ..Load::default()
        };
        held.gpu.activity.add(start_ns, end_ns, &load);
        self.write(&Record {
            stream: stream as u64,
            enqueued_ns,
            start_ns,
            end_ns,
            reference_ns,
            alone_ns,
            bytes,
            ..Record::new(kind)
        });
        end_ns
    }

    fn add_collective(&self, device: usize, collective: &Collective, from: u64, to: u64) {
        let Some(Some(held)) = self.devices.get(device) else {
            return;
        };
        let sm_ppm = collective.sm_ppm;
        let power_mw = active_mw(sm_ppm, 0, 10_000, held.gpu.sm_mhz.load(Relaxed));
        let load = Load {
            resident: true,
            sm_ppm,
            occupancy_ppm: sm_ppm / 8,
            dram_ppm: 10_000,
            power_mw,
            ..Load::default()
        };
        held.gpu.activity.add(
            from,
            to,
            &Load {
                client: held.client,
                ..load
            },
        );
    }

    pub(super) fn end_collective(&mut self, number: u64, end: &CollectiveEnd) -> bool {
        let wanted = |slot: &Option<Stream>| {
            slot.as_ref()
                .and_then(|stream| stream.running.as_ref())
                .is_some_and(|running| running.number == number)
        };
        let Some(index) = self.streams.iter().position(wanted) else {
            return false;
        };
        let Some(stream) = self.streams[index].as_mut() else {
            return false;
        };
        let Some(running) = stream.running.take() else {
            return false;
        };
        let end_ns = end.end_ns.max(running.start_ns);
        stream.cursor_ns = end_ns;
        stream.committed += 1;
        self.news = true;
        let device = stream.device;
        self.add_collective(device, &running.collective, running.added_until_ns, end_ns);
        self.write(&Record {
            stream: index as u64,
            enqueued_ns: running.enqueued_ns,
            start_ns: running.start_ns,
            end_ns,
            bytes: running.collective.bytes,
            wire_bytes: running.collective.wire_bytes,
            arrived_ns: end.arrived_ns,
            all_arrived_ns: end.all_arrived_ns,
            moved_ns: end.moved_ns,
            comm: running.collective.comm,
            sequence: running.collective.sequence,
            ranks_nodes: running.collective.ranks_nodes,
            ..Record::new(Kind::Collective)
        });
        true
    }
}
