//! The table of the virtual nodes: what each scenario really was, and what the product said.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::judge;
use crate::lab::interrupt;
use crate::lab::observe::describe;
use crate::paths::Paths;
use crate::scenario::{self, Outcome};
use crate::{build, setup};

const INTRODUCTION: &str = "\
Real processes, kernel and network on virtual GPUs: `cargo xtask truth --live`, or `cargo xtask test` before \
`cargo xtask truth --outcomes`, runs each file of `tests/scenarios` with agents and a collector; what the first run showed \
counts, and nothing is run again because its answer was wrong. Onset to verdict is the time from the \
fault to the first live report with the right cause and place.
";

/// A scenario, and what came of it.
struct Row {
    name: String,
    /// Why it did not run, where it did not.
    outcome: Result<Outcome, String>,
}

/// Runs every file of `tests/scenarios`, one after another, and makes the table.
///
/// # Errors
/// The programs do not build, or someone interrupts. A scenario that does not run is a row of the table.
pub(super) fn run_all(paths: &Paths) -> Result<String> {
    setup::ensure(paths, setup::Scope::Run)?;
    setup::ensure_lab()?;
    let programs = build::programs(paths)?;
    let mut rows = Vec::new();
    for file in scenarios(&paths.root.join("tests/scenarios"))? {
        interrupt::check()?;
        let outcome = scenario::outcome(paths, &programs, &file, false).map_err(|error| format!("{error:#}"));
        interrupt::check()?;
        let row = Row {
            name: file
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned(),
            outcome,
        };
        eprint!("{}", line(&row));
        rows.push(row);
    }
    Ok(table(&rows))
}

/// Makes the table of what `cargo xtask scenario --format json` printed before.
///
/// # Errors
/// A file cannot be read, or is something else.
pub(super) fn of_files(files: &[PathBuf]) -> Result<String> {
    let read = |file: &PathBuf| -> Result<Row> {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("failed to read {}", file.display()))?;
        let outcome: Outcome = serde_json::from_str(&text)
            .with_context(|| format!("{} is not the outcome of a scenario", file.display()))?;
        Ok(Row {
            name: outcome.scenario.clone(),
            outcome: Ok(outcome),
        })
    };
    Ok(table(&files.iter().map(read).collect::<Result<Vec<_>>>()?))
}

fn scenarios(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = std::fs::read_dir(folder).with_context(|| format!("failed to list {}", folder.display()))?;
    let mut files: Vec<PathBuf> = listed.filter_map(|entry| Some(entry.ok()?.path())).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "toml"));
    files.sort();
    Ok(files)
}

fn table(rows: &[Row]) -> String {
    let mut text = format!(
        "{INTRODUCTION}\n{}\n\
         | Scenario | Truth | First verdict | Right | False culprits | MFU error | Leaf error | Onset to verdict |\n\
         |---|---|---|---|---|---|---|---|\n",
        summary(rows)
    );
    rows.iter().for_each(|row| text += &line(row));
    text
}

fn is_control(outcome: &Outcome) -> bool {
    outcome.truth.cause.as_deref().is_none_or(|cause| cause == "none")
}

/// What all runs say together.
fn summary(rows: &[Row]) -> String {
    let ran: Vec<&Outcome> = rows.iter().filter_map(|row| row.outcome.as_ref().ok()).collect();
    let (controls, faults): (Vec<&Outcome>, Vec<&Outcome>) =
        ran.iter().partition(|outcome| is_control(outcome));
    let right = faults
        .iter()
        .filter(|outcome| outcome.judgement.top_cause_right)
        .count();
    let falsely = |outcomes: &[&Outcome]| -> usize {
        outcomes
            .iter()
            .map(|outcome| outcome.judgement.false_culprits)
            .sum()
    };
    let mut text = format!(
        "{} of {} faults with the right cause at the right place first; {} false culprits beside them, {} in {} runs without a fault",
        right,
        faults.len(),
        falsely(&faults),
        falsely(&controls),
        controls.len()
    );
    let leaves: Vec<f64> = ran
        .iter()
        .filter_map(|outcome| outcome.judgement.leaf_error_points)
        .collect();
    if let (Some(mean), Some(worst)) = (mean(&leaves), leaves.iter().copied().reduce(f64::max)) {
        let _ = write!(
            text,
            "; leaf error {mean:.2} points in the mean, {worst:.2} at worst"
        );
    }
    let mut onsets: Vec<u64> = faults
        .iter()
        .filter_map(|outcome| outcome.agent.onset_to_verdict_ms)
        .collect();
    onsets.sort_unstable();
    if let (Some(median), Some(worst)) = (onsets.get(onsets.len() / 2), onsets.last()) {
        let _ = write!(
            text,
            "; from onset to verdict {median} ms in the median, {worst} ms at worst"
        );
    }
    let stopped = rows.len() - ran.len();
    if stopped > 0 {
        let _ = write!(text, "; {stopped} did not run");
    }
    text + ".\n"
}

#[expect(clippy::cast_precision_loss, reason = "a dozen runs")]
fn mean(of: &[f64]) -> Option<f64> {
    (!of.is_empty()).then(|| of.iter().sum::<f64>() / of.len() as f64)
}

fn line(row: &Row) -> String {
    let outcome = match &row.outcome {
        Ok(outcome) => outcome,
        Err(why) => {
            let why = why.replace('|', "/").replace('\n', " ");
            return format!("| {} | did not run: {why} | | | | | | |\n", row.name);
        }
    };
    let accused = |side: &scenario::Side| {
        describe(&judge::Accusation {
            cause: side.cause.clone().unwrap_or_else(|| "nothing".into()),
            place: side.place.clone(),
            confidence: String::new(),
        })
    };
    let judgement = &outcome.judgement;
    let points = |points: Option<f64>| points.map_or_else(|| "-".into(), |points| format!("{points:.2}"));
    let onset = match outcome.agent.onset_to_verdict_ms {
        // Of a run without a fault it is the time to the first report that accuses nobody.
        Some(ms) if !is_control(outcome) => format!("{ms} ms"),
        _ => "-".into(),
    };
    format!(
        "| {} | {} | {} | {} | {} | {} | {} | {onset} |\n",
        row.name,
        accused(&outcome.truth),
        accused(&outcome.agent.side),
        if judgement.top_cause_right { "yes" } else { "no" },
        judgement.false_culprits,
        points(judgement.mfu_error_points),
        points(judgement.leaf_error_points),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As `cargo xtask scenario --format json` prints it.
    fn outcome(name: &str, truth: &str, said: &str, right: bool, falsely: u32, ms: &str) -> Row {
        let text = format!(
            r#"{{"scenario":"{name}","truth":{{"cause":"{truth}","where":{{"node":"node1","gpu":0}},"leaves":{{"comm.net":5}}}},
            "agent":{{"cause":"{said}","where":{{"gpu":0,"link":null,"node":"node1","rank":null}},"leaves":{{"comm.net":4}},
            "onset_to_verdict_ms":{ms}}},"mfu_error_points":0.25,"leaf_error_points":{falsely}.5,"top_cause_right":{right},
            "false_culprits":{falsely},"overhead":{{"agent_cpu_share":0.01,"agent_rss_bytes":1,"bpf":{{}}}}}}"#
        );
        Row {
            name: name.to_owned(),
            outcome: serde_json::from_str(&text).map_err(|error| error.to_string()),
        }
    }

    #[test]
    fn the_table_says_what_was_right_wrong_and_not_run() {
        let rows = [
            outcome("thermal", "device.thermal", "device.thermal", true, 0, "4000"),
            outcome("storage", "data.storage", "data.loader", false, 1, "null"),
            outcome("launch", "host.launch", "host.launch", true, 0, "9000"),
            outcome("none", "none", "none", true, 0, "100"),
            Row {
                name: "graphs".to_owned(),
                outcome: Err("no | lab\nhere".to_owned()),
            },
        ];
        let text = table(&rows);
        for expected in [
            "2 of 3 faults with the right cause at the right place first; 1 false culprits beside them, 0 in 1 runs",
            "leaf error 0.75 points in the mean, 1.50 at worst; from onset to verdict 9000 ms in the median, 9000 ms at worst; 1 did not run.",
            "| thermal | device.thermal at node1, gpu 0 | device.thermal at node1, gpu 0 | yes | 0 | 0.25 | 0.50 | 4000 ms |\n",
            "| storage | data.storage at node1, gpu 0 | data.loader at node1, gpu 0 | no | 1 | 0.25 | 1.50 | - |\n",
            "| yes | 0 | 0.25 | 0.50 | - |\n| graphs | did not run: no / lab here | | | | | | |\n",
        ] {
            assert!(text.contains(expected), "{expected}\nis not in\n{text}");
        }
    }
}
