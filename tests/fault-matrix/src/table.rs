//! Scores as a document.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use crate::score::Score;
use crate::variant::Dose;

/// The bars and whether they hold, the tables, and every mistake by name; Markdown.
#[must_use]
pub fn markdown(scores: &[Score]) -> String {
    let mut out = String::new();
    by_dose(&mut out, scores);
    by_scenario(&mut out, scores);
    for dose in Dose::ALL {
        confusion(&mut out, scores, dose);
    }
    mistakes(&mut out, scores);
    out
}

/// Shares over a set of scores.
#[derive(Debug, Clone, Copy, Default)]
pub struct Summary {
    /// Faults (not controls).
    pub faults: usize,
    /// Of them with every cause right.
    pub cause_right: usize,
    /// Of them with every cause and place right.
    pub place_right: usize,
    /// Faults about which nothing was said.
    pub silent: usize,
    /// False culprits in faults.
    pub false_in_faults: usize,
    /// False culprits in controls.
    pub false_in_controls: usize,
    /// Mean leaf error, points.
    pub leaf_mean: f64,
    /// Worst leaf error, points.
    pub leaf_worst: f64,
    /// Mean error of the cost, points.
    pub cost_mean: f64,
}

/// Sums scores up.
#[must_use]
pub fn summary<'a>(scores: impl IntoIterator<Item = &'a Score>) -> Summary {
    let mut sum = Summary::default();
    let (mut all, mut costed) = (0_u32, 0_u32);
    for score in scores {
        all += 1;
        let control = score.variant.is_control();
        if control {
            sum.false_in_controls += score.false_culprits;
        } else {
            sum.faults += 1;
            sum.cause_right += usize::from(score.cause_right);
            sum.place_right += usize::from(score.place_right);
            sum.silent += usize::from(score.is_silent());
            sum.false_in_faults += score.false_culprits;
        }
        sum.leaf_mean += score.leaf_error_mean;
        sum.leaf_worst = sum.leaf_worst.max(score.leaf_error_worst.0);
        if let Some(error) = score.cost_error {
            costed += 1;
            sum.cost_mean += error;
        }
    }
    sum.leaf_mean /= f64::from(all.max(1));
    sum.cost_mean /= f64::from(costed.max(1));
    sum
}

/// `part` of `whole` in percent; of nothing, nothing.
#[must_use]
pub fn rate(part: usize, whole: usize) -> String {
    if whole == 0 {
        return "-".into();
    }
    let tenths = part * 1000 / whole;
    format!("{}.{} %", tenths / 10, tenths % 10)
}

fn by_dose(out: &mut String, scores: &[Score]) {
    out.push_str(
        "| Dose | Jobs with faults | Right cause | Right cause and place | Nothing said | False culprits | \
         Controls | False culprits in controls | Leaf error mean | worst | Cost error mean |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    for dose in Dose::ALL {
        let of_dose: Vec<&Score> = scores.iter().filter(|score| score.variant.dose == dose).collect();
        let sum = summary(of_dose.iter().copied());
        let controls = of_dose.len() - sum.faults;
        let _ = writeln!(
            out,
            "| {} | {} | {} | {} | {} | {} | {controls} | {} | {:.2} | {:.2} | {:.2} |",
            dose.name(),
            sum.faults,
            rate(sum.cause_right, sum.faults),
            rate(sum.place_right, sum.faults),
            sum.silent,
            sum.false_in_faults,
            sum.false_in_controls,
            sum.leaf_mean,
            sum.leaf_worst,
            sum.cost_mean,
        );
    }
    out.push('\n');
}

fn by_scenario(out: &mut String, scores: &[Score]) {
    out.push_str("### By scenario\n\n| Scenario | Dose | Jobs | Right | Nothing said | False culprits | Leaf error mean | worst leaf | Cost error |\n|---|---|---|---|---|---|---|---|---|\n");
    let mut groups: BTreeMap<(String, Dose), Vec<&Score>> = BTreeMap::new();
    for score in scores {
        groups
            .entry((order(score.variant.scenario), score.variant.dose))
            .or_default()
            .push(score);
    }
    for ((_, dose), group) in groups {
        let sum = summary(group.iter().copied());
        let worst = group
            .iter()
            .map(|score| score.leaf_error_worst)
            .max_by(|a, b| a.0.total_cmp(&b.0))
            .unwrap_or((0.0, ""));
        let right = if group[0].variant.is_control() {
            rate(
                group.iter().filter(|score| score.false_culprits == 0).count(),
                group.len(),
            )
        } else {
            rate(sum.place_right, sum.faults)
        };
        let _ = writeln!(
            out,
            "| {} | {} | {} | {right} | {} | {} | {:.2} | {:.2} {} | {:.2} |",
            group[0].variant.scenario,
            dose.name(),
            group.len(),
            group.iter().filter(|score| score.is_silent()).count(),
            sum.false_in_faults + sum.false_in_controls,
            sum.leaf_mean,
            worst.0,
            worst.1,
            sum.cost_mean,
        );
    }
    out.push('\n');
}

/// A key that sorts "2" before "10", and controls after faults.
fn order(scenario: &str) -> String {
    let digits: String = scenario
        .trim_start_matches('A')
        .chars()
        .take_while(char::is_ascii_digit)
        .collect();
    format!("{:>4} {scenario}", if digits.is_empty() { "99" } else { &digits })
}

fn confusion(out: &mut String, scores: &[Score], dose: Dose) {
    let mut counts: BTreeMap<(String, String), usize> = BTreeMap::new();
    for score in scores.iter().filter(|score| score.variant.dose == dose) {
        let truth = match score.expected.as_slice() {
            [] => "none (control)".to_owned(),
            [one] => one.cause.name().to_owned(),
            _ => continue,
        };
        for (cause, _) in &score.said {
            *counts
                .entry((truth.clone(), cause.name().to_owned()))
                .or_default() += 1;
        }
    }
    let said: BTreeSet<&String> = counts.keys().map(|(_, said)| said).collect();
    let truths: BTreeSet<&String> = counts.keys().map(|(truth, _)| truth).collect();
    let _ = write!(
        out,
        "### Confusion of causes, {} dose, single faults\n\n| Truth \\ said |",
        dose.name()
    );
    for said in &said {
        let _ = write!(out, " {said} |");
    }
    let _ = write!(out, "\n|---|{}\n", "---|".repeat(said.len()));
    for truth in truths {
        let _ = write!(out, "| {truth} |");
        for said in &said {
            let count = counts
                .get(&(truth.clone(), (*said).clone()))
                .copied()
                .unwrap_or(0);
            let _ = write!(
                out,
                " {} |",
                if count == 0 {
                    String::new()
                } else {
                    count.to_string()
                }
            );
        }
        out.push('\n');
    }
    out.push('\n');
}

fn mistakes(out: &mut String, scores: &[Score]) {
    out.push_str("### Mistakes and silences\n\nEvery job whose answer was wrong, and every fault about which nothing was said.\n\n");
    let mut lines: BTreeMap<(String, Dose, String), (usize, String)> = BTreeMap::new();
    for score in scores {
        let fault = !score.variant.is_control();
        if (!fault || score.place_right) && score.false_culprits == 0 {
            continue;
        }
        let said: Vec<String> = score
            .said
            .iter()
            .map(|(cause, place)| format!("{} at {}", cause.name(), place))
            .collect();
        let kind = if score.false_culprits > 0 {
            "false culprit"
        } else if score.is_silent() {
            "nothing said"
        } else if score.cause_right {
            "wrong place"
        } else {
            "cause missing"
        };
        let key = (
            order(score.variant.scenario),
            score.variant.dose,
            format!("{kind}: {}", said.join("; ")),
        );
        let line = lines.entry(key).or_insert_with(|| (0, score.variant.name()));
        line.0 += 1;
    }
    if lines.is_empty() {
        out.push_str("None.\n");
    }
    for ((_, _, what), (count, example)) in lines {
        let _ = writeln!(
            out,
            "- {example}{}: {what}",
            if count > 1 {
                format!(" (and {} like it)", count - 1)
            } else {
                String::new()
            }
        );
    }
}
