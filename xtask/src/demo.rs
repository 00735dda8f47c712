//! `cargo xtask demo`: a job with a fault, and the report that names it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use stallscope_report::document::Document;
use stallscope_report::svg::waterfall_file;

use crate::judge;
use crate::lab::cluster::{Cluster, Watch};
use crate::lab::observe::{describe, observe, run_folder};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::{OutputFormat, build, setup};

/// Every fault the demo can inject.
pub const FAULTS: [&str; 12] = [
    "none",
    "loader-cpu",
    "storage",
    "launch",
    "cpu-quota",
    "slow-link",
    "lossy-link",
    "slow-peer",
    "pcie-width",
    "thermal",
    "co-tenant",
    "checkpoint",
];

/// Arguments of the demo.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to break
    #[arg(long, value_parser = FAULTS, default_value = "thermal")]
    pub fault: String,
    /// What goes to standard output
    #[arg(long, value_enum, default_value_t = OutputFormat::Text)]
    pub format: OutputFormat,
    /// Where the HTML report goes
    #[arg(long, default_value = "stallscope-report.html")]
    pub out: PathBuf,
    /// Also draw the waterfall of the job into this SVG file
    #[arg(long)]
    pub picture: Option<PathBuf>,
    /// Keep the run's files: logs, configurations, stores, truth
    #[arg(long)]
    pub keep: bool,
}

/// Sets up, builds, runs the job with its fault, and prints the report.
///
/// # Errors
/// Something could not be installed, built or run. A wrong verdict is no error: the report shows it.
pub fn run(paths: &Paths, args: &Args) -> Result<()> {
    setup::ensure(paths, setup::Scope::Run)?;
    setup::ensure_lab()?;
    let programs = build::programs(paths)?;
    let (dir, _deleted_at_the_end) = run_folder(args.keep)?;
    let mut progress = Progress::start();
    progress.event(&format!(
        "starting 2 nodes x 2 virtual GPUs with fault {}",
        args.fault
    ));
    let mut cluster = Cluster::start(paths, &programs, &scenario(paths, &args.fault), &dir, Watch::All)?;
    progress.event("nodes, agents and collector run");
    let run = observe(&mut cluster, &mut progress, |_, _| Ok(()))?;
    let text = cluster.report("text")?;
    write_html(&cluster, &args.out)?;
    drop(progress);
    drop(cluster);
    if let Some(file) = &args.picture {
        draw(&run.report, file)?;
    }

    let judged = judge::judge(&run.truth, &run.report);
    match args.format {
        OutputFormat::Json => {
            let mut document = run.report;
            document["demo"] =
                json!({"fault": args.fault, "truth": run.truth, "verdict_right": judged.top_cause_right});
            println!("{document}");
        }
        OutputFormat::Text => {
            println!("{text}");
            let verdict = judge::accusations(&run.report)
                .first()
                .map_or_else(|| "nothing".to_owned(), describe);
            let right = if judged.top_cause_right { "right" } else { "WRONG" };
            println!(
                "injected: {}   truth: {}   verdict: {verdict} ({right})",
                args.fault, run.truth.cause
            );
            println!("HTML report: {}", args.out.display());
        }
    }
    if args.keep {
        eprintln!("the run's files are in {}", dir.display());
    }
    Ok(())
}

/// The picture of the README.
fn draw(report: &Value, file: &Path) -> Result<()> {
    let document: Document = serde_json::from_value(report.clone()).context("the report is no document")?;
    let job = document.jobs.first().context("the report has no job")?;
    std::fs::write(file, waterfall_file(job)).with_context(|| format!("failed to write {}", file.display()))
}

/// The scenario file of a fault.
#[must_use]
pub fn scenario(paths: &Paths, fault: &str) -> PathBuf {
    paths.root.join("tests/scenarios").join(format!("{fault}.toml"))
}

fn write_html(cluster: &Cluster, out: &Path) -> Result<()> {
    std::fs::write(out, cluster.report("html")?).with_context(|| format!("failed to write {}", out.display()))
}
