//! The model's kernels: how long each takes, what it uses and how much of the model's arithmetic it does.
//!
//! Matrix products take about four fifths of the step and all of the FLOPs; the rest (normalisation, softmax,
//! element-wise, optimiser) is bound by memory.

use std::fmt::Write;

use super::driver::{Device, Object};
use crate::scenario::Job;

/// Share of an undisturbed step in which compute kernels run; the rest is the last bucket's reduction and the
/// host's turn-around after the drain.
const BUSY_SHARE: f64 = 0.97;
/// Shares of compute: forward matrix products, other forward, backward matrix products, other backward, optimiser.
const SHARES: [f64; 5] = [0.265, 0.060, 0.530, 0.115, 0.030];

/// The kernels of one module.
#[derive(Debug)]
pub(crate) struct Kernels {
    pub(crate) split: u32,
    pub(crate) module: Object,
    pub(crate) forward_gemm: Object,
    pub(crate) forward_other: Object,
    pub(crate) backward_gemm: Object,
    pub(crate) backward_other: Object,
    pub(crate) optimiser: Object,
}

impl Kernels {
    /// Loads the model with each kernel cut into `split`.
    pub(crate) fn load(device: &Device, job: &Job, split: u32) -> anyhow::Result<Self> {
        let module = device.module(&image(job, split))?;
        let kernel = |name| device.kernel(module, name);
        Ok(Self {
            split,
            module,
            forward_gemm: kernel("forward_gemm")?,
            forward_other: kernel("forward_other")?,
            backward_gemm: kernel("backward_gemm")?,
            backward_other: kernel("backward_other")?,
            optimiser: kernel("adam")?,
        })
    }
}

/// How many of `count` launches are matrix products when they go gemm, gemm, other.
fn gemms(count: u32) -> u32 {
    count / 3 * 2 + (count % 3).min(2)
}

fn image(job: &Job, split: u32) -> String {
    let backward_gemms: u32 = (0..job.buckets)
        .map(|bucket| {
            gemms(
                job.backward_kernels * (bucket + 1) / job.buckets
                    - job.backward_kernels * bucket / job.buckets,
            )
        })
        .sum();
    let forward_gemms = gemms(job.forward_kernels);
    let counts = [
        forward_gemms,
        job.forward_kernels - forward_gemms,
        backward_gemms,
        job.backward_kernels - backward_gemms,
        job.optimiser_kernels,
    ];
    let compute_ns = job.step_s() * BUSY_SHARE * 1e9;
    let flops = job.flops_per_step() as f64;
    // Backward does twice the arithmetic of forward.
    let work = [flops / 3.0, 0.0, flops * 2.0 / 3.0, 0.0, 0.0];
    let names = [
        "forward_gemm",
        "forward_other",
        "backward_gemm",
        "backward_other",
        "adam",
    ];
    let mut image = String::from("//virtual-gpu kernels\n");
    for index in 0..5 {
        let each = f64::from((counts[index] * split).max(1));
        let dur_ns = (compute_ns * SHARES[index] / each) as u64;
        let kernel_flops = (work[index] / each) as u64;
        // Tensor activity is the rate over the data-sheet peak.
        let tensor = (kernel_flops as f64 / (dur_ns as f64 * 989e12 / 1e9) * 1e6) as u64;
        let (sm, occupancy, dram) = if tensor > 0 {
            (930_000, 260_000, 380_000)
        } else {
            (880_000, 640_000, 820_000)
        };
        let _infallible = writeln!(
            image,
            "kernel {} dur_ns={dur_ns} sm={sm} occupancy={occupancy} tensor={tensor} dram={dram} flops={kernel_flops}",
            names[index]
        );
    }
    image
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(line: &str, key: &str) -> u64 {
        line.split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
            .and_then(|text| text.parse().ok())
            .unwrap_or_default()
    }

    #[test]
    fn the_kernels_do_the_models_arithmetic_whatever_the_split() {
        let job = Job::default();
        for split in [1, 16] {
            let image = image(&job, split);
            let total = |name: &str, launches: u64, key: &str| {
                image
                    .lines()
                    .find(|line| line.contains(name))
                    .map_or(0, |line| value(line, key))
                    * launches
                    * u64::from(split)
            };
            let flops = total("forward_gemm", 40, "flops") + total("backward_gemm", 80, "flops");
            let wanted = job.flops_per_step();
            assert!(
                flops.abs_diff(wanted) < wanted / 100_000,
                "{flops} against {wanted}"
            );
            let busy = total("forward_gemm", 40, "dur_ns")
                + total("forward_other", 20, "dur_ns")
                + total("backward_gemm", 80, "dur_ns")
                + total("backward_other", 40, "dur_ns")
                + total("adam", 8, "dur_ns");
            assert!(busy.abs_diff(339_500_000) < 100_000, "{busy}");
        }
    }
}
