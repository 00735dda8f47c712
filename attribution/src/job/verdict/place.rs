//! Where a cause sits: one rank, one node, or the whole job.

use super::costs::Cost;
use super::rules::is_persistent;
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Place};
use crate::facts::{GpuSubject, PPM};
use crate::job::ledger::{Ledger, RankLedger};
use crate::job::network::Pressure;
use crate::job::waits::Slow;

/// Ranks whose own loss is at least this share of the largest are hit too, percent.
const HIT_PERCENT: u64 = 50;
/// Ranks whose work behind the loss is at least this share of the largest are hit too, percent.
const SIGNAL_PERCENT: u64 = 60;

/// The ranks a cause hits, by position.
///
/// In a synchronous job the slowest rank's loss hides that of the others: they wait for it with their own batch
/// ready. So where the work behind a loss is known (what the loaders did, what was launched, who was throttled), that
/// tells who is hit, and the losses only where it does not.
pub(super) fn hit(cause: Cause, cost: &Cost, ledger: &Ledger, base: Option<&Ledger>) -> Vec<usize> {
    let signal: Option<fn(&RankLedger) -> u64> = match cause {
        Cause::DataLoader => Some(|rank| rank.worker_cpu_ns),
        Cause::DataStorage => Some(|rank| rank.worker_io_ns),
        Cause::HostLaunch => Some(|rank| rank.on_cpu_ns),
        Cause::NetworkNvlink => Some(|rank| u64::from(rank.nvlinks_down)),
        Cause::DeviceFault => Some(|rank| u64::from(rank.faults)),
        Cause::DevicePcie => Some(|rank| PPM - rank.pcie_ppm.unwrap_or(PPM)),
        Cause::HostCpu if ledger.is_held_back() => Some(|rank| rank.throttled_ns.unwrap_or(0)),
        _ => None,
    };
    let by_signal = signal.map(|signal| {
        let grown: Vec<u64> = (0..ledger.ranks.len())
            .map(|at| {
                let rank = &ledger.ranks[at];
                let normal = base.and_then(|base| base.ranks.get(at));
                let normal = normal.map_or(0, |normal| {
                    mul_div(signal(normal), rank.steps, normal.steps.max(1))
                });
                signal(rank).saturating_sub(normal)
            })
            .collect();
        near_largest(&grown, SIGNAL_PERCENT)
    });
    if let Some(hit) = by_signal.filter(|hit| !hit.is_empty()) {
        return hit;
    }
    // Waiting that was moved sits with whoever was last; own losses tell who was hit. A cause without any (uneven
    // work) hits those that kept others waiting.
    let by = if cost.own.iter().all(|ns| *ns == 0) {
        &cost.moved
    } else {
        &cost.own
    };
    near_largest(by, HIT_PERCENT)
}

/// Positions of the values that are at least a share of the largest, and not zero.
fn near_largest(values: &[u64], percent: u64) -> Vec<usize> {
    let most = values.iter().max().copied().unwrap_or(0);
    let near = |value: u64| u128::from(value) * 100 >= u128::from(most) * u128::from(percent);
    (0..values.len())
        .filter(|at| values[*at] > 0 && near(values[*at]))
        .collect()
}

/// A process of a node, by its rank if it has one.
fn process_place(subjects: &[&GpuSubject], node: &str, pid: Option<u32>) -> Place {
    let of = |subject: &&&GpuSubject| subject.node == node && Some(subject.pid) == pid;
    let only_node = || Place {
        node: Some(node.to_owned()),
        ..Place::default()
    };
    subjects
        .iter()
        .find(of)
        .map_or_else(only_node, |subject| rank_place(subject))
}

/// The place the hit ranks share.
pub(super) fn place(cause: Cause, hit: &[usize], subjects: &[&GpuSubject], ledger: &Ledger) -> Place {
    match (cause, ledger.pressure) {
        (_, Pressure::Link(of)) if of == cause => {
            return ledger
                .link
                .as_ref()
                .map_or_else(Place::default, |link| link.place.clone());
        }
        (_, Pressure::Waits(slow)) if slow.cause() == cause => return slow_place(slow, subjects, ledger),
        (Cause::NetworkFabric, Pressure::Lossy(at)) => {
            let port = &ledger.ports[at];
            let mut others = ledger.ports.iter().filter(|other| other.node != port.node);
            let only = others.next().filter(|_| others.next().is_none());
            let to = only.map_or_else(
                || "its peers".to_owned(),
                |other| format!("{} {}", other.node, other.port),
            );
            return Place {
                node: Some(port.node.clone()),
                nic_port: Some(port.port.clone()),
                link: Some(format!("{} {} -> {to}", port.node, port.port)),
                ..Place::default()
            };
        }
        (Cause::HostReceiver, Pressure::Receiver(at)) => {
            let Some(receiver) = ledger.ports[at].slowest_receiver() else {
                return Place::default();
            };
            return process_place(subjects, &receiver.node, receiver.pid);
        }
        (Cause::HostReceiver, Pressure::Behind(at)) => {
            let port = &ledger.ports[at];
            return process_place(subjects, &port.node, port.most_behind());
        }
        (Cause::NetworkNic, Pressure::Port(at)) => {
            let port = &ledger.ports[at];
            return Place {
                node: Some(port.node.clone()),
                nic_port: Some(port.port.clone()),
                ..Place::default()
            };
        }
        (Cause::NetworkNic | Cause::NetworkFabric | Cause::NetworkConfig | Cause::JobCheckpoint, _) => {
            return Place::default();
        }
        _ => {}
    }
    if let [only] = hit
        && subjects.len() > 1
        && (!moves(cause) || is_persistent(&ledger.ranks[*only], ledger))
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

/// Where the ranks' network steps say that the network is slow.
fn slow_place(slow: Slow, subjects: &[&GpuSubject], ledger: &Ledger) -> Place {
    let only_other = |node: &str| {
        let mut others = subjects
            .iter()
            .map(|subject| &subject.node)
            .filter(|other| *other != node);
        let first = others.next()?;
        others.all(|other| other == first).then(|| first.clone())
    };
    match slow {
        Slow::Everywhere => Place::default(),
        Slow::Way(at) => {
            let node = &ledger.waits[at].node;
            let to = only_other(node).unwrap_or_else(|| "its peers".into());
            Place {
                node: Some(node.clone()),
                link: Some(format!("{node} -> {to}")),
                ..Place::default()
            }
        }
        Slow::Receiver(at) | Slow::Flush(at) => rank_place(subjects[ledger.waits[at].rank]),
    }
}

/// Causes that may hit another rank in every step: only one that stays is a place.
const fn moves(cause: Cause) -> bool {
    matches!(
        cause,
        Cause::HostGc | Cause::HostAlloc | Cause::HostCompile | Cause::HostSync | Cause::JobImbalance
    )
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
