//! Where hierarchies are mounted.

use std::fs;
use std::path::PathBuf;

use crate::{Hierarchy, Version};

/// The hierarchy that carries a controller, by its names in version 1 and version 2. One that is mounted with version 1
/// is not in version 2's hierarchy, though the files of that exist.
pub(crate) fn hierarchy(mountinfo: &str, v1: &str, v2: &str) -> Option<Hierarchy> {
    let in_v1 = mounts(mountinfo)
        .find(|mount| mount.kind == "cgroup" && mount.options.split(',').any(|option| option == v1))
        .map(|mount| (mount, Version::V1));
    let in_v2 = || {
        mounts(mountinfo)
            .find(|mount| mount.kind == "cgroup2" && offers(mount, v2))
            .map(|mount| (mount, Version::V2))
    };
    in_v1.or_else(in_v2).map(|(mount, version)| Hierarchy {
        root: mount.at,
        version,
    })
}

struct Mount<'a> {
    at: PathBuf,
    kind: &'a str,
    options: &'a str,
}

/// Lines of proc_pid_mountinfo(5): `id parent dev root mount-point options [tags] - type source super-options`.
fn mounts(mountinfo: &str) -> impl Iterator<Item = Mount<'_>> {
    mountinfo.lines().filter_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut after = after.split(' ');
        Some(Mount {
            at: before.split(' ').nth(4)?.replace("\\040", " ").into(),
            kind: after.next()?,
            options: after.nth(1)?,
        })
    })
}

fn offers(mount: &Mount<'_>, controller: &str) -> bool {
    fs::read_to_string(mount.at.join("cgroup.controllers"))
        .is_ok_and(|text| text.split_whitespace().any(|name| name == controller))
}
