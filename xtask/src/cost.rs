//! `cargo xtask cost`: what watching costs the job, with and without agents in turn.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde_json::json;

use crate::lab::cluster::{Cluster, Watch};
use crate::lab::observe::{observe, run_folder};
use crate::paths::Paths;
use crate::progress::Progress;
use crate::{build, demo, setup};

/// Arguments of the measurement.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The scenario to run; default: the one without a fault
    pub file: Option<PathBuf>,
    /// How many runs of each kind
    #[arg(long, default_value_t = 3)]
    pub runs: usize,
}

/// Runs the scenario without agents, with agents that leave NCCL's waits alone, and with all, in turn; prints the step times
/// and what each kind of watching costs as JSON.
///
/// # Errors
/// Something could not be built or run.
pub fn run(paths: &Paths, args: &Args) -> Result<()> {
    setup::ensure(paths, setup::Scope::Run)?;
    setup::ensure_lab()?;
    let programs = build::programs(paths)?;
    let file = args.file.clone().unwrap_or_else(|| demo::scenario(paths, "none"));
    let (mut without, mut but_waits, mut with) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.runs {
        for (watch, steps) in [
            (Watch::Nothing, &mut without),
            (Watch::AllButWaits, &mut but_waits),
            (Watch::All, &mut with),
        ] {
            let (dir, _deleted_at_the_end) = run_folder(false)?;
            let mut cluster = Cluster::start(paths, &programs, &file, &dir, watch)?;
            let run = observe(&mut cluster, &mut Progress::start(), |_, _| Ok(()))?;
            steps.push(run.mean_step_ns.context("the job told of no steps")?);
        }
    }
    let (base, partly, watched) = (median(&mut without), median(&mut but_waits), median(&mut with));
    println!(
        "{}",
        json!({"step_ns_without": without, "step_ns_but_waits": but_waits, "step_ns_with": with,
               "median_without": base, "median_but_waits": partly, "median_with": watched,
               "cost_percent": cost_percent(base, watched), "waits_cost_percent": cost_percent(partly, watched)})
    );
    Ok(())
}

/// How much longer a step takes, percent.
#[expect(clippy::cast_precision_loss, reason = "a percentage")]
fn cost_percent(before_ns: u64, after_ns: u64) -> f64 {
    (after_ns as f64 / before_ns as f64 - 1.0) * 100.0
}

fn median(values: &mut [u64]) -> u64 {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&mut [3, 1, 2]), 2);
        assert_eq!(median(&mut []), 0);
    }
}
