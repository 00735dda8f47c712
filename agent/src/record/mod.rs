//! Observations in a file, and back.
//!
//! A recording is a file of frames: a header, then batches as the sources gave them. Replaying them in order gives
//! the same steps, bit for bit: the timeline knows no other input. Killing the recorder costs the last batch only.

mod from_wire;
#[cfg(test)]
mod tests;
mod to_wire;

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use prost::Message;
use stallscope_proto::convert::WireError;
use stallscope_proto::frame::{self, Decoder, FrameError};
use stallscope_proto::v1;

use crate::observation::Observation;
use crate::timeline::{Event, Timeline};

/// "ssob".
const MAGIC: u32 = u32::from_le_bytes(*b"ssob");
/// Version of the recording's schema.
const SCHEMA: u32 = 1;
/// Observations in one frame: well below the frame's bound, also with long names.
const FRAME_OBSERVATIONS: usize = 1_024;
const READ_BYTES: usize = 64 << 10;
/// How the reason begins why a recording of another version is refused.
const OTHER_SCHEMA: &str = "schema";

/// Why observations cannot be recorded or replayed.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The system refused.
    #[error("failed to {doing} the recording {}: {source}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A batch does not fit a frame.
    #[error("a batch cannot be framed: {0}")]
    Frame(#[from] FrameError),
    /// The file is something else.
    #[error("{} is no recording of observations ({why})", path.display())]
    NotARecording {
        /// The file.
        path: PathBuf,
        /// What was found.
        why: String,
    },
    /// A message is not an observation.
    #[error("{} holds what is no observation: {source}; was it recorded by a newer version?", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: WireError,
    },
}

/// Writes a recording.
#[derive(Debug)]
pub struct Recorder {
    path: PathBuf,
    file: BufWriter<File>,
}

impl Recorder {
    /// Begins a recording; an existing file is replaced.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(path: &Path, node: &str) -> Result<Self, RecordError> {
        let file = File::create(path).map_err(io_error("create", path))?;
        let mut recorder = Self {
            path: path.to_owned(),
            file: BufWriter::new(file),
        };
        let header = v1::RecordingHeader {
            magic: MAGIC,
            schema: SCHEMA,
            node: node.to_owned(),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        };
        recorder.put(&header)?;
        recorder.file.flush().map_err(io_error("write", path))?;
        Ok(recorder)
    }

    /// Appends what the sources gave in one turn, whole: who is killed loses nothing that was written before.
    ///
    /// # Errors
    /// When it cannot be written: the recording ends before this batch.
    pub fn write(&mut self, batch: &[Observation]) -> Result<(), RecordError> {
        let mut parts = batch.chunks(FRAME_OBSERVATIONS).peekable();
        while let Some(part) = parts.next() {
            let message = v1::ObservationBatch {
                observations: part.iter().map(to_wire::observation).collect(),
                more: parts.peek().is_some(),
            };
            self.put(&message)?;
        }
        self.file.flush().map_err(io_error("write", &self.path))
    }

    /// Ends the recording.
    ///
    /// # Errors
    /// When the last batches cannot be written.
    pub fn finish(mut self) -> Result<(), RecordError> {
        self.file.flush().map_err(io_error("write", &self.path))
    }

    fn put(&mut self, message: &impl Message) -> Result<(), RecordError> {
        let framed = frame::encode_message(message)?;
        self.file
            .write_all(&framed)
            .map_err(io_error("write", &self.path))
    }
}

/// Reads a recording.
#[derive(Debug)]
pub struct Replay<R = BufReader<File>> {
    path: PathBuf,
    file: R,
    decoder: Decoder,
    buffer: Vec<u8>,
    node: String,
    torn: bool,
}

impl Replay {
    /// Opens a recording.
    ///
    /// # Errors
    /// When it cannot be read or is none.
    pub fn open(path: &Path) -> Result<Self, RecordError> {
        let file = File::open(path).map_err(io_error("open", path))?;
        Self::new(BufReader::new(file), path)
    }

    /// Whether the file begins as a recording does, of whatever schema.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn is_one(path: &Path) -> Result<bool, RecordError> {
        match Self::open(path) {
            Ok(_) => Ok(true),
            Err(RecordError::NotARecording { why, .. }) => Ok(why.starts_with(OTHER_SCHEMA)),
            Err(error) => Err(error),
        }
    }
}

impl<R: Read> Replay<R> {
    /// Reads a recording that errors call `path`.
    ///
    /// # Errors
    /// When it cannot be read or is none.
    pub fn new(reader: R, path: &Path) -> Result<Self, RecordError> {
        let mut replay = Self {
            path: path.to_owned(),
            file: reader,
            decoder: Decoder::default(),
            buffer: vec![0; READ_BYTES],
            node: String::new(),
            torn: false,
        };
        let none = |why: &str| RecordError::NotARecording {
            path: path.to_owned(),
            why: why.to_owned(),
        };
        let body = replay.next_body()?.ok_or_else(|| none("no whole frame"))?;
        let header = v1::RecordingHeader::decode(body)
            .ok()
            .filter(|header| header.magic == MAGIC)
            .ok_or_else(|| none("no header"))?;
        if header.schema != SCHEMA {
            let why = format!(
                "{OTHER_SCHEMA} {}, known is {SCHEMA}: use the version that recorded it",
                header.schema
            );
            return Err(none(&why));
        }
        replay.node = header.node;
        Ok(replay)
    }

    /// The node that recorded.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Whether the recording ended within a batch: its recorder was killed.
    #[must_use]
    pub const fn is_torn(&self) -> bool {
        self.torn
    }

    /// What the sources gave in the next turn; `None` at the end.
    ///
    /// # Errors
    /// When the file cannot be read or holds something else.
    pub fn next_batch(&mut self) -> Result<Option<Vec<Observation>>, RecordError> {
        let mut batch = Vec::new();
        loop {
            let Some(body) = self.next_body()? else {
                self.torn |= !batch.is_empty();
                return Ok(None);
            };
            let refused = |source| RecordError::Refused {
                path: self.path.clone(),
                source,
            };
            let part = v1::ObservationBatch::decode(body).map_err(|source| {
                refused(WireError::Malformed {
                    what: "batch",
                    source,
                })
            })?;
            for observation in part.observations {
                batch.push(from_wire::observation(observation).map_err(refused)?);
            }
            if !part.more {
                return Ok(Some(batch));
            }
        }
    }

    fn next_body(&mut self) -> Result<Option<bytes::Bytes>, RecordError> {
        loop {
            match self.decoder.next_body() {
                Ok(Some(body)) => return Ok(Some(body)),
                Ok(None) => {}
                Err(error) => {
                    let why = error.to_string();
                    return Err(RecordError::NotARecording {
                        path: self.path.clone(),
                        why,
                    });
                }
            }
            let read = self
                .file
                .read(&mut self.buffer)
                .map_err(io_error("read", &self.path))?;
            if read == 0 {
                self.torn |= self.decoder.pending_bytes() > 0;
                return Ok(None);
            }
            self.decoder.push(&self.buffer[..read]);
        }
    }
}

/// All that a recording shows, as the agent would have told it.
///
/// # Errors
/// When the recording cannot be read or holds something else.
pub fn replay(path: &Path) -> Result<Vec<Event>, RecordError> {
    let mut replay = Replay::open(path)?;
    let mut timeline = Timeline::new(replay.node());
    let mut events = Vec::new();
    while let Some(batch) = replay.next_batch()? {
        batch
            .into_iter()
            .for_each(|observation| timeline.push(observation));
        timeline.advance(&mut events);
    }
    timeline.finish(&mut events);
    Ok(events)
}

fn io_error(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RecordError {
    let path = path.to_owned();
    move |source| RecordError::Io { doing, path, source }
}
