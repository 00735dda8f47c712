//! What the network steps of NCCL's proxy threads wait for, with no plugin in the job.
//!
//! The hooks are attached for a window, the kernel integrates the time in each wait by thread, and at the window's end the
//! growth is read. Then they pause for as long as their cost asks ([`WaitsConfig`]).

mod duty;
mod hooks;
mod trap;

use std::collections::HashMap as StdHashMap;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::thread::JoinHandle;

use aya::Ebpf;
use aya::maps::{Array, HashMap, MapData};
use aya::programs::uprobe::UProbeLink;
use stallscope_attribution::time::Window;
use stallscope_records::waits::{Wait, Waits};

pub use duty::WaitsConfig;
pub(in crate::sources) use duty::pause_ns;
pub(super) use hooks::SYMBOLS;
pub use hooks::{NoWaitHooks, WaitHooks};

use super::attach::attach_program;
use super::detach;
use super::object::{LoadError, take_map};
use crate::observation::{StepWait, StepWaits};
use crate::sources::clock;
use crate::sources::procs::LibraryId;

/// Reads of one thread's value before it is left for the next window: its own thread writes it meanwhile.
const READS: usize = 4;

/// What the program itself takes at a hit, ns, with room.
const PROGRAM_NS: u64 = 400;

/// When attaching is tried again after the kernel refused, ns.
const RETRY_NS: u64 = 60_000_000_000;

/// The waits of one thread in one window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ThreadWaits {
    /// Process.
    pub tgid: u32,
    /// Thread.
    pub tid: u32,
    /// The window in which the hooks were attached.
    pub window: Window,
    /// What its steps waited for.
    pub waits: StepWaits,
}

/// A library whose hooks are known.
struct Hooked {
    file: File,
    hooks: WaitHooks,
}

enum State {
    /// Not attached until then; what was attached may still be on its way out.
    Paused {
        until_ns: u64,
        detaching: Option<JoinHandle<()>>,
    },
    Attached {
        links: Vec<UProbeLink>,
        since_ns: u64,
    },
}

/// Attaches the hooks and reads what they gave.
pub(super) struct WaitStates {
    config: WaitsConfig,
    libraries: StdHashMap<LibraryId, Hooked>,
    state: State,
    epoch: u64,
    epochs: Array<MapData, u64>,
    threads: HashMap<MapData, u64, [u64; Waits::WORDS]>,
    steps: HashMap<MapData, [u64; 3], [u64; 2]>,
    /// What a hit costs here, ns, once it was measured; 0 where it cannot be.
    hit_ns: Option<u64>,
    last: StdHashMap<u64, Waits>,
    /// A library came while the hooks of others were attached.
    is_stale: bool,
    /// Somebody else tells the same of every process.
    is_held: bool,
    trouble: Option<String>,
}

impl WaitStates {
    pub(super) fn new(ebpf: &mut Ebpf, config: WaitsConfig) -> Result<Self, LoadError> {
        Ok(Self {
            config,
            libraries: StdHashMap::new(),
            state: State::Paused {
                until_ns: 0,
                detaching: None,
            },
            epoch: 0,
            epochs: take_map(ebpf, "NCCL_WAIT_EPOCH")?,
            threads: take_map(ebpf, "NCCL_WAITS")?,
            steps: take_map(ebpf, "NCCL_STEPS")?,
            hit_ns: None,
            last: StdHashMap::new(),
            is_stale: false,
            is_held: false,
            trouble: None,
        })
    }

    /// A library is traced from now on.
    pub(super) fn add(&mut self, id: LibraryId, file: File, hooks: WaitHooks) {
        self.libraries.insert(id, Hooked { file, hooks });
        self.is_stale = true;
    }

    /// A library is no longer traced.
    pub(super) fn remove(&mut self, id: LibraryId) {
        if self.libraries.remove(&id).is_some() && self.libraries.is_empty() {
            self.detach(0);
        }
    }

    /// Keeps the hooks detached, or no longer.
    pub(super) fn hold(&mut self, hold: bool) {
        if hold && !std::mem::replace(&mut self.is_held, hold) {
            self.detach(0);
        }
        self.is_held = hold;
    }

    /// Why the hooks could not be attached the last time.
    pub(super) fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Attaches or detaches when it is time, and gives what a window that is over held.
    pub(super) fn poll(&mut self, ebpf: &mut Ebpf, now_ns: u64) -> Vec<ThreadWaits> {
        if self.libraries.is_empty() || self.config.budget_ppm == 0 || self.is_held {
            return Vec::new();
        }
        match &mut self.state {
            State::Paused { until_ns, detaching } => {
                let detached = detaching.as_ref().is_none_or(JoinHandle::is_finished);
                if now_ns >= *until_ns && detached {
                    self.attach(ebpf);
                }
                Vec::new()
            }
            State::Attached { since_ns, .. } => {
                let since_ns = *since_ns;
                if now_ns.saturating_sub(since_ns) < self.config.window_ns {
                    return Vec::new();
                }
                self.window_over(since_ns)
            }
        }
    }

    fn attach(&mut self, ebpf: &mut Ebpf) {
        self.epoch += 1;
        self.is_stale = false;
        self.trouble = None;
        self.last = self.rest();
        self.hit_ns.get_or_insert_with(|| {
            let trap_ns = trap::cost_ns(ebpf);
            tracing::info!(?trap_ns, "what a probe on NCCL's hooks costs at a hit");
            trap_ns.map_or(0, |trap_ns| trap_ns.saturating_add(PROGRAM_NS))
        });
        if let Err(error) = self.epochs.set(0, self.epoch, 0) {
            self.trouble = Some(format!("the kernel's map of epochs cannot be written: {error}"));
            return;
        }
        let mut links = Vec::new();
        for hooked in self.libraries.values() {
            let path = PathBuf::from(format!("/proc/self/fd/{}", hooked.file.as_raw_fd()));
            let WaitHooks {
                state_at,
                state_argument,
                stop_at,
                ..
            } = hooked.hooks;
            // The end first, so that no step is seen that never ends.
            let attached = attach_program(ebpf, &path, "nccl_step_stop", stop_at, None).and_then(|stop| {
                let state = attach_program(ebpf, &path, "nccl_step_state", state_at, Some(state_argument))?;
                Ok([state, stop])
            });
            match attached {
                Ok(pair) => links.extend(pair),
                Err(error) => self.trouble = Some(format!("the kernel refuses probes on the hooks: {error}")),
            }
        }
        if let Some(why) = &self.trouble {
            tracing::warn!(why, "what network steps wait for is not fully seen");
        }
        let now_ns = clock::monotonic_ns();
        self.state = if links.is_empty() {
            State::Paused {
                until_ns: now_ns.saturating_add(RETRY_NS),
                detaching: None,
            }
        } else {
            State::Attached {
                links,
                since_ns: now_ns,
            }
        };
    }

    /// Every thread as the last window left it. Nothing runs that would change it, and no step is under way any more.
    fn rest(&self) -> StdHashMap<u64, Waits> {
        self.threads
            .iter()
            .filter_map(Result::ok)
            .map(|(key, words)| {
                let mut waits = Waits::from_words(&words);
                waits.clocks.iter_mut().for_each(|clock| clock.present = 0);
                (key, waits)
            })
            .collect()
    }

    /// Reads the window, and pauses if its cost asks for it.
    fn window_over(&mut self, since_ns: u64) -> Vec<ThreadWaits> {
        let now_ns = clock::monotonic_ns();
        let Some(window) = Window::new(since_ns, now_ns) else {
            return Vec::new();
        };
        let (given, busiest) = self.read(window);
        let predicted = self.libraries.values().map(|hooked| hooked.hooks.hit_ns);
        let hit_ns = predicted.chain(self.hit_ns).max();
        let pause_ns = pause_ns(&self.config, window.len_ns(), busiest, hit_ns.unwrap_or(0));
        if pause_ns > 0 || self.is_stale {
            self.detach(now_ns.saturating_add(pause_ns));
        } else if let State::Attached { since_ns, .. } = &mut self.state {
            *since_ns = now_ns;
        }
        given
    }

    /// The growth of every thread in the window, and the hits of the busiest.
    fn read(&mut self, window: Window) -> (Vec<ThreadWaits>, u64) {
        let tells_credit = self.libraries.values().all(|hooked| hooked.hooks.tells_credit);
        let keys: Vec<u64> = self.threads.keys().filter_map(Result::ok).collect();
        let mut given = Vec::new();
        let mut busiest = 0;
        let mut last = StdHashMap::with_capacity(keys.len());
        for key in keys {
            let Some(waits) = self.steady(key) else {
                last.extend(self.last.remove(&key).map(|before| (key, before)));
                continue;
            };
            let waits = now(waits, self.epoch, window.end_ns());
            let before = self.last.remove(&key).unwrap_or(Waits::NONE);
            let hits = waits.hits.saturating_sub(before.hits);
            busiest = busiest.max(hits);
            if hits > 0 || waits.clocks.iter().any(|clock| clock.present > 0) {
                given.push(ThreadWaits {
                    tgid: (key >> 32) as u32,
                    tid: key as u32,
                    window,
                    waits: growth(&before, &waits, tells_credit),
                });
            }
            last.insert(key, waits);
        }
        self.last = last;
        (given, busiest)
    }

    /// A value that two reads in a row agree on: a copy may be torn while its thread writes.
    fn steady(&self, key: u64) -> Option<Waits> {
        let mut before = self.threads.get(&key, 0).ok()?;
        for _ in 0..READS {
            let again = self.threads.get(&key, 0).ok()?;
            if again == before {
                return Some(Waits::from_words(&again));
            }
            before = again;
        }
        None
    }

    /// Detaches in the background, and forgets the steps under way: how they go on is not seen.
    fn detach(&mut self, until_ns: u64) {
        let paused = State::Paused {
            until_ns,
            detaching: None,
        };
        if let State::Attached { links, .. } = std::mem::replace(&mut self.state, paused) {
            let detaching = detach::in_background(move || drop(links));
            self.state = State::Paused { until_ns, detaching };
        }
        let steps: Vec<_> = self.steps.keys().filter_map(Result::ok).collect();
        for step in steps {
            let _ = self.steps.remove(&step);
        }
    }

    /// Forgets the threads of a process that is gone.
    pub(super) fn forget(&mut self, tgid: u32) {
        let keys: Vec<u64> = self.threads.keys().filter_map(Result::ok).collect();
        for key in keys.into_iter().filter(|key| (key >> 32) as u32 == tgid) {
            let _ = self.threads.remove(&key);
            self.last.remove(&key);
        }
    }
}

/// The clocks at `now_ns`. Steps of another epoch are not under way.
fn now(mut waits: Waits, epoch: u64, now_ns: u64) -> Waits {
    for clock in &mut waits.clocks {
        if waits.epoch != epoch {
            clock.present = 0;
        }
        *clock = clock.at(now_ns);
    }
    waits
}

fn growth(before: &Waits, after: &Waits, tells_credit: bool) -> StepWaits {
    let wait = |wait: Wait| {
        let (before, after) = (before.clocks[wait as usize], after.clocks[wait as usize]);
        StepWait {
            steps_ns: after.steps_ns.saturating_sub(before.steps_ns),
            any_ns: after.any_ns.saturating_sub(before.any_ns),
            entered: after.entered.saturating_sub(before.entered),
        }
    };
    StepWaits {
        send_gpu: wait(Wait::SendGpu),
        send_credit: tells_credit.then(|| wait(Wait::SendCredit)),
        send_wire: wait(Wait::SendWire),
        receive_wire: wait(Wait::ReceiveWire),
        receive_flush: wait(Wait::ReceiveFlush),
        receive_gpu: wait(Wait::ReceiveGpu),
        sent: after.sent.saturating_sub(before.sent),
        received: after.received.saturating_sub(before.received),
        unknown: after.unknown.saturating_sub(before.unknown),
    }
}

#[cfg(test)]
mod tests;
