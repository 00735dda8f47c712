//! The truth of a run, told from what the virtual GPUs and the training threads logged themselves. Shares no code with
//! the attribution it is compared with.

mod blame;
mod starved;
mod sweep;

use anyhow::{Context, ensure};
use serde_json::{Value, json};
use virtual_node_state::clock::{now_ns, unix_ns};
use virtual_node_state::log;

use crate::faults::Switch;
use crate::plan::Plan;
use crate::scenario::{Fault, FaultKind};
use crate::trainer::spans::{self, Span, SpanKind};
use blame::{Rank, StepBlame, move_skew};
use sweep::{Leaf, Leaves, sum, tile};

/// A fault that costs less than this share of GPU time is none.
const LEAST_EFFECT: f64 = 0.02;
/// The cause of a host that has too few processors for what wants to run.
const HOST_CPU: &str = "host.cpu";

/// Reads the logs and writes `truth.json`.
pub(crate) fn tell(plan: &Plan, faults: &[Switch]) -> anyhow::Result<()> {
    let mut logs = Vec::new();
    for rank in 0..plan.scenario.ranks() {
        let (node, _) = plan.node_of(rank);
        let activity = node.state.join(format!("activity-rank{rank}.bin"));
        let records =
            log::read(&activity).with_context(|| format!("failed to read {}", activity.display()))?;
        let path = spans::path(node, rank);
        let spans = spans::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        logs.push((records, spans));
    }
    let story = Story::new(logs)?;
    let path = plan.dir.join("truth.json");
    let text = serde_json::to_vec_pretty(&story.document(plan, faults))?;
    std::fs::write(&path, text).with_context(|| format!("failed to write {}", path.display()))
}

/// All ranks, swept over their common window.
struct Story {
    from_ns: u64,
    to_ns: u64,
    ranks: Vec<Rank>,
    steps: Vec<StepBlame>,
}

fn steps_of(spans: &[Span]) -> Vec<(u64, u64)> {
    spans
        .iter()
        .filter(|span| span.kind == SpanKind::Step)
        .map(|span| (span.start_ns, span.end_ns))
        .collect()
}

fn delays_of(spans: &[Span]) -> Vec<u64> {
    spans
        .iter()
        .filter(|span| span.kind == SpanKind::Step)
        .map(|span| span.second)
        .collect()
}

impl Story {
    fn new(logs: Vec<(Vec<log::Record>, Vec<Span>)>) -> anyhow::Result<Self> {
        let steps: Vec<Vec<(u64, u64)>> = logs.iter().map(|(_, spans)| steps_of(spans)).collect();
        let from_ns = steps
            .iter()
            .filter_map(|steps| steps.first())
            .map(|step| step.0)
            .max()
            .unwrap_or(0);
        let to_ns = steps
            .iter()
            .filter_map(|steps| steps.last())
            .map(|step| step.1)
            .min()
            .unwrap_or(0);
        ensure!(from_ns < to_ns, "no step was run by all ranks");
        let mut ranks = Vec::new();
        for ((records, spans), steps) in logs.into_iter().zip(steps) {
            let pieces = tile(&records, &spans, from_ns, to_ns);
            let mut rank = Rank::new(pieces, &records, steps);
            rank.delays = delays_of(&spans);
            ranks.push(rank);
        }
        let steps = move_skew(&ranks);
        Ok(Self {
            from_ns,
            to_ns,
            ranks,
            steps,
        })
    }

    fn leaves(&self, from: u64, to: u64) -> Leaves {
        let mut all = Leaves::new();
        for rank in &self.ranks {
            for (leaf, ns) in sum(&rank.pieces, from, to) {
                *all.entry(leaf).or_insert(0) += ns;
            }
        }
        all
    }

    /// Share of GPU time that `wanted` (rank, leaf) took in the steps begun in `[from, to)`, skew moved to its cause.
    fn share(&self, from: u64, to: u64, wanted: &dyn Fn(usize, Leaf) -> bool) -> Option<f64> {
        let (mut part, mut whole) = (0, 0);
        for step in self
            .steps
            .iter()
            .filter(|step| (from..to).contains(&step.begin_ns))
        {
            whole += step.total_ns;
            part += step
                .by
                .iter()
                .filter(|((rank, leaf), _)| wanted(*rank, leaf))
                .map(|(_, ns)| ns)
                .sum::<i64>();
        }
        (whole > 0).then(|| part as f64 / whole as f64)
    }

    /// What a fault cost: the share of its own leaves at its own place while it was on, less what they took before.
    fn effect(&self, plan: &Plan, switch: &Switch, first_onset_ns: u64) -> f64 {
        let Some(on_ns) = switch.on_ns else { return 0.0 };
        let wanted = |rank: usize, leaf: Leaf| {
            let at_place =
                u32::try_from(rank).is_ok_and(|rank| switch.fault.hits(&plan.scenario.topology, rank));
            // A slow link is felt by everyone whose bytes pass it; so is a starved thread that carries them.
            let anywhere = leaf == "comm.net";
            (at_place || anywhere) && leaves_of(switch.fault.name).contains(&leaf)
        };
        let before = self.share(self.from_ns, first_onset_ns, &wanted).unwrap_or(0.0);
        let during = self
            .share(on_ns, switch.off_ns.unwrap_or(self.to_ns), &wanted)
            .unwrap_or(0.0);
        during - before
    }

    fn document(&self, plan: &Plan, faults: &[Switch]) -> Value {
        let first_onset_ns = faults
            .iter()
            .filter_map(|fault| fault.on_ns)
            .min()
            .unwrap_or(self.to_ns);
        let effects: Vec<f64> = faults
            .iter()
            .map(|fault| self.effect(plan, fault, first_onset_ns))
            .collect();
        let worst = effects
            .iter()
            .zip(faults)
            .max_by(|one, other| one.0.total_cmp(other.0));
        let worst = worst
            .filter(|(effect, _)| **effect >= LEAST_EFFECT)
            .map(|(_, switch)| switch);
        let starved = starved::share(&self.ranks);
        let unexplained = if starved >= starved::CAUSE {
            HOST_CPU
        } else {
            "none"
        };
        let cause = worst.map_or(unexplained, |switch| switch.fault.name.cause());
        let leaves = self.leaves(self.from_ns, self.to_ns);
        let total = (self.to_ns - self.from_ns) as f64 * self.ranks.len() as f64;
        let mfu = leaves.get("ideal").copied().unwrap_or(0) as f64 / total;
        json!({
            "scenario": plan.scenario.name,
            "cause": cause,
            "also": (starved >= starved::BESIDE && cause != HOST_CPU).then_some(HOST_CPU).into_iter().collect::<Vec<_>>(),
            "starved_share": starved,
            "where": worst.map_or_else(|| json!({}), |switch| place(plan, &switch.fault)),
            "leaves": leaves,
            "leaves_since_onset": (!faults.is_empty()).then(|| self.leaves(first_onset_ns.min(self.to_ns), self.to_ns)),
            "moved_leaves": self.moved(),
            "culprits": self.culprits(),
            "per_rank": (0_u32..).zip(&self.ranks).map(|(rank, swept)| self.rank(plan, rank, swept)).collect::<Vec<_>>(),
            "steps": self.steps.len(),
            "mfu_ppm": (mfu * 1e6) as u64,
            "mfu_points": mfu * 100.0,
            "window": {
                "start_ns": self.from_ns,
                "end_ns": self.to_ns,
                "realtime_offset_ns": unix_ns().cast_signed() - now_ns().cast_signed(),
            },
            "faults": faults.iter().zip(&effects).map(|(switch, effect)| fault(plan, switch, *effect)).collect::<Vec<_>>(),
        })
    }

    /// The job's leaves after waiting has moved to its cause.
    fn moved(&self) -> Leaves {
        let mut all = Leaves::new();
        for ((_, leaf), ns) in self.steps.iter().flat_map(|step| &step.by) {
            *all.entry(leaf).or_insert(0) += ns;
        }
        all
    }

    /// GPU time that each rank cost the others, most first.
    fn culprits(&self) -> Vec<Value> {
        let mut cost = vec![(0, 0); self.ranks.len()];
        for step in &self.steps {
            for (rank, ns) in &step.moved_to {
                cost[*rank].0 += ns;
            }
            if let Some((rank, _)) = step.moved_to.iter().max_by_key(|(_, ns)| **ns) {
                cost[*rank].1 += 1;
            }
        }
        let mut all: Vec<_> = cost.into_iter().enumerate().collect();
        all.sort_by_key(|(_, (ns, _))| std::cmp::Reverse(*ns));
        all.into_iter()
            .map(|(rank, (ns, steps))| json!({"rank": rank, "cost_ns": ns, "steps_worst": steps}))
            .collect()
    }

    fn rank(&self, plan: &Plan, rank: u32, swept: &Rank) -> Value {
        let (node, gpu) = plan.node_of(rank);
        json!({
            "rank": rank,
            "node": node.name,
            "gpu": gpu,
            "window_ns": self.to_ns - self.from_ns,
            "steps": swept.steps.len(),
            "leaves": sum(&swept.pieces, self.from_ns, self.to_ns),
        })
    }
}

/// The leaves through which a fault acts.
fn leaves_of(fault: FaultKind) -> &'static [&'static str] {
    match fault {
        FaultKind::None => &[],
        FaultKind::LoaderCpu => &["idle.data.cpu", "idle.cpu.sched"],
        FaultKind::Storage => &["idle.data.storage"],
        FaultKind::Launch => &["idle.launch", "idle.cpu.sched"],
        FaultKind::CpuQuota => &[
            "idle.cpu.sched",
            "idle.launch",
            "idle.data.cpu",
            "comm.skew",
            "comm.net",
        ],
        FaultKind::SlowLink | FaultKind::LossyLink | FaultKind::SlowPeer => &["comm.net"],
        FaultKind::PcieWidth => &["memory.pcie"],
        FaultKind::Thermal => &["compute.clock"],
        FaultKind::CoTenant => &["compute.contention"],
        FaultKind::Checkpoint => &["idle.ckpt", "memory.copy"],
    }
}

/// The place of a fault, with what follows from it; nothing when it is everywhere.
fn place(plan: &Plan, fault: &Fault) -> Value {
    let rank = fault.rank.or_else(|| {
        // What comes from other nodes is taken in by a node's first rank.
        let gpu = fault.gpu.or((fault.name == FaultKind::SlowPeer).then_some(0))?;
        Some(fault.node? * plan.scenario.topology.gpus_per_node + gpu)
    });
    if let Some(rank) = rank {
        let (node, gpu) = plan.node_of(rank);
        return json!({"node": node.name, "gpu": gpu, "rank": rank});
    }
    fault.node.map_or_else(
        || json!({}),
        |node| json!({"node": plan.nodes[node as usize].name}),
    )
}

fn fault(plan: &Plan, switch: &Switch, effect: f64) -> Value {
    let kind = switch.fault.name;
    json!({
        "name": kind.name(),
        "cause": kind.cause(),
        "where": place(plan, &switch.fault),
        "dose": switch.fault.amount(&plan.scenario.job),
        "on_unix_ns": switch.on_ns.map(|_| switch.on_unix_ns),
        "off_unix_ns": switch.off_ns.map(|_| switch.off_unix_ns),
        "effect_share": effect,
    })
}
