//! The records themselves. Every one starts with a [`Head`].

use crate::layout::record;

/// What a record is; the first field of its [`Head`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// [`Collective`].
    Collective = 1,
    /// [`Constructor`].
    Constructor = 2,
    /// [`Teardown`].
    Teardown = 3,
    /// [`Bare`]: the outermost `ncclGroupEnd`.
    GroupEnd = 4,
    /// [`CommSeen`].
    CommSeen = 5,
    /// [`Sync`].
    Sync = 10,
    /// [`Copy`](struct@Copy).
    Copy = 11,
    /// [`EventOp`]: `cuEventRecord`.
    EventRecord = 12,
    /// [`EventOp`]: `cuStreamWaitEvent`.
    StreamWait = 13,
    /// [`LaunchRun`].
    LaunchRun = 14,
    /// [`OffCpu`].
    OffCpu = 20,
    /// [`FileIo`].
    FileIo = 30,
    /// [`Bare`]: a process executed another program.
    Exec = 40,
    /// [`Bare`]: a child of a traced process was born; `result` holds its parent's thread group id.
    Fork = 41,
    /// [`Bare`]: a traced process is gone.
    Exit = 42,
    /// [`Bare`]: a file was mapped executable.
    MapExec = 43,
    /// [`crate::verbs::PostsThrough`].
    PostsThrough = 50,
    /// [`crate::verbs::QpGone`].
    QpGone = 51,
    /// [`crate::verbs::VerbsEvent`].
    VerbsEvent = 52,
}

impl Kind {
    /// The kind with this number.
    #[must_use]
    pub const fn from_number(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Collective,
            2 => Self::Constructor,
            3 => Self::Teardown,
            4 => Self::GroupEnd,
            5 => Self::CommSeen,
            10 => Self::Sync,
            11 => Self::Copy,
            12 => Self::EventRecord,
            13 => Self::StreamWait,
            14 => Self::LaunchRun,
            20 => Self::OffCpu,
            30 => Self::FileIo,
            40 => Self::Exec,
            41 => Self::Fork,
            42 => Self::Exit,
            43 => Self::MapExec,
            50 => Self::PostsThrough,
            51 => Self::QpGone,
            52 => Self::VerbsEvent,
            _ => return None,
        })
    }
}

/// Bits of [`Head::flags`].
pub mod flag {
    /// `result` holds what the call returned; without it the thread died inside the call, or its return was missed.
    pub const RETURNED: u16 = 1;
    /// The function takes a peer or a root.
    pub const PEER: u16 = 2;
    /// The 128 bytes of the unique id were read.
    pub const ID: u16 = 4;
    /// The function takes the caller's rank.
    pub const RANK: u16 = 8;
    /// The function takes the number of ranks.
    pub const RANKS: u16 = 16;
    /// Arguments on the user stack or behind a pointer could not be read: the fields that need them hold 0.
    pub const UNREADABLE: u16 = 32;
    /// The copy goes through a stream and returns before it is done.
    pub const ASYNC: u16 = 64;
    /// The caller named the device.
    pub const DEVICE: u16 = 128;
}

record! {
    /// The start of every record.
    pub struct Head: 32 {
        /// A [`Kind`].
        pub kind: u16 = 0,
        /// Bits of [`flag`].
        pub flags: u16 = 2,
        /// What the call returned, when [`flag::RETURNED`] is set.
        pub result: i32 = 4,
        /// Thread group id.
        pub tgid: u32 = 8,
        /// Thread id.
        pub tid: u32 = 12,
        /// Entry of the call, or start of the interval.
        pub begin_ns: u64 = 16,
        /// Return of the call, or end of the interval.
        pub end_ns: u64 = 24,
    }
}

impl crate::Field for Kind {
    const SIZE: usize = 2;

    fn read(bytes: &[u8]) -> Option<Self> {
        Self::from_number(u16::read(bytes)?)
    }
}

record! {
    /// A record that is all head.
    pub struct Bare: 32 {
        /// Head.
        pub head: Head = 0,
    }
}

record! {
    /// A collective, send or receive.
    pub struct Collective: 72 {
        /// Head.
        pub head: Head = 0,
        /// The `ncclComm_t`.
        pub comm: u64 = 32,
        /// Elements.
        pub count: u64 = 40,
        /// The `cudaStream_t`.
        pub stream: u64 = 48,
        /// A [`crate::abi::Function`].
        pub function: u32 = 56,
        /// `ncclDataType_t`.
        pub datatype: u32 = 60,
        /// Peer or root, when [`flag::PEER`] is set.
        pub peer: i32 = 64,
        /// Zero.
        pub reserved: u32 = 68,
    }
}

record! {
    /// A call that makes a communicator. `ncclCommInitAll` gives one record per device.
    pub struct Constructor: 200 {
        /// Head.
        pub head: Head = 0,
        /// The `ncclComm_t` that came out; 0 when none did.
        pub comm: u64 = 32,
        /// The `ncclComm_t` it was made from, or 0.
        pub parent: u64 = 40,
        /// A [`crate::abi::Function`].
        pub function: u32 = 48,
        /// Ranks, when [`flag::RANKS`] is set.
        pub ranks: i32 = 52,
        /// Rank, when [`flag::RANK`] is set.
        pub rank: i32 = 56,
        /// `ncclCommSplit`'s colour; `ncclCommInitRankScalable`'s number of ids; `ncclCommShrink`'s excluded ranks.
        pub color: i32 = 60,
        /// The unique id, when [`flag::ID`] is set.
        pub id: [u8; 128] = 64,
        /// The library's version code as in its `ncclGetVersion`; 0 when the agent could not read it.
        pub version: u32 = 192,
        /// CUDA ordinal of the device, when [`flag::DEVICE`] is set.
        pub device: i32 = 196,
    }
}

record! {
    /// A call that ends a communicator: finalize, destroy, abort, revoke. Seen at its entry.
    pub struct Teardown: 48 {
        /// Head.
        pub head: Head = 0,
        /// The `ncclComm_t`.
        pub comm: u64 = 32,
        /// A [`crate::abi::Function`].
        pub function: u32 = 40,
        /// Zero.
        pub reserved: u32 = 44,
    }
}

record! {
    /// What the library wrote into a communicator, read at the first call that used it.
    pub struct CommSeen: 72 {
        /// Head.
        pub head: Head = 0,
        /// The `ncclComm_t`.
        pub comm: u64 = 32,
        /// Its first word; the library marks what is a communicator.
        pub magic: u64 = 40,
        /// Its hash.
        pub hash: u64 = 48,
        /// Rank.
        pub rank: i32 = 56,
        /// Ranks.
        pub ranks: i32 = 60,
        /// CUDA ordinal of its device.
        pub device: i32 = 64,
        /// Zero.
        pub reserved: u32 = 68,
    }
}

record! {
    /// A blocking synchronisation.
    pub struct Sync: 48 {
        /// Head.
        pub head: Head = 0,
        /// The stream or event; 0 for the context.
        pub handle: u64 = 32,
        /// A [`crate::abi::SyncTarget`].
        pub target: u32 = 40,
        /// Zero.
        pub reserved: u32 = 44,
    }
}

record! {
    /// A copy.
    pub struct Copy: 56 {
        /// Head.
        pub head: Head = 0,
        /// Bytes.
        pub bytes: u64 = 32,
        /// The stream, when [`flag::ASYNC`] is set.
        pub stream: u64 = 40,
        /// A [`crate::abi::Direction`].
        pub direction: u32 = 48,
        /// Zero.
        pub reserved: u32 = 52,
    }
}

record! {
    /// An event recorded on a stream, or a stream that waits for an event. Seen at its entry.
    pub struct EventOp: 48 {
        /// Head.
        pub head: Head = 0,
        /// The `CUevent`.
        pub event: u64 = 32,
        /// The `CUstream`.
        pub stream: u64 = 40,
    }
}

record! {
    /// Launches of one thread on one stream, from the entry of the first to the entry of the last.
    pub struct LaunchRun: 48 {
        /// Head.
        pub head: Head = 0,
        /// The `CUstream`.
        pub stream: u64 = 32,
        /// Kernels.
        pub kernels: u32 = 40,
        /// Graphs.
        pub graphs: u32 = 44,
    }
}

record! {
    /// A thread off the CPU.
    pub struct OffCpu: 48 {
        /// Head.
        pub head: Head = 0,
        /// Of the interval, the time it was runnable, at its end, ns.
        pub runnable_ns: u64 = 32,
        /// A [`crate::abi::OffCpuReason`].
        pub reason: u32 = 40,
        /// Zero.
        pub reserved: u32 = 44,
    }
}

record! {
    /// A read, write or flush.
    pub struct FileIo: 56 {
        /// Head; `result` is the error number when the call failed, else 0.
        pub head: Head = 0,
        /// Bytes done.
        pub bytes: u64 = 32,
        /// Of the call, the time blocked on a device, ns.
        pub blocked_ns: u64 = 40,
        /// A [`crate::abi::FileOp`].
        pub op: u32 = 48,
        /// File descriptor.
        pub fd: u32 = 52,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Field;

    #[test]
    fn a_short_record_is_not_read() {
        let bytes = [0u8; 71];
        assert_eq!(Collective::read(&bytes), None);
        assert!(Collective::read(&[0u8; 72]).is_some());
    }

    #[test]
    fn kinds_keep_their_numbers() {
        for number in 0..=u16::MAX {
            if let Some(kind) = Kind::from_number(number) {
                assert_eq!(kind as u16, number);
            }
        }
    }
}
