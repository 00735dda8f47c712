//! What was observed, in the form the budget and the verdicts take it.
//!
//! [`StepEvidence`] is everything known about one GPU in one window; the budget turns it into a [`GpuStep`], which
//! is what the stream carries and what ranks are joined from.

mod device;
mod hardware;
mod waits;

use crate::budget::Budget;
use crate::leaf::Leaf;
use crate::reading::Reading;
use crate::time::Window;

pub use device::{Activity, ClockFacts, ForeignLoad, LinkFacts};
pub use hardware::{
    AerSeverity, Counter, DeviceEvent, DeviceEventKind, HardwareFact, HardwareFacts, PciDevice, PciKind,
    PciLink, QueuePair, RdmaPort,
};
pub use waits::{ProcessWaits, StepWait, StepWaits};

/// One million parts, the unit of every share in this crate.
pub const PPM: u64 = 1_000_000;

/// Which GPU, of which rank, of which job.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GpuSubject {
    /// Job name as the scheduler or the environment gives it.
    pub job: String,
    /// Node name.
    pub node: String,
    /// GPU index on the node, as the driver counts.
    pub gpu: u32,
    /// PCI address `dddd:bb:dd.f`; empty when unknown.
    pub pci: String,
    /// Device name as the driver gives it; empty when unknown.
    pub device: String,
    /// Rank in the job.
    pub rank: u32,
    /// Number of ranks; 0 when unknown.
    pub world: u32,
    /// Process id on the node.
    pub pid: u32,
}

/// What the GPU could do at best. From the peaks table, calibration and the driver.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DeviceProfile {
    /// Dense peak of the job's dominant tensor type, FLOP/s.
    pub peak_flops_per_s: Option<u64>,
    /// Best rate measured by any GEMM on this device, FLOP/s.
    pub reachable_flops_per_s: Option<u64>,
    /// SM clock at which the peak holds, MHz.
    pub reference_sm_mhz: Option<u32>,
    /// Streaming multiprocessors.
    pub sm_count: Option<u32>,
    /// Host link at its best, bytes/s per direction.
    pub host_link_bytes_per_s: Option<u64>,
    /// Model FLOPs of one step on this GPU, when the job declares them.
    pub model_flops_per_step: Option<u64>,
    /// Reference rate of a collective's slowest link, bytes/s per direction. Without it no exposed communication
    /// can be called unavoidable.
    pub comm_bytes_per_s: Option<u64>,
}

/// How the edges of a step were found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum StepMethod {
    /// Period of the collective sequence.
    CollectivePeriod,
    /// Period of the launch sequence.
    LaunchPeriod,
    /// Fed by the job or a trace.
    Declared,
    /// No period found: windows of fixed length.
    FixedWindow,
}

impl StepMethod {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CollectivePeriod => "collective_period",
            Self::LaunchPeriod => "launch_period",
            Self::Declared => "declared",
            Self::FixedWindow => "fixed_window",
        }
    }
}

/// What the launching thread did, in the priority in which overlapping states are swept (first wins).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum HostState {
    /// In a write or flush of a checkpoint, or in the device-to-host burst before it.
    Checkpoint,
    /// In a garbage collection.
    Gc,
    /// Compiling.
    Compile,
    /// In the driver's allocator.
    Alloc,
    /// Blocked in a synchronisation call.
    Sync,
    /// Blocked in a collective or communicator call.
    CommCall,
    /// Reading files itself.
    FileRead,
    /// Off CPU, sleeping, outside any traced call: waiting for a batch, a lock or a peer.
    Waiting,
    /// Wants a CPU and does not have one.
    Runnable,
    /// On CPU.
    OnCpu,
}

/// A stretch of time in one state. Stretches may overlap; [`HostState`]'s order decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateInterval {
    /// When.
    pub window: Window,
    /// In which state.
    pub state: HostState,
}

/// What the data-loader workers of the process (child processes and reading threads) did in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkerLoad {
    /// When.
    pub window: Window,
    /// Thread-nanoseconds on CPU or waiting for one.
    pub cpu_ns: u64,
    /// Thread-nanoseconds blocked on files or devices.
    pub io_ns: u64,
}

/// Copies between host and device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Copies {
    /// Bytes to the device.
    pub to_device_bytes: u64,
    /// Bytes from the device.
    pub to_host_bytes: u64,
    /// Number of copies.
    pub count: u32,
    /// Time the host was blocked in synchronous copies, ns.
    pub blocked_ns: u64,
}

/// One collective as the host enqueued it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CollectiveFact {
    /// Key of the communicator, equal on all its ranks when it is known; else unique to the process.
    pub comm: u64,
    /// Position in the communicator's sequence, counted since tracing began.
    pub sequence: u64,
    /// Stable name: `all_reduce`, `all_gather`, ...
    pub function: &'static str,
    /// Payload in bytes, by the function's own count.
    pub bytes: u64,
    /// Ranks in the communicator; 0 when unknown.
    pub ranks: u32,
    /// When the call ran on the host.
    pub call: Window,
}

/// Everything known about one GPU in one step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepEvidence {
    /// Which GPU.
    pub subject: GpuSubject,
    /// Position of the step in the rank's own count.
    pub index: u64,
    /// From one step edge to the next.
    pub window: Window,
    /// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC` on the node at the end of the window, ns.
    pub realtime_offset_ns: i64,
    /// How the edges were found.
    pub method: StepMethod,
    /// When the GPU certainly had nothing submitted: from the return of a synchronisation that drained it to the
    /// next submission. Disjoint and sorted.
    pub drained: Vec<Window>,
    /// States of the launching thread over the whole window; may overlap, may leave holes.
    pub host: Vec<StateInterval>,
    /// The data loaders' load, in consecutive windows.
    pub workers: Vec<WorkerLoad>,
    /// Time the process group was throttled by its CPU quota.
    pub quota_throttled_ns: Reading<u64>,
    /// Kernel and graph launches.
    pub launches: u64,
    /// Copies.
    pub copies: Copies,
    /// Collectives, in order of their calls.
    pub collectives: Vec<CollectiveFact>,
    /// GPU activity.
    pub activity: Reading<Activity>,
    /// Clocks.
    pub clock: Reading<ClockFacts>,
    /// Other processes on the GPU.
    pub foreign: Reading<ForeignLoad>,
    /// The GPU's links and faults.
    pub links: Reading<LinkFacts>,
    /// Kernel records lost in the window: what they would have said is missing above.
    pub lost_records: u64,
}

/// Scalars of a step that the job-wide analysis needs beside the budget.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepSignals {
    /// Launching thread on CPU, ns.
    pub host_on_cpu_ns: u64,
    /// Launching thread wanting a CPU, ns.
    pub host_runnable_ns: u64,
    /// Launching thread blocked in synchronisation, ns.
    pub host_sync_ns: u64,
    /// Throttled by CPU quota, ns.
    pub quota_throttled_ns: Reading<u64>,
    /// Data loaders on CPU or waiting for one, thread-ns.
    pub worker_cpu_ns: u64,
    /// Data loaders blocked on storage, thread-ns.
    pub worker_io_ns: u64,
    /// Kernel launches.
    pub launches: u64,
    /// Bytes given to collectives.
    pub comm_bytes: u64,
    /// Number of collectives.
    pub collectives: u32,
    /// Offset of the first collective's call from the start of the step, ns; `None` without collectives.
    pub first_collective_ns: Option<u64>,
    /// Offset of the last collective's call from the start of the step, ns.
    pub last_collective_ns: Option<u64>,
    /// GPU activity.
    pub activity: Reading<Activity>,
    /// Clocks.
    pub clock: Reading<ClockFacts>,
    /// Reference clock used, MHz.
    pub reference_sm_mhz: Option<u32>,
    /// Other processes.
    pub foreign: Reading<ForeignLoad>,
    /// The GPU's links and faults.
    pub links: Reading<LinkFacts>,
    /// Lost kernel records.
    pub lost_records: u64,
}

/// One GPU in one step: the budget and what the verdicts need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuStep {
    /// Position of the step in the rank's own count.
    pub index: u64,
    /// From one step edge to the next, `CLOCK_MONOTONIC` of the node.
    pub window: Window,
    /// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC`, ns.
    pub realtime_offset_ns: i64,
    /// How the edges were found.
    pub method: StepMethod,
    /// Collectives per step; the period of the pattern.
    pub period_calls: u32,
    /// Where the window went.
    pub budget: Budget,
    /// Scalars beside it.
    pub signals: StepSignals,
}

/// What a stretch outside any step was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SpanKind {
    /// Writing a checkpoint.
    Checkpoint,
    /// Before the first step or after a restart.
    Startup,
    /// Collectives or launches ran in another pattern.
    Other,
    /// The agent saw nothing: it was not running, or records were lost.
    Unobserved,
}

impl SpanKind {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Checkpoint => "checkpoint",
            Self::Startup => "startup",
            Self::Other => "other",
            Self::Unobserved => "unobserved",
        }
    }
}

/// A stretch of GPU time outside any step, with its own exact budget.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// What it was.
    pub kind: SpanKind,
    /// When.
    pub window: Window,
    /// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC`, ns.
    pub realtime_offset_ns: i64,
    /// Where it went.
    pub budget: Budget,
}

/// All that is known of one GPU of a job, in order of time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuHistory {
    /// Which GPU.
    pub subject: GpuSubject,
    /// Its steps.
    pub steps: Vec<GpuStep>,
    /// Its time outside steps.
    pub spans: Vec<Span>,
}

/// One TCP flow of the job, seen from its sending node, over a window.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FlowFacts {
    /// Process that owns the socket.
    pub pid: u32,
    /// Local address and port.
    pub local: String,
    /// Peer address and port.
    pub peer: String,
    /// Bytes acknowledged in the window.
    pub acked_bytes: u64,
    /// Time the flow had data to send, ns.
    pub busy_ns: u64,
    /// Of that, time limited by the receiver's window, ns.
    pub receiver_limited_ns: u64,
    /// Largest amount written and not yet sent, bytes.
    pub unsent_bytes: u64,
    /// Segments sent again.
    pub retransmits: u64,
    /// Smoothed round trip, microseconds.
    pub rtt_us: u32,
    /// Smallest round trip seen, microseconds.
    pub min_rtt_us: u32,
    /// Most bytes that lay received and unread by the local process, in any sample of the window.
    pub receive_backlog_bytes: u64,
    /// Most probes of the peer's closed window without an answer that opens it: the peer's process does not read.
    pub window_probes: u32,
}

/// A node's network over a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortFacts {
    /// Node.
    pub node: String,
    /// Interface or port.
    pub port: String,
    /// When.
    pub window: Window,
    /// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC`, ns.
    pub realtime_offset_ns: i64,
    /// Line rate in bytes/s.
    pub line_bytes_per_s: Reading<u64>,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes received.
    pub received_bytes: u64,
    /// Largest backlog in the port's own queue, bytes.
    pub backlog_bytes: Reading<u64>,
    /// Packets the port's own queue dropped or held back over its limit.
    pub queue_overlimits: Reading<u64>,
    /// Flows of traced jobs that leave by this port.
    pub flows: Vec<FlowFacts>,
}

/// Something missing from the record, named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordGap {
    /// Node.
    pub node: String,
    /// When, in `CLOCK_REALTIME` ns; `None` when not known.
    pub window: Option<Window>,
    /// What is missing and why, as a sentence fragment.
    pub what: String,
    /// How many records, steps or messages; 0 when not countable.
    pub count: u64,
}

/// Everything known about one job.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct JobFacts {
    /// Job name.
    pub job: String,
    /// Declared kind: `pretrain`, `finetune`, `rl`, `prefill`, `decode`, `other`, or `unknown`.
    pub kind: String,
    /// One entry per rank.
    pub gpus: Vec<GpuHistory>,
    /// Network windows of every node.
    pub ports: Vec<PortFacts>,
    /// What the devices of every node told about themselves and their links.
    pub hardware: Vec<HardwareFacts>,
    /// What is missing.
    pub gaps: Vec<RecordGap>,
}

/// A leaf's bounds where the tier cannot see it exactly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeafInterval {
    /// Which leaf.
    pub leaf: Leaf,
    /// Least it can be, ns.
    pub low_ns: i64,
    /// Most it can be, ns.
    pub high_ns: i64,
}
