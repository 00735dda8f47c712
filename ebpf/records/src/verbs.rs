//! Queue pairs of the RDMA verbs: what was posted to each, counted in a kernel map and read out by the agent; and where in a
//! process's memory, and with which meaning, the verbs' structures hold what the programs read.

use crate::layout::record;
use crate::record::Head;

/// Where the structures of `infiniband/verbs.h` hold what is read, bytes. The library's ABI fixes them on every 64-bit machine.
pub mod offset {
    /// `ibv_qp.context`; also of a protection domain.
    pub const CONTEXT: u64 = 0;
    /// `ibv_qp.qp_num`.
    pub const QP_NUM: u64 = 52;
    /// `ibv_qp.qp_type`.
    pub const QP_TYPE: u64 = 60;
    /// `ibv_context.device`.
    pub const DEVICE: u64 = 0;
    /// `ibv_context.ops.post_send`.
    pub const POST_SEND: u64 = 208;
    /// `ibv_device.name`.
    pub const DEVICE_NAME: u64 = 24;
    /// `ibv_qp_ex.wr_set_inline_data`, and from there on 8 bytes apart `wr_set_inline_data_list`, `wr_set_sge` and
    /// `wr_set_sge_list`.
    pub const EXTENDED_SETTERS: u64 = 288;
    /// `ibv_send_wr.next`.
    pub const WR_NEXT: u64 = 8;
    /// `ibv_send_wr.sg_list`.
    pub const WR_SGES: u64 = 16;
    /// `ibv_send_wr.num_sge`.
    pub const WR_SGE_COUNT: u64 = 24;
    /// `ibv_sge.length`.
    pub const SGE_LENGTH: u64 = 8;
    /// Bytes of an `ibv_sge`.
    pub const SGE_BYTES: u64 = 16;
    /// `ibv_qp_attr.qp_state`.
    pub const ATTR_STATE: u64 = 0;
    /// `ibv_qp_attr.dest_qp_num`.
    pub const ATTR_PEER_NUMBER: u64 = 28;
    /// `ibv_qp_attr.ah_attr`, which starts with the peer's GID.
    pub const ATTR_ADDRESS: u64 = 56;
    /// `ibv_qp_attr.ah_attr.dlid`.
    pub const ATTR_PEER_LID: u64 = 80;
    /// `ibv_qp_attr.ah_attr.is_global`.
    pub const ATTR_IS_GLOBAL: u64 = 85;
    /// `ibv_qp_attr.port_num`.
    pub const ATTR_PORT: u64 = 129;
    /// `ibv_async_event.event_type`.
    pub const EVENT_TYPE: u64 = 8;
}

/// Bits of the mask of `ibv_modify_qp`.
pub mod mask {
    /// `qp_state` is set.
    pub const STATE: u32 = 1;
    /// `port_num` is set.
    pub const PORT: u32 = 1 << 5;
    /// `ah_attr` is set.
    pub const ADDRESS: u32 = 1 << 7;
    /// `dest_qp_num` is set.
    pub const PEER_NUMBER: u32 = 1 << 20;
}

/// `enum ibv_qp_state`, as far as it matters here.
pub mod state {
    /// As new.
    pub const RESET: u32 = 0;
    /// Nothing is sent any more.
    pub const ERROR: u32 = 6;
}

/// What the cookie of a control call says of its first argument.
pub mod first_argument {
    /// It is the context.
    pub const IS_CONTEXT: u64 = 0;
    /// It starts with a pointer to the context.
    pub const HOLDS_CONTEXT: u64 = 1;
}

/// How a function posts; also the cookie of the program on it.
pub mod posts_by {
    /// `post_send(qp, requests, bad)`.
    pub const REQUESTS: u32 = 0;
    /// `wr_set_inline_data(qp, address, length)`: the one part of a request.
    pub const INLINE: u32 = 1;
    /// `wr_set_inline_data_list(qp, parts, list)`.
    pub const INLINE_LIST: u32 = 2;
    /// `wr_set_sge(qp, key, address, length)`.
    pub const PART: u32 = 3;
    /// `wr_set_sge_list(qp, parts, list)`.
    pub const PART_LIST: u32 = 4;
    /// The largest of them.
    pub const LAST: u32 = PART_LIST;
}

/// Work requests of one call that are followed.
pub const MOST_REQUESTS: u32 = 16;
/// Parts of one work request that are followed.
pub const MOST_PARTS: u32 = 4;
/// Bytes of a device's name.
pub const NAME_BYTES: usize = 64;

/// Bits of [`Qp::flags`].
pub mod qp_flag {
    /// [`super::Qp::peer`] holds a GID.
    pub const GID: u32 = 1;
    /// [`super::Qp::peer`] starts with a LID.
    pub const LID: u32 = 2;
    /// Its program posts through the functions of an `ibv_qp_ex`.
    pub const EXTENDED: u32 = 4;
    /// It is in the error state.
    pub const ERROR: u32 = 8;
}

record! {
    /// Names a queue pair.
    pub struct QpKey: 16 {
        /// Address of the `ibv_qp`.
        pub qp: u64 = 0,
        /// Thread group id.
        pub tgid: u32 = 8,
        /// Zero.
        pub reserved: u32 = 12,
    }
}

record! {
    /// A queue pair. What is counted only grows.
    pub struct Qp: 144 {
        /// When it was first seen, ns.
        pub born_ns: u64 = 0,
        /// Work requests posted to send.
        pub posts: u64 = 8,
        /// Bytes they carry.
        pub bytes: u64 = 16,
        /// Calls that posted more than was followed, or what could not be read.
        pub cut: u64 = 24,
        /// The provider's function that posts; of one that is [`qp_flag::EXTENDED`], that sets a part.
        pub post_send: u64 = 32,
        /// Its number.
        pub number: u32 = 40,
        /// `enum ibv_qp_type`.
        pub kind: u32 = 44,
        /// Number of the peer's queue pair, or 0.
        pub peer_number: u32 = 48,
        /// Port of the device, or 0.
        pub port: u32 = 52,
        /// Bits of [`qp_flag`].
        pub flags: u32 = 56,
        /// Calls of `ibv_modify_qp` that were seen.
        pub changes: u32 = 60,
        /// Address of the peer.
        pub peer: [u8; 16] = 64,
        /// Its device, up to a zero.
        pub device: [u8; NAME_BYTES] = 80,
    }
}

record! {
    /// Names a function through which a process posts.
    pub struct Posting: 16 {
        /// Its address in the process.
        pub address: u64 = 0,
        /// Thread group id.
        pub tgid: u32 = 8,
        /// One of [`posts_by`].
        pub by: u32 = 12,
    }
}

record! {
    /// A function through which a process is about to post: the agent puts a probe there.
    pub struct PostsThrough: 48 {
        /// Head.
        pub head: Head = 0,
        /// Its address in the process.
        pub address: u64 = 32,
        /// One of [`posts_by`].
        pub by: u32 = 40,
        /// Zero.
        pub reserved: u32 = 44,
    }
}

record! {
    /// A queue pair that is gone, as it was at last.
    pub struct QpGone: 184 {
        /// Head.
        pub head: Head = 0,
        /// Address of the `ibv_qp`.
        pub qp: u64 = 32,
        /// The queue pair.
        pub last: Qp = 40,
    }
}

record! {
    /// An event that the process was told.
    pub struct VerbsEvent: 104 {
        /// Head.
        pub head: Head = 0,
        /// `enum ibv_event_type`.
        pub event: u32 = 32,
        /// Number of the queue pair or port; 0 when it is of neither.
        pub element: u32 = 36,
        /// The device, up to a zero.
        pub device: [u8; NAME_BYTES] = 40,
    }
}

/// What an event is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Element {
    /// A queue pair.
    QueuePair,
    /// A port.
    Port,
    /// The device, or something that is not told apart.
    Other,
}

impl Element {
    /// By `enum ibv_event_type`.
    #[must_use]
    pub const fn of(event: u32) -> Self {
        match event {
            1..=7 | 16 => Self::QueuePair,
            9..=13 | 17 | 18 => Self::Port,
            _ => Self::Other,
        }
    }
}

/// Whether the event says that the queue pair sends nothing any more: `QP_FATAL`, `QP_REQ_ERR`, `QP_ACCESS_ERR`.
#[must_use]
pub const fn is_fatal(event: u32) -> bool {
    matches!(event, 1..=3)
}

impl Qp {
    /// Words of 8 bytes that it takes.
    pub const WORDS: usize = 18;
}

const _: () = assert!(size_of::<Qp>() == 8 * Qp::WORDS);
