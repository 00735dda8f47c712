//! One segment file, being written.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

const EXTENSION: &str = "seg";
/// Appends gathered before a write, bytes.
const BUFFER_BYTES: usize = 256 << 10;

pub(super) fn segment_path(dir: &Path, index: u64) -> PathBuf {
    dir.join(format!("{index:016x}.{EXTENSION}"))
}

/// Numbers of the segments of a directory, oldest first.
pub(super) fn list_segments(dir: &Path) -> io::Result<Vec<u64>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let is_segment = path.extension().is_some_and(|extension| extension == EXTENSION);
        if let (true, Some(Ok(index))) = (is_segment, stem.map(|stem| u64::from_str_radix(stem, 16))) {
            found.push(index);
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[derive(Debug)]
pub(super) struct SegmentWriter {
    path: PathBuf,
    file: File,
    buffer: Vec<u8>,
    /// Bytes in the file and the buffer.
    written_bytes: u64,
    /// Bytes known to be on disk.
    synced_bytes: u64,
}

impl SegmentWriter {
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let file = File::create_new(path)?;
        // The name must survive a crash as well as the bytes.
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            buffer: Vec::new(),
            written_bytes: 0,
            synced_bytes: 0,
        })
    }

    pub(super) fn append(&mut self, framed: &[u8]) -> io::Result<()> {
        self.buffer.extend_from_slice(framed);
        self.written_bytes += framed.len() as u64;
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush()
        } else {
            Ok(())
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }

    pub(super) fn sync(&mut self) -> io::Result<()> {
        if self.synced_bytes == self.written_bytes {
            return Ok(());
        }
        self.flush()?;
        self.file.sync_data()?;
        self.synced_bytes = self.written_bytes;
        Ok(())
    }

    /// Gives up on everything not synced; the number of bytes that remain. A file without any is removed.
    pub(super) fn cut_to_synced(self) -> u64 {
        let result = if self.synced_bytes == 0 {
            std::fs::remove_file(&self.path)
        } else {
            self.file.set_len(self.synced_bytes)
        };
        if let Err(error) = result {
            tracing::warn!(path = %self.path.display(), %error, "unfinished tail of a segment cannot be cut off");
        }
        self.synced_bytes
    }

    pub(super) const fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}
