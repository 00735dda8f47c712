//! `cargo xtask scenario FILE`: truth beside verdict.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::build::Programs;
use crate::judge::{self, Judgement, Truth};
use crate::lab::cluster::{Cluster, Watch};
use crate::lab::observe::{Run, describe, observe, run_folder};
use crate::overhead::Overhead;
use crate::paths::Paths;
use crate::progress::Progress;
use crate::{OutputFormat, build, setup};

/// Arguments of a scenario.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The scenario file
    pub file: PathBuf,
    /// What goes to standard output
    #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
    pub format: OutputFormat,
    /// Keep the run's files: logs, configurations, stores, truth
    #[arg(long)]
    pub keep: bool,
}

/// What a scenario showed; the JSON is a contract.
#[derive(Debug, Serialize, Deserialize)]
pub struct Outcome {
    /// Name of the scenario.
    pub scenario: String,
    /// What really happened.
    pub truth: Side,
    /// What the product said.
    pub agent: AgentSide,
    /// How right that was.
    #[serde(flatten)]
    pub judgement: Judgement,
    /// What it cost; not read back.
    #[serde(skip_deserializing)]
    pub overhead: Option<Overhead>,
}

/// A cause, a place and a budget.
#[derive(Debug, Serialize, Deserialize)]
pub struct Side {
    /// Stable name of the cause.
    pub cause: Option<String>,
    /// Where it sits.
    #[serde(rename = "where")]
    pub place: Value,
    /// Leaves in ns of GPU time summed over all GPUs.
    pub leaves: BTreeMap<String, i64>,
}

/// The product's side, with how long it took.
#[derive(Debug, Serialize, Deserialize)]
pub struct AgentSide {
    /// Cause, place and budget.
    #[serde(flatten)]
    pub side: Side,
    /// From the fault to the first live report with the right cause and place, ms.
    pub onset_to_verdict_ms: Option<u64>,
}

/// Sets up, builds, runs the scenario and prints truth beside verdict.
///
/// # Errors
/// Something could not be installed, built or run. A wrong verdict is no error: the outcome shows it.
pub fn run(paths: &Paths, args: &Args) -> Result<()> {
    ensure!(args.file.is_file(), "{} is not a file", args.file.display());
    setup::ensure(paths, setup::Scope::Run)?;
    setup::ensure_lab()?;
    let programs = build::programs(paths)?;
    let outcome = outcome(paths, &programs, &args.file, args.keep)?;
    match args.format {
        OutputFormat::Json => println!("{}", serde_json::to_string(&outcome)?),
        OutputFormat::Text => print_text(&outcome),
    }
    Ok(())
}

/// Runs one scenario on programs that are built.
///
/// # Errors
/// Something did not run.
pub fn outcome(paths: &Paths, programs: &Programs, file: &Path, keep: bool) -> Result<Outcome> {
    let (dir, _deleted_at_the_end) = run_folder(keep)?;
    let mut progress = Progress::start();
    progress.event(&format!("scenario {}", file.display()));
    let run = {
        let mut cluster = Cluster::start(paths, programs, file, &dir, Watch::All)?;
        observe(&mut cluster, &mut progress, |_, _| Ok(()))
    };
    if keep {
        eprintln!("the run's files are in {}", dir.display());
    }
    summarise(file, run?)
}

fn summarise(file: &Path, run: Run) -> Result<Outcome> {
    let Run {
        truth,
        report,
        onset_to_verdict_ms,
        overhead,
        ..
    } = run;
    let judgement = judge::judge(&truth, &report);
    let top = judge::accusations(&report).into_iter().next();
    let Truth {
        scenario,
        cause,
        place,
        leaves,
        ..
    } = truth;
    let name = if scenario.is_empty() {
        file_stem(file)?
    } else {
        scenario
    };
    Ok(Outcome {
        scenario: name,
        truth: Side {
            cause: Some(cause),
            place: serde_json::to_value(place)?,
            leaves,
        },
        agent: AgentSide {
            side: Side {
                cause: top.as_ref().map(|top| top.cause.clone()),
                place: top.map_or(Value::Null, |top| top.place),
                leaves: judge::leaves(&report),
            },
            onset_to_verdict_ms,
        },
        judgement,
        overhead,
    })
}

fn file_stem(file: &Path) -> Result<String> {
    let stem = file.file_stem().context("a scenario file has a name")?;
    Ok(stem.to_string_lossy().into_owned())
}

fn print_text(outcome: &Outcome) {
    let accused = |side: &Side| {
        let cause = side.cause.clone().unwrap_or_else(|| "nothing".to_owned());
        describe(&judge::Accusation {
            cause,
            place: side.place.clone(),
            confidence: String::new(),
        })
    };
    println!("scenario  {}", outcome.scenario);
    println!("truth     {}", accused(&outcome.truth));
    println!("verdict   {}", accused(&outcome.agent.side));
    let points = |points: Option<f64>| {
        points.map_or_else(|| "not measured".to_owned(), |points| format!("{points:.2}"))
    };
    println!("right     {}", outcome.judgement.top_cause_right);
    println!("false culprits   {}", outcome.judgement.false_culprits);
    println!(
        "MFU error        {} points",
        points(outcome.judgement.mfu_error_points)
    );
    println!(
        "leaf error       {} points",
        points(outcome.judgement.leaf_error_points)
    );
    match outcome.agent.onset_to_verdict_ms {
        Some(ms) => println!("onset to verdict {ms} ms"),
        None => println!("onset to verdict none"),
    }
    print_leaves(outcome);
    if let Some(overhead) = &outcome.overhead {
        println!(
            "agent: {:.2} % of a core, {} KiB; programs: {:.0} hits/s, {:.2} % of a core",
            overhead.agent_cpu_share * 100.0,
            overhead.agent_rss_bytes / 1024,
            overhead.probe_hits_per_s,
            overhead.probe_cpu_share * 100.0
        );
    }
}

#[expect(clippy::cast_precision_loss, reason = "percent for reading")]
fn print_leaves(outcome: &Outcome) {
    let share = |side: &Side, leaf: &String| {
        let total: i64 = side.leaves.values().sum();
        side.leaves.get(leaf).copied().unwrap_or(0) as f64 * 100.0 / total.max(1) as f64
    };
    let (truth, agent) = (&outcome.truth, &outcome.agent.side);
    let mut names: Vec<&String> = truth.leaves.keys().chain(agent.leaves.keys()).collect();
    names.sort();
    names.dedup();
    println!("{:<20} {:>8} {:>8}   % of GPU time", "leaf", "truth", "verdict");
    for name in names {
        let (there, here) = (share(truth, name), share(agent, name));
        if there.abs() >= 0.05 || here.abs() >= 0.05 {
            println!("{name:<20} {there:>8.2} {here:>8.2}");
        }
    }
}
