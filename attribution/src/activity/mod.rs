//! Budgets from GPU activity records: when each kernel and copy ran, as the device itself recorded it.
//!
//! Every nanosecond of a GPU between its first and its last record gets one leaf ([`Label`]): the sweep compute >
//! communication > memory > idle decides what runs, and an idle gap is explained by what the host did before it
//! launched what ended the gap. Budgets, steps and blame are sums over these labels, so all of them agree to the ns.

mod analyse;
mod blame;
mod collectives;
mod contention;
mod efficiency;
mod host;
mod kernels;
mod label;
mod math;
mod steps;
mod verdict;

#[cfg(test)]
mod tests;

use crate::facts::{GpuSubject, RecordGap};
use crate::time::Window;

/// The node of a trace that does not name its host. Reports for people leave it out.
pub const UNNAMED_NODE: &str = "unnamed";

pub use analyse::analyse;
pub use host::Host;
pub use kernels::{KernelClass, Pipe, TABLE};
pub use label::Label;
pub use math::MathOp;
pub use steps::{Pattern, pattern};

/// What a record is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Work {
    /// A kernel.
    Kernel(KernelClass),
    /// A copy to the device over the host's link.
    ToDevice,
    /// A copy from the device over the host's link.
    ToHost,
    /// A copy or a fill within the device, or between devices.
    OnDevice,
}

/// The call that put work on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Launch {
    /// When the call began, ns of the records' clock.
    pub at_ns: u64,
    /// Thread that made it.
    pub thread: u32,
}

/// One thing a GPU did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// From its start to its end on the device.
    pub window: Window,
    /// What it was.
    pub work: Work,
    /// Stream.
    pub stream: u32,
    /// What launched it; `None` when the trace does not say.
    pub launch: Option<Launch>,
    /// Bytes moved; `None` when the trace does not say.
    pub bytes: Option<u64>,
    /// Equal for equal work: name, and grid and block where the trace gives them.
    pub token: u64,
    /// Whether the token tells shapes apart: without a grid one name may stand for different work.
    pub shaped: bool,
    /// Which units a matrix kernel uses, where its name tells.
    pub pipe: Option<Pipe>,
    /// A copy from or to memory that the host had not pinned.
    pub pageable: bool,
    /// Communicator and message of a communication kernel, equal on all its ranks.
    pub collective: Option<Collective>,
}

/// What is known of a communication kernel beyond its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Collective {
    /// Communicator, equal on all its ranks; 0 when the trace does not say.
    pub group: u64,
    /// Ranks in it; 0 when the trace does not say.
    pub ranks: u32,
    /// Operation and size, equal on all ranks.
    pub message: u64,
    /// Of a send or a receive the other rank; `None` of what all ranks of the communicator take part in, and where
    /// the trace does not say.
    pub peer: Option<Peer>,
    /// Bytes that the slowest link of each rank carries for it in a bandwidth-optimal algorithm, as bus bandwidth
    /// counts them; `None` when the trace does not give the size.
    pub bus_bytes: Option<u64>,
}

/// The other rank of a transfer between two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Peer {
    /// Sent to that rank.
    To(u32),
    /// Received from that rank.
    From(u32),
}

/// What a host thread did, in the priority in which overlapping ranges are swept (first wins).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Doing {
    /// Writing a checkpoint.
    Checkpoint,
    /// Collecting garbage.
    Gc,
    /// Compiling, loading modules, capturing graphs.
    Compile,
    /// In the driver's allocator.
    Alloc,
    /// Blocked in a synchronisation.
    Sync,
    /// Waiting for or making a batch.
    Data,
    /// In an operator or a call: issuing work.
    Issue,
}

/// A stretch of a host thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostRange {
    /// When.
    pub window: Window,
    /// Which thread.
    pub thread: u32,
    /// What it did.
    pub doing: Doing,
}

/// A stretch of a host thread in which it issued work of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Issued {
    /// Which thread.
    pub thread: u32,
    /// When.
    pub window: Window,
}

/// One GPU of one rank, with all its records.
#[derive(Debug, Clone)]
pub struct Device {
    /// Which GPU.
    pub subject: GpuSubject,
    /// Its records, in any order.
    pub records: Vec<Record>,
}

/// What one rank's trace holds.
#[derive(Debug, Clone)]
pub struct RankTrace {
    /// Its GPUs; more than one when a process drives several.
    pub devices: Vec<Device>,
    /// What its threads did.
    pub host: Vec<HostRange>,
    /// When threads issued forward work a second time, in the backward pass (activation checkpointing).
    pub repeated: Vec<Issued>,
    /// Operators whose arithmetic their shapes tell.
    pub math: Vec<MathOp>,
    /// Steps that the job marked, on the host's clock.
    pub marks: Vec<Window>,
    /// Thread of the training loop.
    pub main_thread: Option<u32>,
    /// `CLOCK_REALTIME` minus the records' clock, ns; `None` when the trace does not say.
    pub realtime_offset_ns: Option<i64>,
    /// What is missing.
    pub gaps: Vec<RecordGap>,
}

/// All traces of a job.
#[derive(Debug, Clone)]
pub struct TraceJob {
    /// Job name.
    pub job: String,
    /// Kind of job, or `unknown`.
    pub kind: String,
    /// What is known of it from outside the traces.
    pub declared: Declared,
    /// One per trace.
    pub ranks: Vec<RankTrace>,
}

/// What the user says of a job.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Declared {
    /// The model's own arithmetic per GPU and step, FLOP.
    pub model_flops_per_step: Option<u64>,
    /// Arithmetic per GPU and step with what is repeated, FLOP.
    pub hardware_flops_per_step: Option<u64>,
    /// How the two were told, in words.
    pub flops_from: String,
    /// Peak to measure against, FLOP/s, in place of the table's.
    pub peak_flops_per_s: Option<u64>,
    /// Precision whose peak counts, in place of that of most arithmetic.
    pub precision: Option<crate::peaks::Precision>,
    /// Bus bandwidth a collective should reach, bytes/s, in place of the best that the traces show.
    pub bus_bytes_per_s: Option<u64>,
}
