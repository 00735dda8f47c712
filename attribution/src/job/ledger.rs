//! What a regime cost each rank, re-split now that all ranks are known, and the facts that name it.

use core::ops::Range;

use super::align::{AlignedStep, ByLeaf, Cell, class_ns, median};
use super::blame::Skew;
use super::network::{self, PortLoad, Pressure};
use super::regimes;
use super::waits::{self, RankWaits, Says};
use crate::budget::arith::{apportion, mul_div, signed};
use crate::cause::Cause;
use crate::facts::{GpuSubject, HardwareFacts, LinkFacts, PPM, PortFacts};
use crate::leaf::{Class, Leaf};
use crate::links::{Finding, Severity};
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

    /// Bytes the ports send for a byte that the collectives were given, parts per million. Both are taken as rates, because
    /// what watches the ports may begin later than what counts the calls; `None` where it saw too little of the regime.
    fn on_wire_ppm(&self) -> Option<u64> {
        let length_ns = self.window.len_ns();
        let covers = |ns: u64| ns >= mul_div(length_ns, COVERED_PPM, PPM);
        if !self.ports.iter().all(|port| covers(port.window_ns)) {
            return None;
        }
        let sent = self
            .ports
            .iter()
            .map(|port| mul_div(port.sent_bytes, length_ns, port.window_ns));
        let given = self
            .ranks
            .iter()
            .map(|rank| mul_div(rank.comm_bytes, length_ns, rank.window_ns));
        let (sent, given) = (
            sent.fold(0, u64::saturating_add),
            given.fold(0, u64::saturating_add),
        );
        (sent > 0 && given > 0).then(|| mul_div(sent, PPM, given))
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
    let best = (0..ledgers.len()).min_by_key(|at| (ledgers[*at].median_step_ns, *at));
    for at in 0..ledgers.len() {
        ledgers[at].baseline = best.filter(|best| {
            let (own, base) = (ledgers[at].median_step_ns, ledgers[*best].median_step_ns);
            let noise_ppm = ledgers[at].noise_ppm.max(ledgers[*best].noise_ppm);
            *best != at && own - base >= mul_div(base, regimes::healthier_ppm(noise_ppm), PPM)
        });
        let base = ledgers[at].baseline.map(|best| &ledgers[best]);
        let link = base
            .and_then(|base| began(told.findings, ledgers[at].window, base.window))
            .cloned();
        let says = waits::says(&ledgers[at].waits, base.map(|base| base.waits.as_slice()));
        let pressure = pressure(&ledgers[at], base, link.as_ref(), says);
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
        noise_ppm: regimes::noise_ppm(&lengths),
        late_steps: skew.late[regime.clone()]
            .iter()
            .filter(|late| !late.is_empty())
            .count() as u64,
        total_ns: ranks.iter().map(|rank| rank.window_ns).sum(),
        ports: network::loads(told.ports, window),
        waits: waits::of_ranks(told.hardware, told.subjects, window),
        says: Says::Nothing,
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
/// A thread that wants a CPU for this share of its time runs on a host with too few, parts per million.
const STARVED_PPM: u64 = 100_000;

/// Share of a regime that a port must have been watched, parts per million, for its bytes to be compared.
const COVERED_PPM: u64 = 500_000;
/// More bytes on the wire for the same payload than in the healthy regime, parts per million: another algorithm.
const WASTEFUL_PPM: u64 = 1_150_000;

/// The finding about links that is there now and was not in the healthy regime: the worst of them. One that was there
/// all the time does not tell what the difference is.
fn began(findings: &[Finding], now: Window, healthy: Window) -> Option<&Finding> {
    let slows = |finding: &&Finding| {
        let links = matches!(
            finding.cause,
            Cause::NetworkNic
                | Cause::NetworkFabric
                | Cause::NetworkNvlink
                | Cause::NetworkPcie
                | Cause::NetworkConfig
                | Cause::HostReceiver
        );
        links && finding.severity >= Severity::Degraded
    };
    let common_ns = |finding: &Finding, window: Window| {
        let end_ns = finding.window.end_ns().min(window.end_ns());
        end_ns.saturating_sub(finding.window.start_ns().max(window.start_ns()))
    };
    findings.iter().filter(slows).find(|finding| {
        common_ns(finding, now) > 0 && common_ns(finding, healthy).saturating_mul(4) <= healthy.len_ns()
    })
}

/// What holds the collectives back: a port, the way between two, who takes the bytes in, the links inside a node, or the
/// way they are done.
fn pressure(ledger: &Ledger, base: Option<&Ledger>, link: Option<&Finding>, says: Says) -> Pressure {
    let mut of_ports = network::pressure(&ledger.ports, base.map(|base| base.ports.as_slice()));
    if matches!(of_ports, Pressure::Port(_) | Pressure::Lossy(_)) {
        return of_ports;
    }
    if let Some(link) = link {
        return Pressure::Link(link.cause);
    }
    // Sockets are served by CPUs: where threads wait for one, busy flows say nothing of the network. What the links
    // and the bytes say stays.
    let starved = is_starved(&ledger.ranks, base.map(|base| base.ranks.as_slice()));
    let by_cpus = matches!(
        of_ports,
        Pressure::Fabric | Pressure::Receiver(_) | Pressure::Behind(_)
    );
    if by_cpus && starved {
        of_ports = Pressure::None;
    }
    if matches!(of_ports, Pressure::Receiver(_) | Pressure::Behind(_)) && ledger.is_held_back() {
        of_ports = Pressure::None;
    }
    let down = |ledger: &Ledger| {
        ledger
            .ranks
            .iter()
            .map(|rank| rank.nvlinks_down)
            .max()
            .unwrap_or(0)
    };
    if down(ledger) > base.map_or(0, down) {
        return Pressure::Nvlink;
    }
    // A process that takes nothing in is a nearer reason than what it does to the bytes.
    if matches!(of_ports, Pressure::Receiver(_) | Pressure::Behind(_)) {
        return of_ports;
    }
    if let (Some(now), Some(before)) = (ledger.on_wire_ppm(), base.and_then(Ledger::on_wire_ppm))
        && now >= mul_div(before, WASTEFUL_PPM, PPM)
    {
        return Pressure::Config;
    }
    of_waits(of_ports, says, starved || ledger.is_held_back())
}

/// Flows that are busy, or tell nothing, are no match for what NCCL's own threads waited for. They too are served by CPUs.
fn of_waits(of_ports: Pressure, says: Says, lacks_cpu: bool) -> Pressure {
    match (of_ports, says) {
        (Pressure::Fabric | Pressure::None, Says::Slow(slow)) if !lacks_cpu => Pressure::Waits(slow),
        (Pressure::Fabric, Says::Late(_) | Says::AsBefore) => Pressure::None,
        _ => of_ports,
    }
}

/// Whether the launching thread of any rank wants a CPU for much of its time, and more than in the healthy regime.
fn is_starved(ranks: &[RankLedger], base: Option<&[RankLedger]>) -> bool {
    let most = |ranks: &[RankLedger]| {
        let wanted = ranks.iter().map(|rank| rank.share_ppm(rank.runnable_ns));
        wanted.max().unwrap_or(0)
    };
    most(ranks) >= STARVED_PPM.max(base.map_or(0, most).saturating_mul(2))
}

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

#[cfg(test)]
mod tests {
    use super::*;

    fn wanting(share_ppm: u64) -> Vec<RankLedger> {
        let rank = |runnable_ns| RankLedger {
            window_ns: 1_000_000_000,
            runnable_ns,
            ..RankLedger::default()
        };
        vec![rank(0), rank(share_ppm * 1_000)]
    }

    #[test]
    fn a_host_is_starved_when_its_threads_want_a_cpu_more_than_they_used_to() {
        assert!(is_starved(&wanting(180_000), None));
        assert!(is_starved(&wanting(180_000), Some(&wanting(33_000))));
        assert!(
            !is_starved(&wanting(50_000), Some(&wanting(10_000))),
            "a busy host"
        );
        assert!(
            !is_starved(&wanting(180_000), Some(&wanting(150_000))),
            "as before"
        );
        assert!(!is_starved(&[], None));
    }

    /// Two nodes that ran for 10 s and sent `per_s` a second while `watched_s` of them were watched.
    fn running(per_s: u64, watched_s: u64) -> Ledger {
        let second = 1_000_000_000;
        let port = |node: &str| PortLoad {
            node: node.into(),
            sent_bytes: per_s * watched_s,
            window_ns: watched_s * second,
            ..PortLoad::default()
        };
        let rank = || RankLedger {
            comm_bytes: 20_000_000,
            window_ns: 10 * second,
            ..RankLedger::default()
        };
        Ledger {
            steps: 0..20,
            window: Window::new(5 * second, 15 * second).unwrap_or_default(),
            ranks: vec![rank(), rank()],
            ports: vec![port("a"), port("b")],
            pressure: Pressure::None,
            link: None,
            baseline: None,
            total_ns: 20 * second,
            median_step_ns: second / 2,
            noise_ppm: 0,
            late_steps: 0,
        }
    }

    #[test]
    fn another_algorithm_is_told_by_rates_of_bytes() {
        let whole = running(3_000_000, 10);
        let before = running(2_000_000, 7);
        assert_eq!(pressure(&whole, Some(&before), None), Pressure::Config);
        let late = running(3_000_000, 7);
        assert_eq!(
            pressure(&whole, Some(&late), None),
            Pressure::None,
            "the same rate, watched from later on"
        );
        assert_eq!(
            pressure(&whole, Some(&running(2_000_000, 3)), None),
            Pressure::None,
            "watched too little to tell"
        );
    }
}
