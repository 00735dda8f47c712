//! The store's directory: who may use it, what survived, and its small files.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::path::Path;

use super::ring::OpenError;
use super::segment::{Messages, Next, Segment};

/// One agent per directory: two would give the same numbers to different messages.
pub(super) fn lock(dir: &Path) -> Result<File, OpenError> {
    let path = dir.join("lock");
    let open = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path);
    let file = open.map_err(|source| OpenError::Io {
        doing: "open",
        path: path.clone(),
        source,
    })?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(OpenError::InUse { path: dir.to_owned() }),
        Err(error) => Err(OpenError::Io {
            doing: "lock",
            path,
            source: error.into(),
        }),
    }
}

/// Cuts a torn tail off the last segment. Gives the next sequence number and the bytes cut off.
pub(super) fn mend_last(dir: &Path, segments: &mut VecDeque<Segment>) -> io::Result<(u64, u64)> {
    let Some(last) = segments.back_mut() else {
        return Ok((1, 0));
    };
    let path = last.path(dir);
    let mut messages = Messages::new(File::open(&path)?, 0, last.bytes)?;
    let mut next_sequence = last.first.max(1);
    while let Next::Message(_) = messages.next()? {
        next_sequence += 1;
    }
    let torn_bytes = last.bytes - messages.position();
    if torn_bytes > 0 {
        OpenOptions::new()
            .write(true)
            .open(&path)?
            .set_len(messages.position())?;
        last.bytes = messages.position();
    }
    Ok((next_sequence, torn_bytes))
}

/// Decimal numbers, one a line; `None` when the file is missing or holds anything else.
pub(super) fn read_numbers(path: &Path) -> Option<Vec<u64>> {
    std::fs::read_to_string(path)
        .ok()?
        .lines()
        .map(|line| line.parse().ok())
        .collect()
}

/// Writes beside and renames, so that a crash leaves the old numbers or the new.
pub(super) fn write_numbers(path: &Path, numbers: &[u64]) -> io::Result<()> {
    let text: String = numbers.iter().map(|number| format!("{number}\n")).collect();
    let beside = path.with_extension("new");
    std::fs::write(&beside, text)?;
    std::fs::rename(beside, path)
}
