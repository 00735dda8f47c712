//! The plugin's memory in a process: a file without a name that the process keeps open.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, MemfdFlags, Mode, OFlags, StatxFlags};
use stallscope_records::profiler::{BYTES, NAME};

use super::memory::{Memory, Refused};

/// Most descriptors of a process that are looked at.
const MAX_DESCRIPTORS: usize = 1 << 16;

/// Why a process cannot be looked into.
#[derive(Debug, thiserror::Error)]
pub(super) enum FindError {
    /// Its descriptors, or this file, cannot be opened.
    #[error("its NCCL profiler plugin, if there is one, is not read: {0}; run the agent with CAP_SYS_PTRACE")]
    Open(#[from] io::Error),
    /// What was found is not the plugin's memory.
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// The memory of the plugin in a process; `None` when it has none, or is gone.
pub(super) fn memory(pid: u32) -> Result<Option<Memory>, FindError> {
    let folder = PathBuf::from(format!("/proc/{pid}/fd"));
    let wanted = format!("/memfd:{NAME} (deleted)");
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    for entry in entries.take(MAX_DESCRIPTORS).flatten() {
        let path = entry.path();
        if !fs::read_link(&path).is_ok_and(|to| to.as_os_str().as_bytes() == wanted.as_bytes()) {
            continue;
        }
        let Some(file) = open(&path)? else { continue };
        // A child that was forked holds its parent's.
        match Memory::open(file, namespace_pid(pid)) {
            Err(Refused::Other { .. }) => {}
            result => return Ok(Some(result?)),
        }
    }
    Ok(None)
}

fn is_gone(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    error.kind() == io::ErrorKind::NotFound || code == Some(rustix::io::Errno::SRCH.raw_os_error())
}

/// Opens the file to read and write if it is memory without a name; `None` if not.
///
/// Any file can be called like this, and opening one of a slow or hostile file system may never return. So it is looked at
/// without being opened first.
pub(super) fn open(path: &Path) -> io::Result<Option<File>> {
    let handle = match rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(handle) => handle,
        Err(error) => {
            let error = io::Error::from(error);
            return if is_gone(&error) { Ok(None) } else { Err(error) };
        }
    };
    let own = rustix::fs::memfd_create("stallscope-device", MemfdFlags::CLOEXEC)?;
    let ((device, kind, bytes), (own_device, ..)) = (look(&handle)?, look(&own)?);
    if device != own_device || kind != FileType::RegularFile || bytes != BYTES {
        return Ok(None);
    }
    let again = format!("/proc/self/fd/{}", handle.as_raw_fd());
    OpenOptions::new().read(true).write(true).open(again).map(Some)
}

/// Device, type and size, as far as the kernel knows them without asking a file system.
fn look(file: &OwnedFd) -> io::Result<((u32, u32), FileType, u64)> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = rustix::fs::statx(file, c"", flags, StatxFlags::BASIC_STATS)?;
    let kind = FileType::from_raw_mode(found.stx_mode.into());
    Ok(((found.stx_dev_major, found.stx_dev_minor), kind, found.stx_size))
}

/// The process's id as it sees it itself.
fn namespace_pid(pid: u32) -> u32 {
    last_id(&format!("/proc/{pid}/status"), "NSpid:").unwrap_or(pid)
}

/// The last id of a line in a process's or thread's `status`: the one in its own namespace.
pub(super) fn last_id(path: &str, name: &str) -> Option<u32> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next_back()?.parse().ok()
}
