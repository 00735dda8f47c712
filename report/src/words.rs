//! What leaves, causes, tiers and methods are called in front of people.

use stallscope_attribution::cause::Cause;
use stallscope_attribution::leaf::{Class, Leaf};

/// A leaf in at most 32 characters, lower case.
#[must_use]
pub const fn leaf(leaf: Leaf) -> &'static str {
    match leaf {
        Leaf::Ideal => "model math at the device's peak",
        Leaf::ComputeRecompute => "forward work repeated for memory",
        Leaf::ComputePlatform => "peak that no kernel reaches here",
        Leaf::ComputeClock => "clock below the reference",
        Leaf::ComputeContention => "slowed by copies, comm or others",
        Leaf::ComputeNonmatmul => "norms, softmax, optimiser",
        Leaf::ComputeKernel => "kernels below the device's reach",
        Leaf::CommTransfer => "bytes at the reference rate",
        Leaf::CommNet => "network slower than reference",
        Leaf::CommSkew => "waiting for the last rank",
        Leaf::CommProto => "latency, launch and tails",
        Leaf::MemoryCopy => "copies at the link's rate",
        Leaf::MemoryPcie => "copies slower than the link",
        Leaf::IdleDataCpu => "waiting for data: loaders on CPU",
        Leaf::IdleDataStorage => "waiting for data: storage",
        Leaf::IdleCkpt => "writing a checkpoint",
        Leaf::IdleGc => "garbage collection",
        Leaf::IdleCpuSched => "launching thread without a CPU",
        Leaf::IdleCpuSync => "late relaunch after a sync",
        Leaf::IdleAlloc => "device memory allocation",
        Leaf::IdleCompile => "compilation or graph capture",
        Leaf::IdleLaunch => "host issues work too slowly",
        Leaf::IdleDep => "queued behind a stream or rank",
        Leaf::IdleUnknown => "idle, evidence does not say why",
    }
}

/// A class in a few words, lower case.
#[must_use]
pub const fn class(class: Class) -> &'static str {
    match class {
        Class::Compute => "compute",
        Class::Comm => "exposed communication",
        Class::Memory => "exposed copies",
        Class::Idle => "idle",
    }
}

/// A cause as a sentence without its full stop.
#[must_use]
pub const fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::NetworkNic => "A node's own network interface is slow",
        Cause::NetworkFabric => "The network between nodes is slow",
        Cause::NetworkNvlink => "The link between GPUs of a node is slow",
        Cause::NetworkPcie => "The PCIe path of a network interface is slow",
        Cause::NetworkConfig => "The communication library is configured badly",
        Cause::KernelLowTensor => "Kernels use the tensor cores badly",
        Cause::KernelMemoryBound => "Kernels are bound by device memory",
        Cause::KernelClock => "The clock is below the reference without a fault",
        Cause::DataLoader => "Data-loader workers are too slow",
        Cause::DataStorage => "Storage is too slow for the data loaders",
        Cause::DataCopy => "Host-to-device copies are exposed",
        Cause::HostLaunch => "The host cannot issue work fast enough",
        Cause::HostCpu => "The launching thread does not get a CPU",
        Cause::HostGc => "Garbage collection pauses the launching thread",
        Cause::HostSync => "Synchronisation drains the GPU",
        Cause::HostAlloc => "Allocation in the driver blocks the launching thread",
        Cause::HostCompile => "Compilation blocks the launching thread",
        Cause::HostReceiver => "A process takes in data more slowly than its peers send it",
        Cause::DeviceThermal => "A GPU lowers its clock because it is hot",
        Cause::DevicePowerCap => "A GPU lowers its clock because of its power limit",
        Cause::DeviceContention => "Another process uses the GPU",
        Cause::DevicePcie => "A GPU's own PCIe link is slow",
        Cause::DeviceFault => "A GPU reports faults",
        Cause::JobImbalance => "Ranks have unequal work by construction",
        Cause::JobCheckpoint => "Checkpoints stall the job",
        Cause::JobRestart => "The job restarted",
        Cause::JobUnallocated => "GPUs are not allocated",
        Cause::None => "Nothing worth naming is lost",
        Cause::Unknown => "Time is lost and the evidence does not say why",
    }
}

/// The words for a cause's stable name; the name itself when a newer producer sent one unknown here.
#[must_use]
pub fn cause_named(name: &str) -> &str {
    match Cause::from_name(name) {
        Some(known) => cause(known),
        None => name,
    }
}

/// What a tier can see, by its stable name.
#[must_use]
pub fn tier(name: &str) -> &'static str {
    match name {
        "A" => "GPU activity records: every leaf is exact",
        "B+C" => "host probes, calibrated by device counters: leaves carry intervals",
        "B" => "host probes alone: GPU time is bounded, leaves carry wide intervals",
        _ => "a tier this version does not know",
    }
}

/// How steps were found, by the method's stable name.
#[must_use]
pub fn method(name: &str) -> &str {
    match name {
        "collective_period" => "the period of the collectives",
        "launch_period" => "the period of the launches",
        "declared" => "the job's own marks",
        "fixed_window" => "windows of fixed length (no period found)",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The guide is written by hand but for these rows.
    #[test]
    fn the_guide_names_every_leaf_cause_and_tier() {
        let guide = include_str!("../../docs/report.md");
        let leaves = Leaf::ALL.iter().map(|known| (known.name(), leaf(*known)));
        let causes = Cause::ALL.iter().map(|known| (known.name(), cause(*known)));
        let tiers = ["A", "B+C", "B"].into_iter().map(|name| (name, tier(name)));
        for (name, words) in leaves.chain(causes).chain(tiers) {
            let row = format!("| `{name}` | {words} |\n");
            assert!(guide.contains(&row), "docs/report.md lacks the row {row}");
        }
        let rows = guide.lines().filter(|line| line.starts_with("| `")).count();
        let fields = guide
            .split("| Field of a job |")
            .nth(1)
            .map_or(0, |rest| rest.matches("\n| `").count());
        assert_eq!(
            rows - fields,
            Leaf::ALL.len() + Cause::ALL.len() + 3,
            "a row names what does not exist"
        );
    }

    #[test]
    fn words_fit_their_column() {
        for known in Leaf::ALL {
            assert!(leaf(*known).chars().count() <= 32, "{}", leaf(*known));
        }
        assert_eq!(cause_named("data.loader"), "Data-loader workers are too slow");
        assert_eq!(cause_named("device.cosmic"), "device.cosmic");
    }
}
