//! Verdicts beside the truth.

use std::collections::{BTreeMap, BTreeSet};

use stallscope_attribution::activity;
use stallscope_attribution::cause::{Cause, Place};
use stallscope_attribution::job::{JobAnalysis, Verdict, analyse};
use stallscope_attribution::leaf::Leaf;

use crate::job::play;
use crate::observe::{self, node_name};
use crate::traced;
use crate::truth::{self, Answer, Truth, Where};
use crate::variant::{GPUS, Variant};

/// How right the answer to one variant was.
#[derive(Debug, Clone)]
pub struct Score {
    /// The variant.
    pub variant: Variant,
    /// What had to be said; empty for controls.
    pub expected: Vec<Answer>,
    /// What was said: cause and place in words, the costliest first.
    pub said: Vec<(Cause, String)>,
    /// Whether every expected cause was named, at any place.
    pub cause_right: bool,
    /// Whether every expected cause was named at its place.
    pub place_right: bool,
    /// Verdicts that accuse what was not at fault.
    pub false_culprits: usize,
    /// Mean distance of the leaves, percent of GPU time: points of MFU.
    pub leaf_error_mean: f64,
    /// Largest distance of a leaf and its name.
    pub leaf_error_worst: (f64, &'static str),
    /// Distance of the first right verdict's cost from what the fault cost, percent of GPU time.
    pub cost_error: Option<f64>,
}

impl Score {
    /// Whether nothing was named.
    #[must_use]
    pub fn is_silent(&self) -> bool {
        self.said
            .iter()
            .all(|(cause, _)| matches!(cause, Cause::None | Cause::Unknown))
    }
}

/// Plays, observes and judges a variant.
#[must_use]
pub fn score(variant: &Variant) -> Score {
    let job = play(variant);
    let truth = truth::of(variant, &job);
    let analysis = analyse(&observe::facts(variant, &job));
    judge(variant, &truth, &analysis)
}

/// Plays, traces and judges a variant.
#[must_use]
pub fn score_traced(variant: &Variant) -> Score {
    let job = play(variant);
    let truth = traced::truth(variant, &job, truth::of(variant, &job));
    let analysis = activity::analyse(traced::traces(variant, &job));
    judge(variant, &truth, &analysis)
}

/// The analysis of a variant in words: verdicts with what was seen and what was ruled out, and the largest blame.
#[must_use]
pub fn explain(variant: &Variant) -> String {
    let job = play(variant);
    words(variant, &analyse(&observe::facts(variant, &job)))
}

/// The same of its traces.
#[must_use]
pub fn explain_traced(variant: &Variant) -> String {
    let job = play(variant);
    words(variant, &activity::analyse(traced::traces(variant, &job)))
}

fn words(variant: &Variant, analysis: &JobAnalysis) -> String {
    let mut lines = vec![variant.name()];
    for verdict in &analysis.verdicts {
        lines.push(format!(
            "{} at {}, {} ppm",
            verdict.cause.name(),
            describe(&verdict.place),
            verdict.share_ppm
        ));
        let seen = verdict.evidence.iter();
        lines
            .extend(seen.map(|seen| format!("  {}: {} (expected {})", seen.what, seen.value, seen.expected)));
        let ruled = verdict.ruled_out.iter();
        lines.extend(ruled.map(|ruled| format!("  not {}: {}", ruled.cause.name(), ruled.why)));
    }
    let blame = analysis.blame.iter().take(5);
    lines.extend(blame.map(|blame| {
        format!(
            "  blame {}: {} {} ms",
            describe(&blame.place),
            blame.leaf.name(),
            blame.cost_ns / 1_000_000
        )
    }));
    lines.join("\n")
}

fn judge(variant: &Variant, truth: &Truth, analysis: &JobAnalysis) -> Score {
    let verdicts = &analysis.verdicts;
    let named = |answer: &Answer| verdicts.iter().any(|verdict| verdict.cause == answer.cause);
    let placed = |answer: &Answer| verdicts.iter().find(|verdict| meets(verdict, answer));
    let fits = |verdict: &Verdict| {
        truth
            .expected
            .iter()
            .chain(&truth.allowed)
            .any(|answer| meets(verdict, answer))
    };
    let accuses = |verdict: &&Verdict| !matches!(verdict.cause, Cause::None | Cause::Unknown);
    let errors = leaf_errors(truth, analysis);
    let worst = errors
        .iter()
        .copied()
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap_or(("", 0.0));
    let count = f64::from(u32::try_from(errors.len().max(1)).unwrap_or(1));
    // What a job is costs nothing against itself.
    let single = truth
        .expected
        .first()
        .filter(|_| truth.expected.len() == 1 && truth.cost_ns > 0);
    Score {
        variant: variant.clone(),
        expected: truth.expected.clone(),
        said: verdicts
            .iter()
            .map(|verdict| (verdict.cause, describe(&verdict.place)))
            .collect(),
        cause_right: truth.expected.iter().all(named),
        place_right: truth.expected.iter().all(|answer| placed(answer).is_some()),
        false_culprits: verdicts
            .iter()
            .filter(accuses)
            .filter(|verdict| !fits(verdict))
            .count(),
        leaf_error_mean: errors.iter().map(|(_, error)| error).sum::<f64>() / count,
        leaf_error_worst: (worst.1, worst.0),
        cost_error: single
            .and_then(placed)
            .map(|verdict| percent(truth.cost_ns.abs_diff(verdict.cost_ns), truth.total_ns)),
    }
}

/// Whether a verdict names this cause and this place, and no finer one.
fn meets(verdict: &Verdict, answer: &Answer) -> bool {
    let place = &verdict.place;
    let bare = place.gpu.is_none() && place.rank.is_none();
    let node = |node: usize| place.node.as_deref() == Some(node_name(node).as_str());
    let number = |rank: usize| u32::try_from(rank).ok();
    verdict.cause == answer.cause
        && match answer.place {
            Where::Job => bare && place.node.is_none() && place.nic_port.is_none(),
            Where::Node(at) => bare && node(at),
            Where::Port(at) => bare && node(at) && place.nic_port.is_some(),
            Where::Rank(rank) => {
                node(rank / GPUS) && place.rank == number(rank) && place.gpu == number(rank % GPUS)
            }
            Where::Stage { node: stage } => {
                bare && place.nic_port.is_none() && (place.node.is_none() || stage.is_some_and(node))
            }
        }
}

fn describe(place: &Place) -> String {
    let parts = [
        place.node.clone(),
        place.nic_port.clone(),
        place.gpu.map(|gpu| format!("GPU {gpu}")),
        place.rank.map(|rank| format!("rank {rank}")),
    ];
    let text: Vec<String> = parts.into_iter().flatten().collect();
    if text.is_empty() {
        "job".into()
    } else {
        text.join(" ")
    }
}

/// By leaf that either side has: the distance of both sides in percent of GPU time. What the agent does not measure
/// counts in the residual of its class, on both sides.
fn leaf_errors(truth: &Truth, analysis: &JobAnalysis) -> Vec<(&'static str, f64)> {
    let unmeasured: BTreeSet<&'static str> = Leaf::ALL
        .iter()
        .filter(|leaf| **leaf != leaf.class().residual())
        .filter(|leaf| analysis.gpus.iter().any(|gpu| !gpu.total.is_measured(**leaf)))
        .map(|leaf| leaf.name())
        .collect();
    let mut seen: BTreeMap<&'static str, i64> = BTreeMap::new();
    for leaf in Leaf::ALL {
        let ns: i64 = analysis.gpus.iter().map(|gpu| gpu.total.leaf_ns(*leaf)).sum();
        *seen.entry(leaf.name()).or_default() += ns;
    }
    let total: u64 = analysis.gpus.iter().map(|gpu| gpu.total.window_ns()).sum();
    let (truth_leaves, seen) = (folded(&truth.leaves, &unmeasured), folded(&seen, &unmeasured));
    let names: BTreeSet<&'static str> = truth_leaves.keys().chain(seen.keys()).copied().collect();
    names
        .into_iter()
        .map(|name| {
            let share = |side: &BTreeMap<&'static str, i64>, total| {
                let ns = side.get(name).copied().unwrap_or(0);
                let sign = if ns < 0 { -1.0 } else { 1.0 };
                sign * percent(ns.unsigned_abs(), total)
            };
            (name, share(&truth_leaves, truth.total_ns), share(&seen, total))
        })
        .filter(|(_, truth, seen)| *truth != 0.0 || *seen != 0.0)
        .map(|(name, truth, seen)| (name, (truth - seen).abs()))
        .collect()
}

fn folded(
    leaves: &BTreeMap<&'static str, i64>,
    unmeasured: &BTreeSet<&'static str>,
) -> BTreeMap<&'static str, i64> {
    let mut sums = BTreeMap::new();
    for (name, ns) in leaves {
        let residual = || Leaf::from_name(name).map(|leaf| leaf.class().residual().name());
        let into = unmeasured.contains(name).then(residual).flatten().unwrap_or(name);
        *sums.entry(into).or_insert(0) += ns;
    }
    sums
}

#[expect(clippy::cast_precision_loss, reason = "a share for reading")]
fn percent(part_ns: u64, whole_ns: u64) -> f64 {
    part_ns as f64 * 100.0 / whole_ns.max(1) as f64
}
