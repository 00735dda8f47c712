//! What every rendering shows, computed once from the document, so that text and page cannot disagree.

mod efficiency;
mod links;

use stallscope_attribution::activity::UNNAMED_NODE;
use stallscope_attribution::leaf::{Class, Leaf};

use crate::document::{Blame, Gpu, Job, MfuSource, Rollup, Verdict, Where};
use crate::format;
use crate::share::{apportion, tenths_of_percent};
use crate::words;

pub(crate) use efficiency::{hfu_percent, mfu_notes, mfu_percent, mfu_sentence, roof};
pub(crate) use links::{finding_costs, not_seen, path};

/// How many ranks a table for people shows; the JSON has them all.
const MOST_RANKS: usize = 32;
/// How many nodes a table for people shows.
const MOST_NODES: usize = 16;

/// One leaf of a budget, ready to print.
#[derive(Debug, Clone)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) words: String,
    pub(crate) class: Class,
    pub(crate) ns: i128,
    /// Tenths of a percent; over all lines they sum to 1000.
    pub(crate) tenths: i64,
    /// Bounds in tenths of a percent.
    pub(crate) bounds: Option<(i64, i64)>,
    pub(crate) measured: Measured,
}

/// On how many GPUs a leaf was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Measured {
    Everywhere,
    Partly,
    Nowhere,
}

/// The leaves of a budget in the order of reports, leaves of a newer producer after those known here.
pub(crate) fn lines(rollup: &Rollup) -> Vec<Line> {
    let known = Leaf::ALL
        .iter()
        .map(|leaf| (leaf.name(), words::leaf(*leaf), leaf.class()));
    let newer = rollup
        .budget
        .keys()
        .filter(|name| Leaf::from_name(name).is_none());
    let newer = newer.map(|name| (name.as_str(), "newer than this version", class_of(name)));
    let rows: Vec<(&str, &str, Class)> = known.chain(newer).collect();
    let ns: Vec<i128> = rows
        .iter()
        .map(|(name, ..)| rollup.budget.get(*name).copied().unwrap_or(0))
        .collect();
    let tenths = tenths_of_percent(&ns);
    let is_whole_compute = !rollup.is_measured(Leaf::Ideal);
    let mut lines = Vec::with_capacity(rows.len());
    for (((name, words, class), ns), tenths) in rows.into_iter().zip(ns).zip(tenths) {
        lines.push(Line {
            name: format::clean(name),
            words: if is_whole_compute && name == Leaf::ComputeKernel.name() {
                "compute, model share unknown".to_owned()
            } else {
                words.to_owned()
            },
            class,
            ns,
            tenths,
            bounds: rollup
                .intervals
                .get(name)
                .map(|bounds| bounds_tenths(*bounds, rollup.total_ns)),
            measured: measured(rollup, name),
        });
    }
    lines
}

fn class_of(name: &str) -> Class {
    match name.split('.').next() {
        Some("compute") => Class::Compute,
        Some("comm") => Class::Comm,
        Some("memory") => Class::Memory,
        _ => Class::Idle,
    }
}

fn bounds_tenths([low, high]: [i128; 2], total_ns: i128) -> (i64, i64) {
    (share_tenths(low, total_ns), share_tenths(high, total_ns))
}

/// A share in tenths of a percent, rounded half up; for numbers that are not part of a printed sum.
pub(crate) fn share_tenths(ns: i128, total_ns: i128) -> i64 {
    if total_ns <= 0 {
        return 0;
    }
    i64::try_from((ns.saturating_mul(2_000).saturating_add(total_ns)).div_euclid(2 * total_ns)).unwrap_or(0)
}

fn measured(rollup: &Rollup, name: &str) -> Measured {
    if rollup.unmeasured.iter().any(|leaf| leaf == name) {
        Measured::Nowhere
    } else if rollup.partly_measured.iter().any(|leaf| leaf == name) {
        Measured::Partly
    } else {
        Measured::Everywhere
    }
}

/// What a stacked bar distinguishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Band {
    Ideal,
    Compute,
    Comm,
    Waiting,
    Memory,
    Idle,
}

impl Band {
    pub(crate) const ALL: [Self; 6] = [
        Self::Ideal,
        Self::Compute,
        Self::Comm,
        Self::Waiting,
        Self::Memory,
        Self::Idle,
    ];

    pub(crate) fn of(leaf: &str, class: Class) -> Self {
        match class {
            Class::Compute if leaf == Leaf::Ideal.name() => Self::Ideal,
            Class::Compute => Self::Compute,
            Class::Comm if leaf == Leaf::CommSkew.name() => Self::Waiting,
            Class::Comm => Self::Comm,
            Class::Memory => Self::Memory,
            Class::Idle => Self::Idle,
        }
    }

    /// What it is called in a legend; `ideal_known` tells whether the model's own share could be split off.
    pub(crate) const fn words(self, ideal_known: bool) -> &'static str {
        match self {
            Self::Ideal => "model math",
            Self::Compute if ideal_known => "other compute",
            Self::Compute => "compute",
            Self::Comm => "exposed comm",
            Self::Waiting => "waiting",
            Self::Memory => "exposed copies",
            Self::Idle => "idle",
        }
    }
}

/// Tenths of a percent per band; they sum to 1000.
pub(crate) fn bands(rollup: &Rollup) -> [i64; Band::ALL.len()] {
    let mut sums = [0; Band::ALL.len()];
    for line in lines(rollup) {
        sums[Band::of(&line.name, line.class) as usize] += line.tenths;
    }
    sums
}

/// Whether the model's own math is told apart from other compute.
pub(crate) fn ideal_known(rollup: &Rollup) -> bool {
    rollup.total_ns > 0 && rollup.is_measured(Leaf::Ideal)
}

/// What of every 100 GPU-hours is lost, and how it is counted.
pub(crate) struct Lost {
    pub(crate) tenths: i64,
    /// Bounds in tenths of a percent, where leaves carry intervals.
    pub(crate) bounds: Option<(i64, i64)>,
    /// Whether everything but model math counts, else only time without compute.
    pub(crate) against_model_math: bool,
}

/// The headline loss. Without model FLOPs only time in which no compute ran can be called lost.
pub(crate) fn lost(job: &Job) -> Lost {
    // FLOPs of operators with shapes leave out all other work of the model: they measure, they do not accuse.
    let known = job.mfu_points.is_some() && job.mfu_source != MfuSource::OperatorShapes;
    let against_model_math = ideal_known(&job.total) && known;
    let counted = |line: &Line| match line.class {
        Class::Compute => against_model_math && line.name != Leaf::Ideal.name(),
        Class::Comm | Class::Memory | Class::Idle => true,
    };
    let lost: Vec<Line> = lines(&job.total).into_iter().filter(counted).collect();
    let tenths = lost.iter().map(|line| line.tenths).sum();
    let bounds = if against_model_math {
        let ideal = job.total.intervals.get(Leaf::Ideal.name());
        ideal
            .map(|bounds| bounds_tenths(*bounds, job.total.total_ns))
            .map(|(low, high)| (1000 - high, 1000 - low))
    } else if lost.iter().any(|line| line.bounds.is_some()) {
        let sum =
            |pick: fn((i64, i64)) -> i64| lost.iter().map(|l| l.bounds.map_or(l.tenths, pick)).sum::<i64>();
        Some((
            sum(|bounds| bounds.0).max(0).min(tenths),
            sum(|bounds| bounds.1).min(1000).max(tenths),
        ))
    } else {
        None
    };
    Lost {
        tenths,
        // Bounds that print the same number say nothing.
        bounds: bounds.filter(|(low, high)| low < high),
        against_model_math,
    }
}

/// The sentence that heads a report: what is lost and to what.
pub(crate) fn headline(job: &Job) -> String {
    if job.total.total_ns <= 0 {
        return "No GPU time was analysed.".to_owned();
    }
    let lost = lost(job);
    let mut text = format!("Of every 100 GPU-hours, {}", format::tenths(lost.tenths));
    if let Some((low, high)) = lost.bounds {
        text += &format!(" (between {} and {})", format::tenths(low), format::tenths(high));
    }
    text += if lost.against_model_math {
        " do no model math"
    } else {
        " pass without compute"
    };
    let Some(top) = job.verdicts.first() else {
        return text + "; no verdict was reached.";
    };
    let cost = format::ppm_percent(top.share.ppm);
    text + &match top.cause.as_str() {
        "none" => "; nothing worth naming is lost.".to_owned(),
        "unknown" => format!("; for {cost} of them the evidence does not say why."),
        cause => format!(
            "; the top cause, {} on {}, costs {cost}.",
            format::clean(cause),
            short_place(&top.place)
        ),
    }
}

/// A place in words, most specific part last; the whole job when no part is set.
pub(crate) fn place(place: &Where) -> String {
    let mut parts = Vec::new();
    parts.extend(place.node.as_deref().and_then(node));
    match (place.gpu, &place.pci) {
        (Some(gpu), Some(pci)) if !pci.is_empty() => {
            parts.push(format!("GPU {gpu} ({})", format::clean(pci)))
        }
        (Some(gpu), _) => parts.push(format!("GPU {gpu}")),
        (None, Some(pci)) if !pci.is_empty() => parts.push(format!("PCI {}", format::clean(pci))),
        (None, _) => {}
    }
    parts.extend(place.rank.map(|rank| format!("rank {rank}")));
    parts.extend(
        place
            .nic_port
            .as_ref()
            .map(|port| format!("port {}", format::clean(port))),
    );
    parts.extend(
        place
            .link
            .as_ref()
            .map(|link| format!("link {}", format::clean(link))),
    );
    parts.extend(place.process.map(|pid| format!("process {pid}")));
    if parts.is_empty() {
        "the whole job".to_owned()
    } else {
        parts.join(", ")
    }
}

/// A node's name; `None` where the record does not tell it.
fn node(name: &str) -> Option<String> {
    (name != UNNAMED_NODE).then(|| format::clean(name))
}

/// A GPU in a row of its own: its rank, and where it is.
pub(crate) fn gpu_name(gpu: &Gpu) -> String {
    let node = node(&gpu.node).map_or_else(String::new, |node| format!("{node} "));
    format!("rank {} · {node}GPU {}", gpu.rank, gpu.gpu)
}

/// A place for a headline: without the PCI address, which the verdict itself gives.
fn short_place(whole: &Where) -> String {
    place(&Where {
        pci: whole.pci.clone().filter(|_| whole.gpu.is_none()),
        ..whole.clone()
    })
}

/// What a verdict costs, in words.
pub(crate) fn cost(verdict: &Verdict) -> String {
    let share = format::ppm_percent(verdict.share.ppm);
    format!(
        "{share} of every 100 GPU-hours ({} of GPU time)",
        format::duration(verdict.cost_ns.into())
    )
}

/// What fixing a verdict's cause would return, in words; `None` when nothing.
pub(crate) fn returns(verdict: &Verdict) -> Option<String> {
    let recovers = &verdict.recovers;
    (recovers.gpu_ns > 0).then(|| {
        let mut text = format!(
            "{} of GPU time in this period",
            format::duration(recovers.gpu_ns.into())
        );
        if recovers.low_gpu_ns < recovers.high_gpu_ns {
            let bounds = [recovers.low_gpu_ns, recovers.high_gpu_ns].map(|ns| format::duration(ns.into()));
            text += &format!(", between {} and {}", bounds[0], bounds[1]);
        }
        if let Some(points) = recovered_points(verdict) {
            text += &format!(": {points}");
        }
        text
    })
}

/// MFU points that fixing a verdict's cause would return, in words.
pub(crate) fn recovered_points(verdict: &Verdict) -> Option<String> {
    verdict.recovers.mfu_points.map(|points| {
        let centi = (points.ppm + 50) / 100;
        format!("+{}.{:02} MFU points", centi / 100, centi % 100)
    })
}

/// Waiting given back to one culprit.
pub(crate) struct BlameLine {
    pub(crate) place: String,
    pub(crate) leaf: String,
    pub(crate) cause: String,
    pub(crate) ns: i128,
    /// Tenths of a percent of the job's GPU time; they sum to the printed share of `comm.skew`.
    pub(crate) tenths: i64,
}

/// All waiting that was moved, and how much of it was exposed, in words.
pub(crate) fn waiting(job: &Job) -> String {
    let exposed = job.total.leaf_ns(Leaf::CommSkew);
    let moved: i128 = job.blame.iter().map(|blame| i128::from(blame.cost_ns)).sum();
    let share = lines(&job.total)
        .iter()
        .find(|line| line.name == Leaf::CommSkew.name())
        .map_or(0, |line| line.tenths);
    let (time, share) = (format::duration(exposed), format::tenths(share));
    if moved > exposed {
        let all = format::duration(moved);
        format!("{all} of waiting, exposed of it {time} (comm.skew, {share} %)")
    } else {
        format!("comm.skew, {time} = {share} %, moved to who was late")
    }
}

/// The waiting by culprit, largest first; what is beyond `most` lines is summed in the last.
pub(crate) fn blame_lines(job: &Job, most: usize) -> Vec<BlameLine> {
    let mut blame: Vec<&Blame> = job.blame.iter().filter(|blame| blame.cost_ns > 0).collect();
    blame.sort_by_key(|blame| std::cmp::Reverse(blame.cost_ns));
    let costs: Vec<i128> = blame.iter().map(|blame| blame.cost_ns.into()).collect();
    let waiting = lines(&job.total)
        .iter()
        .find(|line| line.name == Leaf::CommSkew.name())
        .map_or(0, |l| l.tenths);
    let mut lines: Vec<BlameLine> = Vec::new();
    for (blame, tenths) in blame.iter().zip(apportion(&costs, waiting)) {
        if let Some(rest) = lines.get_mut(most.saturating_sub(1)) {
            *rest = BlameLine {
                place: "all others".to_owned(),
                leaf: String::new(),
                cause: "several".to_owned(),
                ns: rest.ns + i128::from(blame.cost_ns),
                tenths: rest.tenths + tenths,
            };
            continue;
        }
        lines.push(BlameLine {
            place: culprit(blame),
            leaf: format::clean(&blame.leaf),
            cause: format::clean(&blame.cause),
            ns: blame.cost_ns.into(),
            tenths,
        });
    }
    lines
}

fn culprit(blame: &Blame) -> String {
    let whole = Where {
        node: blame.node.clone(),
        gpu: blame.gpu,
        rank: blame.rank,
        ..Where::default()
    };
    if whole == Where::default() {
        "no single rank".to_owned()
    } else {
        place(&whole)
    }
}

/// The GPUs to show to people: all when they are few, else the named culprits and those that lose most, by rank.
pub(crate) fn shown_gpus(job: &Job) -> Vec<&Gpu> {
    if job.gpus.len() <= MOST_RANKS {
        return job.gpus.iter().collect();
    }
    let is_culprit = |gpu: &Gpu| {
        let named = |rank: Option<u32>| rank == Some(gpu.rank);
        job.verdicts.iter().any(|verdict| named(verdict.place.rank))
            || job.blame.iter().any(|blame| named(blame.rank))
    };
    let not_math =
        |gpu: &Gpu| i128::from(gpu.total_ns) - i128::from(gpu.budget.get("ideal").copied().unwrap_or(0));
    let mut gpus: Vec<&Gpu> = job.gpus.iter().collect();
    gpus.sort_by_key(|gpu| (!is_culprit(gpu), std::cmp::Reverse(not_math(gpu)), gpu.rank));
    gpus.truncate(MOST_RANKS);
    gpus.sort_by_key(|gpu| gpu.rank);
    gpus
}

/// The GPUs left out of tables for people, summed; `None` when none is.
pub(crate) fn hidden_gpus(job: &Job) -> Option<Rollup> {
    let shown: std::collections::BTreeSet<(u32, u32)> =
        shown_gpus(job).iter().map(|gpu| (gpu.rank, gpu.gpu)).collect();
    let hidden = job
        .gpus
        .iter()
        .filter(|gpu| !shown.contains(&(gpu.rank, gpu.gpu)));
    Some(Rollup::over(hidden)).filter(|rest| rest.gpus > 0)
}

/// The nodes to show to people, those that do least model math first when they are many, and the rest summed.
pub(crate) fn shown_nodes(job: &Job) -> (Vec<(&str, &Rollup)>, Option<Rollup>) {
    let mut nodes: Vec<(&str, &Rollup)> = job.nodes.iter().map(|(node, sum)| (node.as_str(), sum)).collect();
    if nodes.len() <= MOST_NODES {
        return (nodes, None);
    }
    nodes.sort_by_key(|(node, sum)| (std::cmp::Reverse(sum.total_ns - sum.leaf_ns(Leaf::Ideal)), *node));
    let kept: std::collections::BTreeSet<&str> =
        nodes.iter().take(MOST_NODES).map(|(node, _)| *node).collect();
    let rest = Rollup::over(job.gpus.iter().filter(|gpu| !kept.contains(gpu.node.as_str())));
    nodes.truncate(MOST_NODES);
    nodes.sort_unstable_by_key(|(node, _)| *node);
    (nodes, Some(rest))
}

/// What to bear in mind when reading this job's numbers.
pub(crate) fn notes(job: &Job) -> Vec<String> {
    let mut notes = vec![format!(
        "tier {}: {}",
        format::clean(&job.tier),
        words::tier(&job.tier)
    )];
    if let Some(gpu) = job.gpus.first() {
        let steps = &gpu.steps;
        let method = format::clean(words::method(&steps.method));
        let period = match steps.period_calls {
            0 => String::new(),
            calls => format!(", {} each", format::counted(calls.into(), "collective")),
        };
        let count = format::counted(steps.count, "step");
        let median = format::duration(steps.median_ns.into());
        notes.push(format!(
            "steps: {count} on rank {} by {method}{period}, median {median}",
            gpu.rank
        ));
    }
    notes.extend(mfu_notes(job));
    notes.extend(job.notes.iter().map(|note| format::clean(note)));
    match job.kind.as_str() {
        "decode" => {
            notes.push("decode is bound by memory bandwidth: judge it by HBM activity, not by MFU".to_owned())
        }
        "unknown" | "" => {
            let how = if job.tier == "A" {
                "--kind"
            } else {
                "STALLSCOPE_JOB_KIND"
            };
            notes.push(format!(
                "job kind not declared ({how}): low MFU may be its nature"
            ));
        }
        _ => {}
    }
    notes
}

/// A gap as one line.
pub(crate) fn gap(gap: &crate::document::Gap) -> String {
    let when = gap.period.map_or_else(String::new, |period| {
        let length = period.end_unix_ns.saturating_sub(period.start_unix_ns);
        format!(
            ", {} for {}",
            format::utc(period.start_unix_ns),
            format::duration(length.into())
        )
    });
    let count = if gap.count == 0 {
        String::new()
    } else {
        format!(" ({} missing)", gap.count)
    };
    let node = node(&gap.node).map_or_else(String::new, |node| format!("{node}: "));
    format!("{node}{}{count}{when}", format::clean(&gap.what))
}

/// What the report is about, in one line.
pub(crate) fn subject(job: &Job) -> String {
    let gpus = format::counted(job.gpus.len() as u64, "GPU");
    let nodes = format::counted(crate::document::by_node(&job.gpus).len() as u64, "node");
    let when = job.observed.map_or_else(String::new, |period| {
        let length = period.end_unix_ns.saturating_sub(period.start_unix_ns);
        format!(
            " · {} from {}",
            format::duration(length.into()),
            format::utc(period.start_unix_ns)
        )
    });
    // That it is not known is a note: it tells how to declare it.
    let kind = match job.kind.as_str() {
        "unknown" | "" => String::new(),
        kind => format!(" ({})", format::clean(kind)),
    };
    format!("{}{kind} · {gpus} on {nodes}{when}", format::clean(&job.job))
}
