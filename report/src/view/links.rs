//! Paths and findings in words.

use crate::document::{LinkPath, LinkPort, NotSeen};
use crate::format::clean;

/// "rank 3, node1 GPU 1 0000:0f:00.0 -> mlx5_3:1 (same switch, in use) to node0 mlx5_3:1".
pub(crate) fn path(path: &LinkPath) -> String {
    let rank = path
        .rank
        .map_or_else(|| "no rank".to_owned(), |rank| format!("rank {rank}"));
    let gpu = path
        .gpu
        .map_or_else(|| "GPU".to_owned(), |gpu| format!("GPU {gpu}"));
    let pci = if path.pci.is_empty() {
        String::new()
    } else {
        format!(" {}", clean(&path.pci))
    };
    let ports: Vec<String> = path.ports.iter().map(port).collect();
    let ports = if ports.is_empty() {
        "no port known".to_owned()
    } else {
        ports.join("; ")
    };
    format!("{rank}, {} {gpu}{pci} -> {ports}", clean(&path.node))
}

fn port(port: &LinkPort) -> String {
    let distance = match port.distance.as_str() {
        "unknown" => None,
        distance => Some(clean(distance).replace('_', " ")),
    };
    let used = match port.used {
        Some(true) => Some("in use".to_owned()),
        Some(false) => Some("not used".to_owned()),
        None => None,
    };
    let notes: Vec<String> = distance.into_iter().chain(used).collect();
    let notes = if notes.is_empty() {
        String::new()
    } else {
        format!(" ({})", notes.join(", "))
    };
    let peers: Vec<String> = port.peers.iter().take(4).map(|peer| clean(peer)).collect();
    let more = port.peers.len().saturating_sub(peers.len());
    let peers = match (peers.as_slice(), more) {
        ([], _) => String::new(),
        (_, 0) => format!(" to {}", peers.join(", ")),
        (_, more) => format!(" to {} and {more} more", peers.join(", ")),
    };
    format!("{}{notes}{peers}", clean(&port.port))
}

/// "node1: mlx5_0:1: its rate was not measured".
pub(crate) fn not_seen(one: &NotSeen) -> String {
    if one.node.is_empty() {
        clean(&one.what)
    } else {
        format!("{}: {}", clean(&one.node), clean(&one.what))
    }
}

/// What a finding costs, in words.
pub(crate) fn finding_costs(costs: &str) -> &'static str {
    match costs {
        "verdict" => "named by a verdict",
        "nothing_measured" => "seen, costs nothing measured",
        _ => "no job's time was measured beside it",
    }
}
