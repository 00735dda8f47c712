//! One thread visits many devices in turn; a device that does not answer keeps that thread to itself.
//!
//! A read of sysfs may be a command to firmware that is dead, and a thread in it cannot be stopped. So every device is a
//! station that is taken while a thread is in it. When a visit lasts longer than [`PATIENCE`], another thread goes on
//! with the other stations; the one that hangs ends when its read returns. No second thread ever visits a station that
//! hangs, so the number of threads is bounded by the number of devices, and by [`MOST_THREADS`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use stallscope_attribution::facts::{Counter, HardwareFact, HardwareFacts};
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use super::clock;
use crate::observation::{Fact, Observation};

/// How long one visit may take before the other stations get another thread.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);
/// How long one visit may take before its station counts as silent.
pub(super) const SILENT: Duration = Duration::from_secs(3);
/// How often a silent station is told of.
const SILENT_AGAIN_NS: u64 = 30_000_000_000;
/// Threads in visits that hang, and the one that goes on.
const MOST_THREADS: usize = 16;
/// Facts kept for a reader that is late: a quarter of a minute of the largest nodes.
const QUEUE: usize = 2048;

/// What one visit told: over which time, and what.
pub(super) type Told = (Window, HardwareFact);

/// The counters of a device that does not answer: each is there, and none was read.
pub(super) fn unread(counters: &[Counter], why: &str) -> Vec<Counter> {
    let unread = |counter: &Counter| Counter {
        name: counter.name.clone(),
        growth: Reading::Failed(why.to_owned()),
    };
    counters.iter().map(unread).collect()
}

/// A device that is visited.
pub(super) trait Station: Send + 'static {
    /// Reads it. `now_ns` is the time before the first read.
    fn visit(&mut self, now_ns: u64) -> Vec<Told>;
}

/// A kind of devices.
pub(super) trait Beat: Send + Sync + 'static {
    /// One of them.
    type Station: Station;

    /// For people: `rdma`.
    fn name(&self) -> &'static str;

    /// The devices that are there now; an error says why none can be seen.
    fn find(&self) -> Result<BTreeSet<String>, String>;

    /// A station for a device found; reads nothing yet.
    fn station(&self, name: &str) -> Self::Station;

    /// What a station told last, as it is told while it is silent; `None` when silence does not touch it.
    fn silent(fact: &HardwareFact, why: &str) -> Option<HardwareFact>;
}

/// The running patrol of one kind of devices.
#[derive(Debug)]
pub(super) struct Patrol<B: Beat> {
    rounds: Arc<Rounds<B>>,
    told: Receiver<Told>,
    node: String,
}

struct Rounds<B: Beat> {
    beat: B,
    interval: Duration,
    state: Mutex<State<B::Station>>,
    wake: Condvar,
    send: SyncSender<Told>,
    dropped: AtomicU64,
}

impl<B: Beat> std::fmt::Debug for Rounds<B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rounds")
            .field("beat", &self.beat.name())
            .finish_non_exhaustive()
    }
}

struct State<S> {
    /// Number of the thread that goes the rounds; an older one ends when its visit is over.
    number: u64,
    threads: usize,
    stopped: bool,
    /// Since when the present thread is in one visit, or lists the devices.
    present_since_ns: Option<u64>,
    /// Since when some thread lists the devices.
    finding_since_ns: Option<u64>,
    /// Why the devices cannot be listed.
    trouble: Option<String>,
    slots: BTreeMap<String, Slot<S>>,
}

struct Slot<S> {
    /// Taken while a thread visits.
    station: Option<S>,
    since_ns: u64,
    /// What it told last.
    last: Vec<HardwareFact>,
    /// When its silence was told.
    silence_told_ns: Option<u64>,
    /// It was among the devices when they were last listed.
    listed: bool,
}

impl<B: Beat> Patrol<B> {
    /// Begins to visit every `interval`.
    ///
    /// # Errors
    /// No thread can be started.
    pub(super) fn start(node: &str, beat: B, interval: Duration) -> std::io::Result<Self> {
        let (send, told) = sync_channel(QUEUE);
        let rounds = Arc::new(Rounds {
            beat,
            interval,
            state: Mutex::new(State {
                number: 0,
                threads: 0,
                stopped: false,
                present_since_ns: None,
                finding_since_ns: None,
                trouble: None,
                slots: BTreeMap::new(),
            }),
            wake: Condvar::new(),
            send,
            dropped: AtomicU64::new(0),
        });
        Rounds::go(&rounds)?;
        Ok(Self {
            rounds,
            told,
            node: node.to_owned(),
        })
    }

    /// Everything that was told since the last call, and who is silent.
    pub(super) fn poll(&mut self, now_ns: u64) -> Vec<Observation> {
        self.keep_going(now_ns);
        let mut told: Vec<Told> = self.told.try_iter().take(QUEUE).collect();
        told.extend(self.rounds.silences(now_ns));
        if told.is_empty() {
            return Vec::new();
        }
        let realtime_offset_ns = clock::realtime_offset_ns();
        told.into_iter()
            .map(|(window, fact)| Observation {
                window,
                fact: Fact::Hardware(Box::new(HardwareFacts {
                    node: self.node.clone(),
                    window,
                    realtime_offset_ns,
                    fact,
                })),
            })
            .collect()
    }

    /// What cannot be seen now.
    pub(super) fn trouble(&self, now_ns: u64) -> Option<String> {
        let state = locked(&self.rounds.state);
        let silent = |since_ns: u64| now_ns.saturating_sub(since_ns) > ns(SILENT);
        let mut troubles: Vec<String> = state.trouble.iter().cloned().collect();
        if state.finding_since_ns.is_some_and(silent) {
            troubles.push("the list of devices does not end".to_owned());
        }
        let hung: Vec<&str> = state
            .slots
            .iter()
            .filter(|(_, slot)| slot.station.is_none() && silent(slot.since_ns))
            .map(|(name, _)| name.as_str())
            .collect();
        if !hung.is_empty() {
            troubles.push(format!("{} has not answered for some seconds", hung.join(", ")));
        }
        let dropped = self.rounds.dropped.load(Ordering::Relaxed);
        if dropped > 0 {
            troubles.push(format!("{dropped} readings were lost in the agent"));
        }
        (!troubles.is_empty()).then(|| troubles.join("; "))
    }

    /// Starts another thread when the present one hangs.
    fn keep_going(&self, now_ns: u64) {
        let hangs = {
            let state = locked(&self.rounds.state);
            let since = state.present_since_ns;
            since.is_some_and(|since_ns| now_ns.saturating_sub(since_ns) > ns(PATIENCE))
                && state.threads < MOST_THREADS
        };
        if hangs && let Err(error) = Rounds::go(&self.rounds) {
            tracing::error!(%error, beat = self.rounds.beat.name(), "no thread reads these devices any more");
        }
    }
}

impl<B: Beat> Drop for Patrol<B> {
    fn drop(&mut self) {
        locked(&self.rounds.state).stopped = true;
        self.rounds.wake.notify_all();
    }
}

impl<B: Beat> Rounds<B> {
    /// Goes the rounds in a new thread. The one before ends as soon as it can.
    fn go(rounds: &Arc<Self>) -> std::io::Result<()> {
        let number = {
            let mut state = locked(&rounds.state);
            state.number += 1;
            state.threads += 1;
            state.present_since_ns = None;
            state.number
        };
        let its = Arc::clone(rounds);
        let started = std::thread::Builder::new()
            .name(rounds.beat.name().to_owned())
            .spawn(move || {
                its.run(number);
                locked(&its.state).threads -= 1;
            });
        if let Err(error) = started {
            locked(&rounds.state).threads -= 1;
            return Err(error);
        }
        Ok(())
    }

    fn run(&self, number: u64) {
        loop {
            self.find(number);
            let names: Vec<String> = locked(&self.state).slots.keys().cloned().collect();
            for name in names {
                if !self.visit(number, &name) {
                    return;
                }
            }
            let state = locked(&self.state);
            let goes_on = |state: &mut State<B::Station>| !state.stopped && state.number == number;
            let (mut state, _) = self
                .wake
                .wait_timeout_while(state, self.interval, |state| goes_on(state))
                .unwrap_or_else(PoisonError::into_inner);
            if !goes_on(&mut state) {
                return;
            }
        }
    }

    fn find(&self, number: u64) {
        {
            let mut state = locked(&self.state);
            if state.finding_since_ns.is_some() {
                return;
            }
            let now_ns = clock::monotonic_ns();
            state.finding_since_ns = Some(now_ns);
            state.begin(number, now_ns);
        }
        let found = self.beat.find();
        let mut state = locked(&self.state);
        state.finding_since_ns = None;
        state.end(number);
        let found = match found {
            Ok(found) => found,
            Err(why) => {
                state.trouble = Some(why);
                return;
            }
        };
        state.trouble = None;
        state
            .slots
            .retain(|name, slot| found.contains(name) || slot.station.is_none());
        for slot in state.slots.values_mut() {
            slot.listed = false;
        }
        for name in found {
            let slot = state.slots.entry(name).or_insert_with_key(|name| Slot {
                station: Some(self.beat.station(name)),
                since_ns: 0,
                last: Vec::new(),
                silence_told_ns: None,
                listed: true,
            });
            slot.listed = true;
        }
    }

    /// Visits one station, unless another thread is in it. Whether the thread goes on.
    fn visit(&self, number: u64, name: &str) -> bool {
        let (mut station, now_ns) = {
            let mut state = locked(&self.state);
            if state.stopped || state.number != number {
                return false;
            }
            let now_ns = clock::monotonic_ns();
            let Some(slot) = state.slots.get_mut(name) else {
                return true;
            };
            let Some(station) = slot.station.take() else {
                return true;
            };
            slot.since_ns = now_ns;
            state.begin(number, now_ns);
            (station, now_ns)
        };
        let told = station.visit(now_ns);
        let mut state = locked(&self.state);
        state.end(number);
        let goes_on = !state.stopped && state.number == number;
        if let Some(slot) = state.slots.get_mut(name) {
            if slot.listed {
                slot.station = Some(station);
                slot.silence_told_ns = None;
                if !told.is_empty() {
                    slot.last = told.iter().map(|(_, fact)| fact.clone()).collect();
                }
            } else {
                state.slots.remove(name);
            }
        }
        drop(state);
        for told in told {
            if self.send.try_send(told).is_err() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
        }
        goes_on
    }

    /// What stations that hang told last, as failed: once when they fall silent and seldom after that.
    fn silences(&self, now_ns: u64) -> Vec<Told> {
        let mut told = Vec::new();
        let mut state = locked(&self.state);
        for slot in state.slots.values_mut() {
            let silent_ns = now_ns.saturating_sub(slot.since_ns);
            if slot.station.is_some() || silent_ns <= ns(SILENT) {
                continue;
            }
            let since_ns = slot.silence_told_ns.unwrap_or(slot.since_ns);
            if slot.silence_told_ns.is_some() && now_ns.saturating_sub(since_ns) < SILENT_AGAIN_NS {
                continue;
            }
            slot.silence_told_ns = Some(now_ns);
            let why = format!("the device has not answered for {} s", silent_ns / 1_000_000_000);
            let facts = slot.last.iter().filter_map(|fact| B::silent(fact, &why));
            told.extend(facts.filter_map(|fact| Some((Window::new(since_ns, now_ns)?, fact))));
        }
        told
    }
}

impl<S> State<S> {
    fn begin(&mut self, number: u64, now_ns: u64) {
        if self.number == number {
            self.present_since_ns = Some(now_ns);
        }
    }

    fn end(&mut self, number: u64) {
        if self.number == number {
            self.present_since_ns = None;
        }
    }
}

/// Every lock here is held for moves only, never over a read.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ns(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
