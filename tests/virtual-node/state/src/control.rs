//! The knobs by which faults and the end of the run reach the ranks of a job, and the ranks' progress.

use std::sync::atomic::{AtomicU32, AtomicU64};

use crate::map::Shareable;

/// Its file in the run's folder, above those of the nodes.
pub const FILE: &str = "control";
/// Most ranks a job may have.
pub const MAX_RANKS: usize = 64;

/// One rank's knobs and progress.
#[repr(C)]
#[derive(Debug)]
pub struct RankControl {
    /// Process id of the trainer.
    pub pid: AtomicU32,
    /// 1 once the rank has left its training loop.
    pub finished: AtomicU32,
    /// Steps begun.
    pub steps: AtomicU64,
    /// When the first step began; 0 before.
    pub first_step_ns: AtomicU64,
    /// Decoding work of a batch, ppm of normal.
    pub decode_ppm: AtomicU64,
    /// 1: dataset files are dropped from the page cache before they are read.
    pub cold_reads: AtomicU32,
    /// Time that the last reads of such files took, ns; 0 once it was taken note of.
    pub read_ns: AtomicU64,
    /// Each kernel is launched as this many shorter ones.
    pub launch_split: AtomicU32,
    /// Processor time of one launch, ns.
    pub launch_cost_ns: AtomicU64,
    /// A checkpoint every this many steps; 0 never.
    pub checkpoint_every: AtomicU32,
    /// 0: nothing; else the rank leaves with an error at once.
    pub abandon: AtomicU32,
    /// Bytes each checkpoint writes.
    pub checkpoint_bytes: AtomicU64,
    /// What the rank's proxy takes in from other nodes, bytes/s; 0: as fast as it comes.
    pub drain_bytes_per_s: AtomicU64,
}

/// One job's knobs.
#[repr(C)]
#[derive(Debug)]
pub struct Control {
    /// Ranks leave their training loop before beginning this step.
    pub stop_at_step: AtomicU64,
    /// By rank.
    pub ranks: [RankControl; MAX_RANKS],
}

// SAFETY: `repr(C)` and atomics throughout.
unsafe impl Shareable for Control {}
