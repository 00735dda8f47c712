//! What a run must not leave behind: network namespaces, control groups.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::virtual_nodes::Ready;
use crate::shell;

/// Where control groups may be mounted, one folder per hierarchy below it.
const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// Removes what is left of the nodes and names it. The virtual nodes clean up themselves; this is for when they
/// could not.
#[must_use]
pub fn remove(ready: &Ready) -> Vec<String> {
    let mut found = Vec::new();
    let spaces = ready
        .nodes
        .iter()
        .map(|node| &node.netns)
        .chain(&ready.collector.netns);
    for name in spaces.filter(|name| Path::new("/run/netns").join(name).exists()) {
        let removed = shell::succeeds(Command::new("ip").args(["netns", "delete", name]));
        found.push(describe("network namespace", name, removed));
    }
    for group in groups_left(ready) {
        let removed = remove_group(&group).is_ok();
        found.push(describe("control group", &group.display().to_string(), removed));
    }
    found
}

fn describe(kind: &str, name: &str, removed: bool) -> String {
    let done = if removed { "removed" } else { "still there" };
    format!("{kind} {name} ({done})")
}

fn groups_left(ready: &Ready) -> Vec<PathBuf> {
    let hierarchies = fs::read_dir(CGROUP_ROOT)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    hierarchies
        .flat_map(|root| {
            ready
                .nodes
                .iter()
                .map(move |node| root.join(node.cgroup.trim_start_matches('/')))
                .collect::<Vec<_>>()
        })
        .filter(|group| group.is_dir())
        .collect()
}

/// Children first, as the kernel wants it.
fn remove_group(group: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(group)?
        .flatten()
        .filter(|entry| entry.path().is_dir())
    {
        remove_group(&entry.path())?;
    }
    fs::remove_dir(group)
}
