//! Faults: switched on at their onset and off at their end, at their place, and noted with the exact times.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering::SeqCst;

use anyhow::Context;
use serde_json::json;
use test_cgroups::{CPU_PERIOD_US, Transfer};
use virtual_node_state::PPM;
use virtual_node_state::clock::{now_ns, unix_ns};
use virtual_node_state::control::{Control, RankControl};
use virtual_node_state::gpu::{Gpu, PCIE_LANES, reason};
use virtual_node_state::power::REFERENCE_MHZ;

use crate::plan::Plan;
use crate::run::{Gpus, emit, node_env};
use crate::scenario::{Fault, FaultKind, Job};
use crate::topology::{Topology, command};

/// Temperatures of a healthy and of an overheated GPU, degrees Celsius.
const COOL_C: u32 = 58;
const HOT_C: u32 = 89;
/// Cost of a launch beyond what the host is told to spend, ns.
const CALL_NS: f64 = 2_000.0;
/// Reads may miss their time by this share.
const READ_TOLERANCE: f64 = 0.03;

/// A fault and when it was in force, ns of `CLOCK_MONOTONIC`.
#[derive(Debug)]
pub(crate) struct Switch {
    pub(crate) fault: Fault,
    pub(crate) on_ns: Option<u64>,
    pub(crate) off_ns: Option<u64>,
    pub(crate) on_unix_ns: u64,
    pub(crate) off_unix_ns: u64,
    tenants: Vec<Child>,
    /// Read limits in force, bytes per second by rank.
    read_limits: BTreeMap<u32, u64>,
}

/// What faults work on.
pub(crate) struct Scene<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) control: &'a Control,
    pub(crate) gpus: &'a Gpus,
    pub(crate) topology: &'a Topology,
}

impl Switch {
    pub(crate) fn all(plan: &Plan) -> Vec<Self> {
        let switch = |fault: &Fault| Self {
            fault: fault.clone(),
            on_ns: None,
            off_ns: None,
            on_unix_ns: 0,
            off_unix_ns: 0,
            tenants: Vec::new(),
            read_limits: BTreeMap::new(),
        };
        let faults = plan.scenario.fault.iter();
        faults
            .filter(|fault| fault.name != FaultKind::None)
            .map(switch)
            .collect()
    }

    /// Switches when it is time.
    pub(crate) fn tick(&mut self, scene: &Scene<'_>, started_ns: u64) -> anyhow::Result<()> {
        let now = now_ns();
        let due = |after_s: f64| now >= started_ns + (after_s * 1e9) as u64;
        let end_s = self.fault.duration_s.map(|length| self.fault.onset_s + length);
        if self.on_ns.is_none() && due(self.fault.onset_s) {
            self.set(scene, true)?;
        }
        if self.off_ns.is_none() && end_s.is_some_and(due) {
            self.set(scene, false)?;
        }
        self.correct_reads(scene)
    }

    /// Brings reads to the time the dose asks for. The kernel's throttle lends a group up to a slice of its rate after
    /// each pause, and how much differs between kernels, so the limit alone would be a smaller dose.
    fn correct_reads(&mut self, scene: &Scene<'_>) -> anyhow::Result<()> {
        let job = &scene.plan.scenario.job;
        // Its workers share the group's rate.
        let wanted_ns = self.read_s(job) * f64::from(job.workers) * 1e9;
        for (rank, limit) in &mut self.read_limits {
            let took_ns = scene.control.ranks[*rank as usize].read_ns.swap(0, SeqCst) as f64;
            let ratio = took_ns / wanted_ns;
            if took_ns > 0.0 && (ratio - 1.0).abs() > READ_TOLERANCE {
                *limit = corrected(*limit, ratio);
                throttle(scene, *rank, Transfer::Read, Some(*limit))?;
            }
        }
        Ok(())
    }

    /// Time between batches that is left for reading, s: a worker reads, then decodes.
    fn read_s(&self, job: &Job) -> f64 {
        let decode_s = job.decode_ms / 1e3 / f64::from(job.workers);
        (self.fault.amount(job) / 100.0 * job.step_s() - decode_s).max(0.001)
    }

    /// Switches off at the end of the run, if it is still on.
    pub(crate) fn finish(&mut self, scene: &Scene<'_>) -> anyhow::Result<()> {
        if self.on_ns.is_some() && self.off_ns.is_none() {
            self.set(scene, false)
        } else {
            Ok(())
        }
    }

    fn set(&mut self, scene: &Scene<'_>, on: bool) -> anyhow::Result<()> {
        let name = self.fault.name.name();
        self.apply(scene, on)
            .with_context(|| format!("failed to switch {name} {}", if on { "on" } else { "off" }))?;
        let (now, unix) = (now_ns(), unix_ns());
        if on {
            (self.on_ns, self.on_unix_ns) = (Some(now), unix);
        } else {
            (self.off_ns, self.off_unix_ns) = (Some(now), unix);
        }
        emit(&json!({"event": "fault", "name": name, "on": on, "at_unix_ns": unix}));
        Ok(())
    }

    fn apply(&mut self, scene: &Scene<'_>, on: bool) -> anyhow::Result<()> {
        let plan = scene.plan;
        let job = &plan.scenario.job;
        let amount = self.fault.amount(job);
        let hit = |rank: &u32| self.fault.hits(&plan.scenario.topology, *rank);
        let ranks: Vec<u32> = (0..plan.scenario.ranks()).filter(hit).collect();
        let knobs = |rank: &u32| -> &RankControl { &scene.control.ranks[*rank as usize] };
        match self.fault.name {
            FaultKind::None => {}
            FaultKind::LoaderCpu => {
                let wanted_ms = amount / 100.0 * job.step_ms as f64 * f64::from(job.workers);
                let factor = wanted_ms / job.decode_ms.max(0.001);
                let ppm = if on { (factor * PPM as f64) as u64 } else { PPM };
                ranks
                    .iter()
                    .for_each(|rank| knobs(rank).decode_ppm.store(ppm, SeqCst));
            }
            FaultKind::Storage => {
                let bytes_per_s = (job.sample_bytes() as f64 / self.read_s(job)) as u64;
                self.read_limits.clear();
                for rank in &ranks {
                    throttle(scene, *rank, Transfer::Read, on.then_some(bytes_per_s))?;
                    knobs(rank).read_ns.store(0, SeqCst);
                    knobs(rank).cold_reads.store(u32::from(on), SeqCst);
                    if on {
                        self.read_limits.insert(*rank, bytes_per_s);
                    }
                }
            }
            FaultKind::Launch => {
                let launches = f64::from(job.launches_per_step() * self.fault.split);
                let each_ns = (amount / 100.0 * job.step_s() * 1e9 / launches - CALL_NS).max(1_000.0);
                for rank in &ranks {
                    knobs(rank)
                        .launch_split
                        .store(if on { self.fault.split } else { 1 }, SeqCst);
                    knobs(rank)
                        .launch_cost_ns
                        .store(if on { each_ns as u64 } else { 0 }, SeqCst);
                }
            }
            FaultKind::CpuQuota => {
                let quota_us = (amount / 100.0 * CPU_PERIOD_US as f64) as u64;
                for rank in &ranks {
                    let group = plan.rank_cgroup(*rank);
                    scene
                        .topology
                        .cgroups()
                        .limit_cpu(&group, on.then_some(quota_us))?;
                }
            }
            FaultKind::SlowLink => {
                for (index, node) in (0..).zip(&plan.nodes) {
                    if self.at_node(index) {
                        slow_link(&node.netns, on.then_some(amount))?;
                    }
                }
            }
            FaultKind::LossyLink => {
                for (index, _) in (0..).zip(&plan.nodes).filter(|(index, _)| self.at_node(*index)) {
                    lossy_link(&plan.management.netns, index, on.then_some(amount))?;
                }
            }
            FaultKind::SlowPeer => {
                // What comes from other nodes is taken in by a node's first rank.
                let first = |rank: &&u32| rank.is_multiple_of(plan.scenario.topology.gpus_per_node);
                let rate = if on { (amount * 1e6 / 8.0) as u64 } else { 0 };
                ranks
                    .iter()
                    .filter(first)
                    .for_each(|rank| knobs(rank).drain_bytes_per_s.store(rate, SeqCst));
            }
            FaultKind::PcieWidth => {
                let lanes = if on { amount as u32 } else { PCIE_LANES };
                let gpus = ranks.iter().map(|rank| &scene.gpus[*rank as usize]);
                gpus.for_each(|gpu| gpu.pcie_lanes.store(lanes, SeqCst));
            }
            FaultKind::Thermal => {
                let mhz = (amount / 100.0 * f64::from(REFERENCE_MHZ)) as u32;
                ranks
                    .iter()
                    .for_each(|rank| heat(&scene.gpus[*rank as usize], on.then_some(mhz)));
            }
            FaultKind::CoTenant if on => {
                for rank in &ranks {
                    self.tenants.push(tenant(plan, *rank, amount)?);
                }
            }
            FaultKind::CoTenant => self.evict(),
            FaultKind::Checkpoint => {
                let bytes_per_s = (job.checkpoint_mib << 20) as f64 / amount;
                let every = if on {
                    self.fault.every_steps
                } else {
                    job.checkpoint_every
                };
                for rank in &ranks {
                    throttle(scene, *rank, Transfer::Write, on.then_some(bytes_per_s as u64))?;
                    knobs(rank).checkpoint_every.store(every, SeqCst);
                }
            }
        }
        Ok(())
    }

    fn at_node(&self, index: u32) -> bool {
        self.fault.node.is_none_or(|wanted| wanted == index)
    }

    fn evict(&mut self) {
        for mut tenant in self.tenants.drain(..) {
            // One that has left already is what we want.
            let _gone = tenant.kill();
            let _reaped = tenant.wait();
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.evict();
    }
}

/// A limit for reads that took `ratio` of the wanted time: half the way, as one batch alone says little.
fn corrected(bytes_per_s: u64, ratio: f64) -> u64 {
    (bytes_per_s as f64 * f64::midpoint(1.0, ratio.clamp(0.5, 2.0))).max(4_096.0) as u64
}

/// Limits a rank's rate on the dataset's disk; `None` lifts the limit.
fn throttle(scene: &Scene<'_>, rank: u32, way: Transfer, bytes_per_s: Option<u64>) -> anyhow::Result<()> {
    let group = scene.plan.rank_cgroup(rank);
    let disk = scene.topology.disk_number()?;
    Ok(scene
        .topology
        .cgroups()
        .limit_disk(&group, way, &disk, bytes_per_s)?)
}

/// Shapes what a node sends, in Mbit/s; `None` lifts it.
fn slow_link(netns: &str, mbit_per_s: Option<f64>) -> anyhow::Result<()> {
    let line = match mbit_per_s {
        // The burst takes one large segment; the queue is deep enough not to drop what TCP keeps in flight.
        Some(rate) => format!(
            "tc -n {netns} qdisc add dev eth0 root tbf rate {}bit burst 96kb limit 4mb",
            (rate * 1e6) as u64
        ),
        None => format!("tc -n {netns} qdisc del dev eth0 root"),
    };
    command(&line).map(drop)
}

/// Loses a share of the TCP packets that a node sends, in percent, where they enter the bridge; `None` loses no more.
/// What the agent streams is not TCP.
fn lossy_link(bridge_netns: &str, node: u32, percent: Option<f64>) -> anyhow::Result<()> {
    let nft = |rule: &str| command(&format!("nsenter --net=/run/netns/{bridge_netns} nft {rule}")).map(drop);
    let table = format!("netdev lossy{node}");
    let Some(percent) = percent else {
        return nft(&format!("delete table {table}"));
    };
    let of_ten_thousand = (percent * 100.0).round().max(1.0) as u64;
    nft(&format!("add table {table}"))?;
    nft(&format!(
        "add chain {table} sent {{ type filter hook ingress device port{node} priority 0 ; }}"
    ))?;
    nft(&format!(
        "add rule {table} sent ip protocol tcp numgen random mod 10000 < {of_ten_thousand} drop"
    ))
}

/// Makes a GPU too hot for its clock; `None` cools it.
fn heat(gpu: &Gpu, mhz: Option<u32>) {
    let now = now_ns();
    let hot = mhz.is_some();
    gpu.sm_mhz.store(mhz.unwrap_or(REFERENCE_MHZ), SeqCst);
    gpu.temperature_c.store(if hot { HOT_C } else { COOL_C }, SeqCst);
    let reasons = if hot {
        reason::SW_THERMAL | reason::HW_SLOWDOWN | reason::HW_THERMAL
    } else {
        0
    };
    gpu.reasons.store(reasons, SeqCst);
    gpu.sw_thermal.set(hot, now);
    gpu.hw_thermal.set(hot, now);
}

/// Starts another job's process on a rank's GPU.
fn tenant(plan: &Plan, rank: u32, share_percent: f64) -> anyhow::Result<Child> {
    let (node, gpu) = plan.node_of(rank);
    let log = fs::File::create(node.state.join(format!("cotenant{gpu}.log")))?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["cotenant", "--gpu", &gpu.to_string(), "--node", &node.name]);
    command
        .args(["--share-percent", &share_percent.to_string()])
        .arg("--dir")
        .arg(&plan.dir);
    command
        .envs(node_env(node))
        .env("STALLSCOPE_JOB", "notebook")
        .env("STALLSCOPE_JOB_KIND", "other");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
    command.spawn().context("failed to start the other job")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk whose throttle lends 42 ms of the rate with each read of 2 MiB.
    #[test]
    fn limits_come_to_the_wanted_time_on_a_throttle_that_lends() {
        let (bytes, wanted_s) = (f64::from(2 << 20), 0.362);
        let mut limit = (bytes / wanted_s) as u64;
        let took_s = |limit: u64| bytes / limit as f64 - 0.042;
        assert!(took_s(limit) < wanted_s * 0.9);
        for _ in 0..8 {
            limit = corrected(limit, took_s(limit) / wanted_s);
        }
        assert!((took_s(limit) / wanted_s - 1.0).abs() < READ_TOLERANCE, "{limit}");
        assert!(corrected(1, 0.0) >= 4_096, "a limit of 0 would be none");
    }
}
