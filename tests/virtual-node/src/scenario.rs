//! Scenario files: topology, job and faults. `README.md` beside this crate documents every key.

use std::path::Path;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

/// One run.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Scenario {
    /// Default: the file's name without extension.
    #[serde(default)]
    pub(crate) name: String,
    #[serde(default)]
    pub(crate) topology: Topology,
    #[serde(default)]
    pub(crate) job: Job,
    #[serde(default)]
    pub(crate) fault: Vec<Fault>,
}

/// Nodes and their GPUs.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Topology {
    pub(crate) nodes: u32,
    pub(crate) gpus_per_node: u32,
}

impl Default for Topology {
    fn default() -> Self {
        Self {
            nodes: 2,
            gpus_per_node: 2,
        }
    }
}

/// The training job.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Job {
    pub(crate) name: String,
    pub(crate) kind: String,
    /// From the first common step to the last.
    pub(crate) duration_s: f64,
    /// Length of an undisturbed step.
    pub(crate) step_ms: u64,
    /// Model FLOPs utilisation of an undisturbed step.
    pub(crate) mfu_percent: f64,
    /// The loss is read back every this many steps.
    pub(crate) sync_every: u64,
    pub(crate) forward_kernels: u32,
    pub(crate) backward_kernels: u32,
    pub(crate) optimiser_kernels: u32,
    /// Host processor time of one launch.
    pub(crate) launch_us: f64,
    /// Whether the host replays CUDA graphs instead of launching kernel by kernel.
    pub(crate) graphs: bool,
    pub(crate) gradient_mib: u64,
    pub(crate) buckets: u32,
    /// Data-loader processes of each rank.
    pub(crate) workers: u32,
    /// Batches each loader prepares ahead.
    pub(crate) prefetch: u32,
    /// Processor time to decode a batch.
    pub(crate) decode_ms: f64,
    /// Bytes read for a batch, and copied to the GPU.
    pub(crate) sample_mib: u64,
    /// Bytes of optimiser state that each rank keeps on its host: copied there and back in every step; 0 none.
    pub(crate) offload_mib: u64,
    /// Steps between checkpoints; 0 none.
    pub(crate) checkpoint_every: u32,
    /// Bytes each rank writes per checkpoint.
    pub(crate) checkpoint_mib: u64,
}

impl Default for Job {
    fn default() -> Self {
        Self {
            name: "virtual-pretrain".into(),
            kind: "pretrain".into(),
            duration_s: 45.0,
            step_ms: 350,
            mfu_percent: 40.0,
            sync_every: 1,
            forward_kernels: 60,
            backward_kernels: 120,
            optimiser_kernels: 8,
            launch_us: 12.0,
            graphs: false,
            gradient_mib: 12,
            buckets: 4,
            workers: 1,
            prefetch: 2,
            decode_ms: 30.0,
            sample_mib: 2,
            offload_mib: 0,
            checkpoint_every: 0,
            checkpoint_mib: 8,
        }
    }
}

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum FaultKind {
    None,
    LoaderCpu,
    Storage,
    Launch,
    CpuQuota,
    SlowLink,
    LossyLink,
    SlowPeer,
    PcieWidth,
    Thermal,
    CoTenant,
    Checkpoint,
}

/// One fault.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Fault {
    pub(crate) name: FaultKind,
    /// Seconds after the job's start.
    #[serde(default = "default_onset")]
    pub(crate) onset_s: f64,
    /// Default: to the end of the run.
    pub(crate) duration_s: Option<f64>,
    #[serde(default)]
    pub(crate) dose: Dose,
    /// Place: at most one of `node` (with or without `gpu`) and `rank`; neither means everywhere.
    pub(crate) node: Option<u32>,
    pub(crate) gpu: Option<u32>,
    pub(crate) rank: Option<u32>,
    /// `launch`: kernels into which each one is cut.
    #[serde(default = "default_split")]
    pub(crate) split: u32,
    /// `checkpoint`: steps between two.
    #[serde(default = "default_every")]
    pub(crate) every_steps: u32,
}

fn default_onset() -> f64 {
    15.0
}

fn default_split() -> u32 {
    16
}

fn default_every() -> u32 {
    8
}

/// How much of a fault: a number in the fault's own unit, or a word.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(untagged)]
pub(crate) enum Dose {
    Number(f64),
    Word(Level),
}

impl Default for Dose {
    fn default() -> Self {
        Self::Word(Level::Loud)
    }
}

/// Doses by word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// Dominates the step.
    Loud,
    /// A few percent of the step.
    Quiet,
    /// Present, and hidden behind something else.
    Masked,
}

impl FaultKind {
    /// The name in scenario files.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::LoaderCpu => "loader-cpu",
            Self::Storage => "storage",
            Self::Launch => "launch",
            Self::CpuQuota => "cpu-quota",
            Self::SlowLink => "slow-link",
            Self::LossyLink => "lossy-link",
            Self::SlowPeer => "slow-peer",
            Self::PcieWidth => "pcie-width",
            Self::Thermal => "thermal",
            Self::CoTenant => "co-tenant",
            Self::Checkpoint => "checkpoint",
        }
    }

    /// The cause that the fault is.
    pub(crate) const fn cause(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::LoaderCpu => "data.loader",
            Self::Storage => "data.storage",
            Self::Launch => "host.launch",
            Self::CpuQuota => "host.cpu",
            Self::SlowLink => "network.nic",
            Self::LossyLink => "network.fabric",
            Self::SlowPeer => "host.receiver",
            Self::PcieWidth => "device.pcie",
            Self::Thermal => "device.thermal",
            Self::CoTenant => "device.contention",
            Self::Checkpoint => "job.checkpoint",
        }
    }
}

impl Fault {
    /// The dose in the fault's own unit (see README.md).
    pub(crate) fn amount(&self, job: &Job) -> f64 {
        let level = match self.dose {
            Dose::Number(number) => return number,
            Dose::Word(level) => level,
        };
        let pick = |loud, quiet, masked| match level {
            Level::Loud => loud,
            Level::Quiet => quiet,
            Level::Masked => masked,
        };
        match self.name {
            FaultKind::None => 0.0,
            FaultKind::LoaderCpu | FaultKind::Storage | FaultKind::Launch => pick(160.0, 112.0, 80.0),
            FaultKind::CpuQuota => pick(5.0, 9.0, 30.0),
            FaultKind::SlowLink | FaultKind::SlowPeer => {
                let bits = job.gradient_bytes() as f64 * 8.0;
                bits / (job.step_s() * pick(1.3, 0.25, 0.05)) / 1e6
            }
            FaultKind::LossyLink => pick(8.0, 1.0, 0.01),
            FaultKind::PcieWidth => pick(4.0, 8.0, 12.0),
            FaultKind::Thermal => pick(65.0, 93.0, 99.0),
            FaultKind::CoTenant => pick(35.0, 8.0, 1.0),
            FaultKind::Checkpoint => pick(2.0, 0.4, 0.03),
        }
    }

    /// Whether the fault is at this rank.
    pub(crate) fn hits(&self, topology: &Topology, rank: u32) -> bool {
        let (node, gpu) = (rank / topology.gpus_per_node, rank % topology.gpus_per_node);
        self.rank.is_none_or(|wanted| wanted == rank)
            && self.node.is_none_or(|wanted| wanted == node)
            && self.gpu.is_none_or(|wanted| wanted == gpu)
    }
}

impl Job {
    pub(crate) fn step_s(&self) -> f64 {
        self.step_ms as f64 / 1e3
    }

    pub(crate) fn gradient_bytes(&self) -> u64 {
        self.gradient_mib << 20
    }

    pub(crate) fn sample_bytes(&self) -> u64 {
        self.sample_mib << 20
    }

    /// Model FLOPs of one step on one GPU, at a data-sheet peak of 989 TFLOP/s.
    pub(crate) fn flops_per_step(&self) -> u64 {
        (self.mfu_percent / 100.0 * 989e12 * self.step_s()) as u64
    }

    pub(crate) fn launches_per_step(&self) -> u32 {
        self.forward_kernels + self.backward_kernels + self.optimiser_kernels
    }
}

impl Scenario {
    /// Reads and checks a scenario file.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
        let mut scenario: Self =
            toml::from_str(&text).with_context(|| format!("{} is not a scenario", path.display()))?;
        if scenario.name.is_empty() {
            scenario.name = path
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
        }
        scenario
            .check()
            .with_context(|| format!("{} asks for the impossible", path.display()))?;
        Ok(scenario)
    }

    pub(crate) fn ranks(&self) -> u32 {
        self.topology.nodes * self.topology.gpus_per_node
    }

    fn check(&self) -> anyhow::Result<()> {
        let (topology, job) = (&self.topology, &self.job);
        ensure!(
            !job.graphs || self.fault.iter().all(|fault| fault.name != FaultKind::Launch),
            "a job that replays graphs is not slowed by launches: set job.graphs = false"
        );
        ensure!((1..=8).contains(&topology.nodes), "topology.nodes must be 1 to 8");
        ensure!(
            (1..=8).contains(&topology.gpus_per_node),
            "topology.gpus_per_node must be 1 to 8"
        );
        ensure!(
            (20..=10_000).contains(&job.step_ms),
            "job.step_ms must be 20 to 10000"
        );
        ensure!(
            job.duration_s > 0.0 && job.duration_s <= 3_600.0,
            "job.duration_s must be above 0 and at most 3600"
        );
        ensure!(
            job.mfu_percent > 0.0 && job.mfu_percent <= 55.0,
            "job.mfu_percent must be above 0 and at most 55"
        );
        ensure!(job.sync_every >= 1, "job.sync_every must be at least 1");
        ensure!(
            job.buckets >= 1 && job.buckets <= job.backward_kernels,
            "job.buckets must be 1 to job.backward_kernels"
        );
        ensure!(
            job.forward_kernels >= 3 && job.optimiser_kernels >= 1,
            "a step needs kernels"
        );
        ensure!((1..=16).contains(&job.workers), "job.workers must be 1 to 16");
        ensure!((1..=16).contains(&job.prefetch), "job.prefetch must be 1 to 16");
        ensure!(
            (1..=64).contains(&job.sample_mib),
            "job.sample_mib must be 1 to 64"
        );
        ensure!(job.offload_mib <= 16_384, "job.offload_mib must be at most 16384");
        ensure!(
            (1..=1_024).contains(&job.gradient_mib),
            "job.gradient_mib must be 1 to 1024"
        );
        ensure!(
            (1..=256).contains(&job.checkpoint_mib),
            "job.checkpoint_mib must be 1 to 256"
        );
        ensure!(
            job.decode_ms >= 0.0 && job.launch_us >= 0.0,
            "times must not be negative"
        );
        self.fault.iter().try_for_each(|fault| self.check_fault(fault))
    }

    fn check_fault(&self, fault: &Fault) -> anyhow::Result<()> {
        let name = fault.name.name();
        ensure!(fault.onset_s >= 0.0, "{name}: onset_s must not be negative");
        ensure!(
            fault.duration_s.is_none_or(|length| length > 0.0),
            "{name}: duration_s must be above 0"
        );
        ensure!(
            fault.rank.is_none() || (fault.node.is_none() && fault.gpu.is_none()),
            "{name}: give rank, or node and gpu"
        );
        ensure!(
            fault.gpu.is_none() || fault.node.is_some(),
            "{name}: gpu needs node"
        );
        ensure!(
            (0..self.ranks()).any(|rank| fault.hits(&self.topology, rank)),
            "{name}: the place does not exist"
        );
        ensure!((1..=256).contains(&fault.split), "{name}: split must be 1 to 256");
        ensure!(fault.every_steps >= 1, "{name}: every_steps must be at least 1");
        let amount = fault.amount(&self.job);
        ensure!(
            amount.is_finite() && (amount > 0.0 || fault.name == FaultKind::None),
            "{name}: dose must be above 0"
        );
        match fault.name {
            FaultKind::Thermal => ensure!(
                (10.0..=100.0).contains(&amount),
                "{name}: dose is 10 to 100 % of the clock"
            ),
            FaultKind::CoTenant => ensure!(
                (1.0..=85.0).contains(&amount),
                "{name}: dose is 1 to 85 % of the SMs"
            ),
            FaultKind::CpuQuota => ensure!(amount >= 1.0, "{name}: dose is at least 1 % of a core"),
            FaultKind::PcieWidth => ensure!(
                [1.0, 2.0, 4.0, 8.0, 12.0, 16.0].contains(&amount),
                "{name}: dose is 1, 2, 4, 8, 12 or 16 lanes"
            ),
            FaultKind::LossyLink => {
                ensure!(
                    fault.rank.is_none() && fault.gpu.is_none(),
                    "{name}: the place is a node"
                );
                ensure!(
                    (0.01..=50.0).contains(&amount),
                    "{name}: dose is 0.01 to 50 % of packets"
                );
            }
            FaultKind::SlowLink | FaultKind::SlowPeer => {
                ensure!(
                    fault.rank.is_none() && fault.gpu.is_none(),
                    "{name}: the place is a node"
                );
                ensure!(amount >= 1.0, "{name}: dose is at least 1 Mbit/s");
            }
            _ => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> anyhow::Result<Scenario> {
        let scenario: Scenario = toml::from_str(text)?;
        scenario.check()?;
        Ok(scenario)
    }

    #[test]
    fn defaults_are_a_two_by_two_control() {
        let scenario = parse("").expect("empty scenario");
        assert_eq!(scenario.ranks(), 4);
        assert!(scenario.fault.is_empty());
    }

    #[test]
    fn unknown_keys_and_impossible_places_are_refused() {
        assert!(parse("[job]\nspeed = 3").is_err());
        assert!(parse("[[fault]]\nname = \"thermal\"\nrank = 4").is_err());
        assert!(parse("[[fault]]\nname = \"thermal\"\ngpu = 1").is_err());
        assert!(parse("[[fault]]\nname = \"slow-link\"\nrank = 1").is_err());
        assert!(parse("[[fault]]\nname = \"lossy-link\"\ndose = 80").is_err());
        assert!(parse("[[fault]]\nname = \"slow-peer\"\nrank = 1").is_err());
        assert!(parse("[[fault]]\nname = \"pcie-width\"\ndose = 7").is_err());
        assert!(parse("[[fault]]\nname = \"earthquake\"").is_err());
        assert!(parse("[[fault]]\nname = \"thermal\"\ndose = 140").is_err());
        assert!(parse("[[fault]]\nname = \"thermal\"\ndose = \"deafening\"").is_err());
    }

    #[test]
    fn places_and_doses_are_read() {
        let scenario =
            parse("[[fault]]\nname = \"co-tenant\"\nnode = 1\ngpu = 0\ndose = 20").expect("scenario");
        let fault = &scenario.fault[0];
        let hit: Vec<u32> = (0..4)
            .filter(|rank| fault.hits(&scenario.topology, *rank))
            .collect();
        assert_eq!(hit, [2]);
        assert_eq!(fault.amount(&scenario.job), 20.0);
        assert_eq!(fault.onset_s, 15.0);
    }
}
