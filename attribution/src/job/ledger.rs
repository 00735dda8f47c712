//! What a regime cost each rank, re-split now that all ranks are known, and the facts that name it.

use core::ops::Range;

use super::align::{AlignedStep, ByLeaf, Cell, class_ns};
use super::blame::{self, Skew};
use super::network::{self, PortLoad, Pressure};
use super::pressure;
use super::regimes;
use super::waits::{self, RankWaits, Says};
use crate::budget::arith::{apportion, median, mul_div, signed};
use crate::facts::{GpuSubject, HardwareFacts, LinkFacts, PPM, PortFacts};
use crate::leaf::{Class, Leaf};
use crate::links::Finding;
use crate::noise::noise_ppm;
use crate::time::Window;

/// One rank over one regime.
#[derive(Debug, Clone, Default)]
pub(super) struct RankLedger {
    pub(super) steps: u64,
    /// Steps and the spans between them, ns.
    pub(super) window_ns: u64,
    /// Where it went, waiting and slow network told apart.
    pub(super) leaves: ByLeaf,
    /// What re-splitting added to each communication leaf; sums to zero.
    pub(super) resplit: ByLeaf,
    /// Communication leaves that re-splitting measured, one bit each.
    pub(super) resplit_measured: u32,
    /// Waiting of others that was moved here, by what kept this rank.
    pub(super) moved: [u64; Leaf::COUNT],
    /// Steps in which others waited for it.
    pub(super) late: u64,
    pub(super) throttled_ns: Option<u64>,
    pub(super) worker_cpu_ns: u64,
    pub(super) worker_io_ns: u64,
    pub(super) on_cpu_ns: u64,
    pub(super) runnable_ns: u64,
    pub(super) sync_ns: u64,
    pub(super) launches: u64,
    pub(super) comm_bytes: u64,
    pub(super) sm_mhz: Option<u64>,
    pub(super) reference_mhz: Option<u32>,
    pub(super) thermal_ns: u64,
    pub(super) power_ns: u64,
    pub(super) temperature_c: u32,
    pub(super) foreign_ppm: u32,
    pub(super) foreign_processes: Option<u32>,
    pub(super) foreign_pid: u32,
    /// What the host's link moves of its best at least, parts per million.
    pub(super) pcie_ppm: Option<u64>,
    pub(super) nvlinks: u32,
    pub(super) nvlinks_down: u32,
    pub(super) nvlink_errors: u64,
    /// What the host's link moves now, bytes/s; 0 when unknown.
    pub(super) host_link_bytes_per_s: u64,
    pub(super) faults: u32,
    pub(super) fault_code: u32,
    /// Steps held back by heat, by the power limit, and beside another process.
    pub(super) hot_steps: u64,
    pub(super) capped_steps: u64,
    pub(super) shared_steps: u64,
    pub(super) lost_records: u64,
    /// Steps with device activity.
    pub(super) with_activity: u64,
}

impl RankLedger {
    pub(super) fn share_ppm(&self, ns: u64) -> u64 {
        mul_div(ns, PPM, self.window_ns)
    }

    pub(super) fn leaf(&self, leaf: Leaf) -> u64 {
        u64::try_from(self.leaves[leaf.index()]).unwrap_or(0)
    }

    /// Throttled by its quota, share of the time in parts per million; several CPUs may be throttled at once.
    pub(super) fn throttled_ppm(&self) -> u64 {
        self.share_ppm(self.throttled_ns.unwrap_or(0))
    }

    /// Whether its quota holds it back.
    pub(super) fn is_held_back(&self) -> bool {
        self.throttled_ppm() >= HELD_BACK_PPM
    }

    fn add(&mut self, cell: &Cell<'_>) {
        let signals = &cell.step.signals;
        self.steps += 1;
        self.window_ns = self.window_ns.saturating_add(cell.window_ns);
        for (sum, ns) in self.leaves.iter_mut().zip(cell.leaves) {
            *sum = sum.saturating_add(ns);
        }
        if let Some(ns) = signals.quota_throttled_ns.value() {
            self.throttled_ns = Some(self.throttled_ns.unwrap_or(0).saturating_add(*ns));
        }
        for (sum, ns) in [
            (&mut self.worker_cpu_ns, signals.worker_cpu_ns),
            (&mut self.worker_io_ns, signals.worker_io_ns),
            (&mut self.on_cpu_ns, signals.host_on_cpu_ns),
            (&mut self.runnable_ns, signals.host_runnable_ns),
            (&mut self.sync_ns, signals.host_sync_ns),
            (&mut self.launches, signals.launches),
            (&mut self.comm_bytes, signals.comm_bytes),
            (&mut self.lost_records, signals.lost_records),
        ] {
            *sum = sum.saturating_add(ns);
        }
        self.reference_mhz = signals.reference_sm_mhz.or(self.reference_mhz);
        if let Some(clock) = signals.clock.value() {
            self.thermal_ns = self.thermal_ns.saturating_add(clock.thermal_ns);
            self.power_ns = self.power_ns.saturating_add(clock.power_ns);
            self.temperature_c = self.temperature_c.max(clock.temperature_c);
            self.hot_steps += u64::from(clock.thermal_ns > 0);
            self.capped_steps += u64::from(clock.power_ns > 0);
        }
        let foreign = signals.foreign.value();
        self.shared_steps += u64::from(foreign.is_some_and(|load| load.processes > 0 && load.sm_ppm > 0));
        if let Some(links) = signals.links.value() {
            self.nvlink_errors = self.nvlink_errors.saturating_add(links.nvlink_errors);
            self.faults = self.faults.saturating_add(links.faults);
            self.fault_code = if links.faults > 0 {
                links.fault_code
            } else {
                self.fault_code
            };
        }
        self.with_activity += u64::from(signals.activity.value().is_some());
    }

    /// Facts whose typical value counts: a sample that straddles the regime's edge must not move them.
    fn add_typical<'a>(&mut self, cells: impl Iterator<Item = &'a Cell<'a>> + Clone) {
        let links: Vec<LinkFacts> = cells
            .clone()
            .filter_map(|cell| cell.step.signals.links.value().copied())
            .collect();
        self.pcie_ppm = (!links.is_empty()).then(|| median(links.iter().map(LinkFacts::pcie_ppm).collect()));
        self.nvlinks = median(links.iter().map(|links| links.nvlinks).collect());
        self.nvlinks_down = median(links.iter().map(|links| links.nvlinks_down).collect());
        self.host_link_bytes_per_s = median(links.iter().map(LinkFacts::pcie_bytes_per_s).collect());
        let mhz = cells
            .clone()
            .filter_map(|cell| cell.step.signals.clock.value())
            .map(|clock| clock.sm_mhz);
        let mhz: Vec<u64> = mhz.filter(|mhz| *mhz > 0).map(u64::from).collect();
        self.sm_mhz = (!mhz.is_empty()).then(|| median(mhz));
        let foreign: Vec<_> = cells
            .filter_map(|cell| cell.step.signals.foreign.value().copied())
            .collect();
        self.foreign_ppm = median(
            foreign
                .iter()
                .map(|load| load.sm_ppm * load.processes.min(1))
                .collect(),
        );
        self.foreign_processes =
            (!foreign.is_empty()).then(|| median(foreign.iter().map(|load| load.processes).collect()));
        self.foreign_pid = foreign
            .iter()
            .rev()
            .map(|load| load.largest_pid)
            .find(|pid| *pid != 0)
            .unwrap_or(0);
    }
}

/// One regime.
#[derive(Debug, Clone)]
pub(super) struct Ledger {
    pub(super) steps: Range<usize>,
    /// `CLOCK_REALTIME`.
    pub(super) window: Window,
    pub(super) median_step_ns: u64,
    /// Most of what is called steps are windows of a fixed length, because the job's own were not found.
    pub(super) is_fixed: bool,
    /// Typical distance of a step's length from the median, parts per million of it.
    pub(super) noise_ppm: u64,
    /// Steps in which anybody was late.
    pub(super) late_steps: u64,
    /// GPU time, ns.
    pub(super) total_ns: u64,
    pub(super) ranks: Vec<RankLedger>,
    pub(super) ports: Vec<PortLoad>,
    pub(super) pressure: Pressure,
    /// What the devices say holds communication back, where `pressure` says that they do.
    pub(super) link: Option<Finding>,
    /// What the ranks' network steps waited for, where that was watched.
    pub(super) waits: Vec<RankWaits>,
    /// What that says.
    pub(super) says: Says,
    /// Position of a healthier regime to compare with.
    pub(super) baseline: Option<usize>,
}

impl Ledger {
    /// Parts per million of the regime's GPU time.
    pub(super) fn share_ppm(&self, ns: u64) -> u64 {
        mul_div(ns, PPM, self.total_ns)
    }

    /// Whether a quota holds any rank back.
    pub(super) fn is_held_back(&self) -> bool {
        self.ranks.iter().any(RankLedger::is_held_back)
    }
}

/// What was told of the job beside its steps.
pub(super) struct Told<'a> {
    pub(super) subjects: &'a [&'a GpuSubject],
    pub(super) ports: &'a [PortFacts],
    pub(super) hardware: &'a [HardwareFacts],
    pub(super) findings: &'a [Finding],
}

/// The ledgers of all regimes, communication split into waiting, transfer, slow network and the rest.
pub(super) fn ledgers(
    steps: &[AlignedStep<'_>],
    regimes: &[Range<usize>],
    skew: &Skew,
    told: &Told<'_>,
    nodes: usize,
) -> Vec<Ledger> {
    let mut ledgers: Vec<Ledger> = regimes
        .iter()
        .map(|regime| collect(steps, regime.clone(), skew, told))
        .collect();
    let mut ports: Vec<_> = ledgers.iter_mut().map(|ledger| &mut ledger.ports).collect();
    network::retain_used(&mut ports);
    for at in 0..ledgers.len() {
        // Windows of a fixed length are no steps: their length compares with none.
        let alike = (0..ledgers.len()).filter(|other| ledgers[*other].is_fixed == ledgers[at].is_fixed);
        let best = alike.min_by_key(|other| (ledgers[*other].median_step_ns, *other));
        ledgers[at].baseline = best.filter(|best| {
            let (own, base) = (ledgers[at].median_step_ns, ledgers[*best].median_step_ns);
            let noise_ppm = ledgers[at].noise_ppm.max(ledgers[*best].noise_ppm);
            *best != at && own - base >= mul_div(base, regimes::healthier_ppm(noise_ppm), PPM)
        });
        let base = ledgers[at].baseline.map(|best| &ledgers[best]);
        let link = base
            .and_then(|base| pressure::began(told.findings, ledgers[at].window, base.window))
            .cloned();
        let says = waits::says(&ledgers[at].waits, base.map(|base| base.waits.as_slice()));
        let pressure = pressure::of(&ledgers[at], base, link.as_ref(), says);
        ledgers[at].says = says;
        ledgers[at].pressure = pressure;
        ledgers[at].link = link.filter(|_| matches!(ledgers[at].pressure, Pressure::Link(_)));
    }
    // Healthy regimes first: the others take them as reference.
    let mut order: Vec<usize> = (0..ledgers.len()).collect();
    order.sort_by_key(|at| ledgers[*at].baseline.is_some());
    for at in order {
        let base = ledgers[at].baseline.map(|base| ledgers[base].ranks.clone());
        resplit(&mut ledgers[at], base.as_deref(), nodes);
        move_detour(&mut ledgers[at]);
        resplit_data(&mut ledgers[at], base.as_deref());
        resplit_contention(&mut ledgers[at], base.as_deref());
    }
    ledgers
}

fn collect(steps: &[AlignedStep<'_>], regime: Range<usize>, skew: &Skew, told: &Told<'_>) -> Ledger {
    let part = &steps[regime.clone()];
    let count = part.first().map_or(0, |step| step.cells.len());
    let mut ranks = vec![RankLedger::default(); count];
    for (rank, ledger) in ranks.iter_mut().enumerate() {
        let cells = part.iter().filter_map(|step| step.cells[rank].as_ref());
        cells.clone().for_each(|cell| ledger.add(cell));
        ledger.add_typical(cells);
        ledger.late = skew.late[regime.clone()]
            .iter()
            .filter(|late| late.iter().any(|late| late.rank == rank))
            .count() as u64;
        let waited: u64 = skew.waited[regime.clone()]
            .iter()
            .map(|waited| waited[rank])
            .sum();
        let given = ledger.leaves[Leaf::CommSkew.index()];
        shift_comm(ledger, Leaf::CommSkew, signed(waited) - given);
        let measured = part
            .iter()
            .filter_map(|step| step.cells[rank].as_ref())
            .any(|cell| {
                cell.step.budget.is_measured(Leaf::CommProto) || cell.step.budget.is_measured(Leaf::CommSkew)
            });
        if measured && count > 1 {
            ledger.resplit_measured |= 1 << Leaf::CommSkew.index();
        }
    }
    for moved in skew.moves.iter().filter(|moved| regime.contains(&moved.at)) {
        ranks[moved.culprit].moved[moved.leaf.index()] += moved.ns;
    }
    let start = part.first().map_or(0, |step| step.window.start_ns());
    let end = part.last().map_or(start, |step| step.window.end_ns());
    let window = Window::new(start, end).unwrap_or_default();
    let lengths: Vec<u64> = part.iter().map(AlignedStep::step_ns).collect();
    Ledger {
        median_step_ns: median(lengths.clone()),
        noise_ppm: noise_ppm(&lengths),
        late_steps: skew.late[regime.clone()]
            .iter()
            .filter(|late| !late.is_empty())
            .count() as u64,
        total_ns: ranks.iter().map(|rank| rank.window_ns).sum(),
        ports: network::loads(told.ports, window),
        waits: waits::of_ranks(told.hardware, told.subjects, window),
        says: Says::Nothing,
        is_fixed: part.iter().filter(|step| blame::is_fixed(step)).count() * 2 > part.len(),
        steps: regime,
        window,
        ranks,
        pressure: Pressure::None,
        link: None,
        baseline: None,
    }
}

/// A group throttled for this share of the time lacks a CPU, parts per million.
const HELD_BACK_PPM: u64 = 40_000;
/// What collectives inside a node take longer over the host's link than over the links that are down, per rank, ns;
/// an estimate for a job nobody saw healthy.
fn detour_ns(rank: &RankLedger, gpus: u64) -> u64 {
    let moved = mul_div(rank.comm_bytes, 2 * gpus.saturating_sub(1), gpus.max(1));
    let whole = mul_div(moved, 1_000_000_000, rank.host_link_bytes_per_s);
    mul_div(
        whole,
        u64::from(rank.nvlinks_down),
        u64::from(rank.nvlinks.max(rank.nvlinks_down)),
    )
}

/// Splits what is left after waiting: what the bytes need at the line rate, what a slow network added, the rest.
fn resplit(ledger: &mut Ledger, base: Option<&[RankLedger]>, nodes: usize) {
    let line = ledger
        .ports
        .iter()
        .filter_map(|port| port.line_bytes_per_s)
        // A line that was negotiated down is a loss, not the reference.
        .max()
        .filter(|_| nodes > 1);
    let slow = ledger.pressure != Pressure::None;
    let busy_ns = ledger.ports.iter().map(|port| port.busy_ns).max().unwrap_or(0);
    let steps = ledger.steps.len() as u64;
    let gpus = (ledger.ranks.len() / nodes.max(1)) as u64;
    let detour = ledger
        .ranks
        .iter()
        .map(|rank| detour_ns(rank, gpus))
        .max()
        .unwrap_or(0);
    let ranks = ledger.ranks.iter().filter(|rank| rank.comm_bytes > 0).count() as u64;
    for (at, rank) in ledger.ranks.iter_mut().enumerate() {
        let rest = u64::try_from(class_ns(&rank.leaves, Class::Comm))
            .unwrap_or(0)
            .saturating_sub(rank.leaf(Leaf::CommSkew));
        let known = rank.leaf(Leaf::CommTransfer);
        let needed = line.map_or(known, |line| {
            let moved = mul_div(rank.comm_bytes, 2 * ranks.saturating_sub(1), ranks.max(1));
            mul_div(moved, 1_000_000_000, line).max(known)
        });
        let normal = base.and_then(|base| base.get(at)).map(|base| {
            let own = u64::try_from(class_ns(&base.leaves, Class::Comm)).unwrap_or(0);
            mul_div(
                own.saturating_sub(base.leaf(Leaf::CommSkew)),
                rank.steps,
                base.steps.max(1),
            )
        });
        // Part of what the bytes need is hidden behind compute: the healthy regime shows how much is not; without one,
        // the time in which flows had data to send beyond the exposed time was hidden.
        let hidden = if slow {
            mul_div(busy_ns, rank.steps, steps).saturating_sub(rest)
        } else {
            0
        };
        let exposed = normal.map_or(needed.saturating_sub(hidden), |normal| needed.min(normal));
        let transfer = exposed.min(rest);
        let net = match (ledger.pressure, normal) {
            (Pressure::None, _) => 0,
            (_, Some(normal)) => rest.saturating_sub(transfer.max(normal)),
            (Pressure::Nvlink, None) => detour.min(rest),
            (_, None) => rest.saturating_sub(transfer),
        };
        let transfer = transfer.min(rest - net);
        if rank.resplit_measured != 0 {
            // Where nothing held packets back, what exceeds the line rate may be the network's or the hosts': it
            // stays in the residual, and the network's part is not measured.
            rank.resplit_measured |= u32::from(line.is_some()) << Leaf::CommTransfer.index();
            rank.resplit_measured |= u32::from(slow) << Leaf::CommNet.index();
        }
        let given = rank.leaves;
        shift_comm(
            rank,
            Leaf::CommTransfer,
            signed(transfer) - given[Leaf::CommTransfer.index()],
        );
        shift_comm(rank, Leaf::CommNet, signed(net) - given[Leaf::CommNet.index()]);
    }
}

/// Links that are down slow their own node's collectives; the other nodes' ranks wait for it.
fn move_detour(ledger: &mut Ledger) {
    let hit: Vec<usize> = (0..ledger.ranks.len())
        .filter(|at| ledger.ranks[*at].nvlinks_down > 0)
        .collect();
    if ledger.pressure != Pressure::Nvlink || hit.is_empty() {
        return;
    }
    let mut waited = 0_u64;
    for rank in ledger
        .ranks
        .iter_mut()
        .filter(|rank| rank.nvlinks_down == 0 && rank.resplit_measured != 0)
    {
        let net = rank.leaf(Leaf::CommNet);
        shift(rank, Leaf::CommNet, Leaf::CommSkew, signed(net));
        waited = waited.saturating_add(net);
    }
    for (at, part) in hit.iter().zip(apportion(waited, &vec![1; hit.len()])) {
        ledger.ranks[*at].moved[Leaf::CommNet.index()] += part;
    }
}

/// Of two reasons for a late batch, the one that grew this many times as much as the other is the reason, percent.
const DECISIVE_PERCENT: u64 = 150;

/// Within one step a batch was waited for while loaders computed and read at once; over many steps it shows which of
/// the two takes longer than it does in a healthy regime (without one: than the other). That one is waited for.
fn resplit_data(ledger: &mut Ledger, base: Option<&[RankLedger]>) {
    for (at, rank) in ledger.ranks.iter_mut().enumerate() {
        let healthy = base.and_then(|base| base.get(at));
        let grown = |of: &dyn Fn(&RankLedger) -> u64| {
            let normal = healthy.map_or(0, |healthy| {
                mul_div(of(healthy), rank.steps, healthy.steps.max(1))
            });
            of(rank).saturating_sub(normal)
        };
        let (computing, reading) = (
            grown(&|rank| rank.worker_cpu_ns),
            grown(&|rank| rank.worker_io_ns),
        );
        let beats = |one: u64, other: u64| one > 0 && mul_div(one, 100, DECISIVE_PERCENT) >= other;
        let (from, to) = if beats(reading, computing) {
            (Leaf::IdleDataCpu, Leaf::IdleDataStorage)
        } else if beats(computing, reading) {
            (Leaf::IdleDataStorage, Leaf::IdleDataCpu)
        } else {
            continue;
        };
        let own = grown(&|rank| rank.leaf(from));
        let moved = grown(&|rank| rank.moved[from.index()]);
        shift(rank, from, to, signed(own));
        rank.moved[from.index()] -= moved;
        rank.moved[to.index()] += moved;
    }
}

/// Another process cost at most what compute grew by: against the same rank in a healthy regime, else against the
/// other ranks, which have the same work. Its share of SM time alone does not tell how much of that we wanted.
fn resplit_contention(ledger: &mut Ledger, base: Option<&[RankLedger]>) {
    let own = |rank: &RankLedger| u64::try_from(class_ns(&rank.leaves, Class::Compute)).unwrap_or(0);
    let per_step = |rank: &RankLedger| own(rank) / rank.steps.max(1);
    let alone: Vec<u64> = ledger
        .ranks
        .iter()
        .filter(|rank| rank.steps > 0 && rank.leaf(Leaf::ComputeContention) == 0)
        .map(per_step)
        .collect();
    for (at, rank) in ledger.ranks.iter_mut().enumerate() {
        let contention = rank.leaf(Leaf::ComputeContention);
        let normal = match base.and_then(|base| base.get(at)).filter(|base| base.steps > 0) {
            Some(healthy) if healthy.leaf(Leaf::ComputeContention) == 0 => per_step(healthy),
            Some(_) => continue,
            None if !alone.is_empty() => median(alone.clone()),
            None => continue,
        };
        let clock = rank.leaf(Leaf::ComputeClock);
        let grown = per_step(rank)
            .saturating_sub(normal)
            .saturating_mul(rank.steps)
            .saturating_sub(clock);
        let beyond = contention.saturating_sub(grown);
        shift(rank, Leaf::ComputeContention, Leaf::ComputeKernel, signed(beyond));
    }
}

/// Moves communication between its residual and another of its leaves.
fn shift_comm(rank: &mut RankLedger, leaf: Leaf, ns: i64) {
    shift(rank, Leaf::CommProto, leaf, ns);
}

fn shift(rank: &mut RankLedger, from: Leaf, to: Leaf, ns: i64) {
    for (leaf, ns) in [(to, ns), (from, -ns)] {
        rank.leaves[leaf.index()] += ns;
        rank.resplit[leaf.index()] += ns;
    }
}
