//! What a collector is told when it starts.

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::board::BoardLimits;
use crate::tls::IdentityFiles;

/// Configuration of a collector.
#[derive(Debug, Clone)]
pub struct CollectorConfig {
    /// UDP address to listen on.
    pub listen: SocketAddr,
    /// Directory of the segments, made when missing.
    pub store: PathBuf,
    /// Bytes the segments may take; the oldest go first.
    pub max_bytes: u64,
    /// Own certificate and key, and who signs the agents'.
    pub identity: IdentityFiles,
    /// Whether a client may call itself what it likes. Else its certificate must name the node it speaks for: for fleets
    /// that share one certificate, where anybody who holds its key can speak for any node.
    pub any_name: bool,
    /// Bounds of memory.
    pub board: BoardLimits,
    /// Bounds per client.
    pub limits: Limits,
}

/// Bounds per client. The memory of one connection is at most `max_frame_bytes` plus twice `window_bytes`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections open at the same time; more are refused.
    pub max_connections: usize,
    /// Longest frame body accepted, bytes.
    pub max_frame_bytes: u32,
    /// Bytes a client may have sent and not seen acknowledged; also the QUIC receive window.
    pub window_bytes: u32,
    /// Bytes per second taken from one client in the long run; a faster one is slowed down, not dropped.
    pub bytes_per_s: u64,
    /// Reports computed at the same time; more wait.
    pub reports: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_frame_bytes: 1 << 20,
            window_bytes: 1 << 20,
            bytes_per_s: 8 << 20,
            reports: 2,
        }
    }
}

/// Bytes the segments may take by default: 1 GiB.
pub const DEFAULT_MAX_BYTES: u64 = 1 << 30;
