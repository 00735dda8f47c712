//! Bounded reads below `/proc`, from a root that tests can build.
//!
//! A process that dies while it is read is normal: every read gives `None` then, as for a process that never was.

use std::fs::File;
use std::io::{BufReader, Read as _};
use std::path::{Path, PathBuf};

use super::cgroup::{CgroupPaths, parse_cgroups};
use super::maps::{MappedLibrary, scan_maps};

/// Most that is read of a small file (`stat`, `cgroup`, `statm`).
const SMALL_BYTES: u64 = 64 << 10;
/// Most that is read of an environment: the kernel's own default limit for arguments and environment is 2 MiB.
const ENVIRON_BYTES: u64 = 2 << 20;

/// Set in `stat`'s flags for kernel threads (include/linux/sched.h, `PF_KTHREAD`).
const KERNEL_THREAD: u64 = 0x0020_0000;

/// The process file system.
#[derive(Debug, Clone)]
pub(super) struct ProcFs {
    root: PathBuf,
}

/// What `/proc/PID/stat` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Stat {
    pub(super) comm: String,
    pub(super) parent_pid: u32,
    pub(super) session: u32,
    pub(super) start_ticks: u64,
    pub(super) kernel_thread: bool,
    /// All threads have ended; only the exit status is left.
    pub(super) dead: bool,
}

impl ProcFs {
    pub(super) fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// All processes now; empty when the directory cannot be read.
    pub(super) fn pids(&self) -> Vec<u32> {
        let Ok(entries) = std::fs::read_dir(&self.root) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    pub(super) fn stat(&self, pid: u32) -> Option<Stat> {
        parse_stat(&self.small(pid, "stat")?)
    }

    /// Size of the address space in pages: it grows when a library is mapped.
    pub(super) fn size_pages(&self, pid: u32) -> Option<u64> {
        let statm = self.small(pid, "statm")?;
        std::str::from_utf8(&statm)
            .ok()?
            .split_ascii_whitespace()
            .next()?
            .parse()
            .ok()
    }

    pub(super) fn cgroups(&self, pid: u32) -> Option<CgroupPaths> {
        Some(parse_cgroups(&String::from_utf8_lossy(
            &self.small(pid, "cgroup")?,
        )))
    }

    pub(super) fn environ(&self, pid: u32) -> Option<Vec<u8>> {
        read_bounded(&self.path(pid, "environ"), ENVIRON_BYTES)
    }

    pub(super) fn libraries(&self, pid: u32) -> Option<Vec<MappedLibrary>> {
        let file = File::open(self.path(pid, "maps")).ok()?;
        scan_maps(BufReader::with_capacity(64 << 10, file)).ok()
    }

    pub(super) fn path(&self, pid: u32, name: &str) -> PathBuf {
        self.root.join(pid.to_string()).join(name)
    }

    /// A path below the root.
    pub(super) fn at(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    pub(super) fn text(&self, name: &str) -> Option<String> {
        read_bounded(&self.at(name), ENVIRON_BYTES).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
    }

    fn small(&self, pid: u32, name: &str) -> Option<Vec<u8>> {
        read_bounded(&self.path(pid, name), SMALL_BYTES)
    }
}

/// A small text file.
pub(super) fn read_text(path: &Path) -> Option<String> {
    read_bounded(path, SMALL_BYTES).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

fn read_bounded(path: &Path, limit: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(limit).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Fields by proc_pid_stat(5). The name may hold spaces and parentheses, so the fields start after the last one.
fn parse_stat(bytes: &[u8]) -> Option<Stat> {
    let open = bytes.iter().position(|&byte| byte == b'(')?;
    let close = bytes.iter().rposition(|&byte| byte == b')')?;
    let comm = String::from_utf8_lossy(bytes.get(open + 1..close)?).into_owned();
    let rest = std::str::from_utf8(bytes.get(close + 1..)?).ok()?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().take(20).collect();
    // The first of these is field 3 of the manual page.
    let field = |number: usize| fields.get(number - 3).copied();
    let state = field(3)?;
    let threads: u64 = field(20)?.parse().ok()?;
    Some(Stat {
        comm,
        parent_pid: field(4)?.parse().ok()?,
        session: field(6)?.parse().ok()?,
        start_ticks: field(22)?.parse().ok()?,
        kernel_thread: field(9)?.parse::<u64>().ok()? & KERNEL_THREAD != 0,
        dead: matches!(state, "Z" | "X" | "x") && threads <= 1,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_of_a_name_with_parentheses_and_spaces() {
        let text = b"42 (py) thon (x) S 7 42 5 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 3 0 9001 100 200\n";
        assert_eq!(
            parse_stat(text),
            Some(Stat {
                comm: "py) thon (x".to_owned(),
                parent_pid: 7,
                session: 5,
                start_ticks: 9001,
                kernel_thread: false,
                dead: false,
            })
        );
    }

    #[test]
    fn a_zombie_leader_with_threads_left_is_not_dead() {
        let zombie = |threads: u32| {
            format!("1 (a) Z 0 1 1 0 -1 0 1 2 3 4 5 6 7 8 20 0 {threads} 0 5 1 2").into_bytes()
        };
        assert_eq!(parse_stat(&zombie(1)).map(|stat| stat.dead), Some(true));
        assert_eq!(parse_stat(&zombie(2)).map(|stat| stat.dead), Some(false));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = parse_stat(&bytes);
        }
    }

    #[test]
    fn reads_itself() {
        let proc_fs = ProcFs::new("/proc");
        let pid = std::process::id();
        assert!(proc_fs.pids().contains(&pid));
        let stat = proc_fs.stat(pid);
        assert!(stat.is_some_and(|stat| !stat.kernel_thread && !stat.dead && stat.start_ticks > 0));
        assert!(proc_fs.size_pages(pid).is_some_and(|pages| pages > 0));
        assert!(proc_fs.cgroups(pid).is_some());
        assert!(proc_fs.libraries(pid).is_some());
        assert!(proc_fs.stat(u32::MAX).is_none());
    }
}
