//! Truth beside verdict: what the virtual nodes really did against what the report says.

mod leaves;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Causes that accuse nobody.
const NOT_A_CULPRIT: [&str; 2] = ["none", "unknown"];

/// What really happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Truth {
    /// Name of the scenario.
    #[serde(default)]
    pub scenario: String,
    /// Stable name of the cause.
    pub cause: String,
    /// Where it sits.
    #[serde(rename = "where", default)]
    pub place: Place,
    /// Causes that were at work beside it, not enough to have to be named.
    #[serde(default)]
    pub also: Vec<String>,
    /// Leaves by name, in ns of GPU time summed over all GPUs.
    pub leaves: BTreeMap<String, i64>,
    /// Model FLOPs utilisation in percent.
    #[serde(default)]
    pub mfu_points: Option<f64>,
}

/// A place; parts that are not meant are absent.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Place {
    /// Node name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// GPU index on the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gpu: Option<u32>,
    /// Rank in the job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rank: Option<u32>,
}

/// A cause and its place, as accused.
#[derive(Debug, Clone, PartialEq)]
pub struct Accusation {
    /// Stable name of the cause.
    pub cause: String,
    /// Where it sits, as the report writes it.
    pub place: Value,
    /// `exact`, `high`, `medium` or `low`.
    pub confidence: String,
}

/// How right a report was.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Judgement {
    /// Distance between the two MFUs in points; `None` when either is unknown.
    pub mfu_error_points: Option<f64>,
    /// Mean distance over leaves, in percent of GPU time.
    pub leaf_error_points: Option<f64>,
    /// Whether the first verdict has the true cause and place.
    pub top_cause_right: bool,
    /// Verdicts of at least medium confidence that accuse what was not at fault.
    pub false_culprits: usize,
}

impl Truth {
    /// Reads the file that the virtual nodes wrote.
    ///
    /// # Errors
    /// It is unreadable or not a truth.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
        serde_json::from_str(&text).with_context(|| format!("{} is not a truth", path.display()))
    }

    /// Whether an accusation names the true cause, and the true place as far as the truth names one.
    #[must_use]
    pub fn is_met_by(&self, accusation: &Accusation) -> bool {
        accusation.cause == self.cause && self.place.is_met_by(&accusation.place)
    }

    /// Whether an accusation names what was at work without being the cause.
    fn allows(&self, accusation: &Accusation) -> bool {
        self.also.contains(&accusation.cause)
    }

    /// Whether what a report names first is right: the cause, or where there is none, what was at work nevertheless.
    fn accepts_first(&self, first: &Accusation) -> bool {
        let nobody = NOT_A_CULPRIT.contains(&self.cause.as_str());
        self.is_met_by(first) || nobody && self.allows(first)
    }
}

impl Place {
    /// Whether every part named here is the same there.
    #[must_use]
    pub fn is_met_by(&self, place: &Value) -> bool {
        self.node.as_ref().is_none_or(|node| place["node"] == *node)
            && self.gpu.is_none_or(|gpu| place["gpu"] == gpu)
            && self.rank.is_none_or(|rank| place["rank"] == rank)
    }
}

/// The job of a report: the collector answers an unnamed question with the job of most ranks, never a co-tenant's.
fn job(report: &Value) -> &Value {
    &report["jobs"][0]
}

/// The verdicts of the job, first the one that costs most.
#[must_use]
pub fn accusations(report: &Value) -> Vec<Accusation> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let verdicts = job(report)["verdicts"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    verdicts
        .iter()
        .map(|verdict| Accusation {
            cause: text(&verdict["cause"]),
            place: verdict["where"].clone(),
            confidence: text(&verdict["confidence"]),
        })
        .collect()
}

/// Compares a report with the truth.
#[must_use]
pub fn judge(truth: &Truth, report: &Value) -> Judgement {
    let accusations = accusations(report);
    let false_culprits = accusations
        .iter()
        .filter(|accusation| !NOT_A_CULPRIT.contains(&accusation.cause.as_str()))
        .filter(|accusation| {
            accusation.confidence != "low" && !truth.is_met_by(accusation) && !truth.allows(accusation)
        })
        .count();
    let mfu = |points: f64| truth.mfu_points.map(|truth| (truth - points).abs());
    Judgement {
        mfu_error_points: job(report)["mfu_points"].as_f64().and_then(mfu),
        leaf_error_points: leaves::error_points(&truth.leaves, job(report)),
        top_cause_right: accusations
            .first()
            .is_some_and(|first| truth.accepts_first(first)),
        false_culprits,
    }
}

/// The report's leaves, in ns of GPU time summed over all GPUs.
#[must_use]
pub fn leaves(report: &Value) -> BTreeMap<String, i64> {
    leaves::summed(job(report))
}
