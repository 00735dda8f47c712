//! MFU, what it is measured against, and which roof binds.

use stallscope_attribution::leaf::{Class, Leaf};

use super::{Band, Line, bands, bounds_tenths, ideal_known, lines};
use crate::document::{Job, MfuSource};
use crate::format;
use crate::share::Points;

/// MFU in tenths of a point: the ideal leaf where there is one, so that it agrees with the table below it.
fn mfu_tenths(job: &Job) -> Option<i64> {
    if ideal_known(&job.total) && job.mfu_points.is_some() {
        return Some(bands(&job.total)[Band::Ideal as usize]);
    }
    job.mfu_points.map(|points| (i64::from(points.ppm) + 500) / 1000)
}

/// MFU in a few words, with its interval and what it rests on, or what to do to know it.
pub(crate) fn mfu_sentence(job: &Job) -> String {
    let Some(value) = mfu_percent(job) else {
        return if job.tier == "A" {
            "MFU unknown: give the model's FLOPs per GPU and step (--model-flops) or its shape (--model-shape)".to_owned()
        } else {
            "MFU unknown: declare the model ([model] in the agent's configuration, or STALLSCOPE_MODEL_SHAPE)"
                .to_owned()
        };
    };
    let bounds = job.total.intervals.get(Leaf::Ideal.name());
    let bounds = bounds
        .map(|bounds| bounds_tenths(*bounds, job.total.total_ns))
        .filter(|(low, high)| low < high)
        .map_or_else(String::new, |(low, high)| {
            format!(", between {} and {}", format::tenths(low), format::tenths(high))
        });
    let source = match job.mfu_source {
        MfuSource::DeclaredFlops => "from declared model FLOPs",
        MfuSource::OperatorShapes => "from the shapes of operators",
        MfuSource::TensorActivity => "estimated from tensor activity",
        MfuSource::Unknown => "source not told",
    };
    let hfu = hfu_percent(job).map_or_else(String::new, |hfu| format!("; HFU, with repeated work, {hfu} %"));
    format!("MFU {value} %{bounds} ({source}){hfu}")
}

/// MFU in percent, in words.
pub(crate) fn mfu_percent(job: &Job) -> Option<String> {
    let mfu = mfu_tenths(job)?;
    Some(match job.mfu_points {
        Some(points) if mfu < 10 => percent(points),
        _ => format::tenths(mfu),
    })
}

/// HFU in percent, in words; `None` when it is not known or nothing is repeated, and so it is MFU.
pub(crate) fn hfu_percent(job: &Job) -> Option<String> {
    job.hfu_points
        .filter(|hfu| Some(*hfu) != job.mfu_points)
        .map(percent)
}

/// A few thousandths are not nothing: below one percent with two places.
fn percent(points: Points) -> String {
    if points.ppm < 10_000 {
        format!("0.{:02}", points.ppm / 100)
    } else {
        format::ppm_percent(points.ppm)
    }
}

/// Against which peak and by which convention MFU is counted; nothing without an MFU.
pub(crate) fn mfu_notes(job: &Job) -> Vec<String> {
    let convention = job
        .mfu_convention
        .as_ref()
        .map(|of| format!("MFU counts FLOPs {}", format::clean(of)));
    let peak = job.peak.as_ref().map(|of| format!("peak {}", format::clean(of)));
    let known = mfu_tenths(job).is_some();
    convention.into_iter().chain(peak).filter(|_| known).collect()
}

/// What most GPU time is bound by, and what comes next.
pub(crate) fn roof(job: &Job) -> Option<String> {
    let total = &job.total;
    let share = |of: &dyn Fn(&Line) -> bool| -> i64 {
        lines(total)
            .iter()
            .filter(|line| of(line))
            .map(|line| line.tenths)
            .sum()
    };
    let split = total.is_measured(Leaf::ComputeNonmatmul);
    let without_math = |line: &Line| line.name == Leaf::ComputeNonmatmul.name();
    let mut roofs = vec![
        (
            share(&|line| line.class == Class::Comm),
            "links and waiting for ranks",
        ),
        (share(&|line| line.class == Class::Memory), "the link to the host"),
        (share(&|line| line.class == Class::Idle), "the host"),
    ];
    let compute = share(&|line| line.class == Class::Compute);
    if split {
        let memory = share(&without_math);
        roofs.push((compute - memory, "matrix kernels"));
        roofs.push((memory, "device memory, by kernels without matrix math"));
    } else {
        roofs.push((compute, busiest(job)));
    }
    roofs.sort_by_key(|(tenths, _)| std::cmp::Reverse(*tenths));
    let [(most, first), (less, second), ..] = roofs[..] else {
        return None;
    };
    (most > 0).then(|| {
        format!(
            "What binds: {first}, {} % of GPU time; then {second}, {} %",
            format::tenths(most),
            format::tenths(less)
        )
    })
}

/// Which of its units compute holds most, as the devices tell.
fn busiest(job: &Job) -> &'static str {
    let mean = |of: fn(&crate::document::Activity) -> u32| {
        let known = || job.gpus.iter().filter_map(|gpu| gpu.activity.as_ref());
        let sum: u64 = known().map(|activity| u64::from(of(activity))).sum();
        sum.checked_div(known().count() as u64)
    };
    match mean(|of| of.hbm.ppm).zip(mean(|of| of.tensor.ppm)) {
        Some((hbm, tensor)) if hbm > tensor => "device memory (HBM is busier than the tensor units)",
        Some(_) => "matrix kernels (the tensor units are busier than HBM)",
        None => "compute",
    }
}
