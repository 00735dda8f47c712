//! Where a cause sits: one rank, one node, or the whole job.

use super::costs::Cost;
use crate::cause::{Cause, Place};
use crate::facts::GpuSubject;
use crate::job::ledger::Ledger;
use crate::job::network::Pressure;

/// Ranks whose own loss is at least this share of the largest are hit too, percent.
const HIT_PERCENT: u64 = 50;

/// The ranks a cause hits, by position.
pub(super) fn hit(cost: &Cost) -> Vec<usize> {
    // Waiting that was moved sits with whoever was last; own losses tell who was hit. A cause without any (uneven
    // work) hits those that kept others waiting.
    let by = if cost.own.iter().all(|ns| *ns == 0) {
        &cost.moved
    } else {
        &cost.own
    };
    let most = by.iter().max().copied().unwrap_or(0);
    let bar = |ns: u64| u128::from(ns) * 100 >= u128::from(most) * u128::from(HIT_PERCENT);
    (0..by.len()).filter(|at| by[*at] > 0 && bar(by[*at])).collect()
}

/// The place the hit ranks share.
pub(super) fn place(cause: Cause, hit: &[usize], subjects: &[&GpuSubject], ledger: &Ledger) -> Place {
    match (cause, ledger.pressure) {
        (Cause::NetworkNic, Pressure::Port(at)) => {
            let port = &ledger.ports[at];
            return Place {
                node: Some(port.node.clone()),
                nic_port: Some(port.port.clone()),
                ..Place::default()
            };
        }
        (Cause::NetworkNic | Cause::NetworkFabric | Cause::JobCheckpoint, _) => return Place::default(),
        _ => {}
    }
    if let [only] = hit
        && subjects.len() > 1
    {
        let process = match cause {
            Cause::DeviceContention => Some(ledger.ranks[*only].foreign_pid).filter(|pid| *pid != 0),
            _ => None,
        };
        return Place {
            process,
            ..rank_place(subjects[*only])
        };
    }
    let Some(node) = hit.first().map(|at| &subjects[*at].node) else {
        return Place::default();
    };
    let on_node: Vec<usize> = (0..subjects.len())
        .filter(|at| subjects[*at].node == *node)
        .collect();
    let whole_node = hit.len() >= 2 && hit == on_node && on_node.len() < subjects.len();
    Place {
        node: whole_node.then(|| node.clone()),
        ..Place::default()
    }
}

/// A rank with its GPU and node.
pub(in crate::job) fn rank_place(subject: &GpuSubject) -> Place {
    Place {
        node: Some(subject.node.clone()),
        gpu: Some(subject.gpu),
        pci: Some(subject.pci.clone()).filter(|pci| !pci.is_empty()),
        rank: Some(subject.rank),
        ..Place::default()
    }
}
