//! The local ring on disk, which is also the spool of the stream.
//!
//! Every message that leaves the timeline is appended here first, with a sequence number that never repeats within
//! one store directory. The stream reads from the same ring, so that a collector that was away catches up.
//!
//! While the disk takes nothing, because it is full or the directory cannot be used, messages wait in memory up to a
//! bound and are streamed from there.
//!
//! On disk: `identity` (the epoch), `acknowledged` (how far the collector has everything, and what was dropped before
//! it had it) and `segments/`, files of CRC-framed envelopes named by their first sequence number. Every run of the
//! agent begins a segment, and every segment announces the subjects it uses, so each can be read on its own.

mod files;
mod read_back;
mod ring;
mod segment;
#[cfg(test)]
mod tests;
mod waiting;
mod writer;

use bytes::Bytes;
use tokio::sync::watch;

pub use read_back::{Scope, StoredJobs, read_back};
pub use ring::{AppendError, OpenError, Opened, Ring};
pub use writer::{Writer, Written};

/// What the stream reads from: messages by sequence number.
///
/// Sequence numbers begin at 1 and have no holes, except where messages were dropped because the ring was full;
/// those are counted in [`Spool::dropped_unacked`]. All calls are quick (page cache) but may touch the disk.
pub trait Spool: Send + Sync {
    /// Identifies this store directory: random, made with the directory. Sequence numbers of different epochs are
    /// unrelated.
    fn epoch(&self) -> u64;

    /// Up to `max_messages` messages with a sequence number above `sequence`, in order, stopping early after about
    /// `max_bytes` of payload (at least one message is returned if there is one).
    ///
    /// # Errors
    /// When the ring cannot be read; what is unreadable is skipped on the next call and counted as dropped.
    fn next_after(
        &self,
        sequence: u64,
        max_messages: usize,
        max_bytes: usize,
    ) -> Result<Vec<(u64, Bytes)>, SpoolError>;

    /// The collector has stored everything up to and including `sequence`. Survives a restart.
    fn acked(&self, sequence: u64);

    /// Highest sequence number acknowledged so far; 0 when none.
    fn last_acked(&self) -> u64;

    /// Messages dropped before they were acknowledged, since the directory was made.
    fn dropped_unacked(&self) -> u64;

    /// The highest sequence number appended, watched: wakes when there is more to send.
    fn watch_last(&self) -> watch::Receiver<u64>;
}

/// Why the spool could not be read.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// A segment could not be opened or read.
    #[error(
        "failed to read segment {segment} of the store: {source}; its messages stay on disk, retry later"
    )]
    Read {
        /// File name of the segment.
        segment: String,
        /// What the system said.
        source: std::io::Error,
    },
}
