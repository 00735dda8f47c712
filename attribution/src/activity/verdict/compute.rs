//! What kernels themselves leave, once nothing keeps the GPU from them.

use super::{Case, Labelled, millis, percent, plain, price, sum};
use crate::activity::{Pipe, Work};
use crate::budget::arith::mul_div;
use crate::cause::{Cause, Confidence};
use crate::facts::PPM;
use crate::job::{Evidence, Verdict, WorkAccount};
use crate::leaf::Leaf;
use crate::peaks::{self, Precision};

/// Least share of GPU time that badly used tensor units cost before they are named, parts per million.
const LEAST_TENSOR_PPM: u64 = 100_000;
/// Matrix kernels below this share of their peak are badly used, percent; good ones reach 70 to 85.
const LOW_RATE_PERCENT: u64 = 35;
/// What good matrix kernels reach of the peak, percent.
const GOOD_RATE_PERCENT: u64 = 70;
/// Work without matrix math binds a job from this share of GPU time on, parts per million.
const MEMORY_BOUND_PPM: u64 = 400_000;
/// Plain FP32 units are worth a remark from this share of GPU time on, parts per million.
const REMARK_PPM: u64 = 200_000;

/// The kernels' own verdict, if they leave enough.
pub(super) fn kernels(case: &Case<'_>, total_ns: u64) -> Option<Verdict> {
    plain_kernels(case, total_ns)
        .or_else(|| slow_kernels(case, total_ns))
        .or_else(|| memory_bound(case, total_ns))
}

/// Matrix kernels on the plain units of a device whose tensor units take the same operands.
fn plain_kernels(case: &Case<'_>, total_ns: u64) -> Option<Verdict> {
    let saved = |gpu: &Labelled| {
        let row = peaks::find(0, &gpu.subject.device)?;
        let (plain, tensor) = (
            row.peak_flops_per_s(Precision::Fp32)?,
            row.peak_flops_per_s(Precision::Tf32)?,
        );
        (plain < tensor).then(|| mul_div(plain_ns(gpu), tensor - plain, tensor))
    };
    let cost_ns = sum(case, |gpu| saved(gpu).unwrap_or(0));
    if mul_div(cost_ns, PPM, total_ns) < LEAST_TENSOR_PPM {
        return None;
    }
    let mut verdict = plain(
        Cause::KernelLowTensor,
        "set torch.backends.cuda.matmul.allow_tf32 = True, or run under autocast(bfloat16), for ten steps: matrix kernels \
         must change their names and get shorter",
    );
    let time = sum(case, plain_ns);
    verdict.evidence.push(Evidence {
        what: "matrix kernels on the plain FP32 units".into(),
        value: format!("{} ({})", percent(mul_div(time, PPM, total_ns)), millis(time)),
        expected: "tensor units: they take FP32 operands as TF32".into(),
    });
    price(&mut verdict, cost_ns, total_ns);
    // Kernels that memory holds back gain less than their arithmetic would.
    verdict.recovers.low_gpu_ns = cost_ns / 3;
    Some(verdict)
}

/// Matrix kernels whose arithmetic is known and far below the peak.
fn slow_kernels(case: &Case<'_>, total_ns: u64) -> Option<Verdict> {
    let matmul_ns = sum(case, |gpu| time_of(gpu, |_| true));
    let peak_ns = case.gpus.iter().map(Labelled::hardware_ns).sum::<Option<u64>>()?;
    let rate = mul_div(peak_ns, 100, matmul_ns);
    let good_ns = mul_div(peak_ns, 100, GOOD_RATE_PERCENT);
    let cost_ns = matmul_ns.saturating_sub(good_ns);
    if matmul_ns == 0 || rate >= LOW_RATE_PERCENT || mul_div(cost_ns, PPM, total_ns) < LEAST_TENSOR_PPM {
        return None;
    }
    let mut verdict = plain(
        Cause::KernelLowTensor,
        "run the largest matrix product of the model alone in a loop: a rate as low confirms that its shape or type is at \
         fault",
    );
    verdict.evidence.push(Evidence {
        what: format!(
            "arithmetic rate of matrix kernels, {} of GPU time",
            percent(mul_div(matmul_ns, PPM, total_ns))
        ),
        value: format!("{rate} % of the peak"),
        expected: format!("{GOOD_RATE_PERCENT} % and more"),
    });
    price(&mut verdict, cost_ns, total_ns);
    verdict.confidence = Confidence::Low;
    verdict.recovers.low_gpu_ns = cost_ns / 4;
    Some(verdict)
}

/// Kernels without matrix math move bytes: device memory binds them.
fn memory_bound(case: &Case<'_>, total_ns: u64) -> Option<Verdict> {
    let cost_ns = sum(case, |gpu| gpu.ns(Leaf::ComputeNonmatmul));
    if mul_div(cost_ns, PPM, total_ns) < MEMORY_BOUND_PPM {
        return None;
    }
    let mut verdict = plain(
        Cause::KernelMemoryBound,
        "compile the model (torch.compile) or fuse its normalisation, activation and optimiser for ten steps: time without \
         matrix math must fall",
    );
    let kernels = super::super::efficiency::by_class(case.gpus.iter().flat_map(|gpu| &gpu.records));
    let account = WorkAccount {
        kernels,
        ..WorkAccount::default()
    };
    let all: u64 = account.kernels.iter().map(|of| of.time_ns).sum();
    verdict.evidence.push(Evidence {
        what: "kernels without matrix math".into(),
        value: format!(
            "{} ({})",
            percent(mul_div(cost_ns, PPM, total_ns)),
            millis(cost_ns)
        ),
        expected: "below 40.0 %".into(),
    });
    let largest = account
        .kernels
        .iter()
        .filter(|of| of.class != "communication")
        .take(4);
    verdict.evidence.extend(largest.map(|of| Evidence {
        what: format!("{} kernels, {} of them", of.class, of.count),
        value: format!("{} of kernel time", percent(mul_div(of.time_ns, PPM, all))),
        expected: "matrix math first".into(),
    }));
    price(&mut verdict, cost_ns, total_ns);
    // Their bytes must be moved once, whatever is fused.
    verdict.recovers.gpu_ns = cost_ns / 2;
    verdict.recovers.low_gpu_ns = cost_ns / 10;
    Some(verdict)
}

/// What plain FP32 units do for a job that has nothing else to mend.
pub(super) fn plain_units(case: &Case<'_>) -> Option<Evidence> {
    let total_ns = sum(case, |gpu| gpu.total.window_ns());
    let share = mul_div(sum(case, plain_ns), PPM, total_ns);
    (share >= REMARK_PPM).then(|| Evidence {
        what: "matrix kernels on the plain FP32 units, of all GPU time".into(),
        value: percent(share),
        expected: "16-bit types run on tensor units, if the model bears them".into(),
    })
}

fn plain_ns(gpu: &Labelled) -> u64 {
    time_of(gpu, |pipe| pipe == Some(Pipe::Plain))
}

fn time_of(gpu: &Labelled, of: impl Fn(Option<Pipe>) -> bool) -> u64 {
    let matmul = |work: Work| matches!(work, Work::Kernel(class) if class.is_matmul());
    let kernels = gpu
        .records
        .iter()
        .filter(|record| matmul(record.work) && of(record.pipe));
    kernels.map(|record| record.window.len_ns()).sum()
}
