//! Control groups for tests: one tree of groups, whichever version of cgroups carries a controller.
//!
//! A group is named by its path below the root (`/run-1/node0/rank0`), the path that `/proc/PID/cgroup` shows for its
//! members. Version 1 has a hierarchy for each controller, version 2 one for all; a host may have both, with each
//! controller in one of them. Only leaves of the tree may have members, as version 2 demands.
#![forbid(unsafe_code)]

mod mounts;
mod remove;

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Length of a period of the processor quota, us: the kernel's default.
pub const CPU_PERIOD_US: u64 = 100_000;

/// Why a group cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// No hierarchy carries a controller.
    #[error(
        "no control group hierarchy carries the {0} controller: mount cgroup2 at /sys/fs/cgroup (`mount -t cgroup2 none \
         /sys/fs/cgroup`), and boot a kernel with CONFIG_CFS_BANDWIDTH and CONFIG_BLK_DEV_THROTTLING"
    )]
    NoController(&'static str),
    /// Version 2 keeps processes and controllers of groups below apart.
    #[error(
        "{group} holds processes, so it cannot hand the {controller} controller to groups below it: move them to a group \
         of their own, for instance `mkdir {group}/init && for p in $(cat {group}/cgroup.procs); do echo $p > \
         {group}/init/cgroup.procs; done`"
    )]
    HoldsProcesses {
        /// The folder of the group.
        group: PathBuf,
        /// The controller that was to be enabled.
        controller: &'static str,
    },
    /// The controller is there and its limits are not.
    #[error("{0} is missing: boot a kernel with CONFIG_CFS_BANDWIDTH and CONFIG_BLK_DEV_THROTTLING")]
    NoLimit(PathBuf),
    /// The kernel refused.
    #[error("failed to {what} {path}: {source}")]
    Io {
        /// A verb.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

/// Which way bytes go between a group and a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transfer {
    /// From the disk.
    Read,
    /// To the disk.
    Write,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

/// Where a controller's groups are.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    root: PathBuf,
    version: Version,
}

/// The groups that share out processors and disks on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    cpu: Hierarchy,
    io: Hierarchy,
}

impl Tree {
    /// The tree of this host.
    ///
    /// # Errors
    /// The processor or the disk controller is nowhere.
    pub fn find() -> Result<Self, Error> {
        let path = Path::new("/proc/self/mountinfo");
        let mountinfo = fs::read_to_string(path).map_err(|source| Error::Io {
            what: "read",
            path: path.to_owned(),
            source,
        })?;
        Self::from_mounts(&mountinfo)
    }

    fn from_mounts(mountinfo: &str) -> Result<Self, Error> {
        let found = |v1, v2| mounts::hierarchy(mountinfo, v1, v2).ok_or(Error::NoController(v2));
        Ok(Self {
            cpu: found("cpu", "cpu")?,
            io: found("blkio", "io")?,
        })
    }

    /// In words: the version that carries each controller.
    #[must_use]
    pub fn describe(&self) -> String {
        let version = |hierarchy: &Hierarchy| match hierarchy.version {
            Version::V1 => 1,
            Version::V2 => 2,
        };
        format!(
            "cpu by cgroup version {}, io by version {}",
            version(&self.cpu),
            version(&self.io)
        )
    }

    /// Makes a group and those above it, with both controllers enabled in it.
    ///
    /// # Errors
    /// The kernel refuses: without root, or because a group above has members.
    pub fn create(&self, group: &str) -> Result<(), Error> {
        for hierarchy in self.hierarchies() {
            if hierarchy.version == Version::V2 {
                self.enable_above(hierarchy, group)?;
            }
            let path = hierarchy.folder(group);
            fs::create_dir_all(&path).map_err(|source| Error::Io {
                what: "create",
                path,
                source,
            })?;
        }
        Ok(())
    }

    /// Whether a group that was made has the files that set its limits.
    ///
    /// # Errors
    /// The kernel was built without one of the limits.
    pub fn check(&self, group: &str) -> Result<(), Error> {
        let cpu = match self.cpu.version {
            Version::V1 => "cpu.cfs_quota_us",
            Version::V2 => "cpu.max",
        };
        let io = match self.io.version {
            Version::V1 => "blkio.throttle.read_bps_device",
            Version::V2 => "io.max",
        };
        let files = [self.cpu.folder(group).join(cpu), self.io.folder(group).join(io)];
        match files.into_iter().find(|file| !file.exists()) {
            Some(missing) => Err(Error::NoLimit(missing)),
            None => Ok(()),
        }
    }

    /// Moves the calling process into a group.
    ///
    /// # Errors
    /// The group does not exist, or has groups below it.
    pub fn join(&self, group: &str) -> Result<(), Error> {
        self.hierarchies()
            .iter()
            .try_for_each(|hierarchy| write(hierarchy.folder(group).join("cgroup.procs"), "0"))
    }

    /// Gives a group `quota_us` of processor time in each [`CPU_PERIOD_US`]; `None` lifts the limit.
    ///
    /// # Errors
    /// The group does not exist, or the kernel refuses the value.
    pub fn limit_cpu(&self, group: &str, quota_us: Option<u64>) -> Result<(), Error> {
        let folder = self.cpu.folder(group);
        match self.cpu.version {
            Version::V1 => {
                let quota = quota_us.map_or_else(|| "-1".to_owned(), |quota| quota.to_string());
                write(folder.join("cpu.cfs_period_us"), &CPU_PERIOD_US.to_string())?;
                write(folder.join("cpu.cfs_quota_us"), &quota)
            }
            Version::V2 => {
                let quota = quota_us.map_or_else(|| "max".to_owned(), |quota| quota.to_string());
                write(folder.join("cpu.max"), &format!("{quota} {CPU_PERIOD_US}"))
            }
        }
    }

    /// Gives a group `bytes_per_s` on the disk `device` (`major:minor`); `None` lifts the limit.
    ///
    /// # Errors
    /// The group or the device does not exist.
    pub fn limit_disk(
        &self,
        group: &str,
        transfer: Transfer,
        device: &str,
        bytes_per_s: Option<u64>,
    ) -> Result<(), Error> {
        let folder = self.io.folder(group);
        match self.io.version {
            Version::V1 => {
                let way = match transfer {
                    Transfer::Read => "read",
                    Transfer::Write => "write",
                };
                let limit = bytes_per_s.unwrap_or(0);
                write(
                    folder.join(format!("blkio.throttle.{way}_bps_device")),
                    &format!("{device} {limit}"),
                )
            }
            Version::V2 => {
                let key = match transfer {
                    Transfer::Read => "rbps",
                    Transfer::Write => "wbps",
                };
                let limit = bytes_per_s.map_or_else(|| "max".to_owned(), |limit| limit.to_string());
                write(folder.join("io.max"), &format!("{device} {key}={limit}"))
            }
        }
    }

    /// Time a group was throttled by its quota so far, ns; `None` when it cannot be read, as when the group is gone.
    #[must_use]
    pub fn throttled_ns(&self, group: &str) -> Option<u64> {
        let text = fs::read_to_string(self.cpu.folder(group).join("cpu.stat")).ok()?;
        let (key, unit_ns) = match self.cpu.version {
            Version::V1 => ("throttled_time ", 1),
            Version::V2 => ("throttled_usec ", 1_000),
        };
        let value: u64 = text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.trim().parse().ok())?;
        Some(value * unit_ns)
    }

    /// Folders of a group that exist, one for each hierarchy.
    #[must_use]
    pub fn folders(&self, group: &str) -> Vec<PathBuf> {
        self.hierarchies()
            .iter()
            .map(|hierarchy| hierarchy.folder(group))
            .filter(|folder| folder.is_dir())
            .collect()
    }

    /// Kills the members of a group and of those below it; how many were there.
    #[must_use]
    pub fn kill(&self, group: &str) -> usize {
        let folders = self.folders(group);
        folders.iter().map(|folder| remove::kill(folder)).sum()
    }

    /// Kills the members of a group and of those below it, and removes the groups. One that does not exist is no error.
    ///
    /// # Errors
    /// A member would not die.
    pub fn remove(&self, group: &str) -> Result<(), Error> {
        self.folders(group)
            .iter()
            .try_for_each(|folder| remove::remove(folder))
    }

    fn hierarchies(&self) -> Vec<&Hierarchy> {
        if self.cpu == self.io {
            vec![&self.cpu]
        } else {
            vec![&self.cpu, &self.io]
        }
    }

    /// What a hierarchy of version 2 must hand down: a controller works in a group when the one above enables it.
    fn wanted(&self, hierarchy: &Hierarchy) -> Vec<&'static str> {
        let mut wanted = Vec::new();
        if self.cpu == *hierarchy {
            wanted.push("cpu");
        }
        if self.io == *hierarchy {
            wanted.push("io");
            // Dirty pages belong to the group that carries memory; without it what a group writes counts as the
            // root's, which has no limit.
            if words(&hierarchy.root.join("cgroup.controllers")).any(|name| name == "memory") {
                wanted.push("memory");
            }
        }
        wanted
    }

    fn enable_above(&self, hierarchy: &Hierarchy, group: &str) -> Result<(), Error> {
        let wanted = self.wanted(hierarchy);
        let mut above: Vec<&str> = Path::new(group)
            .ancestors()
            .skip(1)
            .filter_map(Path::to_str)
            .collect();
        above.reverse();
        for group in above {
            let folder = hierarchy.folder(group);
            fs::create_dir_all(&folder).map_err(|source| Error::Io {
                what: "create",
                path: folder.clone(),
                source,
            })?;
            for controller in &wanted {
                enable(&folder, controller)?;
            }
        }
        Ok(())
    }
}

impl Hierarchy {
    fn folder(&self, group: &str) -> PathBuf {
        self.root.join(group.trim_start_matches('/'))
    }
}

fn enable(folder: &Path, controller: &'static str) -> Result<(), Error> {
    let path = folder.join("cgroup.subtree_control");
    if words(&path).any(|name| name == controller) {
        return Ok(());
    }
    write(path, &format!("+{controller}")).map_err(|error| match error {
        Error::Io { source, .. } if source.kind() == ErrorKind::ResourceBusy => Error::HoldsProcesses {
            group: folder.to_owned(),
            controller,
        },
        other => other,
    })
}

fn words(path: &Path) -> impl Iterator<Item = String> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    words.into_iter()
}

fn write(path: PathBuf, text: &str) -> Result<(), Error> {
    fs::write(&path, text).map_err(|source| Error::Io {
        what: "write",
        path,
        source,
    })
}

#[cfg(test)]
mod tests;
