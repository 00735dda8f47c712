//! One file of consecutive messages.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use stallscope_proto::frame::Decoder;

const READ_BYTES: usize = 64 << 10;
const SUFFIX: &str = ".seg";

/// A segment on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Segment {
    /// Number of its first message.
    pub(super) first: u64,
    /// Bytes of whole frames.
    pub(super) bytes: u64,
}

impl Segment {
    /// File name: fixed width, so that names sort as numbers do.
    pub(super) fn name(first: u64) -> String {
        format!("{first:020}{SUFFIX}")
    }

    pub(super) fn path(&self, dir: &Path) -> PathBuf {
        dir.join(Self::name(self.first))
    }

    /// The segments in a directory, by number. What is not named like one is left alone.
    pub(super) fn list(dir: &Path) -> io::Result<Vec<Self>> {
        let mut segments = Vec::new();
        for entry in std::fs::read_dir(dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let Some(number) = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)) else {
                continue;
            };
            if number.len() == 20
                && let Ok(first) = number.parse()
            {
                segments.push(Self {
                    first,
                    bytes: entry.metadata()?.len(),
                });
            }
        }
        segments.sort_by_key(|segment| segment.first);
        Ok(segments)
    }
}

/// Reads a segment's messages in order, from a byte that begins a frame.
#[derive(Debug)]
pub(super) struct Messages {
    file: File,
    decoder: Decoder,
    buffer: Vec<u8>,
    left_bytes: u64,
    started_at: u64,
}

/// What comes next in a segment.
#[derive(Debug)]
pub(super) enum Next {
    /// A message.
    Message(Bytes),
    /// No more whole messages, and nothing after the last.
    End,
    /// What follows is no message: a torn tail, or damage.
    Damaged,
}

impl Messages {
    /// Reads `file` from `from` up to `to` bytes.
    pub(super) fn new(mut file: File, from: u64, to: u64) -> io::Result<Self> {
        io::Seek::seek(&mut file, io::SeekFrom::Start(from))?;
        Ok(Self {
            file,
            decoder: Decoder::default(),
            buffer: vec![0; READ_BYTES],
            left_bytes: to.saturating_sub(from),
            started_at: from,
        })
    }

    /// The next message.
    pub(super) fn next(&mut self) -> io::Result<Next> {
        loop {
            match self.decoder.next_body() {
                Ok(Some(body)) => return Ok(Next::Message(body)),
                Ok(None) => {}
                Err(_) => return Ok(Next::Damaged),
            }
            let most = usize::try_from(self.left_bytes)
                .unwrap_or(READ_BYTES)
                .min(READ_BYTES);
            let read = self.file.read(&mut self.buffer[..most])?;
            if read == 0 {
                return Ok(if self.decoder.pending_bytes() == 0 {
                    Next::End
                } else {
                    Next::Damaged
                });
            }
            self.left_bytes -= read as u64;
            self.decoder.push(&self.buffer[..read]);
        }
    }

    /// Where in the file the next message begins.
    pub(super) const fn position(&self) -> u64 {
        self.started_at + self.decoder.consumed_bytes()
    }
}
