//! The distance between two budgets.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use stallscope_attribution::leaf::Leaf;

/// The leaves of every GPU of a job, summed.
pub(super) fn summed(job: &Value) -> BTreeMap<String, i64> {
    let mut sum = BTreeMap::new();
    for gpu in gpus(job) {
        for (leaf, ns) in gpu["budget"].as_object().into_iter().flatten() {
            *sum.entry(leaf.clone()).or_insert(0) += ns.as_i64().unwrap_or_default();
        }
    }
    sum
}

/// Mean distance over leaves in percent of GPU time. A leaf that the agent does not measure counts in the residual of
/// its class, on both sides. `None` when either side holds no time.
pub(super) fn error_points(truth: &BTreeMap<String, i64>, job: &Value) -> Option<f64> {
    let unmeasured: BTreeSet<&str> = gpus(job)
        .iter()
        .flat_map(|gpu| {
            gpu["unmeasured"]
                .as_array()
                .map(Vec::as_slice)
                .unwrap_or_default()
        })
        .filter_map(Value::as_str)
        .collect();
    let truth = percent(&folded(truth, &unmeasured))?;
    let agent = percent(&folded(&summed(job), &unmeasured))?;
    let leaves: BTreeSet<&String> = truth.keys().chain(agent.keys()).collect();
    let of = |side: &BTreeMap<String, f64>, leaf: &String| side.get(leaf).copied().unwrap_or(0.0);
    let distance: f64 = leaves
        .iter()
        .map(|leaf| (of(&truth, leaf) - of(&agent, leaf)).abs())
        .sum();
    Some(distance / f64::from(u32::try_from(leaves.len()).ok()?))
}

fn gpus(job: &Value) -> &[Value] {
    job["gpus"].as_array().map(Vec::as_slice).unwrap_or_default()
}

fn folded(leaves: &BTreeMap<String, i64>, unmeasured: &BTreeSet<&str>) -> BTreeMap<String, i64> {
    let mut sum = BTreeMap::new();
    for (name, ns) in leaves {
        let residual = || Leaf::from_name(name).map(|leaf| leaf.class().residual().name().to_owned());
        let into = unmeasured.contains(name.as_str()).then(residual).flatten();
        *sum.entry(into.unwrap_or_else(|| name.clone())).or_insert(0) += ns;
    }
    sum
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a distance in percent needs no more than a double's 52 bits"
)]
fn percent(leaves: &BTreeMap<String, i64>) -> Option<BTreeMap<String, f64>> {
    let total: i64 = leaves.values().sum();
    let share = |ns: &i64| *ns as f64 * 100.0 / total as f64;
    (total > 0).then(|| {
        leaves
            .iter()
            .map(|(leaf, ns)| (leaf.clone(), share(ns)))
            .collect()
    })
}
