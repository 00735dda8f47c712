//! Taking groups down.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::Error;

/// How often and how long members are waited for.
const TRIES: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// Kills all members and waits for their end, as long as [`TRIES`] times [`PAUSE`]; how many were there at first.
pub(crate) fn kill(group: &Path) -> usize {
    let first = members(group);
    let mut left = first.clone();
    for _ in 0..TRIES {
        if left.is_empty() {
            break;
        }
        for pid in left.into_iter().filter_map(Pid::from_raw) {
            // One that has gone meanwhile is what we want.
            let _gone = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(PAUSE);
        left = members(group);
    }
    first.len()
}

/// Kills all members and removes the group with those below it: children first, as the kernel wants it.
pub(crate) fn remove(group: &Path) -> Result<(), Error> {
    kill(group);
    for child in children(group) {
        remove(&child)?;
    }
    fs::remove_dir(group).map_err(|source| Error::Io {
        what: "remove",
        path: group.to_owned(),
        source,
    })
}

fn members(group: &Path) -> Vec<i32> {
    let mut pids: Vec<i32> = fs::read_to_string(group.join("cgroup.procs"))
        .map(|text| text.lines().filter_map(|line| line.parse().ok()).collect())
        .unwrap_or_default();
    for child in children(group) {
        pids.extend(members(&child));
    }
    pids
}

fn children(group: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(group) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}
