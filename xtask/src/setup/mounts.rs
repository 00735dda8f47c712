//! Kernel file systems.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result};

/// A file system that must be mounted.
#[derive(Debug)]
pub(super) struct Mount {
    kind: &'static str,
    at: &'static str,
}

const MOUNTS: &[Mount] = &[
    Mount {
        kind: "tracefs",
        at: "/sys/kernel/tracing",
    },
    Mount {
        kind: "bpf",
        at: "/sys/fs/bpf",
    },
];

impl Mount {
    /// The command that mounts it.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new("mount");
        command.args(["-t", self.kind, "nodev", self.at]);
        command
    }
}

/// Those that are not mounted.
pub(super) fn missing() -> Result<Vec<&'static Mount>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("failed to read /proc/self/mounts")?;
    Ok(MOUNTS
        .iter()
        .filter(|mount| !is_mounted(&mounts, mount))
        .collect())
}

fn is_mounted(mounts: &str, mount: &Mount) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some(mount.at) && fields.next() == Some(mount.kind)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_known_by_place_and_kind() {
        let mounts = "nodev /sys/kernel/tracing tracefs rw 0 0\ntmpfs /sys/fs/bpf tmpfs rw 0 0\n";
        let missing: Vec<_> = MOUNTS
            .iter()
            .filter(|mount| !is_mounted(mounts, mount))
            .map(|mount| mount.kind)
            .collect();
        assert_eq!(missing, ["bpf"]);
    }
}
