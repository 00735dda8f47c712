//! Segments on disk, bounded in total; the oldest goes first.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use stallscope_proto::frame;
use tokio::sync::watch;

use super::files::{lock, mend_last, read_numbers, write_numbers};
use super::segment::{Messages, Next, Segment};
use super::waiting::Waiting;
use super::{Spool, SpoolError};

/// A segment is about this part of the ring.
const SEGMENTS: u64 = 16;
const LEAST_SEGMENT_BYTES: u64 = 64 << 10;
const MOST_SEGMENT_BYTES: u64 = 8 << 20;
/// How often the acknowledged position is written: it moves several times a second, beside a job that uses the disk too.
const KEEP_ACKED: Duration = Duration::from_secs(5);

/// Why the store cannot be opened. The agent runs on without it.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The system refused.
    #[error(
        "failed to {doing} {}: {source}; history is kept in memory only, at most 4 MiB that the collector does not have, \
         and is lost when the agent ends: fix store.dir and restart the agent",
        path.display()
    )]
    Io {
        /// What was tried.
        doing: &'static str,
        /// On what.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Another agent uses the directory.
    #[error("{} is in use by another agent; set another store.dir", path.display())]
    InUse {
        /// The directory.
        path: PathBuf,
    },
}

/// Why a message is not in the store.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The system refused; what was written before is untouched.
    #[error(
        "failed to write to the store in {}: {source}; what waits in memory is full too: new history is lost until \
         there is room",
        path.display()
    )]
    Io {
        /// The directory.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It does not fit a frame.
    #[error("a message cannot be framed: {0}")]
    Frame(#[from] frame::FrameError),
    /// A segment names as many subjects as it may.
    #[error(
        "more than {} processes used GPUs within one segment of the store: history of further ones is lost until the \
         next segment begins",
        stallscope_proto::convert::MAX_SUBJECTS
    )]
    TooManySubjects,
}

/// What opening found.
#[derive(Debug)]
pub struct Opened {
    /// The ring.
    pub ring: Ring,
    /// Bytes of a torn last message that were cut off.
    pub torn_bytes: u64,
    /// Whether the directory is new.
    pub is_new: bool,
}

/// The ring.
#[derive(Debug)]
pub struct Ring {
    dir: PathBuf,
    epoch: u64,
    inner: Mutex<Inner>,
    last: watch::Sender<u64>,
    /// `None` for a ring in memory.
    _lock: Option<File>,
}

#[derive(Debug)]
struct Inner {
    segments: VecDeque<Segment>,
    active: Option<File>,
    next_sequence: u64,
    max_bytes: u64,
    segment_bytes: u64,
    acked: u64,
    /// When the acknowledged position was last written.
    acked_kept: Option<Instant>,
    dropped_unacked: u64,
    /// Up to here what damage cost is counted.
    damaged_to: u64,
    /// Where the last read ended: message after which, segment, byte.
    cursor: Option<(u64, u64, u64)>,
    /// Bytes of the page of a ring in memory.
    page_bytes: u64,
    waiting: Waiting,
    /// Why messages wait.
    refusal: Option<String>,
    /// Nothing is ever written: what is acknowledged need not be kept.
    memory_only: bool,
}

impl Ring {
    /// Opens the store in `dir`, made when missing; at most about `max_bytes` are used. `fresh_epoch` names the directory if it
    /// is new: it should be random.
    ///
    /// # Errors
    /// When the directory cannot be made, read or locked.
    pub fn open(dir: &Path, max_bytes: u64, fresh_epoch: u64) -> Result<Opened, OpenError> {
        let failed = |doing| {
            move |path: &Path, source| OpenError::Io {
                doing,
                path: path.to_owned(),
                source,
            }
        };
        let segments_dir = dir.join("segments");
        std::fs::create_dir_all(&segments_dir).map_err(|source| failed("make")(&segments_dir, source))?;
        let lock = lock(dir)?;
        let identity = dir.join("identity");
        let (epoch, is_new) = match read_numbers(&identity).as_deref() {
            Some([epoch, ..]) => (*epoch, false),
            _ => {
                write_numbers(&identity, &[fresh_epoch])
                    .map_err(|source| failed("write")(&identity, source))?;
                (fresh_epoch, true)
            }
        };
        let mut segments: VecDeque<Segment> = Segment::list(&segments_dir)
            .map_err(|source| failed("list")(&segments_dir, source))?
            .into();
        let (next_sequence, torn_bytes) = mend_last(&segments_dir, &mut segments)
            .map_err(|source| failed("mend")(&segments_dir, source))?;
        let acknowledged = read_numbers(&dir.join("acknowledged")).unwrap_or_default();
        let inner = Inner {
            segments,
            next_sequence,
            acked: acknowledged.first().copied().unwrap_or(0).min(next_sequence - 1),
            dropped_unacked: acknowledged.get(1).copied().unwrap_or(0),
            ..Inner::new(max_bytes)
        };
        let ring = Self {
            dir: dir.to_owned(),
            epoch,
            last: watch::channel(next_sequence - 1).0,
            inner: Mutex::new(inner),
            _lock: Some(lock),
        };
        Ok(Opened {
            ring,
            torn_bytes,
            is_new,
        })
    }

    /// A ring without a directory: a few MiB that the collector does not have yet.
    #[must_use]
    pub fn in_memory(epoch: u64) -> Self {
        let inner = Inner {
            memory_only: true,
            ..Inner::new(0)
        };
        Self {
            dir: PathBuf::new(),
            epoch,
            last: watch::channel(0).0,
            inner: Mutex::new(inner),
            _lock: None,
        }
    }

    /// Messages that wait in memory for the disk, and why; `None` when the disk takes them.
    #[must_use]
    pub fn refused(&self) -> Option<(usize, String)> {
        let inner = self.inner();
        let why = inner.refusal.clone()?;
        Some((inner.waiting.len(), why))
    }

    /// Ends the segment if it is full. Whether the next message begins one: its readers know nothing of what came
    /// before. Segments begin nowhere else.
    pub fn turn_page(&self) -> bool {
        let mut inner = self.inner();
        if inner.memory_only {
            // No reader begins here; but a writer reviews at every page whom it has to name.
            let full = inner.page_bytes >= inner.segment_bytes;
            if full {
                inner.page_bytes = 0;
            }
            return full;
        }
        if !inner.waiting.is_empty() {
            return false;
        }
        let full = inner
            .segments
            .back()
            .is_none_or(|segment| segment.bytes >= inner.segment_bytes);
        let ended = inner.active.take_if(|_| full);
        let begins = inner.active.is_none();
        // A disk may take seconds: nobody else is to wait for it.
        drop(inner);
        if let Some(file) = ended
            && let Err(error) = file.sync_data()
        {
            tracing::warn!(%error, "the store's last segment may be lost if the node crashes now");
        }
        begins
    }

    /// Appends the message that `encode` makes for the sequence number it is given.
    ///
    /// # Errors
    /// When it cannot be written; the number is then given again, and nothing written before is touched.
    pub fn append(&self, encode: impl FnOnce(u64) -> Bytes) -> Result<u64, AppendError> {
        let mut inner = self.inner();
        let sequence = inner.next_sequence;
        let body = encode(sequence);
        let segments_dir = self.segments_dir();
        inner
            .keep(&segments_dir, sequence, &body)
            .map_err(|error| match error {
                KeepError::Frame(error) => error.into(),
                KeepError::Full(source) => AppendError::Io {
                    path: self.dir.clone(),
                    source,
                },
            })?;
        inner.next_sequence += 1;
        if inner.drop_oldest(&segments_dir) {
            self.keep_acknowledged(&inner);
        }
        drop(inner);
        self.last.send_replace(sequence);
        Ok(sequence)
    }

    /// Brings everything to the disk, as far as it takes it.
    ///
    /// # Errors
    /// When the system cannot.
    pub fn sync(&self) -> io::Result<()> {
        let mut inner = self.inner();
        if let Err(error) = inner.write_waiting(&self.segments_dir()) {
            inner.refusal = Some(error.to_string());
        }
        let active = inner.active.as_ref().map(File::try_clone).transpose()?;
        // As above: the stream goes on meanwhile.
        drop(inner);
        active.map_or(Ok(()), |file| file.sync_data())
    }

    /// Bytes on disk.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.inner().segments.iter().map(|segment| segment.bytes).sum()
    }

    /// Number of the oldest message kept; one more than the newest when there is none.
    #[must_use]
    pub fn first_sequence(&self) -> u64 {
        let inner = self.inner();
        inner
            .segments
            .front()
            .map_or(inner.next_sequence, |segment| segment.first)
    }

    fn segments_dir(&self) -> PathBuf {
        self.dir.join("segments")
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Losing this file costs messages sent twice, so a failure to write it is not worth more than a line.
    fn keep_acknowledged(&self, inner: &Inner) {
        let path = self.dir.join("acknowledged");
        if let Err(error) = write_numbers(&path, &[inner.acked, inner.dropped_unacked]) {
            tracing::debug!(path = %path.display(), %error, "the acknowledged position is not kept");
        }
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let inner = self.inner();
        if !inner.memory_only {
            self.keep_acknowledged(&inner);
        }
    }
}

impl Spool for Ring {
    fn epoch(&self) -> u64 {
        self.epoch
    }

    fn next_after(
        &self,
        sequence: u64,
        max_messages: usize,
        max_bytes: usize,
    ) -> Result<Vec<(u64, Bytes)>, SpoolError> {
        self.inner()
            .read_after(&self.segments_dir(), sequence, max_messages, max_bytes)
    }

    fn acked(&self, sequence: u64) {
        let mut inner = self.inner();
        let sequence = sequence.min(inner.next_sequence - 1);
        if sequence > inner.acked {
            inner.acked = sequence;
            if inner.memory_only {
                inner.drop_acknowledged();
            } else if inner.acked_kept.is_none_or(|kept| kept.elapsed() >= KEEP_ACKED) {
                inner.acked_kept = Some(Instant::now());
                self.keep_acknowledged(&inner);
            }
        }
    }

    fn last_acked(&self) -> u64 {
        self.inner().acked
    }

    fn dropped_unacked(&self) -> u64 {
        self.inner().dropped_unacked
    }

    fn watch_last(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}

enum KeepError {
    Frame(frame::FrameError),
    Full(io::Error),
}

impl Inner {
    fn new(max_bytes: u64) -> Self {
        Self {
            segments: VecDeque::new(),
            active: None,
            next_sequence: 1,
            max_bytes,
            segment_bytes: (max_bytes / SEGMENTS).clamp(LEAST_SEGMENT_BYTES, MOST_SEGMENT_BYTES),
            acked: 0,
            acked_kept: None,
            dropped_unacked: 0,
            damaged_to: 0,
            cursor: None,
            page_bytes: 0,
            waiting: Waiting::default(),
            refusal: None,
            memory_only: false,
        }
    }

    /// On disk if it takes the message, else in memory if there is room.
    fn keep(&mut self, dir: &Path, sequence: u64, body: &Bytes) -> Result<(), KeepError> {
        let mut framed = BytesMut::new();
        frame::encode(body, &mut framed).map_err(KeepError::Frame)?;
        let refused = if self.memory_only {
            io::Error::other("the store is in memory only, and the collector takes nothing")
        } else {
            let written = self
                .write_waiting(dir)
                .and_then(|()| self.write(dir, sequence, &framed));
            match written {
                Ok(()) => return Ok(()),
                Err(error) => error,
            }
        };
        if !self.memory_only {
            self.refusal = Some(refused.to_string());
        }
        if self.waiting.push(sequence, body) {
            self.page_bytes += body.len() as u64;
            Ok(())
        } else {
            Err(KeepError::Full(refused))
        }
    }

    /// Brings what waits to the disk, in order.
    fn write_waiting(&mut self, dir: &Path) -> io::Result<()> {
        if self.memory_only {
            return Ok(());
        }
        while let Some((sequence, body)) = self.waiting.front().cloned() {
            let mut framed = BytesMut::new();
            frame::encode(&body, &mut framed).map_err(io::Error::other)?;
            self.write(dir, sequence, &framed)?;
            self.waiting.pop();
        }
        self.refusal = None;
        Ok(())
    }

    fn drop_acknowledged(&mut self) {
        while self
            .waiting
            .front()
            .is_some_and(|(sequence, _)| *sequence <= self.acked)
        {
            self.waiting.pop();
        }
    }

    /// Number of the first message that is not on disk.
    fn disk_end(&self) -> u64 {
        self.waiting
            .front()
            .map_or(self.next_sequence, |(sequence, _)| *sequence)
    }

    fn write(&mut self, dir: &Path, sequence: u64, framed: &[u8]) -> io::Result<()> {
        if self.active.is_none() {
            self.begin_segment(dir, sequence)?;
        }
        let (Some(file), Some(segment)) = (&mut self.active, self.segments.back_mut()) else {
            return Err(io::Error::other("no segment"));
        };
        if let Err(error) = file.write_all(framed) {
            // Part of the frame may be there: cut it off, or end the segment so that it stays its tail.
            if file.set_len(segment.bytes).is_err() {
                self.active = None;
            }
            return Err(error);
        }
        segment.bytes += framed.len() as u64;
        Ok(())
    }

    fn begin_segment(&mut self, dir: &Path, first: u64) -> io::Result<()> {
        if self.segments.back().is_some_and(|segment| segment.bytes == 0) {
            self.segments.pop_back();
        }
        let segment = Segment { first, bytes: 0 };
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(segment.path(dir))?;
        file.set_len(0)?;
        self.active = Some(file);
        self.segments.push_back(segment);
        Ok(())
    }

    /// Drops the oldest segments while there is too much; never the one written to. Whether any was dropped.
    fn drop_oldest(&mut self, dir: &Path) -> bool {
        let mut dropped = false;
        while self.segments.len() > 1
            && self.segments.iter().map(|segment| segment.bytes).sum::<u64>() > self.max_bytes
        {
            let Some(oldest) = self.segments.pop_front() else {
                break;
            };
            let last = self
                .segments
                .front()
                .map_or(self.next_sequence, |next| next.first)
                - 1;
            self.dropped_unacked += last.saturating_sub(self.acked.max(oldest.first - 1));
            if let Err(error) = std::fs::remove_file(oldest.path(dir)) {
                tracing::warn!(segment = Segment::name(oldest.first), %error, "an old segment cannot be removed");
            }
            dropped = true;
        }
        dropped
    }

    fn read_after(
        &mut self,
        dir: &Path,
        sequence: u64,
        max_messages: usize,
        max_bytes: usize,
    ) -> Result<Vec<(u64, Bytes)>, SpoolError> {
        let mut found = Vec::new();
        let mut wanted = sequence.saturating_add(1);
        let mut bytes = 0;
        let disk_end = self.disk_end();
        while found.len() < max_messages && bytes < max_bytes && wanted < disk_end {
            // The segment that holds the wanted message; the oldest if it is gone.
            let at = self
                .segments
                .partition_point(|segment| segment.first <= wanted)
                .saturating_sub(1);
            let Some(segment) = self.segments.get(at).cloned() else {
                break;
            };
            let end = self.segments.get(at + 1).map_or(disk_end, |next| next.first);
            wanted = wanted.max(segment.first);
            let (mut number, from) = match self.cursor {
                Some((after, first, position)) if first == segment.first && after < wanted => {
                    (after + 1, position)
                }
                _ => (segment.first, 0),
            };
            let failed = |source| SpoolError::Read {
                segment: Segment::name(segment.first),
                source,
            };
            let file = File::open(segment.path(dir)).map_err(failed)?;
            let mut messages = Messages::new(file, from, segment.bytes).map_err(failed)?;
            while found.len() < max_messages && bytes < max_bytes && number < end {
                let Next::Message(body) = messages.next().map_err(failed)? else {
                    // Damaged: what is left of this segment cannot be had.
                    // Every further read meets the same damage.
                    let counted = self.acked.max(self.damaged_to);
                    self.dropped_unacked += end - number.max(counted + 1).min(end);
                    self.damaged_to = self.damaged_to.max(end - 1);
                    number = end;
                    break;
                };
                if number >= wanted {
                    bytes += body.len();
                    found.push((number, body));
                }
                self.cursor = Some((number, segment.first, messages.position()));
                number += 1;
            }
            wanted = wanted.max(number);
        }
        for (number, body) in self.waiting.from(wanted) {
            if found.len() >= max_messages || bytes >= max_bytes {
                break;
            }
            bytes += body.len();
            found.push((*number, body.clone()));
        }
        Ok(found)
    }
}
