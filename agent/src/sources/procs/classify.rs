//! Who uses a GPU, who works for whom, and for which job. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::discovery::{Known, Traced};
use super::gpu::{gpu_of, is_listed};
use super::{GpuView, LibraryId, LibraryKind};
use crate::observation::{ProcessFacts, ProcessKey, ProcessRole};

/// Longest chain of parents followed; a cycle can only come from pids reused between two reads.
const MAX_ANCESTORS: usize = 64;

/// What should be traced, given what is known and what is traced already.
///
/// - A process that maps the driver's or NCCL's library, or is on the driver's list, is a GPU process, unless it is a
///   forked worker: it descends from one that maps the driver's library, has the same rank, and is not on the
///   driver's list.
/// - Every other descendant of a GPU process that maps the driver's library is a helper.
/// - A helper stays one when its parent chain breaks, for as long as the process it works for lives.
pub(super) fn classify(
    known: &BTreeMap<u32, Known>,
    traced: &BTreeMap<ProcessKey, Traced>,
    view: &GpuView,
) -> BTreeMap<ProcessKey, Traced> {
    let world = World { known, traced, view };
    let gpu_pids: BTreeSet<u32> = world.candidates().filter(|&pid| !world.is_worker(pid)).collect();
    let owner = |pid: u32| world.owner(pid, &gpu_pids);
    let gpus = gpu_pids.iter().filter_map(|&pid| world.gpu_process(pid));
    let helpers = known
        .iter()
        .filter(|(pid, process)| process.in_scope && !gpu_pids.contains(pid))
        .filter_map(|(&pid, _)| world.helper(pid, owner(pid)?));
    gpus.chain(helpers)
        .map(|traced| (traced.facts.key, traced))
        .collect()
}

struct World<'a> {
    known: &'a BTreeMap<u32, Known>,
    traced: &'a BTreeMap<ProcessKey, Traced>,
    view: &'a GpuView,
}

impl World<'_> {
    fn candidates(&self) -> impl Iterator<Item = u32> {
        self.known.iter().filter_map(|(&pid, process)| {
            let uses = process.uses_gpu() || is_listed(pid, self.view) == Some(true);
            (process.in_scope && uses).then_some(pid)
        })
    }

    fn uses_driver(&self, pid: u32) -> bool {
        is_listed(pid, self.view) == Some(true) || self.known.get(&pid).is_some_and(maps_driver)
    }

    /// The nearest first.
    fn ancestors(&self, pid: u32) -> impl Iterator<Item = (u32, &Known)> {
        let parent = |pid: u32| {
            let child = self.known.get(&pid)?;
            let parent = self.known.get(&child.parent_pid)?;
            // A parent younger than its child is another process that got the pid.
            (parent.in_scope && parent.start_ticks <= child.start_ticks).then_some((child.parent_pid, parent))
        };
        std::iter::successors(parent(pid), move |(pid, _)| parent(*pid)).take(MAX_ANCESTORS)
    }

    /// A forked data loader maps its parent's libraries without using the GPU.
    fn is_worker(&self, pid: u32) -> bool {
        if is_listed(pid, self.view) == Some(true) {
            return false;
        }
        let Some(process) = self.known.get(&pid) else {
            return false;
        };
        let same_rank = |ancestor: &Known| ancestor.declared.rank == process.declared.rank;
        let descends = self
            .ancestors(pid)
            .any(|(ancestor_pid, ancestor)| self.uses_driver(ancestor_pid) && same_rank(ancestor));
        descends || self.remembered_owner(pid, process).is_some()
    }

    fn remembered_owner(&self, pid: u32, process: &Known) -> Option<u32> {
        let owner = self.traced.get(&process.key(pid))?.facts.works_for?;
        self.known
            .get(&owner.pid)
            .filter(|known| known.start_ticks == owner.start_ticks)
            .map(|_| owner.pid)
    }

    fn owner(&self, pid: u32, gpu_pids: &BTreeSet<u32>) -> Option<u32> {
        let is_owner = |pid: &u32| gpu_pids.contains(pid) && self.uses_driver(*pid);
        self.ancestors(pid)
            .map(|(ancestor, _)| ancestor)
            .find(is_owner)
            .or_else(|| self.remembered_owner(pid, self.known.get(&pid)?).filter(is_owner))
    }

    fn gpu_process(&self, pid: u32) -> Option<Traced> {
        let process = self.known.get(&pid)?;
        let declared = &process.declared;
        // Slurm gives its step's variables to launchers too, and those map NCCL without using a GPU.
        let launcher = declared.rank_by_slurm && !self.uses_driver(pid);
        let rank = declared.rank.filter(|_| !launcher);
        let facts = ProcessFacts {
            key: process.key(pid),
            parent_pid: process.parent_pid,
            comm: process.comm.clone(),
            role: ProcessRole::Gpu,
            works_for: None,
            job: job_of(process, rank),
            rank,
            world: declared.world.filter(|_| rank.is_some()),
            local_rank: declared.local_rank.filter(|_| rank.is_some()),
            gpu: gpu_of(pid, declared, self.view),
            cgroup: process.cgroups.cpu().to_owned(),
            kind: declared.kind.clone(),
            model_flops_per_step: declared.model_flops_per_step,
        };
        Some(Traced {
            facts,
            libraries: library_ids(process),
        })
    }

    fn helper(&self, pid: u32, owner_pid: u32) -> Option<Traced> {
        let process = self.known.get(&pid)?;
        let owner = self.gpu_process(owner_pid)?.facts;
        let facts = ProcessFacts {
            key: process.key(pid),
            parent_pid: process.parent_pid,
            comm: process.comm.clone(),
            role: ProcessRole::Helper,
            works_for: Some(owner.key),
            cgroup: process.cgroups.cpu().to_owned(),
            ..owner
        };
        Some(Traced {
            facts,
            libraries: library_ids(process),
        })
    }
}

fn maps_driver(process: &Known) -> bool {
    process
        .libraries
        .iter()
        .any(|library| library.kind == LibraryKind::Cuda)
}

fn library_ids(process: &Known) -> Vec<LibraryId> {
    let mut ids: Vec<LibraryId> = process.libraries.iter().map(|library| library.id).collect();
    ids.sort_unstable();
    ids
}

/// The declared or scheduler's name. A rank without one belongs to a job named by what its ranks share: the
/// rendezvous on all nodes, else the container or the session on this one. A process without any of these belongs to
/// no job.
fn job_of(process: &Known, rank: Option<u32>) -> Option<String> {
    let declared = &process.declared;
    let unnamed = || {
        rank?;
        let session = || format!("session-{}", process.session);
        Some(
            declared
                .rendezvous
                .clone()
                .or_else(|| process.cgroups.container())
                .unwrap_or_else(session),
        )
    };
    declared
        .job
        .clone()
        .or_else(|| process.cgroups.slurm_job())
        .or_else(unnamed)
}
