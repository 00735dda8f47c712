//! The shapes of the traced calls, as carried in the cookie of each attachment.
//!
//! One program serves many functions: the cookie tells which function was hit and where its arguments lie.
//! Arguments are named by their index in the C prototype, so a shape holds on every ABI; the programs know how the
//! machine passes the argument of that index.

/// An NCCL function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
#[expect(missing_docs, reason = "each is NCCL's function of that name")]
pub enum Function {
    AllReduce = 1,
    AllGather = 2,
    ReduceScatter = 3,
    Broadcast = 4,
    Reduce = 5,
    AllToAll = 6,
    Gather = 7,
    Scatter = 8,
    Send = 9,
    Recv = 10,
    CommInitRank = 32,
    CommInitRankConfig = 33,
    CommInitRankScalable = 34,
    CommInitAll = 35,
    CommSplit = 36,
    CommShrink = 37,
    CommGrow = 38,
    CommFinalize = 48,
    CommDestroy = 49,
    CommAbort = 50,
    CommRevoke = 51,
}

impl Function {
    /// The function with this number.
    #[must_use]
    pub const fn from_number(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::AllReduce,
            2 => Self::AllGather,
            3 => Self::ReduceScatter,
            4 => Self::Broadcast,
            5 => Self::Reduce,
            6 => Self::AllToAll,
            7 => Self::Gather,
            8 => Self::Scatter,
            9 => Self::Send,
            10 => Self::Recv,
            32 => Self::CommInitRank,
            33 => Self::CommInitRankConfig,
            34 => Self::CommInitRankScalable,
            35 => Self::CommInitAll,
            36 => Self::CommSplit,
            37 => Self::CommShrink,
            38 => Self::CommGrow,
            48 => Self::CommFinalize,
            49 => Self::CommDestroy,
            50 => Self::CommAbort,
            51 => Self::CommRevoke,
            _ => return None,
        })
    }
}

/// What the programs on a constructor are told.
///
/// Cookie: function in bits 0..32, then the version code of the library, 0 when it is not known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConstructorShape {
    /// Which function.
    pub function: Function,
    /// As the library's `ncclGetVersion` gives it.
    pub version: u32,
}

impl ConstructorShape {
    /// First bit of the version.
    pub const VERSION: u32 = 32;

    /// The cookie.
    #[must_use]
    pub const fn cookie(self) -> u64 {
        self.function as u64 | (self.version as u64) << Self::VERSION
    }
}

/// What a blocking synchronisation waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum SyncTarget {
    /// The context.
    Context = 0,
    /// A stream.
    Stream = 1,
    /// An event.
    Event = 2,
}

/// Direction of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum Direction {
    /// Not told by the call.
    Unknown = 0,
    /// Host to device.
    ToDevice = 1,
    /// Device to host.
    ToHost = 2,
    /// Within or between devices.
    DeviceToDevice = 3,
}

/// Why a thread left the CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum OffCpuReason {
    /// It stayed runnable.
    Preempted = 0,
    /// Interruptible sleep.
    Sleep = 1,
    /// Uninterruptible sleep.
    Disk = 2,
}

/// A file operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum FileOp {
    /// Any read.
    Read = 0,
    /// Any write.
    Write = 1,
    /// fsync and the like.
    Flush = 2,
}

/// No argument: what a function without a peer, a root or a stream has in that place of its cookie.
pub const NO_ARGUMENT: u64 = 15;

/// The largest argument index a cookie can name.
pub const LAST_ARGUMENT: u64 = 7;

const fn nibble(index: u64, at: u32) -> u64 {
    assert!(index <= LAST_ARGUMENT || index == NO_ARGUMENT, "no such argument");
    index << at
}

/// Where a data-moving NCCL call carries its arguments.
///
/// Cookie: function in bits 0..8, then one nibble each for count, datatype, peer, communicator and stream; from bit 32 on
/// the offset of the rank in the library's communicators, 0 when it is not known ([`CallShape::with_rank_offset`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CallShape {
    /// Which function (numbers below 256).
    pub function: Function,
    /// Index of the element count.
    pub count: u64,
    /// Index of the data type.
    pub datatype: u64,
    /// Index of the peer or root, or [`NO_ARGUMENT`].
    pub peer: u64,
    /// Index of the communicator.
    pub comm: u64,
    /// Index of the stream.
    pub stream: u64,
}

impl CallShape {
    /// First bit of each nibble in the cookie.
    pub const COUNT: u32 = 8;
    /// See [`Self::COUNT`].
    pub const DATATYPE: u32 = 12;
    /// See [`Self::COUNT`].
    pub const PEER: u32 = 16;
    /// See [`Self::COUNT`].
    pub const COMM: u32 = 20;
    /// See [`Self::COUNT`].
    pub const STREAM: u32 = 24;
    /// First bit of the rank's offset.
    pub const RANK_OFFSET: u32 = 32;

    /// A cookie with the offset of the rank in a communicator, bytes.
    #[must_use]
    pub const fn with_rank_offset(cookie: u64, rank_offset: u32) -> u64 {
        cookie | (rank_offset as u64) << Self::RANK_OFFSET
    }

    /// The cookie.
    #[must_use]
    pub const fn cookie(self) -> u64 {
        self.function as u64
            | nibble(self.count, Self::COUNT)
            | nibble(self.datatype, Self::DATATYPE)
            | nibble(self.peer, Self::PEER)
            | nibble(self.comm, Self::COMM)
            | nibble(self.stream, Self::STREAM)
    }
}

/// Where a CUDA driver call carries its arguments.
///
/// Cookie: tag in bits 0..8 (a [`SyncTarget`], [`Direction`] or [`Launch`]), then one nibble each for the first and
/// the second argument of interest, then [`CudaShape::PER_THREAD`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaShape {
    /// What the program should do with it.
    pub tag: u32,
    /// Index of the handle, event or byte count.
    pub first: u64,
    /// Index of the stream, or [`NO_ARGUMENT`].
    pub second: u64,
    /// The `_ptsz` twin: stream 0 means the thread's own default stream.
    pub per_thread: bool,
}

impl CudaShape {
    /// First bit of the first argument's nibble.
    pub const FIRST: u32 = 8;
    /// First bit of the second argument's nibble.
    pub const SECOND: u32 = 12;
    /// Bit of the per-thread default stream.
    pub const PER_THREAD: u64 = 1 << 16;

    /// The cookie.
    #[must_use]
    pub const fn cookie(self) -> u64 {
        self.tag as u64
            | nibble(self.first, Self::FIRST)
            | nibble(self.second, Self::SECOND)
            | if self.per_thread { Self::PER_THREAD } else { 0 }
    }
}

/// `CU_STREAM_PER_THREAD`: what stream 0 means in a `_ptsz` call.
pub const STREAM_PER_THREAD: u64 = 2;

/// How a launch function carries its stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Launch {
    /// `cuLaunchKernel` and `cuLaunchCooperativeKernel`: argument 8, always on the user stack on x86-64.
    Kernel = 0,
    /// `cuLaunchKernelEx`: field `hStream` of the `CUlaunchConfig` behind argument 0.
    KernelEx = 1,
    /// `cuGraphLaunch`: argument 1.
    Graph = 2,
}

/// Index of `cuLaunchKernel`'s stream.
pub const LAUNCH_KERNEL_STREAM: usize = 8;

/// Offset of `hStream` in `CUlaunchConfig`: seven 32-bit fields, then alignment to 8.
pub const LAUNCH_CONFIG_STREAM: u64 = 32;
