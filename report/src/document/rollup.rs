//! Budgets of several GPUs summed: nanoseconds add up, percentages would not.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use stallscope_attribution::leaf::{Class, Leaf};

use super::{Gpu, Sweep};

/// The sum of several GPUs' budgets. Wide integers: a year of a hundred thousand GPUs fits.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Rollup {
    /// GPUs summed.
    pub gpus: u64,
    /// Analysed time, GPU-ns.
    pub total_ns: i128,
    /// The four classes; they sum to `total_ns`.
    pub sweep: Sweep,
    /// GPU-ns per leaf; they sum to `total_ns`.
    pub budget: BTreeMap<String, i128>,
    /// Bounds `[low, high]` in GPU-ns of the leaves that are not exact on every GPU.
    pub intervals: BTreeMap<String, [i128; 2]>,
    /// Leaves that no GPU measured.
    pub unmeasured: Vec<String>,
    /// Leaves that only some of the GPUs measured: their sum is a lower bound.
    pub partly_measured: Vec<String>,
}

impl Rollup {
    /// The sum over `gpus`.
    #[must_use]
    pub fn over<'a>(gpus: impl IntoIterator<Item = &'a Gpu>) -> Self {
        let gpus: Vec<&Gpu> = gpus.into_iter().collect();
        let mut sum = Self {
            gpus: gpus.len() as u64,
            ..Self::default()
        };
        let bounded: BTreeSet<&String> = gpus.iter().flat_map(|gpu| gpu.intervals.keys()).collect();
        let mut missing: BTreeMap<&String, u64> = BTreeMap::new();
        for gpu in &gpus {
            sum.total_ns += i128::from(gpu.total_ns);
            sum.sweep = sum.sweep.plus(gpu.sweep);
            for (leaf, ns) in &gpu.budget {
                *sum.budget.entry(leaf.clone()).or_default() += i128::from(*ns);
            }
            for leaf in &bounded {
                // A GPU without bounds for this leaf knows it exactly.
                let exact = gpu.budget.get(*leaf).copied().unwrap_or(0);
                let [low, high] = gpu.intervals.get(*leaf).copied().unwrap_or([exact, exact]);
                let bounds = sum.intervals.entry((*leaf).clone()).or_default();
                bounds[0] += i128::from(low);
                bounds[1] += i128::from(high);
            }
            for leaf in &gpu.unmeasured {
                *missing.entry(leaf).or_default() += 1;
            }
        }
        let (all, some): (Vec<_>, Vec<_>) = missing.into_iter().partition(|(_, count)| *count >= sum.gpus);
        sum.unmeasured = all.into_iter().map(|(leaf, _)| leaf.clone()).collect();
        sum.partly_measured = some.into_iter().map(|(leaf, _)| leaf.clone()).collect();
        sum
    }

    /// GPU-ns of one leaf.
    #[must_use]
    pub fn leaf_ns(&self, leaf: Leaf) -> i128 {
        self.budget.get(leaf.name()).copied().unwrap_or(0)
    }

    /// Whether any GPU measured the leaf.
    #[must_use]
    pub fn is_measured(&self, leaf: Leaf) -> bool {
        !self.unmeasured.iter().any(|name| name == leaf.name())
    }
}

impl Sweep {
    /// Both sums together; saturates, which only values from outside that are no times can reach.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self {
            compute_ns: self.compute_ns.saturating_add(other.compute_ns),
            exposed_comm_ns: self.exposed_comm_ns.saturating_add(other.exposed_comm_ns),
            exposed_memory_ns: self.exposed_memory_ns.saturating_add(other.exposed_memory_ns),
            idle_ns: self.idle_ns.saturating_add(other.idle_ns),
        }
    }

    /// Nanoseconds of one class.
    #[must_use]
    pub const fn class_ns(&self, class: Class) -> i128 {
        match class {
            Class::Compute => self.compute_ns,
            Class::Comm => self.exposed_comm_ns,
            Class::Memory => self.exposed_memory_ns,
            Class::Idle => self.idle_ns,
        }
    }

    /// All four classes together.
    #[must_use]
    pub const fn total_ns(&self) -> i128 {
        let running = self.compute_ns.saturating_add(self.exposed_comm_ns);
        running
            .saturating_add(self.exposed_memory_ns)
            .saturating_add(self.idle_ns)
    }
}
