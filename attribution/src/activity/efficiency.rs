//! Model math and what the peak would need for it.

use super::math::Arithmetic;
use super::{Declared, KernelClass, Pipe, Record, Work};
use crate::budget::arith::mul_div;
use crate::facts::LeafInterval;
use crate::job::{Efficiency, FlopsSource};
use crate::leaf::{Class, Leaf};
use crate::peaks::{self, Precision};

/// Matrix kernels whose operators have no shapes are taken to compute at the rate of those that have, from this
/// share of their time on, percent.
const COVERED_PERCENT: u64 = 50;

/// The model's arithmetic on one GPU over its whole time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ModelMath {
    /// Time at the peak, ns.
    pub(super) ideal_ns: u64,
    /// Least and most it can be, ns.
    pub(super) bounds: (u64, u64),
    /// The same with what is repeated, ns; `None` when that is not known.
    pub(super) hardware_ns: Option<u64>,
    /// What the best GEMM of this device leaves of the peak, ns; `None` when it is not known.
    pub(super) platform_ns: Option<u64>,
    /// How it was computed.
    pub(super) how: Efficiency,
}

/// Steps of a GPU in its time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Span {
    /// Whole steps.
    pub(super) steps: u64,
    /// Their time, ns.
    pub(super) steps_ns: u64,
    /// All time, ns.
    pub(super) window_ns: u64,
}

impl Span {
    /// FLOPs of the whole time from those of a step. What is left over at both ends is part of a step too; a longer
    /// rest is none.
    fn flops(self, per_step: u64) -> u64 {
        let flops = per_step.saturating_mul(self.steps);
        let rest_ns = self.window_ns.saturating_sub(self.steps_ns);
        if self.steps > 0 && rest_ns < self.steps_ns / self.steps * 2 {
            mul_div(flops, self.window_ns, self.steps_ns)
        } else {
            flops
        }
    }
}

/// The model's arithmetic of a GPU: as declared, else from the shapes of its operators. The text says why there is
/// none.
pub(super) fn model_math(
    device: &str,
    declared: &Declared,
    records: &[Record],
    arithmetic: &Arithmetic,
    span: Span,
) -> Result<ModelMath, String> {
    let row = peaks::find(0, device);
    let peak_of = |precision| {
        let of_table = row.and_then(|row| row.peak_flops_per_s(precision));
        declared.peak_flops_per_s.or(of_table).filter(|peak| *peak > 0)
    };
    let nominal = declared
        .precision
        .or_else(|| most(arithmetic))
        .unwrap_or_else(|| by_kernels(records));
    let Some(peak) = peak_of(nominal) else {
        let device = if device.is_empty() { "this device" } else { device };
        return Err(format!("the {} peak of {device} is not known", nominal.name()));
    };
    let at_peak = |flops: u64, peak: u64| mul_div(flops, 1_000_000_000, peak);
    let source = match (declared.peak_flops_per_s, row) {
        (Some(_), _) => "as given".to_owned(),
        (None, Some(row)) => row.source.to_owned(),
        (None, None) => String::new(),
    };
    let words = format!(
        "{}.{} TFLOP/s {}: {source}",
        peak / 1_000_000_000_000,
        peak / 100_000_000_000 % 10,
        nominal.name()
    );
    let reachable = row
        .and_then(|row| row.reachable_gflops)
        .filter(|_| nominal == Precision::Half && declared.peak_flops_per_s.is_none())
        .map(|gflops| gflops * 1_000_000_000);
    let platform =
        |ideal_ns| reachable.map(|reachable| mul_div(ideal_ns, peak.saturating_sub(reachable), reachable));

    if let Some(per_step) = declared.model_flops_per_step {
        if span.steps == 0 {
            return Err("model FLOPs are declared per step and no steps were found".to_owned());
        }
        let ideal_ns = at_peak(span.flops(per_step), peak);
        let hardware = declared
            .hardware_flops_per_step
            .map(|flops| at_peak(span.flops(flops), peak));
        return Ok(ModelMath {
            ideal_ns,
            bounds: (ideal_ns, ideal_ns),
            hardware_ns: hardware,
            platform_ns: platform(hardware.unwrap_or(ideal_ns)),
            how: Efficiency {
                source: FlopsSource::Declared,
                hfu_ppm: None,
                convention: declared.flops_from.clone(),
                peak: words,
            },
        });
    }
    let covered = mul_div(arithmetic.covered_ns, 100, arithmetic.matmul_ns);
    if arithmetic.model.is_empty() || covered < COVERED_PERCENT {
        return Err(format!(
            "operator shapes tell the arithmetic of {covered} % of the time of matrix kernels; declare the model's \
             FLOPs, or trace with record_shapes=True"
        ));
    }
    // Each precision at its own peak, so that the times add up.
    let time = |flops: &[(Precision, u64)]| -> u64 {
        let times = flops.iter();
        times
            .map(|(precision, flops)| {
                at_peak(
                    *flops,
                    if declared.precision.is_some() {
                        peak
                    } else {
                        peak_of(*precision).unwrap_or(peak)
                    },
                )
            })
            .sum()
    };
    let whole = |ns: u64| mul_div(ns, arithmetic.matmul_ns, arithmetic.covered_ns);
    let (model, repeated) = (time(&arithmetic.model), time(&arithmetic.repeated));
    let (ideal_ns, hardware_ns) = (whole(model), whole(model.saturating_add(repeated)));
    let most = ideal_ns.saturating_add(ideal_ns.saturating_sub(model));
    let mut convention = format!(
        "executed by operators with known shapes, repeated work apart; they launched {covered} % of the time of matrix kernels"
    );
    if covered < 100 {
        convention += ", the rest taken at their rate";
    }
    Ok(ModelMath {
        ideal_ns,
        bounds: (model, most),
        hardware_ns: Some(hardware_ns),
        platform_ns: platform(hardware_ns),
        how: Efficiency {
            source: FlopsSource::OperatorShapes,
            hfu_ppm: None,
            convention,
            peak: words,
        },
    })
}

/// The precision of most arithmetic.
fn most(arithmetic: &Arithmetic) -> Option<Precision> {
    let most = arithmetic
        .model
        .iter()
        .max_by_key(|(precision, flops)| (*flops, *precision));
    most.map(|(precision, _)| *precision)
}

/// Without arithmetic the matrix kernels' names tell; without a hint it is the 16-bit types that training runs in.
fn by_kernels(records: &[Record]) -> Precision {
    let time = |pipe: Option<Pipe>| -> u64 {
        let of_pipe = records.iter().filter(|record| {
            matches!(record.work, Work::Kernel(class) if class.is_matmul()) && record.pipe == pipe
        });
        of_pipe.map(|record| record.window.len_ns()).sum()
    };
    if time(Some(Pipe::Plain)) > time(Some(Pipe::Tensor)) + time(None) {
        Precision::Fp32
    } else {
        Precision::Half
    }
}

/// Carves the model's arithmetic out of compute's residual, which takes the difference: it may become negative.
/// Leaves keep their sum.
pub(super) fn carve(
    leaves: &mut [i64; Leaf::COUNT],
    measured: &mut u32,
    math: &ModelMath,
) -> Vec<LeafInterval> {
    let ns = |ns: u64| i64::try_from(ns).unwrap_or(i64::MAX);
    let compute: i64 = Leaf::ALL
        .iter()
        .filter(|leaf| leaf.class() == Class::Compute)
        .map(|leaf| leaves[leaf.index()])
        .sum();
    let residual = Leaf::ComputeKernel.index();
    let ideal = ns(math.ideal_ns).min(compute);
    leaves[Leaf::Ideal.index()] = ideal;
    leaves[residual] -= ideal;
    *measured |= 1 << Leaf::Ideal.index();
    if let Some(platform) = math.platform_ns {
        let platform = ns(platform).min(leaves[residual].max(0));
        leaves[Leaf::ComputePlatform.index()] = platform;
        leaves[residual] -= platform;
        *measured |= 1 << Leaf::ComputePlatform.index();
    }
    let (low, high) = (
        ns(math.bounds.0).min(ideal),
        ns(math.bounds.1).min(compute).max(ideal),
    );
    if low == high {
        return Vec::new();
    }
    vec![
        LeafInterval {
            leaf: Leaf::Ideal,
            low_ns: low,
            high_ns: high,
        },
        LeafInterval {
            leaf: Leaf::ComputeKernel,
            low_ns: leaves[residual].saturating_sub(high - ideal),
            high_ns: leaves[residual].saturating_add(ideal - low),
        },
    ]
}

/// Kernels' time by class, most first.
pub(super) fn by_class<'a>(records: impl IntoIterator<Item = &'a Record>) -> Vec<crate::job::KernelTime> {
    let mut classes: std::collections::BTreeMap<KernelClass, (u64, u64)> = std::collections::BTreeMap::new();
    for record in records {
        if let Work::Kernel(class) = record.work {
            let (time_ns, count) = classes.entry(class).or_default();
            *time_ns = time_ns.saturating_add(record.window.len_ns());
            *count += 1;
        }
    }
    let mut times: Vec<_> = classes
        .into_iter()
        .map(|(class, (time_ns, count))| crate::job::KernelTime {
            class: class.name(),
            time_ns,
            count,
        })
        .collect();
    times.sort_by_key(|time| (core::cmp::Reverse(time.time_ns), time.class));
    times
}
