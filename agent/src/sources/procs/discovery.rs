//! Which processes exist, what they map, and what changed since the last look.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::cgroup::CgroupPaths;
use super::classify::classify;
use super::environ::{Declared, Malformed, parse_environ};
use super::maps::MappedLibrary;
use super::proc_fs::ProcFs;
use super::{Action, GpuView, Library, LibraryId, LibraryKind, ProcessEvent};
use crate::config::DeclaredModel;
use crate::observation::{ProcessFacts, ProcessKey};

/// From an event to reading the process: a loader maps many files in a row, and one read is enough for them.
const DEBOUNCE_NS: u64 = 100_000_000;
/// Full look when process events arrive.
const RECONCILE_NS: u64 = 5_000_000_000;
/// Full look when they do not: a new process or library must be seen within a second.
const POLL_NS: u64 = 500_000_000;
/// Most distinct warnings about variables; a job that is launched wrongly repeats the same few.
const MAX_WARNINGS: usize = 256;

/// Finds the processes to trace. See the [module](super) for how to drive it.
#[derive(Debug)]
pub struct Discovery {
    proc_fs: ProcFs,
    scope: Option<String>,
    model: Option<DeclaredModel>,
    own_pid: u32,
    events_live: bool,
    gpus: GpuView,
    known: BTreeMap<u32, Known>,
    /// When to read a process, by pid.
    dirty: BTreeMap<u32, u64>,
    next_full_ns: u64,
    changed: bool,
    traced: BTreeMap<ProcessKey, Traced>,
    attached: BTreeSet<LibraryId>,
    warned: HashSet<Malformed>,
}

/// A process, as far as it was read.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    pub(super) start_ticks: u64,
    pub(super) comm: String,
    pub(super) parent_pid: u32,
    pub(super) session: u32,
    pub(super) in_scope: bool,
    pub(super) cgroups: CgroupPaths,
    pub(super) libraries: Vec<MappedLibrary>,
    pub(super) declared: Declared,
    size_pages: u64,
}

impl Known {
    pub(super) fn key(&self, pid: u32) -> ProcessKey {
        ProcessKey {
            pid,
            start_ticks: self.start_ticks,
        }
    }

    /// Whether it has a library of those that only programs for GPUs have.
    pub(super) fn uses_gpu(&self) -> bool {
        self.libraries
            .iter()
            .any(|library| library.kind != LibraryKind::Verbs)
    }
}

/// What was last said of a traced process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Traced {
    pub(super) facts: ProcessFacts,
    pub(super) libraries: Vec<LibraryId>,
}

impl Discovery {
    /// A discovery that has read nothing yet. `proc_root` is `/proc`; `scope` limits it to a control group.
    #[must_use]
    pub fn new(proc_root: impl Into<PathBuf>, scope: Option<String>) -> Self {
        Self {
            proc_fs: ProcFs::new(proc_root),
            scope,
            model: None,
            own_pid: std::process::id(),
            events_live: false,
            gpus: GpuView::default(),
            known: BTreeMap::new(),
            dirty: BTreeMap::new(),
            next_full_ns: 0,
            changed: false,
            traced: BTreeMap::new(),
            attached: BTreeSet::new(),
            warned: HashSet::new(),
        }
    }

    /// What the node's operator declares of the model, for processes that declare nothing.
    pub fn set_model(&mut self, model: Option<DeclaredModel>) {
        self.model = model;
        self.changed = true;
    }

    /// Whether process events arrive; until then, and without, everything is looked at twice a second.
    pub fn set_events_live(&mut self, live: bool) {
        if !live {
            self.next_full_ns = 0;
        }
        self.events_live = live;
    }

    /// What NVML knows. Roles and GPUs are decided again at the next poll when it differs.
    pub fn set_gpus(&mut self, gpus: GpuView) {
        if self.gpus != gpus {
            self.gpus = gpus;
            self.changed = true;
        }
    }

    /// Takes note of an event; reads nothing.
    pub fn on_event(&mut self, event: ProcessEvent, now_ns: u64) {
        match event {
            ProcessEvent::Exec { tgid } => self.mark(tgid, now_ns + DEBOUNCE_NS),
            ProcessEvent::MapExec { tgid } => {
                // Many processes map many files; only one in scope, or not read yet, is worth another read.
                if self.known.get(&tgid).is_none_or(|known| known.in_scope) {
                    self.mark(tgid, now_ns + DEBOUNCE_NS);
                }
            }
            ProcessEvent::Fork { parent, child } => {
                if self.known.get(&parent).is_none_or(|known| known.in_scope) {
                    self.mark(child, now_ns + DEBOUNCE_NS);
                }
            }
            ProcessEvent::Exit { tgid } => {
                if self.known.contains_key(&tgid) || self.dirty.contains_key(&tgid) {
                    self.dirty.insert(tgid, now_ns);
                }
            }
            ProcessEvent::PostsThrough { .. } => {}
        }
    }

    /// When [`Discovery::poll`] has something to do, `CLOCK_MONOTONIC` ns.
    #[must_use]
    pub fn due_ns(&self) -> u64 {
        let dirty = self.dirty.values().min().copied().unwrap_or(u64::MAX);
        if self.changed {
            0
        } else {
            dirty.min(self.next_full_ns)
        }
    }

    /// The processes that are traced now.
    pub fn traced(&self) -> impl Iterator<Item = &ProcessFacts> {
        self.traced.values().map(|traced| &traced.facts)
    }

    /// The library could not be attached through the path given: it is offered again, by another process if there is
    /// one, at the next full look.
    pub fn attach_failed(&mut self, id: LibraryId) {
        self.attached.remove(&id);
    }

    /// Reads what is due and says what follows from it.
    pub fn poll(&mut self, now_ns: u64) -> Vec<Action> {
        if now_ns >= self.next_full_ns {
            self.look_at_all();
            self.next_full_ns = now_ns + if self.events_live { RECONCILE_NS } else { POLL_NS };
        }
        let due: Vec<u32> = self
            .dirty
            .iter()
            .filter_map(|(&pid, &at)| (at <= now_ns).then_some(pid))
            .collect();
        for pid in due {
            self.dirty.remove(&pid);
            self.read(pid);
        }
        if std::mem::take(&mut self.changed) {
            self.decide()
        } else {
            Vec::new()
        }
    }

    /// Reads everything again, now.
    pub fn rescan(&mut self, now_ns: u64) -> Vec<Action> {
        self.next_full_ns = now_ns;
        let pids: Vec<u32> = self.known.keys().copied().collect();
        for pid in pids {
            self.mark(pid, now_ns);
        }
        self.poll(now_ns)
    }

    fn mark(&mut self, pid: u32, at_ns: u64) {
        // The first event counts: a stream of them must not put the read off for ever.
        let at = self.dirty.entry(pid).or_insert(at_ns);
        *at = at_ns.min(*at);
    }

    /// Marks new and changed processes, forgets dead ones.
    fn look_at_all(&mut self) {
        let pids: BTreeSet<u32> = self
            .proc_fs
            .pids()
            .into_iter()
            .filter(|&pid| pid != self.own_pid)
            .collect();
        let gone: Vec<u32> = self
            .known
            .keys()
            .copied()
            .filter(|pid| !pids.contains(pid))
            .collect();
        for pid in gone {
            self.forget(pid);
        }
        for pid in pids {
            if self.looks_changed(pid) {
                self.mark(pid, 0);
            }
        }
        // A library whose attachment failed is offered again.
        self.changed = true;
    }

    fn looks_changed(&self, pid: u32) -> bool {
        let Some(known) = self.known.get(&pid) else {
            return true;
        };
        let Some(stat) = self.proc_fs.stat(pid) else {
            return true;
        };
        if stat.dead || stat.start_ticks != known.start_ticks {
            return true;
        }
        if known.in_scope {
            return stat.comm != known.comm || self.proc_fs.size_pages(pid) != Some(known.size_pages);
        }
        // It may have been moved into the scope.
        !stat.kernel_thread
            && self.scope.is_some()
            && self.proc_fs.cgroups(pid).is_some_and(|paths| self.within(&paths))
    }

    fn within(&self, paths: &CgroupPaths) -> bool {
        self.scope.as_ref().is_none_or(|scope| paths.within(scope))
    }

    fn forget(&mut self, pid: u32) {
        self.dirty.remove(&pid);
        self.changed |= self.known.remove(&pid).is_some();
    }

    fn read(&mut self, pid: u32) {
        if pid == self.own_pid {
            return;
        }
        match self.read_whole(pid) {
            Some(known) => {
                self.known.insert(pid, known);
                self.changed = true;
            }
            None => self.forget(pid),
        }
    }

    /// Everything about one process, or `None` when it is gone, died meanwhile, or its pid was reused meanwhile.
    fn read_whole(&mut self, pid: u32) -> Option<Known> {
        let stat = self.proc_fs.stat(pid).filter(|stat| !stat.dead)?;
        let mut known = Known {
            start_ticks: stat.start_ticks,
            comm: stat.comm,
            parent_pid: stat.parent_pid,
            session: stat.session,
            ..Known::default()
        };
        if stat.kernel_thread {
            return Some(known);
        }
        known.cgroups = self.proc_fs.cgroups(pid)?;
        known.in_scope = self.within(&known.cgroups);
        if !known.in_scope {
            return Some(known);
        }
        // Size before maps: a library mapped between the two is then found as a change.
        known.size_pages = self.proc_fs.size_pages(pid)?;
        // Unreadable maps and environment (no permission) leave a process without libraries, not an error each time.
        known.libraries = self.proc_fs.libraries(pid).unwrap_or_default();
        let (declared, malformed) = parse_environ(&self.proc_fs.environ(pid).unwrap_or_default());
        let again = self.proc_fs.stat(pid)?;
        if again.dead || again.start_ticks != stat.start_ticks {
            return None;
        }
        known.declared = declared;
        if known.uses_gpu() {
            self.warn(pid, malformed);
        }
        Some(known)
    }

    fn warn(&mut self, pid: u32, malformed: Vec<Malformed>) {
        for malformed in malformed {
            if self.warned.len() >= MAX_WARNINGS || self.warned.contains(&malformed) {
                continue;
            }
            let Malformed {
                variable,
                value,
                wanted,
            } = &malformed;
            tracing::warn!(pid, "{variable}={value} is ignored: it should hold {wanted}");
            self.warned.insert(malformed);
        }
    }

    /// Compares what should be traced with what is.
    fn decide(&mut self) -> Vec<Action> {
        let mut wanted = classify(&self.known, &self.traced, &self.gpus);
        for Traced { facts, .. } in wanted.values_mut() {
            let declared = || {
                self.model
                    .as_ref()?
                    .flops_per_step(facts.job.as_deref(), facts.world)
            };
            facts.model_flops_per_step = facts.model_flops_per_step.or_else(declared);
        }
        let mut actions = Vec::new();
        for (key, traced) in &wanted {
            for id in &traced.libraries {
                if !self.attached.contains(id)
                    && let Some(library) = self.openable(key.pid, *id)
                {
                    self.attached.insert(*id);
                    actions.push(Action::AttachLibrary(library));
                }
            }
            if self.traced.get(key) != Some(traced) {
                actions.push(Action::Trace {
                    facts: Box::new(traced.facts.clone()),
                    libraries: traced.libraries.clone(),
                });
            }
        }
        actions.extend(
            self.traced
                .keys()
                .filter(|key| !wanted.contains_key(key))
                .map(|key| Action::Gone(*key)),
        );
        let used: BTreeSet<LibraryId> = wanted
            .values()
            .flat_map(|traced| traced.libraries.iter().copied())
            .collect();
        let unused: Vec<LibraryId> = self.attached.difference(&used).copied().collect();
        for id in unused {
            self.attached.remove(&id);
            actions.push(Action::ReleaseLibrary(id));
        }
        self.traced = wanted;
        actions
    }

    /// A path that opens the very file that is mapped.
    fn openable(&self, pid: u32, id: LibraryId) -> Option<Library> {
        let mapped = self
            .known
            .get(&pid)?
            .libraries
            .iter()
            .find(|library| library.id == id)?;
        // The path is another user's to change, and opening anything but a plain file may block or do worse.
        let is_it = |path: &Path| {
            std::fs::metadata(path).is_ok_and(|metadata| metadata.is_file() && metadata.ino() == id.inode)
        };
        let below_root = self
            .proc_fs
            .path(pid, "root")
            .join(mapped.path.trim_start_matches('/'));
        // A process in a chroot of the agent's own mount namespace shows the path as the agent sees it.
        let as_shown = PathBuf::from(&mapped.path);
        let path = [below_root, as_shown]
            .into_iter()
            .find(|path| !mapped.deleted && is_it(path))
            .unwrap_or_else(|| self.proc_fs.path(pid, "map_files").join(&mapped.range));
        Some(Library {
            id,
            kind: mapped.kind,
            path,
            shown: mapped.path.clone(),
            pid,
        })
    }
}
