//! The thread that finds processes and attaches probes: what may take long, away from the rings.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TryRecvError};
use std::time::Duration;

use stallscope_attribution::facts::{DeviceEvent, DeviceEventKind, RecordGap};
use stallscope_attribution::time::Window;

use super::shared::{Keys, Shared};
use super::status::Condition;
use crate::observation::{Fact, Observation, ProcessFacts, ProcessKey, ProcessRole, Thread};
use crate::sources::nccl_profiler::{self, NcclProfiler};
use crate::sources::probes::{DeviceError, PostsError, Probes};
use crate::sources::procs::{Action, Discovery, Library, LibraryId, LibraryKind, ProcessEvent};

/// How long records of a process that is gone may still come, ns.
const LINGER_NS: u64 = 2_000_000_000;
const LONGEST_WAIT: Duration = Duration::from_millis(250);
const SHORTEST_WAIT: Duration = Duration::from_millis(5);
/// What is due within this is waited for without looking at events: they would wake the thread one by one.
const GATHERING: Duration = Duration::from_millis(100);
/// Most libraries whose trouble is told; any user can map files that are called like a library.
const MAX_TROUBLES: usize = 32;

/// Finds processes.
pub(super) struct Discover {
    shared: Arc<Shared>,
    discovery: Discovery,
    probes: Option<Probes>,
    nccl_profiler: Option<NcclProfiler>,
    nccl_profiler_said: Option<Condition>,
    events: Receiver<ProcessEvent>,
    facts: SyncSender<Observation>,
    keys: Keys,
    /// When to forget the key of a process that is gone.
    lingering: BTreeMap<ProcessKey, u64>,
    troubles: BTreeMap<String, String>,
    /// Attached libraries of RDMA verbs.
    verbs: BTreeSet<LibraryId>,
    /// Some RDMA posts went unseen.
    verbs_trouble: bool,
}

impl Discover {
    /// `nccl_profiler` is `None` where it was not asked for.
    pub(super) fn new(
        shared: Arc<Shared>,
        mut discovery: Discovery,
        probes: Option<Probes>,
        nccl_profiler: Option<NcclProfiler>,
        events: Receiver<ProcessEvent>,
        facts: SyncSender<Observation>,
    ) -> Self {
        discovery.set_events_live(probes.is_some());
        Self {
            shared,
            discovery,
            probes,
            nccl_profiler,
            nccl_profiler_said: None,
            events,
            facts,
            keys: Keys::new(),
            lingering: BTreeMap::new(),
            troubles: BTreeMap::new(),
            verbs: BTreeSet::new(),
            verbs_trouble: false,
        }
    }

    pub(super) fn run(mut self) {
        self.shared.status.lock().set_health("procs", Condition::Works);
        while !self.shared.is_stopping() {
            if self.take_events() {
                return;
            }
            if let Some(view) = self.shared.take_gpus() {
                self.discovery.set_gpus(view);
            }
            let now_ns = super::now_ns();
            for action in self.discovery.poll(now_ns) {
                self.apply(action);
            }
            self.poll_nccl_profiler();
            self.poll_waits();
            self.poll_device_errors();
            self.forget_the_gone(super::now_ns());
        }
    }

    /// Tells what the plugins in jobs say, and how they are.
    fn poll_nccl_profiler(&mut self) {
        let Some(plugins) = &mut self.nccl_profiler else {
            return;
        };
        let told = plugins.poll(super::now_ns());
        let troubles: Vec<&str> = plugins.troubles().into_iter().collect();
        let condition = if troubles.is_empty() {
            Condition::Works
        } else {
            Condition::Degraded(troubles.join("; "))
        };
        if self.nccl_profiler_said.as_ref() != Some(&condition) {
            if let Condition::Degraded(why) = &condition {
                tracing::warn!(why, "NCCL's profiler plugin is not read everywhere");
            }
            self.shared
                .status
                .lock()
                .set_health(nccl_profiler::RING, condition.clone());
            self.nccl_profiler_said = Some(condition);
        }
        for observation in told {
            self.tell_in(observation.window, observation.fact);
        }
    }

    /// Tells what the network steps of known processes waited for.
    fn poll_waits(&mut self) {
        let Some(probes) = &mut self.probes else { return };
        let plugins = self.nccl_profiler.as_ref();
        probes.hold_waits(plugins.is_some_and(NcclProfiler::serves_all));
        let mut told = probes.poll_waits(super::now_ns());
        told.retain(|given| !plugins.is_some_and(|plugins| plugins.serves(given.tgid)));
        for given in told {
            let Some(process) = self.keys.get(&given.tgid).copied() else {
                continue;
            };
            let fact = Fact::StepWaits {
                thread: Thread {
                    process,
                    tid: given.tid,
                },
                waits: Box::new(given.waits),
            };
            self.tell_in(given.window, fact);
        }
    }

    /// Tells what the kernel's own events told of devices.
    fn poll_device_errors(&mut self) {
        let Some(probes) = &mut self.probes else { return };
        let told = probes.poll_device_errors(super::now_ns());
        let lost = probes.take_lost_device_errors();
        if lost > 0 {
            self.shared.add_gap(RecordGap {
                node: self.shared.node.clone(),
                window: None,
                what: "devices had more errors at once than were kept".to_owned(),
                count: lost,
            });
        }
        for error in told {
            let (at_ns, event) = device_event(error);
            let observation = super::devices::event(at_ns, event, &self.shared);
            self.tell_in(observation.window, observation.fact);
        }
    }

    /// Waits for an event or until something is due, then takes all there are. Whether nobody will send any more.
    fn take_events(&mut self) -> bool {
        let due_ns = self.discovery.due_ns().saturating_sub(super::now_ns());
        let due = Duration::from_nanos(due_ns).max(SHORTEST_WAIT);
        if due <= GATHERING {
            // Events come in bursts, and none of them is due before the one that came first.
            std::thread::sleep(due);
        } else {
            match self.events.recv_timeout(due.min(LONGEST_WAIT)) {
                Ok(event) => self.on_event(event, super::now_ns()),
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => return true,
            }
        }
        let now_ns = super::now_ns();
        loop {
            match self.events.try_recv() {
                Ok(event) => self.on_event(event, now_ns),
                Err(TryRecvError::Empty) => return false,
                Err(TryRecvError::Disconnected) => return true,
            }
        }
    }

    fn on_event(&mut self, event: ProcessEvent, now_ns: u64) {
        match event {
            ProcessEvent::PostsThrough { tgid, address, by } => self.watch_posts(tgid, address, by),
            event => self.discovery.on_event(event, now_ns),
        }
    }

    /// At once: what is posted until then is missed.
    fn watch_posts(&mut self, tgid: u32, address: u64, by: u32) {
        if let Some(probes) = &mut self.probes {
            let watched = probes.watch_posts(tgid, address, by);
            self.tell_verbs(watched.err());
        }
    }

    /// A process with RDMA verbs may have made its queue pairs before anyone looked.
    fn look_for_posts(&mut self, tgid: u32, libraries: &[LibraryId]) {
        if libraries.iter().any(|id| self.verbs.contains(id))
            && let Some(probes) = &mut self.probes
        {
            let looked = probes.look_for_posts(tgid);
            self.tell_verbs(looked.err());
        }
    }

    fn tell_verbs(&mut self, trouble: Option<PostsError>) {
        let condition = match trouble {
            // It may have ended, as processes do.
            Some(PostsError::Maps { .. }) => return,
            Some(why) => {
                tracing::warn!(%why, "some RDMA posts are not seen");
                Condition::Degraded(why.to_string())
            }
            None if self.verbs_trouble => return,
            None => Condition::Works,
        };
        self.verbs_trouble |= matches!(condition, Condition::Degraded(_));
        self.shared.status.lock().set_health("verbs", condition);
    }

    fn apply(&mut self, action: Action) {
        match action {
            Action::AttachLibrary(library) => self.attach(&library),
            Action::ReleaseLibrary(id) => {
                if let Some(probes) = &mut self.probes {
                    probes.release_library(id);
                }
                self.verbs.remove(&id);
            }
            Action::Trace { facts, libraries } => {
                let tgid = facts.key.pid;
                self.trace(facts);
                self.look_for_posts(tgid, &libraries);
            }
            Action::Gone(key) => self.gone(key),
        }
    }

    fn attach(&mut self, library: &Library) {
        let Some(probes) = &mut self.probes else { return };
        match probes.attach_library(library) {
            Ok(attached) => {
                if library.kind == LibraryKind::Verbs {
                    self.verbs.insert(library.id);
                }
                let version = attached.version.map(|version| version.to_string());
                tracing::info!(library = library.shown, version, functions = attached.functions, took = ?attached.took, "attached");
                if let Some(Err(why)) = &attached.waits {
                    tracing::info!(library = library.shown, %why, "no wait states");
                }
                let failed: Vec<String> = attached
                    .failed
                    .iter()
                    .map(|failure| format!("{} ({})", failure.symbol, failure.why))
                    .collect();
                if attached.inode_differs {
                    let why = "the file was replaced after the process mapped it, or lies on an overlay: its calls may stay \
                               unseen until the process restarts";
                    self.trouble(library, Some(why.to_owned()));
                } else if failed.is_empty() {
                    self.trouble(library, None);
                } else {
                    self.trouble(library, Some(format!("calls stay unseen: {}", failed.join(", "))));
                }
            }
            Err(error) => {
                self.discovery.attach_failed(library.id);
                self.trouble(library, Some(error.to_string()));
            }
        }
    }

    /// Keeps one line of trouble per library, and the health of attaching as a whole.
    fn trouble(&mut self, library: &Library, why: Option<String>) {
        let before = self.troubles.clone();
        match why {
            Some(_) if self.troubles.len() >= MAX_TROUBLES && !self.troubles.contains_key(&library.shown) => {
                None
            }
            Some(why) => self.troubles.insert(library.shown.clone(), why),
            None => self.troubles.remove(&library.shown),
        };
        if self.troubles == before {
            return;
        }
        let text: Vec<String> = self
            .troubles
            .iter()
            .map(|(shown, why)| format!("{shown}: {why}"))
            .collect();
        let condition = if text.is_empty() {
            Condition::Works
        } else {
            Condition::Degraded(text.join("; "))
        };
        if !text.is_empty() {
            tracing::warn!(trouble = text.join("; "), "some libraries are not fully seen");
        }
        self.shared.status.lock().set_health("attach", condition);
    }

    fn trace(&mut self, facts: Box<ProcessFacts>) {
        let key = facts.key;
        if self.keys.insert(key.pid, key) != Some(key) {
            self.shared.set_keys(self.keys.clone());
            if let Some(probes) = &mut self.probes
                && let Err(error) = probes.trace_process(key.pid, facts.role)
            {
                tracing::warn!(pid = key.pid, %error, "the process is not traced");
            }
            tracing::info!(pid = key.pid, job = facts.job, rank = facts.rank, gpu = facts.gpu, role = ?facts.role, "process");
        }
        if let Some(plugins) = &mut self.nccl_profiler
            && facts.role == ProcessRole::Gpu
        {
            plugins.traced(key);
        }
        self.tell(Fact::Process(facts));
    }

    fn gone(&mut self, key: ProcessKey) {
        if let Some(probes) = &mut self.probes
            && self.keys.get(&key.pid) == Some(&key)
        {
            probes.forget_process(key.pid);
        }
        if let Some(plugins) = &mut self.nccl_profiler {
            plugins.gone(key);
        }
        self.lingering.insert(key, super::now_ns() + LINGER_NS);
        self.tell(Fact::ProcessGone(key));
    }

    fn tell(&self, fact: Fact) {
        self.tell_in(Window::instant(super::now_ns()), fact);
    }

    fn tell_in(&self, window: Window, fact: Fact) {
        let observation = Observation { window, fact };
        // The gathering thread takes these every time it runs; it is gone only when the agent stops.
        if self.facts.send(observation).is_err() {
            tracing::debug!("facts about processes find no reader: the agent stops");
        }
    }

    fn forget_the_gone(&mut self, now_ns: u64) {
        let before = self.keys.len();
        let keys = &mut self.keys;
        self.lingering.retain(|key, until_ns| {
            let done = *until_ns <= now_ns;
            if done && keys.get(&key.pid) == Some(key) {
                keys.remove(&key.pid);
            }
            !done
        });
        if self.keys.len() != before {
            self.shared.set_keys(self.keys.clone());
        }
    }
}

/// When it was, and what.
fn device_event(error: DeviceError) -> (u64, DeviceEvent) {
    match error {
        DeviceError::Pcie {
            pci,
            at_ns,
            severity,
            status,
        } => (
            at_ns,
            DeviceEvent {
                pci,
                kind: DeviceEventKind::Aer { severity, status },
            },
        ),
        DeviceError::Xid {
            pci,
            at_ns,
            code,
            message,
        } => (
            at_ns,
            DeviceEvent {
                pci,
                kind: DeviceEventKind::Xid { code, message },
            },
        ),
    }
}
