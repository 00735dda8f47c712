//! Reading segments back, as far as their frames are whole.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use prost::Message;
use stallscope_proto::frame::Decoder;
use stallscope_proto::v1::{self, stored};

use super::MAX_STORED_BODY_BYTES;
use super::segment::{list_segments, segment_path};

const READ_BYTES: usize = 64 << 10;

/// Something a segment holds.
#[derive(Debug, Clone, PartialEq)]
pub enum StoredItem {
    /// What is known of one boot of an agent.
    State(v1::StreamState),
    /// An envelope as it was received.
    Envelope {
        /// When, `CLOCK_REALTIME` ns.
        received_realtime_ns: u64,
        /// Its bytes.
        bytes: Bytes,
    },
}

/// A part of a segment that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Which segment.
    pub path: PathBuf,
    /// From which byte on.
    pub from_byte: u64,
    /// What is wrong.
    pub why: String,
}

/// Reads the segments of a store, oldest first; safe beside a writer.
#[derive(Debug)]
pub struct SegmentReader {
    dir: PathBuf,
    indices: std::vec::IntoIter<u64>,
}

impl SegmentReader {
    /// A reader of all segments there are now.
    ///
    /// # Errors
    /// When the directory cannot be listed.
    pub fn open(dir: &Path) -> io::Result<Self> {
        Ok(Self {
            dir: dir.to_owned(),
            indices: list_segments(dir)?.into_iter(),
        })
    }

    /// Gives every item of the next segment to `each`; `None` after the last segment. A segment removed meanwhile
    /// counts as empty.
    pub fn next_segment(&mut self, mut each: impl FnMut(StoredItem)) -> Option<Result<(), Damage>> {
        let path = segment_path(&self.dir, self.indices.next()?);
        Some(read_segment(&path, &mut each).map(|_consumed| ()))
    }
}

/// Reads one segment; the number of bytes in whole frames.
fn read_segment(path: &Path, each: &mut dyn FnMut(StoredItem)) -> Result<u64, Damage> {
    let mut decoder = Decoder::new(MAX_STORED_BODY_BYTES);
    let damage = |decoder: &Decoder, why: String| Damage {
        path: path.to_owned(),
        from_byte: decoder.consumed_bytes(),
        why,
    };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(damage(&decoder, error.to_string())),
    };
    let mut piece = vec![0; READ_BYTES];
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(decoder.consumed_bytes()),
            Ok(length) => decoder.push(&piece[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(damage(&decoder, error.to_string())),
        }
        loop {
            match decoder.next_body() {
                Ok(Some(body)) => match v1::Stored::decode(body) {
                    Ok(stored) => give(stored, each),
                    Err(error) => return Err(damage(&decoder, error.to_string())),
                },
                Ok(None) => break,
                Err(error) => return Err(damage(&decoder, error.to_string())),
            }
        }
    }
}

fn give(stored: v1::Stored, each: &mut dyn FnMut(StoredItem)) {
    match stored.kind {
        Some(stored::Kind::Envelope(bytes)) => {
            each(StoredItem::Envelope {
                received_realtime_ns: stored.received_realtime_ns,
                bytes,
            });
        }
        Some(stored::Kind::State(state)) => each(StoredItem::State(state)),
        // A newer collector's kind of frame.
        None => {}
    }
}

/// Cuts off an unfinished frame at the end: it was never acknowledged. A damaged frame is left for people to look
/// at; what follows it is not read.
pub(super) fn cut_torn_tail(path: &Path) -> io::Result<()> {
    let length = std::fs::metadata(path)?.len();
    match read_segment(path, &mut |_item| {}) {
        Ok(consumed) if consumed < length => {
            tracing::info!(path = %path.display(), bytes = length - consumed, "cutting off an unfinished frame");
            let file = OpenOptions::new().write(true).open(path)?;
            file.set_len(consumed)?;
            file.sync_all()
        }
        Ok(_) => Ok(()),
        Err(damage) => {
            tracing::warn!(
                path = %path.display(), from_byte = damage.from_byte, why = %damage.why,
                "segment is damaged: what follows is not read"
            );
            Ok(())
        }
    }
}
