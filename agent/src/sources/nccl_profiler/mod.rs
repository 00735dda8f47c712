//! NCCL's own events, from the plugin that a job was started with (`docs/deep-mode.md`).
//!
//! # Facade
//! - [`NcclProfiler::traced`] and [`NcclProfiler::gone`]: the GPU processes there are.
//! - [`NcclProfiler::poll`]`(now)`, a few times a second: looks for the plugin's memory in processes where it was not found yet,
//!   tells every plugin found that the agent is there and what it asks for, and gives what the network steps waited for, as
//!   the probes' wait hooks do.
//! - [`NcclProfiler::serves`]: processes whose waits the plugin tells; the hooks have nothing to add there.
//!
//! The memory belongs to the job. It is read with `pread`, never mapped, so that nothing the job does to it can end the agent; what
//! is read is bounded and checked; what is written are two words.

mod find;
mod memory;
mod sums;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use stallscope_attribution::time::Window;
use stallscope_records::profiler::kind;

use crate::observation::{Fact, Observation, ProcessKey, StepWaits, Thread};
use crate::sources::clock;
use crate::sources::probes::{WaitsConfig, pause_ns};
use memory::{Memory, Refused, Turn};
use sums::Sums;

/// How losses are named.
pub const RING: &str = "nccl-profiler";

/// The kinds of events that are asked for. NCCL tells of what a step belongs to as well.
const ASKED: u32 = 1 << kind::PROXY_STEP;
/// Between two looks into a process where nothing was found, ns.
const LOOK_NS: u64 = 2_000_000_000;
/// Between two readings, ns.
const TURN_NS: u64 = 200_000_000;
/// A plugin that has given no sign of life for so long has ended with its program, ns.
const PATIENCE_NS: u64 = 5_000_000_000;
/// Calls of the plugin per step: begin, three changes, end, and its share of what it belongs to.
const CALLS_PER_STEP: u64 = 6;
/// What a call costs the job, ns: the more expensive kinds on a common host.
const CALL_NS: u64 = 100;
/// Most processes that are looked into.
const MAX_PROCESSES: usize = 256;

/// Reads what the plugin tells in every process that has one.
#[derive(Debug)]
pub struct NcclProfiler {
    config: WaitsConfig,
    due_ns: u64,
    processes: BTreeMap<ProcessKey, Process>,
}

#[derive(Debug)]
struct Process {
    look_ns: u64,
    plugin: Option<Plugin>,
    trouble: Option<String>,
}

/// A plugin that was found.
#[derive(Debug)]
struct Plugin {
    memory: Memory,
    found_ns: u64,
    sums: Sums,
    /// Nothing is asked for until then; 0 while something is.
    paused_until_ns: u64,
    /// Up to when what was asked for has been read; `None` before the plugin has switched.
    read_ns: Option<u64>,
    /// The beginning of what the sums hold.
    from_ns: u64,
    lost: u64,
}

impl Default for NcclProfiler {
    fn default() -> Self {
        Self::new(WaitsConfig::default())
    }
}

impl NcclProfiler {
    /// A source that knows no process.
    #[must_use]
    pub const fn new(config: WaitsConfig) -> Self {
        Self {
            config,
            due_ns: 0,
            processes: BTreeMap::new(),
        }
    }

    /// A GPU process is traced; telling it again changes nothing.
    pub fn traced(&mut self, key: ProcessKey) {
        if self.processes.len() < MAX_PROCESSES {
            self.processes.entry(key).or_insert(Process {
                look_ns: 0,
                plugin: None,
                trouble: None,
            });
        }
    }

    /// A process is traced no longer: its plugin, if it lives, is told to stop.
    pub fn gone(&mut self, key: ProcessKey) {
        if let Some(plugin) = self.processes.remove(&key).and_then(|process| process.plugin) {
            // The process may be gone already.
            let _ = plugin.memory.ask(clock::monotonic_ns(), 0);
        }
    }

    /// Whether the plugin tells what this process waits for.
    #[must_use]
    pub fn serves(&self, pid: u32) -> bool {
        self.processes
            .range(first_of(pid)..)
            .take_while(|(key, _)| key.pid == pid)
            .any(|(_, process)| process.plugin.is_some())
    }

    /// Whether there are processes and the plugin tells of all of them: the wait hooks need not be attached.
    #[must_use]
    pub fn serves_all(&self) -> bool {
        !self.processes.is_empty() && self.processes.values().all(|process| process.plugin.is_some())
    }

    /// How many processes have the plugin.
    #[must_use]
    pub fn served(&self) -> usize {
        self.processes
            .values()
            .filter(|process| process.plugin.is_some())
            .count()
    }

    /// What is wrong, one sentence per process at most.
    #[must_use]
    pub fn troubles(&self) -> BTreeSet<&str> {
        self.processes
            .values()
            .filter_map(|process| process.trouble.as_deref())
            .collect()
    }

    /// Looks, asks and reads; does nothing when it was called a moment ago.
    pub fn poll(&mut self, now_ns: u64) -> Vec<Observation> {
        let mut given = Vec::new();
        if now_ns < self.due_ns {
            return given;
        }
        self.due_ns = now_ns + TURN_NS;
        for (key, process) in &mut self.processes {
            if process.plugin.is_none() {
                process.look(*key, now_ns);
            }
            let Some(plugin) = &mut process.plugin else {
                continue;
            };
            match plugin.turn(&self.config, *key, &mut given) {
                Ok(trouble) => process.trouble = trouble,
                Err(refused) => {
                    process.plugin = None;
                    process.trouble = Some(format!("process {}: {refused}", key.pid));
                }
            }
        }
        given
    }
}

const fn first_of(pid: u32) -> ProcessKey {
    ProcessKey { pid, start_ticks: 0 }
}

impl Process {
    fn look(&mut self, key: ProcessKey, now_ns: u64) {
        if now_ns < self.look_ns {
            return;
        }
        self.look_ns = now_ns + LOOK_NS;
        match find::memory(key.pid) {
            Ok(None) => self.trouble = None,
            Ok(Some(memory)) => {
                tracing::info!(
                    pid = key.pid,
                    interface = memory.interface(),
                    "NCCL's profiler plugin is there"
                );
                self.plugin = Some(Plugin::new(memory, now_ns));
            }
            Err(why) => self.trouble = Some(format!("process {}: {why}", key.pid)),
        }
    }
}

impl Plugin {
    fn new(memory: Memory, found_ns: u64) -> Self {
        Self {
            memory,
            found_ns,
            sums: Sums::default(),
            paused_until_ns: 0,
            read_ns: None,
            from_ns: 0,
            lost: 0,
        }
    }

    /// Asks and reads once. Gives what is wrong without being the end.
    fn turn(
        &mut self,
        config: &WaitsConfig,
        key: ProcessKey,
        given: &mut Vec<Observation>,
    ) -> Result<Option<String>, Refused> {
        let now_ns = clock::monotonic_ns();
        let asks = now_ns >= self.paused_until_ns;
        self.memory.ask(now_ns, if asks { ASKED } else { 0 })?;
        let Turn {
            to_ns,
            alive_ns,
            switched_ns,
            open,
            ended,
            lost,
            refused,
        } = self.memory.turn()?;
        if to_ns.saturating_sub(alive_ns.max(self.found_ns)) > PATIENCE_NS {
            return Err(Refused::Silent);
        }
        let Some(switched_ns) = switched_ns.filter(|_| asks) else {
            self.read_ns = None;
            return Ok(None);
        };
        // After a pause too short to be noticed the switch lies before what was told already.
        let from_ns = self.read_ns.unwrap_or(switched_ns.max(self.from_ns));
        if let Some(window) = Window::new(from_ns, to_ns) {
            if self.read_ns.is_none() {
                self.from_ns = from_ns;
                self.sums = Sums::default();
            }
            self.sums.add(window, &open, &ended);
            self.read_ns = Some(to_ns);
            self.lost += lost;
        }
        if to_ns.saturating_sub(self.from_ns) >= config.window_ns {
            self.window_over(config, key, given);
        }
        Ok((refused > 0).then(|| {
            format!(
                "process {}: {refused} events of its NCCL profiler plugin make no sense and are left out",
                key.pid
            )
        }))
    }

    fn window_over(&mut self, config: &WaitsConfig, key: ProcessKey, given: &mut Vec<Observation>) {
        let Some(window) = self.read_ns.and_then(|to_ns| Window::new(self.from_ns, to_ns)) else {
            return;
        };
        let tells_credit = self.memory.interface() >= 4;
        let threads = self.sums.take();
        let busiest = threads.values().map(|waits| waits.sent + waits.received).max();
        for (tid, waits) in threads {
            let tid = self.memory.tid(key.pid, tid);
            let waits = StepWaits {
                send_credit: waits.send_credit.filter(|_| tells_credit),
                ..waits
            };
            let thread = Thread { process: key, tid };
            let fact = Fact::StepWaits {
                thread,
                waits: Box::new(waits),
            };
            given.push(Observation { window, fact });
        }
        let count = std::mem::take(&mut self.lost);
        if count > 0 {
            let fact = Fact::Lost { ring: RING, count };
            given.push(Observation { window, fact });
        }
        self.from_ns = window.end_ns();
        let calls = busiest.unwrap_or(0).saturating_mul(CALLS_PER_STEP);
        let pause_ns = pause_ns(config, window.len_ns(), calls, CALL_NS);
        if pause_ns > 0 {
            self.paused_until_ns = window.end_ns().saturating_add(pause_ns);
            self.read_ns = None;
        }
    }
}
