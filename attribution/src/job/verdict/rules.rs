//! Which costs are causes, which are their consequences, and which are too small to name.

use std::collections::BTreeMap;

use super::costs::Cost;
use crate::budget::arith::mul_div;
use crate::cause::Cause;
use crate::facts::PPM;
use crate::job::ledger::{Ledger, RankLedger};
use crate::job::network::Pressure;
use crate::noise;

/// Part of a regime's steps that says enough of a fault, parts per million.
const LEAST_ACTIVE_PPM: u64 = 250_000;
/// Launches per step above the healthy regime's by this much mean that there is more to launch, parts per million.
const MORE_LAUNCHES_PPM: u64 = 1_400_000;
/// Work of the host that costs this share by itself may keep other threads waiting, parts per million.
const BURDEN_PPM: u64 = 60_000;
/// A further cause costs at least this share of the first, percent.
const BESIDE_PERCENT: u64 = 35;
/// A rank is the culprit when it was last in at least this share of the steps that had a last rank, percent.
pub(super) const PERSISTENT_PERCENT: u64 = 60;

/// Least share of a regime's GPU time that makes a cost a cause, parts per million.
///
/// Facts of the device (a clock reason, another process) stand by themselves and need less; what is inferred from
/// averages, or happens on every busy host, needs more.
///
/// Without a healthy regime to compare with, what is normal for the job counts as lost too: the host then has to show
/// more before it is accused.
///
/// In a job whose steps are steady a smaller loss stands out, of what a healthy job has next to nothing of.
fn least_ppm(candidate: &Candidate, ledger: &Ledger) -> u64 {
    let cause = candidate.cause;
    let compared = ledger.baseline.is_some();
    let stands_out = (compared && cause != Cause::DevicePowerCap)
        || matches!(
            cause,
            Cause::DataLoader
                | Cause::DataStorage
                | Cause::DeviceThermal
                | Cause::DeviceContention
                | Cause::HostGc
                | Cause::JobImbalance
                | Cause::NetworkNic
                | Cause::NetworkFabric
                | Cause::HostReceiver
                | Cause::DataCopy
        )
        || cause == Cause::HostCpu && ledger.is_held_back();
    let least = usual_ppm(cause, ledger, compared, candidate.is_widespread());
    if stands_out {
        noise::least_ppm(least, ledger.noise_ppm)
    } else {
        least
    }
}

fn usual_ppm(cause: Cause, ledger: &Ledger, compared: bool, widespread: bool) -> u64 {
    match cause {
        // The driver says that links are down, or that the device is at fault.
        Cause::NetworkNvlink | Cause::DevicePcie | Cause::DeviceFault => 10_000,
        Cause::DeviceThermal | Cause::DeviceContention => 20_000,
        Cause::DevicePowerCap if !widespread => 20_000,
        Cause::HostCpu if ledger.is_held_back() => 50_000,
        Cause::HostGc | Cause::HostAlloc | Cause::NetworkNic => 60_000,
        // Lost packets and what devices say are facts.
        Cause::NetworkFabric if matches!(ledger.pressure, Pressure::Lossy(_) | Pressure::Link(_)) => 60_000,
        Cause::NetworkPcie | Cause::HostReceiver => 60_000,
        Cause::DevicePowerCap => 70_000,
        Cause::DataLoader | Cause::DataStorage if compared => 70_000,
        Cause::DataLoader | Cause::DataStorage => 100_000,
        Cause::HostLaunch | Cause::HostSync | Cause::HostCompile if compared => 90_000,
        Cause::NetworkConfig if compared => 60_000,
        Cause::DataCopy | Cause::NetworkFabric => 120_000,
        Cause::HostCpu | Cause::JobImbalance if compared => 120_000,
        _ => 150_000,
    }
}

/// The part of the steps in which the device said what the cause is, parts per million: a fault that began within a
/// regime, too small to be cut out of it, is measured by its own steps.
fn active_ppm(candidate: &Candidate, ledger: &Ledger) -> u64 {
    let steps: fn(&RankLedger) -> u64 = match candidate.cause {
        Cause::DeviceThermal => |rank| rank.hot_steps,
        Cause::DevicePowerCap => |rank| rank.capped_steps,
        Cause::DeviceContention => |rank| rank.shared_steps,
        _ => return PPM,
    };
    let share = |rank: &RankLedger| mul_div(steps(rank), PPM, rank.steps);
    ledger
        .ranks
        .iter()
        .map(share)
        .max()
        .unwrap_or(PPM)
        .max(LEAST_ACTIVE_PPM)
}

/// A cost that is large enough, or the reason why it is none.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) cause: Cause,
    pub(super) cost: Cost,
}

impl Candidate {
    /// Whether most ranks lose about as much: a setting of the whole job, not a fault of one place.
    fn is_widespread(&self) -> bool {
        let most = self.cost.own.iter().max().copied().unwrap_or(0);
        let alike = self
            .cost
            .own
            .iter()
            .filter(|own| **own > 0 && own.saturating_mul(2) >= most)
            .count();
        alike * 2 > self.cost.own.len()
    }
}

/// What the rules decided in one regime.
#[derive(Debug, Clone, Default)]
pub(super) struct Decision {
    /// Causes, largest first.
    pub(super) causes: Vec<Candidate>,
    /// Costs that are not causes, with the reason.
    pub(super) dropped: Vec<(Cause, String)>,
}

/// Applies the rules to the costs of one regime.
pub(super) fn decide(ledger: &Ledger, base: Option<&Ledger>, mut costs: BTreeMap<Cause, Cost>) -> Decision {
    costs.remove(&Cause::JobCheckpoint);
    let mut decision = Decision::default();
    join_host(ledger, base, &mut costs, &mut decision);
    let mut causes: Vec<Candidate> = costs
        .into_iter()
        .map(|(cause, cost)| Candidate { cause, cost })
        .collect();
    causes.sort_by(|a, b| b.cost.total().cmp(&a.cost.total()).then(a.cause.cmp(&b.cause)));
    for candidate in causes {
        match objection(&candidate, &decision.causes, ledger) {
            None => decision.causes.push(candidate),
            Some(why) => decision.dropped.push((candidate.cause, why)),
        }
    }
    decision
}

/// Threads that all want to run at once keep each other waiting. Without a quota, run-queue delay beside launching or
/// loading is the price of that work, not a cause of its own.
fn join_host(
    ledger: &Ledger,
    base: Option<&Ledger>,
    costs: &mut BTreeMap<Cause, Cost>,
    decision: &mut Decision,
) {
    if ledger.is_held_back() {
        return;
    }
    let total = |costs: &BTreeMap<Cause, Cost>, cause| costs.get(&cause).map_or(0, Cost::total);
    let delay = total(costs, Cause::HostCpu);
    let launch = total(costs, Cause::HostLaunch);
    let loader = total(costs, Cause::DataLoader);
    if delay == 0 {
        return;
    }
    let more_launches = base.is_some_and(|base| {
        let rate = |ledger: &Ledger| {
            let (launches, steps) = ledger.ranks.iter().fold((0, 0), |(launches, steps), rank| {
                (launches + rank.launches, steps + rank.steps)
            });
            mul_div(launches, PPM, steps)
        };
        rate(ledger) > mul_div(rate(base), MORE_LAUNCHES_PPM, PPM)
    });
    let into = if more_launches || (launch > loader && ledger.share_ppm(launch) >= BURDEN_PPM) {
        Cause::HostLaunch
    } else if loader * 10 >= delay * 5 && ledger.share_ppm(loader) >= BURDEN_PPM {
        Cause::DataLoader
    } else {
        return;
    };
    if let (Some(delayed), Some(cost)) = (costs.remove(&Cause::HostCpu), costs.get_mut(&into)) {
        cost.add(&delayed);
        let why = format!(
            "run-queue delay of {} is the price of the threads of {} sharing the CPUs; no quota throttles any rank",
            super::words::percent(ledger.share_ppm(delayed.total())),
            into.name(),
        );
        decision.dropped.push((Cause::HostCpu, why));
    }
}

/// Why a cost is not a cause, beside those already found.
fn objection(candidate: &Candidate, found: &[Candidate], ledger: &Ledger) -> Option<String> {
    let (cause, total) = (candidate.cause, candidate.cost.total());
    let share = super::words::percent(ledger.share_ppm(total));
    if mul_div(ledger.share_ppm(total), PPM, active_ppm(candidate, ledger)) < least_ppm(candidate, ledger) {
        return Some(format!(
            "costs {share} of GPU time, below {}",
            super::words::percent(least_ppm(candidate, ledger))
        ));
    }
    if cause == Cause::JobImbalance && !persistent(candidate, ledger) {
        return Some(format!(
            "{share} of GPU time, but the last rank changes from step to step"
        ));
    }
    if matches!(cause, Cause::NetworkNic | Cause::NetworkFabric) && ledger.pressure == Pressure::None {
        return Some("no port held packets back and no flow was held up".into());
    }
    // A quota is set by somebody: being throttled by it follows from nothing else.
    let set = cause == Cause::HostCpu && ledger.is_held_back();
    // Loaders that compute and loaders that read can both be slow; a small part of either comes with the other.
    let beside = |root: &Candidate| {
        let data = |cause| matches!(cause, Cause::DataLoader | Cause::DataStorage);
        data(cause) && data(root.cause) && total.saturating_mul(2) >= root.cost.total()
    };
    let root = |found: &&Candidate| !set && follows(found.cause, cause) && !beside(found);
    if let Some(root) = found.iter().find(root) {
        return Some(format!(
            "{share} of GPU time, a consequence of {}",
            root.cause.name()
        ));
    }
    let top = found.first().map_or(0, |found| found.cost.total());
    (u128::from(total) * 100 < u128::from(top) * u128::from(BESIDE_PERCENT))
        .then(|| format!("costs {share} of GPU time, small beside the first cause"))
}

/// Whether the same ranks were late in most steps.
fn persistent(candidate: &Candidate, ledger: &Ledger) -> bool {
    let most = candidate.cost.moved.iter().max().copied().unwrap_or(0);
    let costliest = ledger
        .ranks
        .iter()
        .zip(&candidate.cost.moved)
        .find(|(_, moved)| **moved == most);
    costliest.is_some_and(|(rank, _)| is_persistent(rank, ledger))
}

/// Whether others waited for a rank in most of the steps in which anybody was waited for, and in most steps at all.
pub(super) fn is_persistent(rank: &RankLedger, ledger: &Ledger) -> bool {
    rank.late * 100 >= ledger.late_steps * PERSISTENT_PERCENT && rank.late * 2 >= rank.steps
}

/// Whether a cost is what the cause brings with it: starved threads, late ranks, slower neighbours.
pub(super) fn follows(cause: Cause, cost: Cause) -> bool {
    use Cause::{
        DataLoader, DataStorage, DeviceContention, DevicePowerCap, DeviceThermal, HostCpu, HostLaunch,
        HostReceiver, HostSync, JobCheckpoint, JobImbalance, KernelClock, NetworkConfig, NetworkFabric,
        NetworkNic, NetworkNvlink, NetworkPcie,
    };
    let effects: &[Cause] = match cause {
        DataLoader => &[
            HostCpu,
            HostLaunch,
            HostSync,
            DataStorage,
            JobImbalance,
            NetworkFabric,
        ],
        DataStorage => &[
            DataLoader,
            HostCpu,
            HostLaunch,
            HostSync,
            JobImbalance,
            NetworkFabric,
            HostReceiver,
        ],
        HostCpu => &[
            DataLoader,
            DataStorage,
            HostLaunch,
            HostSync,
            JobImbalance,
            NetworkFabric,
            NetworkNic,
            HostReceiver,
        ],
        HostLaunch => &[
            HostCpu,
            DataLoader,
            HostSync,
            JobImbalance,
            NetworkFabric,
            HostReceiver,
        ],
        NetworkNic | NetworkFabric | NetworkNvlink | NetworkPcie | NetworkConfig | HostReceiver => {
            &[HostCpu, HostLaunch, HostSync, JobImbalance]
        }
        DeviceThermal => &[DevicePowerCap, KernelClock, JobImbalance],
        DevicePowerCap => &[KernelClock, JobImbalance],
        DeviceContention => &[DevicePowerCap, KernelClock, JobImbalance, HostCpu, HostLaunch],
        JobCheckpoint => &[
            DataStorage,
            DataLoader,
            HostCpu,
            JobImbalance,
            NetworkFabric,
            HostReceiver,
        ],
        _ => &[JobImbalance],
    };
    effects.contains(&cost)
}
