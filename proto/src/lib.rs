//! The words of stallscope on disk and on the wire.
//!
//! [`v1`] holds the generated messages, [`convert`] turns them into the facts of `stallscope-attribution` and back,
//! [`frame`] puts messages into CRC-protected frames that a store and a stream share.
//!
//! Parse, don't validate: a message becomes a fact only if it is one. A budget whose leaves do not sum to its window
//! is refused, with the reason in the error.
#![forbid(unsafe_code)]

pub mod convert;
pub mod frame;

/// The generated messages of package `stallscope.v1`; documented in the `.proto` files.
pub mod v1 {
    #![allow(missing_docs, reason = "generated; the words are in the .proto files")]
    #![allow(clippy::all, reason = "generated")]
    #![allow(rustdoc::all, reason = "generated")]

    include!(concat!(env!("OUT_DIR"), "/stallscope.v1.rs"));
}

/// Version of the stream protocol, carried in [`v1::Hello::schema`].
pub const SCHEMA: u32 = 1;

/// ALPN protocol name of the stream.
pub const ALPN: &[u8] = b"stallscope/1";

/// Application error codes with which a QUIC connection is closed.
pub mod close {
    /// The closing side is done; nothing is wrong.
    pub const DONE: u32 = 0;
    /// A frame or message broke the protocol.
    pub const PROTOCOL: u32 = 1;
    /// The schema version is not spoken here.
    pub const SCHEMA: u32 = 2;
    /// The client exceeded a limit: frame size, streams or rate.
    pub const LIMIT: u32 = 3;
    /// The collector cannot store: disk full or failing. The client keeps its data and comes back.
    pub const STORE: u32 = 4;
    /// Another connection of the same node took over.
    pub const SUPERSEDED: u32 = 5;
    /// The peer is stopping and will be back.
    pub const STOPPING: u32 = 6;

    /// What the code means, as a sentence fragment.
    #[must_use]
    pub const fn meaning(code: u64) -> &'static str {
        match code {
            0 => "done",
            1 => "protocol violated",
            2 => "schema version not supported",
            3 => "limit exceeded",
            4 => "collector cannot store",
            5 => "another connection of the node took over",
            6 => "peer is stopping",
            _ => "unknown reason",
        }
    }
}
