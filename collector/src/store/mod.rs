//! What was received, on disk: append-only segments of CRC-protected frames, the oldest removed first.
//!
//! A frame is acknowledged to its agent only after [`SegmentStore::sync`]. Every segment begins with the state of
//! all streams, so that it can be read without the ones before it.

mod read;
mod segment;
#[cfg(test)]
mod tests;

pub use read::{Damage, SegmentReader, StoredItem};

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use prost::Message;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use stallscope_proto::frame;
use stallscope_proto::v1::{self, stored};

use segment::{SegmentWriter, list_segments, segment_path};

/// Smallest store that is accepted, bytes.
pub const MIN_BYTES: u64 = 64 << 10;
const SEGMENTS_PER_STORE: u64 = 16;
const MAX_SEGMENT_BYTES: u64 = 64 << 20;
/// Room for a stored frame's own fields around the longest frame body received.
const MAX_STORED_BODY_BYTES: usize = frame::MAX_BODY_BYTES + 64;

/// Why something could not be stored. Nothing of it was acknowledged: agents keep it and send it again.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The directory cannot be used.
    #[error("{}: cannot be used as a store: {source}", path.display())]
    Directory {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another collector writes to the directory.
    #[error("{}: another collector writes here; stop it or choose another --store", path.display())]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// A write or a flush failed.
    #[error("{}: cannot be written: {source}; agents keep what was not stored", path.display())]
    Write {
        /// Which segment.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A message is longer than a frame may be.
    #[error("message too long to store: {0}")]
    TooLong(#[from] frame::FrameError),
    /// The bound does not leave room for the state that each segment begins with.
    #[error("--max-bytes {max_bytes} is too small; the least is {MIN_BYTES}")]
    Bound {
        /// The bound, bytes.
        max_bytes: u64,
    },
}

#[derive(Debug, Clone, Copy)]
struct Closed {
    index: u64,
    bytes: u64,
}

/// The writing side; one per directory.
#[derive(Debug)]
pub struct SegmentStore {
    dir: PathBuf,
    max_bytes: u64,
    closed: VecDeque<Closed>,
    current: Option<SegmentWriter>,
    next_index: u64,
    removed_segments: u64,
    _lock: std::fs::File,
}

impl SegmentStore {
    /// Opens or makes the directory and cuts off the torn tail that a killed collector may have left.
    ///
    /// # Errors
    /// When the directory cannot be used, or another collector uses it.
    pub fn open(dir: &Path, max_bytes: u64) -> Result<Self, StoreError> {
        if max_bytes < MIN_BYTES {
            return Err(StoreError::Bound { max_bytes });
        }
        let failed = |source| StoreError::Directory {
            path: dir.to_owned(),
            source,
        };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let lock = std::fs::File::create(dir.join("lock")).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(StoreError::Locked { path: dir.to_owned() }),
            Err(error) => return Err(failed(error.into())),
        }
        let indices = list_segments(dir).map_err(failed)?;
        if let Some(newest) = indices.last() {
            read::cut_torn_tail(&segment_path(dir, *newest)).map_err(failed)?;
        }
        let mut closed = VecDeque::new();
        for index in &indices {
            let bytes = std::fs::metadata(segment_path(dir, *index))
                .map_err(failed)?
                .len();
            closed.push_back(Closed { index: *index, bytes });
        }
        Ok(Self {
            dir: dir.to_owned(),
            max_bytes,
            closed,
            current: None,
            next_index: indices.last().map_or(1, |newest| newest + 1),
            removed_segments: 0,
            _lock: lock,
        })
    }

    /// Appends one envelope as it was received. `states` is asked when a new segment begins.
    ///
    /// # Errors
    /// When it cannot be written; then nothing since the last [`SegmentStore::sync`] counts as stored.
    pub fn append(
        &mut self,
        received_realtime_ns: u64,
        envelope: Bytes,
        states: impl FnOnce() -> Vec<v1::StreamState>,
    ) -> Result<(), StoreError> {
        let framed = stored_frame(received_realtime_ns, stored::Kind::Envelope(envelope))?;
        if self.segment_is_full() {
            self.close_current()?;
        }
        if self.current.is_none() {
            self.begin_segment(received_realtime_ns, states())?;
        }
        self.write(&framed)
    }

    /// Whether the next [`SegmentStore::append`] begins a new segment because this one is full.
    #[must_use]
    pub fn segment_is_full(&self) -> bool {
        let limit = (self.max_bytes / SEGMENTS_PER_STORE).min(MAX_SEGMENT_BYTES);
        self.current
            .as_ref()
            .is_some_and(|current| current.written_bytes() >= limit)
    }

    fn begin_segment(&mut self, now_ns: u64, states: Vec<v1::StreamState>) -> Result<(), StoreError> {
        let index = self.next_index;
        let path = segment_path(&self.dir, index);
        self.next_index += 1;
        let segment = SegmentWriter::create(&path).map_err(|source| StoreError::Write {
            path: path.clone(),
            source,
        })?;
        self.current = Some(segment);
        for state in states {
            self.write(&stored_frame(now_ns, stored::Kind::State(state))?)?;
        }
        self.keep_bound();
        Ok(())
    }

    fn write(&mut self, framed: &[u8]) -> Result<(), StoreError> {
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        let result = current.append(framed);
        if let Err(source) = result {
            return Err(self.abandon_current(source));
        }
        Ok(())
    }

    /// Makes everything appended durable.
    ///
    /// # Errors
    /// When the disk refuses; then nothing since the last success counts as stored.
    pub fn sync(&mut self) -> Result<(), StoreError> {
        let Some(current) = &mut self.current else {
            return Ok(());
        };
        match current.sync() {
            Ok(()) => Ok(()),
            Err(source) => Err(self.abandon_current(source)),
        }
    }

    /// After a failed write the file's end is not known to be durable: cut it to what is, and go on in a new file.
    fn abandon_current(&mut self, source: io::Error) -> StoreError {
        let Some(current) = self.current.take() else {
            return StoreError::Write {
                path: self.dir.clone(),
                source,
            };
        };
        let path = current.path().to_owned();
        let bytes = current.cut_to_synced();
        if bytes > 0 {
            self.closed.push_back(Closed {
                index: self.next_index - 1,
                bytes,
            });
        }
        StoreError::Write { path, source }
    }

    fn close_current(&mut self) -> Result<(), StoreError> {
        self.sync()?;
        if let Some(current) = self.current.take() {
            self.closed.push_back(Closed {
                index: self.next_index - 1,
                bytes: current.written_bytes(),
            });
        }
        self.keep_bound();
        Ok(())
    }

    /// Removes the oldest segments until the bound holds with one more segment to be filled.
    fn keep_bound(&mut self) {
        let reserve = self.max_bytes / SEGMENTS_PER_STORE;
        while self.total_bytes() + reserve > self.max_bytes {
            let Some(oldest) = self.closed.pop_front() else {
                break;
            };
            let path = segment_path(&self.dir, oldest.index);
            match std::fs::remove_file(&path) {
                Ok(()) => self.removed_segments += 1,
                Err(error) => tracing::warn!(path = %path.display(), %error, "old segment cannot be removed"),
            }
        }
    }

    /// Bytes of all segments.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        let current = self.current.as_ref().map_or(0, SegmentWriter::written_bytes);
        self.closed.iter().map(|segment| segment.bytes).sum::<u64>() + current
    }

    /// Segments removed to keep the bound since the store was opened.
    #[must_use]
    pub const fn removed_segments(&self) -> u64 {
        self.removed_segments
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

fn stored_frame(received_realtime_ns: u64, kind: stored::Kind) -> Result<BytesMut, StoreError> {
    let body = v1::Stored {
        received_realtime_ns,
        kind: Some(kind),
    }
    .encode_to_vec();
    let mut framed = BytesMut::with_capacity(body.len() + frame::HEADER_BYTES);
    frame::encode_bounded(&body, MAX_STORED_BODY_BYTES, &mut framed)?;
    Ok(framed)
}
