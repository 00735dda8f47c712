//! Writing a checkpoint as a framework does: a temporary file, flushed, then renamed.

use std::fs::{File, rename};
use std::io::Write;
use std::path::Path;

use anyhow::Context;

/// Writes one shard of `bytes` into `folder`.
pub(crate) fn write(folder: &Path, bytes: u64) -> anyhow::Result<()> {
    let partial = folder.join("checkpoint.partial");
    let mut file = File::create(&partial).context("failed to create the checkpoint")?;
    let block = vec![0xc5; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let part = left.min(block.len() as u64);
        file.write_all(&block[..usize::try_from(part)?])
            .context("failed to write the checkpoint")?;
        left -= part;
    }
    file.sync_all().context("failed to flush the checkpoint")?;
    rename(&partial, folder.join("checkpoint.bin")).context("failed to publish the checkpoint")
}
