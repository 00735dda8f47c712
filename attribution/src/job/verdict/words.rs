//! How a verdict says what was seen, beside what a healthy job shows.

use super::rules::Candidate;
use super::steps;
use crate::cause::{Cause, Confidence, Place};
use crate::facts::GpuSubject;
use crate::job::ledger::{Ledger, RankLedger};
use crate::job::{Evidence, evidence};
use crate::leaf::Leaf;

/// Parts per million as a percentage with one digit.
pub(in crate::job) fn percent(ppm: u64) -> String {
    let tenths = (ppm + 500) / 1000;
    format!("{}.{} %", tenths / 10, tenths % 10)
}

/// Nanoseconds as milliseconds with one digit.
pub(in crate::job) fn millis(ns: u64) -> String {
    let tenths = (ns + 50_000) / 100_000;
    format!("{}.{} ms", tenths / 10, tenths % 10)
}

/// One regime seen through the ranks a cause hits.
pub(super) struct View<'a> {
    pub(super) candidate: &'a Candidate,
    pub(super) place: &'a Place,
    pub(super) hit: &'a [usize],
    pub(super) subjects: &'a [&'a GpuSubject],
    pub(super) ledger: &'a Ledger,
    pub(super) base: Option<&'a Ledger>,
}

impl View<'_> {
    fn ranks(&self) -> impl Iterator<Item = &RankLedger> {
        self.hit.iter().map(|at| &self.ledger.ranks[*at])
    }

    fn others(&self) -> impl Iterator<Item = &RankLedger> {
        self.ledger
            .ranks
            .iter()
            .enumerate()
            .filter(|(at, _)| !self.hit.contains(at))
            .map(|(_, rank)| rank)
    }

    /// "rank 3 (node-b GPU 1)", "all ranks", "4 ranks".
    fn who(&self) -> String {
        match self.hit {
            [only] => {
                let subject = self.subjects[*only];
                format!("rank {} ({} GPU {})", subject.rank, subject.node, subject.gpu)
            }
            hit if hit.len() == self.subjects.len() => "all ranks".into(),
            hit => format!("{} ranks", hit.len()),
        }
    }

    /// Sum over the hit ranks per step, ns.
    fn per_step(&self, of: impl Fn(&RankLedger) -> u64) -> u64 {
        per_step(self.ranks(), of)
    }

    /// The same of the same ranks in the healthy regime, else of the ranks that are not hit.
    fn normally(&self, of: impl Fn(&RankLedger) -> u64) -> Option<u64> {
        match self.base {
            Some(base) => Some(per_step(self.hit.iter().filter_map(|at| base.ranks.get(*at)), of)),
            None if self.hit.len() < self.ledger.ranks.len() => Some(per_step(self.others(), of)),
            None => None,
        }
    }

    /// Time per step against its normal value.
    fn time(&self, what: &str, of: impl Fn(&RankLedger) -> u64) -> Evidence {
        let normally = self.normally(&of).map_or_else(|| "close to 0 ms".into(), millis);
        evidence(
            format!("{what}, {}, per step", self.who()),
            millis(self.per_step(of)),
            normally,
        )
    }

    fn leaf(&self, what: &str, leaf: Leaf) -> Evidence {
        self.time(what, move |rank| rank.leaf(leaf))
    }
}

fn per_step<'a>(ranks: impl Iterator<Item = &'a RankLedger>, of: impl Fn(&RankLedger) -> u64) -> u64 {
    let (sum, steps) = ranks.fold((0_u64, 0_u64), |(sum, steps), rank| {
        (sum.saturating_add(of(rank)), steps + rank.steps)
    });
    sum / steps.max(1)
}

/// What was seen, with how many independent kinds of evidence agree.
pub(super) fn seen(view: &View<'_>) -> (Vec<Evidence>, usize) {
    let mut seen = vec![cost(view)];
    let kinds = match view.candidate.cause {
        Cause::DataLoader => loader(view, &mut seen),
        Cause::DataStorage => storage(view, &mut seen),
        Cause::HostLaunch => launch(view, &mut seen),
        Cause::HostCpu => cpu(view, &mut seen),
        Cause::DeviceThermal | Cause::DevicePowerCap | Cause::KernelClock => clock(view, &mut seen),
        Cause::DeviceContention => contention(view, &mut seen),
        Cause::NetworkNic
        | Cause::NetworkFabric
        | Cause::NetworkPcie
        | Cause::NetworkConfig
        | Cause::HostReceiver => network(view, &mut seen),
        Cause::NetworkNvlink | Cause::DevicePcie | Cause::DeviceFault => links(view, &mut seen),
        Cause::HostGc => one(
            &mut seen,
            view.leaf("GPU idle in a garbage collection", Leaf::IdleGc),
        ),
        Cause::HostSync => one(
            &mut seen,
            view.leaf(
                "GPU idle after a synchronisation inside the step",
                Leaf::IdleCpuSync,
            ),
        ),
        Cause::HostAlloc => one(
            &mut seen,
            view.leaf("GPU idle in the driver's allocator", Leaf::IdleAlloc),
        ),
        Cause::HostCompile => one(
            &mut seen,
            view.leaf("GPU idle during compilation", Leaf::IdleCompile),
        ),
        Cause::JobImbalance => imbalance(view, &mut seen),
        _ => 1,
    };
    seen.extend(steps::rows(view));
    if let Some(base) = view.base {
        let (now, before) = (view.ledger.median_step_ns, base.median_step_ns);
        seen.push(evidence("median step", millis(now), millis(before)));
    }
    (seen, kinds)
}

fn cost(view: &View<'_>) -> Evidence {
    let moved: u64 = view.candidate.cost.moved.iter().sum();
    let share = percent(view.ledger.share_ppm(view.candidate.cost.total()));
    let waiting = percent(view.ledger.share_ppm(moved));
    evidence(
        format!(
            "GPU time lost in the {} steps it was active, waiting of others included",
            view.ledger.steps.len()
        ),
        format!("{share} (waiting of others {waiting})"),
        "below 5 %",
    )
}

fn one(seen: &mut Vec<Evidence>, evidence: Evidence) -> usize {
    seen.push(evidence);
    1
}

fn loader(view: &View<'_>, seen: &mut Vec<Evidence>) -> usize {
    seen.push(view.leaf("GPU idle while the loaders compute", Leaf::IdleDataCpu));
    seen.push(view.time("data loaders on CPU or waiting for one", |rank| {
        rank.worker_cpu_ns
    }));
    let blocked = view.time("data loaders blocked on storage", |rank| rank.worker_io_ns);
    seen.push(blocked);
    let cpu: u64 = view.ranks().map(|rank| rank.worker_cpu_ns).sum();
    let io: u64 = view.ranks().map(|rank| rank.worker_io_ns).sum();
    if cpu > 2 * io { 2 } else { 1 }
}

fn storage(view: &View<'_>, seen: &mut Vec<Evidence>) -> usize {
    seen.push(view.leaf(
        "GPU idle while the loaders wait for storage",
        Leaf::IdleDataStorage,
    ));
    seen.push(view.time("data loaders blocked on storage", |rank| rank.worker_io_ns));
    let io: u64 = view.ranks().map(|rank| rank.worker_io_ns).sum();
    let cpu: u64 = view.ranks().map(|rank| rank.worker_cpu_ns).sum();
    if io > cpu { 2 } else { 1 }
}

fn launch(view: &View<'_>, seen: &mut Vec<Evidence>) -> usize {
    seen.push(view.leaf(
        "GPU idle while the launching thread issues work",
        Leaf::IdleLaunch,
    ));
    seen.push(view.time("launching thread on CPU or waiting for one", |rank| {
        rank.on_cpu_ns + rank.runnable_ns
    }));
    let launches = view.per_step(|rank| rank.launches);
    let normally = view.normally(|rank| rank.launches);
    seen.push(evidence(
        format!("launches, {}, per step", view.who()),
        launches.to_string(),
        normally.map_or_else(
            || "fewer, of longer kernels".into(),
            |launches| launches.to_string(),
        ),
    ));
    let step_ns = view.ledger.median_step_ns;
    let busy = view.per_step(|rank| rank.on_cpu_ns + rank.runnable_ns) * 2 > step_ns;
    if busy || normally.is_some_and(|normally| launches * 2 > normally * 3) {
        2
    } else {
        1
    }
}

fn cpu(view: &View<'_>, seen: &mut Vec<Evidence>) -> usize {
    seen.push(view.leaf(
        "GPU idle while the launching thread wants a CPU",
        Leaf::IdleCpuSched,
    ));
    seen.push(view.time("run-queue delay of the launching thread", |rank| rank.runnable_ns));
    if view.ranks().all(|rank| rank.throttled_ns.is_none()) {
        return 1;
    }
    seen.push(view.time("throttled by the CPU quota", |rank| {
        rank.throttled_ns.unwrap_or(0)
    }));
    if view.ranks().any(RankLedger::is_held_back) {
        2
    } else {
        1
    }
}

fn clock(view: &View<'_>, seen: &mut Vec<Evidence>) -> usize {
    let mhz = |ranks: &mut dyn Iterator<Item = &RankLedger>| ranks.filter_map(|rank| rank.sm_mhz).min();
    let reference = view.ranks().find_map(|rank| rank.reference_mhz);
    if let Some(now) = mhz(&mut view.ranks()) {
        let others = mhz(&mut view.others()).map(|mhz| format!("{mhz} MHz on the other ranks"));
        let expected = others.or(reference.map(|mhz| format!("{mhz} MHz")));
        let what = format!("SM clock, {}", view.who());
        seen.push(evidence(
            what,
            format!("{now} MHz"),
            expected.unwrap_or_else(|| "the reference clock".into()),
        ));
    }
    let power = view.candidate.cause == Cause::DevicePowerCap;
    let (what, held): (_, fn(&RankLedger) -> u64) = if power {
        ("held back by the power limit", |rank| rank.power_ns)
    } else {
        ("held back by heat", |rank| rank.thermal_ns)
    };
    let hottest = view.ranks().map(|rank| rank.temperature_c).max().unwrap_or(0);
    seen.push(view.time(what, held));
    if hottest > 0 {
        let others = view.others().map(|rank| rank.temperature_c).max();
        let expected = others.map_or_else(
            || "below the slowdown limit".into(),
            |others| format!("{others} C on other ranks"),
        );
        seen.push(evidence(
            format!("temperature, {}", view.who()),
            format!("{hottest} C"),
            expected,
        ));
    }
    seen.push(view.time("compute", |rank| {
        [
            Leaf::Ideal,
            Leaf::ComputePlatform,
            Leaf::ComputeClock,
            Leaf::ComputeKernel,
        ]
        .iter()
        .map(|leaf| rank.leaf(*leaf))
        .sum()
    }));
    if view.candidate.cause == Cause::KernelClock {
        1
    } else {
        2
    }
}

fn contention(view: &View<'_>, seen: &mut Vec<Evidence>) -> usize {
    let share = view
        .ranks()
        .map(|rank| u64::from(rank.foreign_ppm))
        .max()
        .unwrap_or(0);
    let pid = view.ranks().map(|rank| rank.foreign_pid).find(|pid| *pid != 0);
    let process = pid.map_or_else(String::new, |pid| format!(" (process {pid})"));
    seen.push(evidence(
        format!("SM time of other processes, {}", view.who()),
        format!("{}{process}", percent(share)),
        "0 %: the GPU belongs to the job",
    ));
    let clocks: Vec<u64> = view.ranks().filter_map(|rank| rank.sm_mhz).collect();
    if let Some(mhz) = clocks.first() {
        let reference = view
            .ranks()
            .find_map(|rank| rank.reference_mhz)
            .map(|mhz| format!("{mhz} MHz"));
        let expected = reference.unwrap_or_else(|| "unchanged".into());
        seen.push(evidence("SM clock beside it", format!("{mhz} MHz"), expected));
    }
    2
}

fn network(view: &View<'_>, seen: &mut Vec<Evidence>) -> usize {
    seen.push(view.leaf(
        "communication after the last rank had arrived, beyond the reference",
        Leaf::CommNet,
    ));
    for port in &view.ledger.ports {
        let own = view.place.node.as_ref() == Some(&port.node);
        let expected = if own {
            "as on the other nodes"
        } else {
            "a port that is not held up"
        };
        let line = port
            .line_bytes_per_s
            .map_or_else(String::new, |line| format!(" of {} MB/s", line / 1_000_000));
        seen.push(evidence(
            format!("{} {}", port.node, port.port),
            format!(
                "queue held packets back in {} of windows, backlog up to {} KiB, unsent up to {} KiB, {} retransmits \
                 ({} of segments), receiver took nothing for {}, {} MB/s{line} sent, what arrived left unread in {} of \
                 windows",
                percent(port.held_ppm()),
                port.backlog_bytes / 1024,
                port.unsent_bytes / 1024,
                port.retransmits,
                percent(port.lost_ppm()),
                percent(port.limited_ppm()),
                port.sent_bytes_per_s() / 1_000_000,
                percent(port.behind_ppm()),
            ),
            expected,
        ));
    }
    for port in view.ledger.ports.iter().filter(|port| port.window_probes > 0) {
        let what = format!(
            "probes of a receiver's closed window that did not open it, in a row, by {}",
            port.node
        );
        seen.push(evidence(
            what,
            format!("up to {}", port.window_probes),
            "0: a receiver that reads has room",
        ));
    }
    2
}

fn links(view: &View<'_>, seen: &mut Vec<Evidence>) -> usize {
    let most = |of: fn(&RankLedger) -> u64| view.ranks().map(of).max().unwrap_or(0);
    match view.candidate.cause {
        Cause::NetworkNvlink => {
            seen.push(evidence(
                format!("NVLinks down, {}", view.who()),
                format!(
                    "{} of {}",
                    most(|rank| rank.nvlinks_down.into()),
                    most(|rank| rank.nvlinks.into())
                ),
                "0",
            ));
            seen.push(view.leaf("communication beyond what it takes with all links", Leaf::CommNet));
        }
        Cause::DevicePcie => {
            let least = view.ranks().filter_map(|rank| rank.pcie_ppm).min().unwrap_or(0);
            let what = format!(
                "rate of the host's link of what device and slot could, {}",
                view.who()
            );
            seen.push(evidence(what, percent(least), "100.0 %"));
            seen.push(view.leaf(
                "exposed copies beyond what they take at the full rate",
                Leaf::MemoryPcie,
            ));
        }
        _ => {
            seen.push(evidence(
                format!("critical faults the driver reported, {}", view.who()),
                format!(
                    "{}, the last with code {}",
                    most(|rank| rank.faults.into()),
                    most(|rank| rank.fault_code.into())
                ),
                "0",
            ));
        }
    }
    2
}

fn imbalance(view: &View<'_>, seen: &mut Vec<Evidence>) -> usize {
    seen.push(view.time("compute without a device reason", |rank| {
        rank.leaf(Leaf::ComputeKernel)
    }));
    let late = view.ranks().map(|rank| rank.late).sum::<u64>() / (view.hit.len() as u64).max(1);
    let steps = view.ledger.steps.len();
    seen.push(evidence(
        format!("others waited for it, {}", view.who()),
        format!("{late} of {steps} steps"),
        "no rank",
    ));
    1
}

/// How sure a verdict is, from the kinds of evidence that agree and what is missing.
pub(super) fn confidence(view: &View<'_>, kinds: usize) -> Confidence {
    let lost = view.ledger.ranks.iter().any(|rank| rank.lost_records > 0);
    let blind = view
        .ledger
        .ranks
        .iter()
        .any(|rank| rank.with_activity * 2 < rank.steps);
    match (kinds >= 2, lost || blind) {
        (true, false) => Confidence::High,
        (true, true) | (false, false) => Confidence::Medium,
        (false, true) => Confidence::Low,
    }
}

/// One step that confirms or refutes the cause.
pub(super) fn confirm(cause: Cause, place: &Place, pid: Option<u32>) -> String {
    let node = place.node.as_deref().unwrap_or("a node of the job");
    let gpu = place.gpu.map_or_else(String::new, |gpu| format!(" -i {gpu}"));
    let pid = pid.map_or_else(|| "PID".into(), |pid| pid.to_string());
    match cause {
        Cause::NetworkNic => {
            let port = place.nic_port.as_deref().unwrap_or("PORT");
            format!("on {node}: tc -s qdisc show dev {port}; ethtool {port} (backlog, overlimits and the negotiated speed)")
        }
        Cause::NetworkFabric if place.node.is_some() => format!("on {node}: nstat -az TcpRetransSegs (RDMA: rdma statistic show) twice, and the error and drop counters of the switch port it is cabled to; swap the cable"),
        Cause::NetworkFabric => "between two nodes of the job, outside it: iperf3 -c NODE -P 4 -t 10, both ways".into(),
        Cause::DataLoader => {
            "double the number of loader workers (or halve the decoding work) for 100 steps: the step must get shorter".into()
        }
        Cause::DataStorage => format!("on {node}: iostat -x 1 10, and read one shard of the data set cold with dd"),
        Cause::HostLaunch => {
            "capture one step in a CUDA graph (or compile the model): launches per step and idle time must fall together".into()
        }
        Cause::HostCpu => {
            format!("on {node}: read cpu.stat of the control group in /proc/{pid}/cgroup twice: nr_throttled must not rise; raise its quota")
        }
        Cause::HostGc => "freeze the collector after warm-up (gc.freeze(); gc.disable()) for 100 steps: the pauses must go".into(),
        Cause::HostSync => "remove .item()/.cpu() calls inside the step for 100 steps: the gaps after them must go".into(),
        Cause::HostAlloc => "set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True for one run: allocator calls must stop after warm-up".into(),
        Cause::HostCompile => "pad inputs to fixed shapes for 100 steps: compilation must stop".into(),
        Cause::DeviceThermal => format!("on {node}: nvidia-smi -q -d TEMPERATURE,PERFORMANCE,CLOCK{gpu}; check its airflow"),
        Cause::DevicePowerCap => format!("on {node}: nvidia-smi -q -d POWER,PERFORMANCE{gpu}; compare the limit with its default"),
        Cause::KernelClock => format!("on {node}: nvidia-smi -q -d CLOCK,PERFORMANCE{gpu}; look for locked application clocks"),
        Cause::DeviceContention => {
            let process = place.process.map_or_else(String::new, |pid| format!("; ps -fp {pid}"));
            format!("on {node}: nvidia-smi pmon{gpu} -c 5{process}; stop the process that is not the job's")
        }
        Cause::JobCheckpoint => "write the next two checkpoints asynchronously or to local disk: the pause must shrink".into(),
        Cause::NetworkNvlink => format!("on {node}: nvidia-smi nvlink -s; nvidia-smi nvlink -e (links that are inactive, error counters that grow)"),
        Cause::NetworkConfig => "compare NCCL_ALGO, NCCL_PROTO and NCCL_TOPO_FILE with the run before, and run all_reduce_perf with NCCL_DEBUG=INFO at the job's sizes".into(),
        Cause::NetworkPcie => format!("on {node}: lspci -vv of the interface (LnkSta against LnkCap, also of the slot above) under load; reseat it"),
        Cause::HostReceiver => format!("on {node}: ss -tmi of process {pid} (a receive queue that stays full), and perf top -p {pid}: what keeps its communication thread"),
        Cause::DevicePcie => format!("on {node}: nvidia-smi -q{gpu} under load (PCIe generation and link width, current against max); reseat the device"),
        Cause::DeviceFault => format!("on {node}: dmesg | grep -i xid; nvidia-smi -q{gpu} -d ECC,ROW_REMAPPER,PAGE_RETIREMENT; drain the node before the next job"),
        Cause::KernelLowTensor => "profile one step (torch.profiler with record_shapes): look for small or odd GEMM shapes, FP32 math and unfused element-wise chains".into(),
        Cause::KernelMemoryBound => "profile one step (Nsight Compute, memory chart): fuse element-wise kernels and attention, or raise the batch, and see memory activity fall beside tensor activity".into(),
        Cause::JobImbalance => "swap the work (data shard or pipeline stage) of that rank with another's: the delay must move with it".into(),
        Cause::DataCopy => "pin the batch's memory and copy on a side stream for 100 steps: exposed copies must go".into(),
        _ => "record 30 s with stallscope record and compare the slowest rank with its neighbours".into(),
    }
}
