//! Which processes are traced, and what they are: job, rank, GPU, role.
//!
//! # Facade
//! - [`Discovery::new`]`(proc_root, scope_cgroup)`; nothing is read before the first poll.
//! - [`Discovery::set_model`]`(model)`: what the configuration declares of the model.
//! - [`Discovery::on_event`]`(event, now_ns)`: what the probes saw ([`ProcessEvent`]); cheap, reads nothing.
//! - [`Discovery::set_gpus`]`(gpus)`: what NVML knows ([`GpuView`]); call after every slow loop of NVML.
//! - [`Discovery::poll`]`(now_ns) -> Vec<Action>`: call when [`Discovery::due_ns`] is reached (at most 500 ms away), and in
//!   any case every 100 ms. It reads changed processes 100 ms after the event, and everything every 5 s.
//! - [`Discovery::set_events_live`]`(bool)`: whether process events arrive. Without them changes are found by size of the
//!   address space every 500 ms.
//!
//! - [`QuotaReader::new`]`(proc_root)` and [`QuotaReader::poll`]`(now_ns, keys) -> Vec<Observation>`: `Fact::CpuQuota` of
//!   the GPU processes given, once a second; call as often as convenient.
//!
//! - [`CpuTimeReader`]: `Fact::ThreadCpu` of helpers that the scheduler's records say nothing of.
//!
//! Actions come in an order that can be applied one by one: a library is attached before the first process that uses
//! it is traced, and released after the last is gone.

mod cgroup;
mod classify;
mod cpu_time;
mod discovery;
mod environ;
mod gpu;
mod maps;
mod proc_fs;
mod quota;
#[cfg(test)]
mod tests;

pub use cpu_time::CpuTimeReader;
pub use discovery::Discovery;
pub(crate) use maps::{Mapping, for_each_mapping};
pub use quota::QuotaReader;

use std::path::PathBuf;

use crate::observation::{ProcessFacts, ProcessKey};

/// What happened to a process, as the probes saw it. Pids are thread groups in the agent's pid namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessEvent {
    /// It replaced its image.
    Exec {
        /// Which.
        tgid: u32,
    },
    /// It mapped a file executable: perhaps a library by `dlopen`.
    MapExec {
        /// Which.
        tgid: u32,
    },
    /// It was made.
    Fork {
        /// By whom.
        parent: u32,
        /// The new process.
        child: u32,
    },
    /// Its last thread ended.
    Exit {
        /// Which.
        tgid: u32,
    },
    /// It is about to post to RDMA queue pairs through this function of their provider.
    PostsThrough {
        /// Which.
        tgid: u32,
        /// Address of the function in the process.
        address: u64,
        /// How it posts: one of `stallscope_records::verbs::posts_by`.
        by: u32,
    },
}

/// What to do about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Attach probes to this library file. Comes before the first [`Action::Trace`] that names it.
    AttachLibrary(Library),
    /// No traced process maps it any more: detach.
    ReleaseLibrary(LibraryId),
    /// Trace this process, or, when it is traced already, know more about it.
    Trace {
        /// What it is; also the fact to pass on (`Fact::Process`).
        facts: Box<ProcessFacts>,
        /// The probed libraries it maps; empty for a helper without any.
        libraries: Vec<LibraryId>,
    },
    /// It is gone, or is not traced any more (`Fact::ProcessGone`).
    Gone(ProcessKey),
}

/// A file, wherever it is mounted, as `/proc/PID/maps` names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LibraryId {
    /// Device, `major << 32 | minor`.
    pub device: u64,
    /// Inode.
    pub inode: u64,
}

/// A world that is probed through a library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LibraryKind {
    /// `libnccl.so*`
    Nccl,
    /// `libcuda.so*`, the driver's API.
    Cuda,
    /// `libibverbs.so*`. Many programs have it that use no GPU: it makes none a process to trace.
    Verbs,
}

/// A library to probe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Library {
    /// Which file.
    pub id: LibraryId,
    /// Which world.
    pub kind: LibraryKind,
    /// A path at which the agent can open that very file now: through `/proc/PID/root`, or `/proc/PID/map_files` when it
    /// was deleted or replaced on disk. Valid while the process `pid` lives.
    pub path: PathBuf,
    /// As the process itself names it, for messages.
    pub shown: String,
    /// The process it was found in.
    pub pid: u32,
}

/// What NVML knows of the node's GPUs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GpuView {
    /// The devices, by index.
    pub devices: Vec<GpuIdentity>,
    /// Compute processes, as (GPU index, pid); `None` when NVML cannot tell.
    pub processes: Option<Vec<(u32, u32)>>,
}

/// One GPU's names.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct GpuIdentity {
    /// Index as the driver counts.
    pub index: u32,
    /// `GPU-xxxxxxxx-...`; empty when unknown.
    pub uuid: String,
    /// PCI address `dddd:bb:dd.f`; empty when unknown.
    pub pci: String,
    /// Device name; empty when unknown.
    pub name: String,
}
