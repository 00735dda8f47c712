//! The virtual GPU's scheduler: streams in order, in real time, with few wake-ups.
//!
//! The time of an operation follows from the end of the one before and the moment it was submitted, so an operation
//! can be *committed* (timed, logged, added to the activity) up to [`LOOKAHEAD_NS`] before it begins. One thread per
//! process wakes when the next operation comes within reach; whoever waits for a stream sleeps until its computed end.

use std::collections::VecDeque;
use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use virtual_node_state::activity::Load;
use virtual_node_state::clock::{now_ns, sleep_until};
use virtual_node_state::gpu::{Gpu, PCIE_BYTES_PER_S};
use virtual_node_state::log::{Kind, Record, Writer};
use virtual_node_state::map::Shared;
use virtual_node_state::power::{REFERENCE_MHZ, active_mw};
use virtual_node_state::{PPM, VNODE_ENV};

use crate::module::KernelSpec;

/// How far ahead of its start an operation may be committed. Clock and neighbours are sampled at that moment.
const LOOKAHEAD_NS: u64 = 25_000_000;
/// The engine thread wakes when the next operation is this close.
const WAKE_BEFORE_NS: u64 = 6_000_000;
/// A running collective's activity is added at this interval.
const COLLECTIVE_TICK_NS: u64 = 20_000_000;
/// Latency of a copy beyond its bytes.
const COPY_LATENCY_NS: u64 = 4_000;
/// Operations a stream may hold; a host that runs further ahead waits, as it does in the driver.
const QUEUE_LIMIT: usize = 4_096;

/// What the communication library asks the GPU to run.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Collective {
    /// Called when the kernel begins, with `user`, the operation's number and the time. Must only take note.
    pub(crate) start: extern "C" fn(*mut c_void, u64, u64),
    pub(crate) user: *mut c_void,
    pub(crate) sm_ppm: u64,
    pub(crate) bytes: u64,
    pub(crate) wire_bytes: u64,
    pub(crate) comm: u64,
    pub(crate) sequence: u64,
    pub(crate) ranks_nodes: u64,
}

// SAFETY: `user` is only handed back to `start`, which the communication library keeps thread safe.
unsafe impl Send for Collective {}

/// How a collective ended.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct CollectiveEnd {
    pub(crate) arrived_ns: u64,
    pub(crate) all_arrived_ns: u64,
    pub(crate) moved_ns: u64,
    pub(crate) end_ns: u64,
}

#[derive(Debug)]
enum Work {
    Kernel(Arc<KernelSpec>),
    Copy { kind: Kind, bytes: u64 },
    Record { event: usize, version: u64 },
    Wait { event: usize, version: u64 },
    Collective(Collective),
}

#[derive(Debug)]
struct Op {
    work: Work,
    enqueued_ns: u64,
}

/// A collective that has begun and has not been told its end.
#[derive(Debug)]
struct Running {
    number: u64,
    start_ns: u64,
    added_until_ns: u64,
    enqueued_ns: u64,
    collective: Collective,
}

#[derive(Debug, Default)]
struct Stream {
    device: usize,
    queue: VecDeque<Op>,
    running: Option<Running>,
    /// End of the last committed operation.
    cursor_ns: u64,
    submitted: u64,
    committed: u64,
}

#[derive(Debug, Default, Clone, Copy)]
struct Event {
    /// Recordings asked for, and recordings whose time is known.
    asked: u64,
    known: u64,
    at_ns: u64,
}

struct Device {
    gpu: Shared<Gpu>,
    client: usize,
}

struct State {
    devices: Vec<Option<Device>>,
    streams: Vec<Option<Stream>>,
    events: Vec<Option<Event>>,
    log: Option<Writer>,
    log_flushed_ns: u64,
    next_collective: u64,
    /// When the engine thread will wake by itself.
    wake_ns: u64,
    waiters: usize,
    /// Something that a waiter may wait for has happened since the last notification.
    news: bool,
    thread: bool,
}

/// The process's engine.
pub(crate) struct Engine {
    state: Mutex<State>,
    wake: Condvar,
    settled: Condvar,
}

/// The engine of this process.
pub(crate) fn engine() -> &'static Engine {
    static ENGINE: OnceLock<Engine> = OnceLock::new();
    ENGINE.get_or_init(Engine::new)
}

fn log_path() -> Option<PathBuf> {
    let node = PathBuf::from(std::env::var_os(VNODE_ENV)?);
    let name = match std::env::var("RANK") {
        Ok(rank) if rank.parse::<u32>().is_ok() => format!("activity-rank{rank}.bin"),
        _ => format!("activity-pid{}.bin", std::process::id()),
    };
    Some(node.join(name))
}

extern "C" fn flush_at_exit() {
    if let Ok(mut state) = engine().state.try_lock() {
        state.flush(u64::MAX);
    }
}

impl Engine {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn new() -> Self {
        Self {
            state: Mutex::new(State {
                devices: Vec::new(),
                streams: Vec::new(),
                events: Vec::new(),
                log: None,
                log_flushed_ns: 0,
                next_collective: 1,
                wake_ns: u64::MAX,
                waiters: 0,
                news: false,
                thread: false,
            }),
            wake: Condvar::new(),
            settled: Condvar::new(),
        }
    }

    /// Makes the process a client of GPU `index`; false when there is no such GPU.
    pub(crate) fn open(&'static self, index: usize) -> bool {
        if self.lock().devices.get(index).is_some_and(Option::is_some) {
            return true;
        }
        let gpu = u32::try_from(index).ok().and_then(|index| Gpu::open(index).ok());
        gpu.is_some_and(|gpu| self.use_gpu(index, gpu, log_path()))
    }

    /// Makes the process a client of a GPU; the first one starts the log and the engine's thread.
    fn use_gpu(&'static self, index: usize, gpu: Shared<Gpu>, log: Option<PathBuf>) -> bool {
        let Some(client) = gpu.register(std::process::id()) else {
            return false;
        };
        let mut state = self.lock();
        if state.devices.len() <= index {
            state.devices.resize_with(index + 1, || None);
        }
        state.devices[index] = Some(Device { gpu, client });
        if state.log.is_none() {
            state.log = log.and_then(|path| Writer::create(&path).ok());
            // SAFETY: `flush_at_exit` is a plain function that neither unwinds nor blocks.
            unsafe { libc::atexit(flush_at_exit) };
        }
        if !state.thread {
            state.thread = std::thread::Builder::new()
                .name("cuda-engine".into())
                .spawn(move || self.run())
                .is_ok();
        }
        true
    }

    fn run(&self) {
        let mut state = self.lock();
        loop {
            let now = now_ns();
            let next = state.pump_all(now);
            state.flush(now);
            state.wake_ns = next;
            self.tell(&mut state);
            let pause = Duration::from_nanos(next.saturating_sub(now_ns()).min(1_000_000_000));
            state = self
                .wake
                .wait_timeout(state, pause)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Adds changed memory use of the process on GPU `device`.
    pub(crate) fn memory(&self, device: usize, bytes: i64) {
        let state = self.lock();
        if let Some(Some(device)) = state.devices.get(device) {
            let held = &device.gpu.clients[device.client].memory_bytes;
            held.store(held.load(Relaxed).saturating_add_signed(bytes), Relaxed);
        }
    }

    pub(crate) fn stream_create(&self, device: usize) -> usize {
        let mut state = self.lock();
        state.streams.push(Some(Stream {
            device,
            ..Stream::default()
        }));
        state.streams.len() - 1
    }

    /// False when there is no such stream.
    pub(crate) fn stream_destroy(&self, stream: usize) -> bool {
        // What was submitted still runs: wait for it first.
        let known = self.stream_synchronize(stream);
        if let Some(slot) = self.lock().streams.get_mut(stream) {
            *slot = None;
        }
        known
    }

    pub(crate) fn event_create(&self) -> usize {
        let mut state = self.lock();
        state.events.push(Some(Event::default()));
        state.events.len() - 1
    }

    pub(crate) fn event_destroy(&self, event: usize) -> bool {
        self.lock()
            .events
            .get_mut(event)
            .is_some_and(|slot| slot.take().is_some())
    }

    /// Submits work; false when stream or event is unknown.
    fn submit(&self, stream: usize, work: Work) -> bool {
        let mut state = self.lock();
        while state
            .streams
            .get(stream)
            .and_then(Option::as_ref)
            .is_some_and(|found| found.queue.len() >= QUEUE_LIMIT)
        {
            state.waiters += 1;
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiters -= 1;
        }
        let now = now_ns();
        let Some(Some(found)) = state.streams.get_mut(stream) else {
            return false;
        };
        found.queue.push_back(Op {
            work,
            enqueued_ns: now,
        });
        found.submitted += 1;
        if found.queue.len() > 1 {
            // Something before it is not committed yet, so the engine thread already knows when to come back.
            return true;
        }
        self.progress(&mut state, now);
        true
    }

    /// Commits what can be, and calls the engine thread when it sleeps for too long.
    fn progress(&self, state: &mut State, now: u64) {
        let next = state.pump_all(now);
        if next < state.wake_ns {
            state.wake_ns = next;
            self.wake.notify_one();
        }
        self.tell(state);
    }

    fn tell(&self, state: &mut State) {
        if std::mem::take(&mut state.news) && state.waiters > 0 {
            self.settled.notify_all();
        }
    }

    pub(crate) fn launch(&self, stream: usize, kernel: Arc<KernelSpec>) -> bool {
        self.submit(stream, Work::Kernel(kernel))
    }

    pub(crate) fn copy(&self, stream: usize, kind: Kind, bytes: u64) -> bool {
        self.submit(stream, Work::Copy { kind, bytes })
    }

    pub(crate) fn collective(&self, stream: usize, collective: Collective) -> bool {
        self.submit(stream, Work::Collective(collective))
    }

    pub(crate) fn event_record(&self, event: usize, stream: usize) -> bool {
        let version = {
            let mut state = self.lock();
            let Some(Some(found)) = state.events.get_mut(event) else {
                return false;
            };
            found.asked += 1;
            found.asked
        };
        self.submit(stream, Work::Record { event, version })
    }

    pub(crate) fn stream_wait(&self, stream: usize, event: usize) -> bool {
        let version = match self.lock().events.get(event) {
            Some(Some(found)) => found.asked,
            _ => return false,
        };
        version == 0 || self.submit(stream, Work::Wait { event, version })
    }

    /// Tells a collective its end.
    pub(crate) fn collective_ended(&self, number: u64, end: &CollectiveEnd) -> bool {
        let mut state = self.lock();
        let known = state.end_collective(number, end);
        self.progress(&mut state, now_ns());
        known
    }

    /// Blocks until everything submitted so far has run; false when there is no such stream.
    pub(crate) fn stream_synchronize(&self, stream: usize) -> bool {
        let mut state = self.lock();
        let Some(Some(found)) = state.streams.get(stream) else {
            return false;
        };
        let target = found.submitted;
        let end = loop {
            match state.streams.get(stream) {
                Some(Some(found)) if found.committed >= target => break found.cursor_ns,
                Some(Some(_)) => {}
                _ => return false,
            }
            state.waiters += 1;
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiters -= 1;
        };
        drop(state);
        sleep_until(end);
        true
    }

    /// Blocks until all streams of `device` are empty.
    pub(crate) fn device_synchronize(&self, device: usize) {
        let streams: Vec<usize> = {
            let state = self.lock();
            let on_device =
                |slot: &Option<Stream>| slot.as_ref().is_some_and(|stream| stream.device == device);
            (0..state.streams.len())
                .filter(|stream| on_device(&state.streams[*stream]))
                .collect()
        };
        for stream in streams {
            self.stream_synchronize(stream);
        }
    }

    /// Whether the stream is empty; `None` when there is no such stream.
    pub(crate) fn stream_idle(&self, stream: usize) -> Option<bool> {
        let state = self.lock();
        let found = state.streams.get(stream)?.as_ref()?;
        Some(found.committed >= found.submitted && found.cursor_ns <= now_ns())
    }

    /// Whether the event's last recording has happened; `None` when there is no such event.
    pub(crate) fn event_done(&self, event: usize) -> Option<bool> {
        let state = self.lock();
        let found = state.events.get(event)?.as_ref()?;
        Some(found.known >= found.asked && (found.asked == 0 || found.at_ns <= now_ns()))
    }

    /// Blocks until the event's last recording has happened; false when there is no such event.
    pub(crate) fn event_synchronize(&self, event: usize) -> bool {
        let mut state = self.lock();
        let Some(Some(found)) = state.events.get(event) else {
            return false;
        };
        let target = found.asked;
        let end = loop {
            match state.events.get(event) {
                Some(Some(found)) if found.known >= target => break found.at_ns,
                Some(Some(_)) => {}
                _ => return false,
            }
            state.waiters += 1;
            state = self.settled.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiters -= 1;
        };
        drop(state);
        sleep_until(end);
        true
    }

    /// Milliseconds between two recorded events.
    pub(crate) fn elapsed_ms(&self, start: usize, end: usize) -> Option<f32> {
        let state = self.lock();
        let at = |event: usize| {
            state
                .events
                .get(event)
                .and_then(|slot| slot.as_ref())
                .map(|found| found.at_ns)
        };
        let ns = at(end)?.saturating_sub(at(start)?);
        Some(Duration::from_nanos(ns).as_secs_f32() * 1e3)
    }
}

impl State {
    /// Commits all that is within reach; returns when something next comes within reach.
    fn pump_all(&mut self, now: u64) -> u64 {
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

    fn flush(&mut self, now: u64) {
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
        let reference_ns = u64::try_from(wire_ns).unwrap_or(u64::MAX / 2) + COPY_LATENCY_NS;
        let end_ns = start_ns + reference_ns;
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
            alone_ns: reference_ns,
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

    fn end_collective(&mut self, number: u64, end: &CollectiveEnd) -> bool {
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

#[cfg(test)]
mod tests;
