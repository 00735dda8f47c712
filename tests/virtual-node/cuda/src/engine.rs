//! The virtual GPU's scheduler: streams in order, in real time, with few wake-ups.
//!
//! The time of an operation follows from the end of the one before and the moment it was submitted, so an operation
//! can be *committed* (timed, logged, added to the activity) shortly before it begins. One thread per
//! process wakes when the next operation comes within reach; whoever waits for a stream sleeps until its computed end.

mod capture;
mod schedule;

use std::ffi::c_void;
use std::path::PathBuf;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use virtual_node_state::VNODE_ENV;
use virtual_node_state::clock::{now_ns, sleep_until};
use virtual_node_state::gpu::Gpu;
use virtual_node_state::log::{Kind, Writer};
use virtual_node_state::map::Shared;

use crate::module::KernelSpec;
pub(crate) use capture::Graph;
use capture::Node;
use schedule::{Device, Event, Op, QUEUE_LIMIT, State, Stream, Work};

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
    // The engine's thread may be at work for a moment; a process on its way out must not wait for ever.
    for _ in 0..200 {
        if let Ok(mut state) = engine().state.try_lock() {
            return state.flush(u64::MAX);
        }
        std::thread::sleep(Duration::from_millis(1));
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
        if let Some(captured) = &mut found.capture {
            let node = Node::of(work);
            let recordable = node.is_some();
            captured.extend(node);
            return recordable;
        }
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

#[cfg(test)]
mod tests;
