//! Which traced process holds a socket, by the inodes in `/proc/PID/fd`.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;

/// Reading the descriptors of all traced processes is the dearest part of this source.
const REFRESH_NS: u64 = 1_000_000_000;
/// A socket that was not a traced process's may become one's: it can be passed on.
const FORGET_NS: u64 = 30_000_000_000;
/// Most descriptors read of one process.
const MAX_DESCRIPTORS: usize = 1 << 16;

/// A cache from socket inode to process.
#[derive(Debug)]
pub(super) struct Owners {
    proc_root: PathBuf,
    owners: HashMap<u32, u32>,
    foreign: HashSet<u32>,
    pids: BTreeSet<u32>,
    refreshed_ns: Option<u64>,
    forgotten_ns: u64,
}

impl Owners {
    pub(super) fn new(proc_root: impl Into<PathBuf>) -> Self {
        Self {
            proc_root: proc_root.into(),
            owners: HashMap::new(),
            foreign: HashSet::new(),
            pids: BTreeSet::new(),
            refreshed_ns: None,
            forgotten_ns: 0,
        }
    }

    /// The owner of each socket that a traced process holds. Descriptors are read again, at most once a second, when
    /// there is a socket that has not been looked for or the set of processes changed.
    pub(super) fn of(
        &mut self,
        now_ns: u64,
        pids: &BTreeSet<u32>,
        inodes: impl Iterator<Item = u32> + Clone,
    ) -> &HashMap<u32, u32> {
        if now_ns.saturating_sub(self.forgotten_ns) >= FORGET_NS {
            self.foreign.clear();
            self.forgotten_ns = now_ns;
        }
        let unknown = |inode: u32| !self.owners.contains_key(&inode) && !self.foreign.contains(&inode);
        let wanted = self.pids != *pids || inodes.clone().any(unknown);
        let rested = self
            .refreshed_ns
            .is_none_or(|at| now_ns.saturating_sub(at) >= REFRESH_NS);
        if wanted && rested {
            self.refreshed_ns = Some(now_ns);
            self.pids.clone_from(pids);
            self.owners = pids.iter().flat_map(|&pid| self.sockets(pid)).collect();
            self.foreign = inodes.filter(|inode| !self.owners.contains_key(inode)).collect();
        }
        &self.owners
    }

    /// The sockets a process holds; none when it is gone.
    fn sockets(&self, pid: u32) -> Vec<(u32, u32)> {
        let Ok(entries) = std::fs::read_dir(self.proc_root.join(pid.to_string()).join("fd")) else {
            return Vec::new();
        };
        let socket = |entry: std::fs::DirEntry| {
            let target = std::fs::read_link(entry.path()).ok()?;
            let inode = target
                .to_str()?
                .strip_prefix("socket:[")?
                .strip_suffix(']')?
                .parse()
                .ok()?;
            Some((inode, pid))
        };
        entries
            .flatten()
            .take(MAX_DESCRIPTORS)
            .filter_map(socket)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use std::os::unix::fs::symlink;

    use super::*;

    const S: u64 = 1_000_000_000;

    #[test]
    fn inodes_are_looked_up_once_and_new_ones_at_most_once_a_second() {
        let dir = tempfile::tempdir().unwrap();
        let descriptor = |pid: u32, fd: u32, target: &str| {
            let at = dir.path().join(pid.to_string()).join("fd");
            std::fs::create_dir_all(&at).unwrap();
            symlink(target, at.join(fd.to_string())).unwrap();
        };
        descriptor(7, 3, "socket:[100]");
        descriptor(7, 4, "/dev/null");
        descriptor(7, 5, "socket:[x]");
        descriptor(9, 3, "socket:[900]");
        let mut owners = Owners::new(dir.path());
        let pids = BTreeSet::from([7, 8]);
        assert_eq!(
            owners.of(S, &pids, [100, 900].into_iter()),
            &HashMap::from([(100, 7)])
        );
        descriptor(7, 6, "socket:[101]");
        assert_eq!(
            owners.of(S + S / 2, &pids, [100, 101].into_iter()).get(&101),
            None
        );
        assert_eq!(
            owners.of(2 * S, &pids, [100, 101].into_iter()).get(&101),
            Some(&7)
        );
        // 900 is known to be foreign: no further reads until it is forgotten or the processes change.
        assert_eq!(
            owners
                .of(4 * S, &BTreeSet::from([7, 9]), [900].into_iter())
                .get(&900),
            Some(&9)
        );
    }
}
