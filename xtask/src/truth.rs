//! `cargo xtask truth`: how right the verdicts are, as a table in `docs/truth.md`.

mod live;

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::paths::{self, Paths};
use crate::shell;

/// Arguments of the truth table.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How many seeds of noise and places each scenario is played with
    #[arg(long, default_value_t = 8)]
    pub seeds: u64,
    /// Also run every file of tests/scenarios on virtual nodes
    #[arg(long)]
    pub live: bool,
    /// Or take what `cargo xtask scenario --format json` wrote to these files, or `cargo xtask test` to target/scenarios
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with = "live")]
    pub outcomes: Vec<PathBuf>,
    /// Where the table goes
    #[arg(long, default_value = "docs/truth.md")]
    pub out: PathBuf,
}

const INTRODUCTION: &str = "\
# How right the verdicts are

Written by `cargo xtask truth`. Generated jobs of 4 nodes with 8 GPUs each, with a step of one second of which 450 ms are \
the model's arithmetic, are hit by one of twelve faults, or by two, or by something that is no fault (the controls); at \
the dose of the scenario's definition (loud), the same in a job whose compute varies three times as much (noisy), a \
third (quiet) and a tenth of it (masked); from the first step and \
beginning mid-run; with noise and places drawn from seeds. The analysis sees them as an agent would: device averages \
over 100 ms that are late and know no step edges, clocks that disagree between nodes, lost steps and lost records. The \
truth is what was put in, by code that shares nothing with the attribution but the names of leaves and causes.

*Right* means the true cause at the true place; of controls, that nobody was accused. A *false culprit* is a verdict, of \
any confidence, that names another cause or place. *Leaf error* is the distance between true and reported leaf in percent \
of GPU time (points of MFU): its mean over the leaves of a job and the worst leaf, leaves that the tier does not measure \
counted in the residual of their class. *Cost error* is that of the first verdict's cost. At the masked dose nothing \
needs to be said; it must not be wrong.

Scenarios 9 and 14 rest on what the driver tells of links between GPUs and of faults. The agent reads it; that it does is \
proven against stand-ins of the driver's library only, not on live jobs. Scenario 2 is acted out live too. \
Several communicators per rank and more than one job shape are not in the \
matrix; blame through tensor, pipeline, data and expert parallelism has its own generated jobs among the tests of the \
attribution.
";
const GENERATED: &str = "## Generated jobs";
const LIVE: &str = "## Virtual nodes";

/// Plays the matrix, prints the table and writes it down.
///
/// # Errors
/// The matrix does not build, a scenario does not run, or the file cannot be written. A wrong verdict is no error: the
/// table shows it, and the matrix's own test holds the bars.
pub fn run(paths: &Paths, args: &Args) -> Result<()> {
    let generated = shell::output(Command::new(paths::cargo()).current_dir(&paths.root).args([
        "run",
        "--locked",
        "--quiet",
        "--release",
        "--package",
        "stallscope-fault-matrix",
        "--",
        &args.seeds.to_string(),
    ]))?;
    let out = paths.root.join(&args.out);
    let live = match args.outcomes.as_slice() {
        _ if args.live => live::run_all(paths)?,
        [] => recorded(&out),
        files => live::of_files(files)?,
    };
    let text = format!(
        "{INTRODUCTION}\n{GENERATED}\n\n{}\n\n{LIVE}\n\n{}\n",
        generated.trim(),
        live.trim()
    );
    std::fs::write(&out, &text).with_context(|| format!("failed to write {}", out.display()))?;
    print!("{text}");
    Ok(())
}

/// The live part of an earlier table: it stays until it is measured again.
fn recorded(out: &Path) -> String {
    let text = std::fs::read_to_string(out).unwrap_or_default();
    text.split_once(LIVE).map_or_else(
        || "Not run yet: `cargo xtask truth --live`.".into(),
        |(_, live)| live.into(),
    )
}
