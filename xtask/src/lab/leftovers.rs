//! What a run must not leave behind: network namespaces, control groups.

use std::path::Path;
use std::process::Command;

use test_cgroups::Tree;

use super::virtual_nodes::Ready;
use crate::shell;

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
    let Ok(tree) = Tree::find() else { return found };
    for group in ready.nodes.iter().map(|node| &node.cgroup) {
        if !tree.folders(group).is_empty() {
            found.push(describe("control group", group, tree.remove(group).is_ok()));
        }
    }
    found
}

fn describe(kind: &str, name: &str, removed: bool) -> String {
    let done = if removed { "removed" } else { "still there" };
    format!("{kind} {name} ({done})")
}
