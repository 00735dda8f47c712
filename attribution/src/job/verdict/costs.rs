//! What each cause cost each rank in one regime.

use std::collections::BTreeMap;

use crate::budget::arith::mul_div;
use crate::cause::Cause;
use crate::facts::PPM;
use crate::job::ledger::{Ledger, RankLedger};
use crate::job::network::Pressure;
use crate::leaf::Leaf;

/// A group throttled for this share of the time stands still as a whole, parts per million.
const THROTTLED_PPM: u64 = 100_000;
/// A clock is low when it is below this share of its reference, parts per million.
const LOW_CLOCK_PPM: u64 = 970_000;
/// A clock reason held for this share of the time counts, parts per million.
const REASON_PPM: u64 = 50_000;

/// GPU time by rank, ns.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::job) struct Cost {
    /// The ranks' own loss beyond what the healthy regime shows.
    pub(in crate::job) own: Vec<u64>,
    /// Waiting of others moved to them.
    pub(in crate::job) moved: Vec<u64>,
}

impl Cost {
    pub(in crate::job) fn total(&self) -> u64 {
        self.own
            .iter()
            .chain(&self.moved)
            .fold(0, |sum: u64, ns| sum.saturating_add(*ns))
    }

    pub(in crate::job) fn add(&mut self, other: &Self) {
        let pairs = self
            .own
            .iter_mut()
            .zip(&other.own)
            .chain(self.moved.iter_mut().zip(&other.moved));
        for (sum, ns) in pairs {
            *sum = sum.saturating_add(*ns);
        }
    }
}

/// Costs by cause. For a cause in `chronic`, found in the healthy regime already, nothing is subtracted.
pub(in crate::job) fn costs(
    ledger: &Ledger,
    base: Option<&Ledger>,
    chronic: &[Cause],
) -> BTreeMap<Cause, Cost> {
    let mut costs: BTreeMap<Cause, Cost> = BTreeMap::new();
    for (at, rank) in ledger.ranks.iter().enumerate() {
        let healthy = base.and_then(|base| base.ranks.get(at));
        for leaf in Leaf::ALL {
            let Some(cause) = cause_of(*leaf, rank, ledger.pressure) else {
                continue;
            };
            let healthy = healthy.filter(|_| !chronic.contains(&cause));
            let normal = |of: &dyn Fn(&RankLedger) -> u64| {
                healthy.map_or(0, |healthy| {
                    mul_div(of(healthy), rank.steps, healthy.steps.max(1))
                })
            };
            let own = match leaf {
                // The kernels' own residual is no loss by itself: only making others wait is.
                Leaf::ComputeKernel => 0,
                _ => rank.leaf(*leaf).saturating_sub(normal(&|rank| rank.leaf(*leaf))),
            };
            let moved = rank.moved[leaf.index()].saturating_sub(normal(&|rank| rank.moved[leaf.index()]));
            let cost = costs.entry(cause).or_insert_with(|| Cost {
                own: vec![0; ledger.ranks.len()],
                moved: vec![0; ledger.ranks.len()],
            });
            cost.own[at] = cost.own[at].saturating_add(own);
            cost.moved[at] = cost.moved[at].saturating_add(moved);
        }
    }
    stalled_communication(ledger, base, &mut costs);
    costs
}

/// A throttled rank's communication threads stand still with the rest of it, and every rank's collectives with them:
/// what communication grew by is that rank's.
fn stalled_communication(ledger: &Ledger, base: Option<&Ledger>, costs: &mut BTreeMap<Cause, Cost>) {
    let throttled = |at: &usize| ledger.ranks[*at].throttled_ppm() >= THROTTLED_PPM;
    let worst = (0..ledger.ranks.len())
        .filter(throttled)
        .max_by_key(|at| ledger.ranks[*at].throttled_ppm());
    let (Some(worst), Some(base)) = (worst, base) else {
        return;
    };
    let Some(cost) = costs
        .get_mut(&Cause::HostCpu)
        .filter(|_| ledger.pressure == Pressure::None)
    else {
        return;
    };
    let moving = |rank: &RankLedger| {
        rank.leaf(Leaf::CommTransfer)
            .saturating_add(rank.leaf(Leaf::CommProto))
    };
    let grown = ledger.ranks.iter().zip(&base.ranks).map(|(rank, healthy)| {
        moving(rank).saturating_sub(mul_div(moving(healthy), rank.steps, healthy.steps.max(1)))
    });
    cost.moved[worst] = cost.moved[worst].saturating_add(grown.sum());
}

/// The cause a rank's leaf stands for, given the facts about the rank; `None` for leaves that are no loss.
pub(in crate::job) fn cause_of(leaf: Leaf, rank: &RankLedger, pressure: Pressure) -> Option<Cause> {
    let throttled = rank.throttled_ppm() >= THROTTLED_PPM;
    Some(match leaf {
        Leaf::IdleCkpt => Cause::JobCheckpoint,
        Leaf::IdleGc => Cause::HostGc,
        // A throttled group stands still as a whole: whatever its threads seem to wait for, they lack a CPU.
        Leaf::IdleDataCpu
        | Leaf::IdleDataStorage
        | Leaf::IdleLaunch
        | Leaf::IdleCpuSync
        | Leaf::IdleAlloc
        | Leaf::IdleUnknown
            if throttled =>
        {
            Cause::HostCpu
        }
        Leaf::IdleCpuSched => Cause::HostCpu,
        Leaf::IdleDataCpu => Cause::DataLoader,
        Leaf::IdleDataStorage => Cause::DataStorage,
        Leaf::IdleLaunch => Cause::HostLaunch,
        Leaf::IdleCpuSync => Cause::HostSync,
        Leaf::IdleAlloc => Cause::HostAlloc,
        Leaf::IdleCompile => Cause::HostCompile,
        Leaf::ComputeClock => clock_cause(rank)?,
        Leaf::ComputeContention => Cause::DeviceContention,
        Leaf::ComputeKernel if rank.faults > 0 => Cause::DeviceFault,
        Leaf::ComputeKernel => Cause::JobImbalance,
        Leaf::CommNet => match pressure {
            Pressure::Fabric | Pressure::Lossy(_) => Cause::NetworkFabric,
            Pressure::Receiver(_) | Pressure::Behind(_) => Cause::HostReceiver,
            Pressure::Link(cause) => cause,
            Pressure::Waits(slow) => slow.cause(),
            Pressure::Nvlink => Cause::NetworkNvlink,
            Pressure::Config => Cause::NetworkConfig,
            Pressure::Port(_) | Pressure::None => Cause::NetworkNic,
        },
        Leaf::MemoryCopy => Cause::DataCopy,
        Leaf::MemoryPcie => Cause::DevicePcie,
        _ => return None,
    })
}

fn clock_cause(rank: &RankLedger) -> Option<Cause> {
    let (seen, reference) = (rank.sm_mhz?, u64::from(rank.reference_mhz?));
    if seen * PPM >= reference * LOW_CLOCK_PPM {
        return None;
    }
    let (thermal, power) = (rank.share_ppm(rank.thermal_ns), rank.share_ppm(rank.power_ns));
    Some(match (thermal >= REASON_PPM, power >= REASON_PPM) {
        (true, _) if thermal >= power => Cause::DeviceThermal,
        (_, true) => Cause::DevicePowerCap,
        (true, false) => Cause::DeviceThermal,
        (false, false) => Cause::KernelClock,
    })
}
