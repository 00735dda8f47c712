//! A fact, its subject, and the window in which it was acquired.
//!
//! Every source yields these and nothing else; recording them and replaying them gives the same budgets. Times are
//! `CLOCK_MONOTONIC` nanoseconds.

use stallscope_attribution::facts::{FlowFacts, HardwareFacts, LinkFacts, PortFacts};
pub use stallscope_attribution::facts::{StepWait, StepWaits};
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

/// Identifies a process for as long as the agent runs: a reused pid has another start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessKey {
    /// Process id (thread group) in the agent's pid namespace.
    pub pid: u32,
    /// Start time in clock ticks since boot, field 22 of `/proc/PID/stat`.
    pub start_ticks: u64,
}

/// One fact.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observation {
    /// When it was acquired: a call's begin and end, or the two reads a counter lies between.
    pub window: Window,
    /// What was observed.
    pub fact: Fact,
}

/// What was observed, and of what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fact {
    /// A traced process appeared (or the agent found it), or more is known about it.
    Process(Box<ProcessFacts>),
    /// A traced process is gone.
    ProcessGone(ProcessKey),
    /// A communicator was made. The window is the constructor's call.
    CommCreated(CommCreated),
    /// A communicator is being destroyed, aborted or finalised.
    CommDestroyed {
        /// Process and thread.
        thread: Thread,
        /// The `ncclComm_t`.
        comm: u64,
    },
    /// A collective, send or receive was called. The window is the call: enqueueing, not completion.
    Collective(Collective),
    /// What the network steps of one of NCCL's proxy threads waited for in the window.
    StepWaits {
        /// Process and thread.
        thread: Thread,
        /// By what they waited for.
        waits: Box<StepWaits>,
    },
    /// `ncclGroupStart` .. `ncclGroupEnd`. The window is the `ncclGroupEnd` call, where the real enqueue happens.
    GroupEnd {
        /// Process and thread.
        thread: Thread,
    },
    /// Launches of one thread on one stream, folded. The window is from the first launch's entry to the last's.
    LaunchRun {
        /// Process and thread.
        thread: Thread,
        /// The `CUstream`.
        stream: u64,
        /// Kernel launches.
        kernels: u32,
        /// Graph launches.
        graphs: u32,
    },
    /// A blocking synchronisation. The window is the call.
    Sync {
        /// Process and thread.
        thread: Thread,
        /// What was waited for.
        target: SyncTarget,
        /// The driver's result code; work is known to be drained only on 0.
        result: i32,
    },
    /// `cuEventRecord`.
    EventRecord {
        /// Process and thread.
        thread: Thread,
        /// The `CUevent`.
        event: u64,
        /// The stream it marks.
        stream: u64,
    },
    /// `cuStreamWaitEvent`.
    StreamWait {
        /// Process and thread.
        thread: Thread,
        /// The stream that waits.
        stream: u64,
        /// For which `CUevent`.
        event: u64,
    },
    /// A copy. The window is the call.
    Copy {
        /// Process and thread.
        thread: Thread,
        /// Bytes.
        bytes: u64,
        /// Direction.
        direction: CopyDirection,
        /// Stream; `None` for a synchronous copy, which returns when it is done.
        stream: Option<u64>,
    },
    /// A thread was off CPU. The window is from leaving the CPU to getting it back.
    OffCpu {
        /// Process and thread.
        thread: Thread,
        /// Why it left.
        reason: OffCpuReason,
        /// Of the window, the time it was runnable and waited for a CPU (at its end), ns.
        runnable_ns: u64,
    },
    /// CPU time of a thread between two reads, in which it gave no record.
    ThreadCpu {
        /// Process and thread.
        thread: Thread,
        /// Time on CPU; counted in ticks, so it may differ from the truth by one or two.
        cpu_ns: u64,
    },
    /// A read, write or flush of a file. The window is the call.
    FileIo {
        /// Process and thread.
        thread: Thread,
        /// Which.
        op: FileOp,
        /// Bytes asked for or done.
        bytes: u64,
        /// Of the window, the time blocked on the device; the rest was page cache and CPU.
        blocked_ns: u64,
    },
    /// File calls of one process too short for a record of their own, folded over the window.
    FileIoFolded {
        /// Process that made them.
        process: ProcessKey,
        /// Which.
        op: FileOp,
        /// Calls.
        calls: u64,
        /// Bytes done.
        bytes: u64,
        /// Time inside the calls, ns.
        total_ns: u64,
        /// Of that, blocked on a device, ns.
        blocked_ns: u64,
    },
    /// Block requests of traced processes, folded over the window.
    Block {
        /// Process that issued them.
        process: ProcessKey,
        /// Requests.
        requests: u32,
        /// Bytes.
        bytes: u64,
        /// Sum of issue-to-completion times, ns.
        latency_ns: u64,
    },
    /// One GPU's counters between two reads.
    Gpu(Box<GpuReading>),
    /// One network port between two reads, with the flows of traced processes.
    Port(Box<PortFacts>),
    /// What a device of the node told about itself and its links.
    Hardware(Box<HardwareFacts>),
    /// CPU quota of a process's group between two reads.
    CpuQuota {
        /// Process.
        process: ProcessKey,
        /// Throttled time in the window, ns.
        throttled_ns: Reading<u64>,
        /// Quota as parts per million of one CPU; `Value(0)` means no quota.
        quota_ppm: Reading<u64>,
    },
    /// Records lost in the kernel since the last such fact.
    Lost {
        /// Which ring: `nccl`, `cuda`, `sched`, `block`.
        ring: &'static str,
        /// How many.
        count: u64,
    },
    /// `CLOCK_REALTIME` minus `CLOCK_MONOTONIC` at the window.
    RealtimeOffset {
        /// The difference, ns.
        ns: i64,
    },
}

/// Process and thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Thread {
    /// Process.
    pub process: ProcessKey,
    /// Thread id.
    pub tid: u32,
}

/// Why a process is traced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ProcessRole {
    /// It uses a GPU.
    Gpu,
    /// It descends from one that does: a data loader or helper.
    Helper,
}

/// Everything known about a traced process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessFacts {
    /// Which process.
    pub key: ProcessKey,
    /// Its parent's pid.
    pub parent_pid: u32,
    /// Short name.
    pub comm: String,
    /// Why it is traced.
    pub role: ProcessRole,
    /// For a helper: the GPU process it works for.
    pub works_for: Option<ProcessKey>,
    /// Job: from the scheduler's variables, the cgroup path, or made from the session.
    pub job: Option<String>,
    /// Rank in the job.
    pub rank: Option<u32>,
    /// Ranks in the job.
    pub world: Option<u32>,
    /// Rank on the node.
    pub local_rank: Option<u32>,
    /// GPU index on the node as the driver counts.
    pub gpu: Option<u32>,
    /// Control group path (v2, or v1's cpu controller).
    pub cgroup: String,
    /// Declared job kind.
    pub kind: Option<String>,
    /// Declared model FLOPs per step on one GPU.
    pub model_flops_per_step: Option<u64>,
}

/// A communicator and its place in the job.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommCreated {
    /// Process and thread.
    pub thread: Thread,
    /// The `ncclComm_t` that came out.
    pub comm: u64,
    /// A key equal on all ranks, when known.
    pub key: Option<u64>,
    /// Whether the key is the hash by which NCCL itself names the communicator: `commId` in its log and profiler, `hash` in
    /// RAS. Else it is a hash of our own, for want of the library's version.
    pub is_nccl_hash: bool,
    /// This process's rank in it.
    pub rank: Option<u32>,
    /// Ranks in it.
    pub ranks: Option<u32>,
    /// CUDA ordinal of its device.
    pub device: Option<u32>,
    /// NCCL's result code.
    pub result: i32,
    /// It was not seen being made, but found in use: it is older than the agent, and how many calls it has had is unknown.
    pub found_in_use: bool,
}

/// A collective, send or receive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collective {
    /// Process and thread.
    pub thread: Thread,
    /// The `ncclComm_t`.
    pub comm: u64,
    /// Which function.
    pub function: CollectiveFunction,
    /// Elements.
    pub count: u64,
    /// `ncclDataType_t`.
    pub datatype: u32,
    /// Peer or root, where the function has one.
    pub peer: Option<i32>,
    /// The `cudaStream_t`.
    pub stream: u64,
    /// NCCL's result code; `None` when the return was not seen.
    pub result: Option<i32>,
}

/// The public data-moving calls of NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[expect(missing_docs, reason = "each is NCCL's function of that name")]
pub enum CollectiveFunction {
    AllReduce,
    AllGather,
    ReduceScatter,
    Broadcast,
    Reduce,
    AllToAll,
    Gather,
    Scatter,
    Send,
    Recv,
}

impl CollectiveFunction {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::AllToAll => "all_to_all",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::Send => "send",
            Self::Recv => "recv",
        }
    }
}

/// What a synchronisation waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum SyncTarget {
    /// Everything submitted to the context.
    Context,
    /// Everything submitted to the stream.
    Stream(u64),
    /// Everything before the event's last record.
    Event(u64),
}

/// Direction of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum CopyDirection {
    /// Host to device.
    ToDevice,
    /// Device to host.
    ToHost,
    /// Within or between devices.
    DeviceToDevice,
    /// By unified addresses: not told by the call.
    Unknown,
}

/// Why a thread left the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum OffCpuReason {
    /// It was preempted or yielded, and stayed runnable.
    Preempted,
    /// It slept interruptibly outside any traced file call.
    Sleep,
    /// It slept uninterruptibly, or in a file call: waiting for a device.
    Disk,
}

/// A file operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FileOp {
    /// Any read.
    Read,
    /// Any write.
    Write,
    /// fsync, fdatasync and the like.
    Flush,
}

/// One GPU between two reads of its counters.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GpuReading {
    /// Index on the node.
    pub gpu: u32,
    /// PCI address `dddd:bb:dd.f`.
    pub pci: String,
    /// Device name.
    pub device: String,
    /// PCI device and vendor id as NVML gives it (`device << 16 | vendor`).
    pub pci_device_id: u32,
    /// Any kernel resident, ppm of the window.
    pub busy_ppm: Reading<u32>,
    /// SM utilisation, ppm.
    pub sm_ppm: Reading<u32>,
    /// SM occupancy, ppm.
    pub occupancy_ppm: Reading<u32>,
    /// Tensor activity, ppm.
    pub tensor_ppm: Reading<u32>,
    /// DRAM activity, ppm.
    pub dram_ppm: Reading<u32>,
    /// PCIe bytes/s from the host's side into the device.
    pub pcie_rx_bytes_per_s: Reading<u64>,
    /// PCIe bytes/s out of the device.
    pub pcie_tx_bytes_per_s: Reading<u64>,
    /// SM clock now, MHz.
    pub sm_mhz: Reading<u32>,
    /// Largest SM clock of the device, MHz.
    pub sm_max_mhz: Reading<u32>,
    /// Clock event reasons now (bits as in NVML).
    pub clock_reasons: Reading<u64>,
    /// Time throttled by heat in the window, ns.
    pub thermal_ns: Reading<u64>,
    /// Time throttled by power in the window, ns.
    pub power_limit_ns: Reading<u64>,
    /// Energy used in the window, mJ.
    pub energy_mj: Reading<u64>,
    /// Temperature now, Celsius.
    pub temperature_c: Reading<u32>,
    /// Memory used, bytes.
    pub memory_used_bytes: Reading<u64>,
    /// SM share of each process in the window: pid, ppm.
    pub process_sm_ppm: Reading<Vec<(u32, u32)>>,
    /// Compute processes on the device, from the slow loop.
    pub processes: Reading<Vec<u32>>,
    /// Links and their errors since the reading that had them last, from the slow loop. Faults come as
    /// [`Fact::Hardware`] and are not counted here.
    pub links: Reading<LinkFacts>,
}

/// A flow of a traced process; see [`FlowFacts`].
pub type Flow = FlowFacts;
