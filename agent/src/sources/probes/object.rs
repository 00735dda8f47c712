//! Finding and loading the BPF object, and the handle on what it does.

use std::collections::HashMap as StdHashMap;
use std::env;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use aya::maps::MapError;
use aya::programs::trace_point::TracePointLink;
use aya::programs::{Program, ProgramError, TracePoint, UProbe};
use aya::{Ebpf, EbpfError, EbpfLoader};

use super::attach::{AttachError, Attached, Attachments};
use super::detach;
use super::device_errors::{self, DeviceError, DeviceErrors, EventState};
use super::filter::{Filter, FilterError};
use super::format;
use super::health::{Health, Outcome};
use super::programs::{Hook, PROGRAMS, ProgramSpec, When};
use super::rings::Reader;
use super::stats::{Counters, RunStats, VerifierStats};
use super::verbs::{PostProbes, PostsError};
use super::waits::{ThreadWaits, WaitStates, WaitsConfig};
use crate::observation::ProcessRole;
use crate::sources::procs::{Library, LibraryId};

/// Names the object file; the configuration goes first.
const OBJECT_VARIABLE: &str = "STALLSCOPE_BPF_OBJECT";
const OBJECT_NAME: &str = "stallscope.bpf.o";

/// Settings of the probes. Times in ns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbesConfig {
    /// The object file; found when `None` (see [`object_places`]).
    pub object: Option<PathBuf>,
    /// A launch later than this after the last one starts a new launch run. Default 500 us.
    pub launch_gap_ns: u64,
    /// A launch run never grows longer than this. Default 10 ms.
    pub launch_run_ns: u64,
    /// Shorter times off the CPU are not recorded. Default 50 us.
    pub off_cpu_min_ns: u64,
    /// Shorter file calls are counted, not recorded. Default 200 us.
    pub file_call_min_ns: u64,
    /// Bytes lying in a ring that wake the reader early. Default 64 KiB; the smallest ring holds 1 MiB.
    pub wake_bytes: u64,
    /// When NCCL's wait hooks are attached.
    pub waits: WaitsConfig,
}

impl Default for ProbesConfig {
    fn default() -> Self {
        Self {
            object: None,
            launch_gap_ns: 500_000,
            launch_run_ns: 10_000_000,
            off_cpu_min_ns: 50_000,
            file_call_min_ns: 200_000,
            wake_bytes: 64 << 10,
            waits: WaitsConfig::default(),
        }
    }
}

/// Why there are no probes at all. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// No object file.
    #[error(
        "the BPF object was not found (looked at {}); name it in the configuration or in {OBJECT_VARIABLE}",
        searched.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    )]
    NotFound {
        /// Where it was looked for.
        searched: Vec<PathBuf>,
    },
    /// The object file cannot be read.
    #[error("the BPF object {} cannot be read: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The caller may not use BPF.
    #[error(
        "the kernel refuses BPF to this user; run as root, or with CAP_BPF, CAP_PERFMON and CAP_SYS_ADMIN: {source}"
    )]
    NotPermitted {
        /// What the kernel said.
        source: io::Error,
    },
    /// The object is not what this agent expects.
    #[error("the BPF object {} does not fit this agent: {source}; install both from one package", path.display())]
    Object {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<EbpfError>,
    },
    /// A map is missing from the object or cannot be used.
    #[error("the BPF object's map {map} cannot be used ({why}); install agent and object from one package")]
    Map {
        /// Which.
        map: &'static str,
        /// Why.
        why: String,
    },
}

/// Loaded probes.
pub struct Loaded {
    /// Attaches, detaches and filters.
    pub probes: Probes,
    /// Reads; may be used from another thread.
    pub reader: Reader,
    /// What each program gives.
    pub health: Health,
}

/// Control of the loaded programs. Dropping it detaches everything, which takes 10 to 100 ms a probe.
pub struct Probes {
    attachments: Attachments,
    tracing: Vec<TracePointLink>,
    _always: Vec<TracePointLink>,
    filter: Filter,
    waits: WaitStates,
    device_errors: DeviceErrors,
    posts: PostProbes,
    health: Health,
    run_time: Option<OwnedFd>,
    ebpf: Ebpf,
}

/// The places where the object is looked for, best first: the configuration, `STALLSCOPE_BPF_OBJECT`, beside the binary, and
/// `../lib/stallscope/` from there.
#[must_use]
pub fn object_places(configured: Option<&Path>) -> Vec<PathBuf> {
    if let Some(path) = configured {
        return vec![path.to_owned()];
    }
    if let Some(path) = env::var_os(OBJECT_VARIABLE).filter(|path| !path.is_empty()) {
        return vec![path.into()];
    }
    let exe = env::current_exe().unwrap_or_default();
    let folder = exe.parent().unwrap_or(Path::new(""));
    let mut places = vec![folder.join(OBJECT_NAME)];
    if let Some(prefix) = folder.parent() {
        places.push(prefix.join("lib/stallscope").join(OBJECT_NAME));
    }
    places
}

impl Probes {
    /// Finds and loads the object, and attaches what needs no library.
    ///
    /// A program that this kernel cannot run is named in the health and the rest goes on.
    ///
    /// # Errors
    /// [`LoadError`]: no object, no permission, or an object of another version.
    pub fn load(config: &ProbesConfig) -> Result<Loaded, LoadError> {
        let path = find_object(config)?;
        let bytes = fs::read(&path).map_err(|source| LoadError::Read {
            path: path.clone(),
            source,
        })?;
        let mut health = Health::of_all();
        let mut offsets = read_offsets(&mut health);
        let of_devices = device_errors::offsets();
        offsets.extend(&of_devices);
        let mut ebpf = load_object(&path, &bytes, config, &offsets)?;
        load_programs(&mut ebpf, &mut health)?;
        let always = attach_tracepoints(&mut ebpf, When::Always, &mut health);
        let posts = PostProbes::new(&mut ebpf)?;
        let reader = Reader::new(&mut ebpf, config.launch_gap_ns, posts.watched())?;
        let filter = Filter::new(take_map(&mut ebpf, "PROCESSES")?, take_map(&mut ebpf, "HINTS")?);
        let waits = WaitStates::new(&mut ebpf, config.waits)?;
        let device_errors = DeviceErrors::new(&mut ebpf, of_devices)?;
        let probes = Self {
            attachments: Attachments::default(),
            tracing: Vec::new(),
            _always: always,
            filter,
            waits,
            device_errors,
            posts,
            health: health.clone(),
            run_time: None,
            ebpf,
        };
        Ok(Loaded {
            probes,
            reader,
            health,
        })
    }

    /// Attaches to every known function of the library. Attaching twice changes nothing.
    ///
    /// # Errors
    /// [`AttachError`] when nothing of the library can be traced; single failures are in [`Attached`].
    pub fn attach_library(&mut self, library: &Library) -> Result<Attached, AttachError> {
        let (attached, file) = self.attachments.attach(&mut self.ebpf, library)?;
        if let (Some(file), Some(Ok(hooks))) = (file, &attached.waits) {
            self.waits.add(library.id, file, *hooks);
        }
        Ok(attached)
    }

    /// Attaches or detaches NCCL's wait hooks when it is time, and gives what a window that is over held. Call it a few times
    /// a second; it may take as long as attaching two functions.
    pub fn poll_waits(&mut self, now_ns: u64) -> Vec<ThreadWaits> {
        self.waits.poll(&mut self.ebpf, now_ns)
    }

    /// Keeps the wait hooks detached, as long as another source tells the same of every process.
    pub fn hold_waits(&mut self, hold: bool) {
        self.waits.hold(hold);
    }

    /// Why the wait hooks could not be attached the last time.
    #[must_use]
    pub fn waits_trouble(&self) -> Option<&str> {
        self.waits.trouble()
    }

    /// Errors of devices that the kernel's own events told since the last call. Now and then it looks for events that were
    /// not there.
    pub fn poll_device_errors(&mut self, now_ns: u64) -> Vec<DeviceError> {
        self.device_errors.poll(&mut self.ebpf, &self.health, now_ns)
    }

    /// What a test attaches and reads by itself.
    #[cfg(test)]
    pub(super) fn parts(&mut self) -> (&mut Ebpf, &mut DeviceErrors) {
        (&mut self.ebpf, &mut self.device_errors)
    }

    /// Events of devices by name, and how each stands.
    #[must_use]
    pub fn device_events(&self) -> Vec<(String, EventState)> {
        self.device_errors.states()
    }

    /// Errors of devices lost because nobody read them, since the last call.
    pub fn take_lost_device_errors(&mut self) -> u64 {
        self.device_errors.take_dropped()
    }

    /// Attaches to the function through which the process posts to RDMA queue pairs, as
    /// [`ProcessEvent::PostsThrough`](crate::sources::procs::ProcessEvent::PostsThrough) told.
    ///
    /// # Errors
    /// [`PostsError`]: what is posted through it stays unseen.
    pub fn watch_posts(&mut self, tgid: u32, address: u64, by: u32) -> Result<(), PostsError> {
        self.posts.watch(&mut self.ebpf, tgid, address, by)
    }

    /// Looks for RDMA providers that the process maps and whose functions have names, and attaches to those: the process may
    /// have made its queue pairs before anyone looked. Gives how many functions are watched for it.
    ///
    /// # Errors
    /// [`PostsError`]: what is posted through one of them stays unseen.
    pub fn look_for_posts(&mut self, tgid: u32) -> Result<usize, PostsError> {
        self.posts.look_at(&mut self.ebpf, tgid)
    }

    /// Detaches from the library; nothing happens when it is not attached.
    pub fn release_library(&mut self, id: LibraryId) {
        self.waits.remove(id);
        self.attachments.release(id);
    }

    /// The attached libraries.
    pub fn libraries(&self) -> impl Iterator<Item = LibraryId> {
        self.attachments.ids()
    }

    /// Records this process from now on, and all children it has from now on.
    ///
    /// # Errors
    /// The kernel's map is full.
    pub fn trace_process(&mut self, tgid: u32, role: ProcessRole) -> Result<(), FilterError> {
        if self.tracing.is_empty() {
            self.tracing = attach_tracepoints(&mut self.ebpf, When::Tracing, &mut self.health);
        }
        self.filter.add(tgid, role)
    }

    /// Records this process no longer.
    pub fn forget_process(&mut self, tgid: u32) {
        self.filter.remove(tgid);
        self.waits.forget(tgid);
        self.posts.forget(tgid);
        if self.filter.is_empty() {
            let links = std::mem::take(&mut self.tracing);
            drop(detach::in_background(move || drop(links)));
        }
    }

    /// What each program gives now.
    #[must_use]
    pub fn health(&self) -> &Health {
        &self.health
    }

    /// The size of every loaded program as the verifier saw it; empty on kernels before 5.16.
    #[must_use]
    pub fn verifier_stats(&self) -> Vec<VerifierStats> {
        self.counters()
            .filter_map(|(program, counters)| {
                let verified_instructions = counters.verified_instructions?;
                Some(VerifierStats {
                    program,
                    verified_instructions,
                })
            })
            .collect()
    }

    /// Makes the kernel count runs and run times, at about 20 ns a run; until this value is dropped.
    ///
    /// # Errors
    /// The kernel is older than 5.8 or refuses.
    pub fn count_runs(&mut self) -> io::Result<()> {
        let guard = aya::sys::enable_stats(aya::sys::Stats::RunTime).map_err(|error| error.io_error)?;
        self.run_time = Some(guard);
        Ok(())
    }

    /// Runs and run times of every loaded program, counted while [`Probes::count_runs`] is on.
    #[must_use]
    pub fn run_stats(&self) -> Vec<RunStats> {
        self.counters()
            .filter_map(|(program, counters)| {
                Some(RunStats {
                    program,
                    runs: counters.runs?,
                    run_ns: counters.run_ns?,
                })
            })
            .collect()
    }

    fn counters(&self) -> impl Iterator<Item = (&'static str, Counters)> {
        PROGRAMS.iter().filter_map(|spec| {
            let fd = self.ebpf.program(spec.name)?.fd().ok()?;
            Some((spec.name, Counters::read(fd)))
        })
    }
}

fn find_object(config: &ProbesConfig) -> Result<PathBuf, LoadError> {
    let searched = object_places(config.object.as_deref());
    match searched.iter().find(|path| path.exists()) {
        Some(path) => Ok(path.clone()),
        None => Err(LoadError::NotFound { searched }),
    }
}

/// Reads the offsets of all tracepoint fields; what cannot be read makes the programs on that tracepoint unsupported.
fn read_offsets(health: &mut Health) -> StdHashMap<&'static str, u32> {
    let mut offsets = StdHashMap::new();
    let tracefs = match format::tracefs() {
        Ok(tracefs) => tracefs,
        Err(error) => {
            for spec in PROGRAMS
                .iter()
                .filter(|spec| matches!(spec.hook, Hook::Tracepoints(..)))
            {
                let why = format!("tracefs is not mounted and cannot be: {error}");
                health.set(spec.name, Outcome::Unsupported(why));
            }
            return offsets;
        }
    };
    for offset in format::OFFSETS {
        match offset.read(&tracefs) {
            Ok(value) => {
                offsets.insert(offset.setting, value);
            }
            Err(why) => {
                for spec in PROGRAMS.iter().filter(|spec| needs(spec, &offset.tracepoint())) {
                    health.set(spec.name, Outcome::Unsupported(why.clone()));
                }
            }
        }
    }
    offsets
}

/// Whether the program reads fields of that tracepoint. All system calls share the layout of `mmap`'s.
fn needs(spec: &ProgramSpec, tracepoint: &str) -> bool {
    let Hook::Tracepoints(_, points) = spec.hook else {
        return false;
    };
    points.iter().any(|(category, event)| {
        let name = format!("{category}/{event}");
        name == tracepoint
            || (tracepoint == "syscalls/sys_enter_mmap" && name.starts_with("syscalls/sys_enter_"))
            || (tracepoint == "syscalls/sys_exit_mmap" && name.starts_with("syscalls/sys_exit_"))
    })
}

fn load_object(
    path: &Path,
    bytes: &[u8],
    config: &ProbesConfig,
    offsets: &StdHashMap<&'static str, u32>,
) -> Result<Ebpf, LoadError> {
    let mut loader = EbpfLoader::new();
    loader
        .override_global("LAUNCH_GAP_NS", &config.launch_gap_ns, true)
        .override_global("LAUNCH_RUN_NS", &config.launch_run_ns, true)
        .override_global("OFF_CPU_MIN_NS", &config.off_cpu_min_ns, true)
        .override_global("FILE_CALL_MIN_NS", &config.file_call_min_ns, true)
        .override_global("WAKE_BYTES", &config.wake_bytes, true);
    for (setting, offset) in offsets {
        loader.override_global(setting, offset, true);
    }
    loader.load(bytes).map_err(|error| match permission(&error) {
        Some(source) => LoadError::NotPermitted { source },
        None => LoadError::Object {
            path: path.to_owned(),
            source: Box::new(error),
        },
    })
}

/// The refusal somewhere in the chain of causes.
fn permission(error: &(dyn std::error::Error + 'static)) -> Option<io::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<io::Error>()
            && error.kind() == io::ErrorKind::PermissionDenied
        {
            return Some(io::Error::from(io::ErrorKind::PermissionDenied));
        }
        cause = error.source();
    }
    None
}

fn load_programs(ebpf: &mut Ebpf, health: &mut Health) -> Result<(), LoadError> {
    for spec in PROGRAMS {
        if health.of(spec.name) != Some(&Outcome::Ok) {
            continue;
        }
        let Err(error) = load_program(ebpf, spec) else {
            continue;
        };
        if let Some(source) = permission(&error)
            && !was_verified(&error)
        {
            return Err(LoadError::NotPermitted { source });
        }
        health.set(spec.name, Outcome::Broken(one_line(&error)));
    }
    Ok(())
}

/// The verifier refuses with the same error as the check of permissions, but says why.
fn was_verified(error: &ProgramError) -> bool {
    matches!(error, ProgramError::LoadError { verifier_log, .. } if !verifier_log.to_string().is_empty())
}

fn load_program(ebpf: &mut Ebpf, spec: &ProgramSpec) -> Result<(), ProgramError> {
    let program = ebpf.program_mut(spec.name).ok_or(ProgramError::InvalidName {
        name: spec.name.to_owned(),
    })?;
    match spec.hook {
        Hook::Entry | Hook::Return => <&mut UProbe>::try_from(program)?.load(),
        Hook::Tracepoints(..) => <&mut TracePoint>::try_from(program)?.load(),
    }
}

/// An error with its causes; of a verifier's log only the end, where the reason stands.
fn one_line(error: &dyn std::error::Error) -> String {
    let text = error.to_string();
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    match lines.as_slice() {
        [] => String::new(),
        [line] => (*line).to_owned(),
        [first, .., reason, last] if last.starts_with("processed ") => format!("{first} .. {reason}"),
        [first, .., last] => format!("{first} .. {last}"),
    }
}

/// Attaches the tracepoint programs of this kind; every failure is in the health.
fn attach_tracepoints(ebpf: &mut Ebpf, wanted: When, health: &mut Health) -> Vec<TracePointLink> {
    let mut links = Vec::new();
    for spec in PROGRAMS {
        let Hook::Tracepoints(when, points) = spec.hook else {
            continue;
        };
        if when != wanted || health.of(spec.name) != Some(&Outcome::Ok) {
            continue;
        }
        let mut failures = Vec::new();
        for (category, event) in points {
            match attach_tracepoint(ebpf, spec.name, category, event) {
                Ok(link) => links.push(link),
                Err(error) => failures.push(format!("{category}/{event}: {error}")),
            }
        }
        if failures.len() == points.len() {
            health.set(spec.name, Outcome::Broken(failures.join("; ")));
        } else if !failures.is_empty() {
            tracing::warn!(
                program = spec.name,
                failures = failures.join("; "),
                "some tracepoints are missing"
            );
        }
    }
    links
}

pub(super) fn attach_tracepoint(
    ebpf: &mut Ebpf,
    name: &str,
    category: &str,
    event: &str,
) -> Result<TracePointLink, ProgramError> {
    let program: &mut Program = ebpf.program_mut(name).ok_or(ProgramError::InvalidName {
        name: name.to_owned(),
    })?;
    let program = <&mut TracePoint>::try_from(program)?;
    let id = program.attach(category, event)?;
    program.take_link(id)
}

/// Takes a map out of the object.
pub(super) fn take_map<M>(ebpf: &mut Ebpf, map: &'static str) -> Result<M, LoadError>
where
    M: TryFrom<aya::maps::Map, Error = MapError>,
{
    let found = ebpf.take_map(map).ok_or_else(|| LoadError::Map {
        map,
        why: "it is missing".to_owned(),
    })?;
    M::try_from(found).map_err(|error| LoadError::Map {
        map,
        why: error.to_string(),
    })
}
