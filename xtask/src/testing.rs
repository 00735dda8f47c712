//! `cargo xtask test`: every test there is, and an honest account of what could not run.

mod cargo_test;
mod tally;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::build::Programs;
use crate::paths::Paths;
use crate::{build, demo, lab, package, scenario, setup, vm};
use tally::Tally;

/// Checks in the virtual machines that every run makes, one to two minutes beside the boot. `cargo xtask vm` makes two more: of
/// packets that get lost, over which soft-`RoCE` may hang, and of ports' counters by themselves, which others read too.
const MACHINE_CHECKS: [&str; 10] = [
    "programs load",
    "doctor",
    "PCIe errors",
    "PCIe width",
    "devices recorded",
    "queue pairs",
    "NCCL transport",
    "late packets",
    "limited link",
    "recorders stop",
];
/// Faults that `--quick` runs: one without a fault, one of a device, one of a host.
const QUICK: [&str; 3] = ["none", "thermal", "loader-cpu"];

/// Arguments of the tests.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Args {
    /// Three scenarios instead of all
    #[arg(long)]
    pub quick: bool,
    /// Leave out what needs root, and do not call that a failure
    #[arg(long)]
    pub unprivileged: bool,
}

/// Runs everything and prints `N passed, N failed` last.
///
/// # Errors
/// A test failed, or could not run although it should.
pub fn run(paths: &Paths, args: Args) -> Result<()> {
    setup::ensure(paths, setup::Scope::All)?;
    let privileged = rustix::process::geteuid().is_root() && !args.unprivileged;
    if privileged {
        setup::ensure_lab()?;
    }
    let programs = build::programs(paths)?;
    let mut tally = Tally::default();
    cargo_test::run(paths, &programs, privileged, &mut tally)?;
    if privileged {
        scenarios(paths, &programs, args.quick, &mut tally)?;
        machines(paths, &programs, &mut tally)?;
        packages(paths, &mut tally);
    } else {
        tally.skip("scenarios", "network namespaces and BPF need root");
        tally.skip(
            "virtual machines",
            "they run the host's files, which root can read",
        );
        tally.skip("package installation", "chroot needs root");
    }
    finish(&tally, args.unprivileged)
}

fn scenarios(paths: &Paths, programs: &Programs, quick: bool, tally: &mut Tally) -> Result<()> {
    let faults: Vec<&str> = if quick {
        QUICK.to_vec()
    } else {
        demo::FAULTS.to_vec()
    };
    for fault in faults {
        lab::interrupt::check()?;
        let file: PathBuf = demo::scenario(paths, fault);
        let judged = |kept: Option<&Path>| {
            let outcome = scenario::outcome(paths, programs, &file, false).and_then(|outcome| {
                kept.map_or(Ok(()), |kept| keep(&outcome, kept))?;
                Ok(outcome)
            });
            let outcome = outcome.map_err(|error| format!("{error:#}"))?;
            verdict(&outcome)
        };
        let kept = paths.target.join("scenarios").join(format!("{fault}.json"));
        // The lab's time is real and the machine is shared: one run that a neighbour spoiled may be repeated, and
        // the first run's text stays in the record.
        let result = judged(Some(&kept)).or_else(|first| {
            lab::interrupt::check().map_err(|error| format!("{error:#}"))?;
            eprintln!("scenario {fault} went wrong ({first}); once more");
            judged(None)
                .map(|text| format!("{text}; at the second run, the first: {first}"))
                .map_err(|second| format!("twice: {first}; then: {second}"))
        });
        tally.record(&format!("scenario {fault}"), result);
    }
    Ok(())
}

/// Keeps what a scenario's first run showed, for the published table (`cargo xtask truth --outcomes`).
fn keep(outcome: &scenario::Outcome, file: &Path) -> Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("failed to make {}", folder.display()))?;
    }
    let text = serde_json::to_string(outcome)?;
    std::fs::write(file, text).with_context(|| format!("failed to write {}", file.display()))
}

/// A scenario passes with the right cause at the right place and nobody falsely accused.
fn verdict(outcome: &scenario::Outcome) -> Result<String, String> {
    let judgement = &outcome.judgement;
    let points =
        |points: Option<f64>| points.map_or_else(|| "unknown".to_owned(), |points| format!("{points:.2}"));
    let text = format!(
        "truth {}, verdict {} at {}; {} falsely accused, leaf error {} points, MFU error {} points, {} ms to the verdict",
        outcome.truth.cause.as_deref().unwrap_or("unknown"),
        outcome.agent.side.cause.as_deref().unwrap_or("nothing"),
        outcome.agent.side.place,
        judgement.false_culprits,
        points(judgement.leaf_error_points),
        points(judgement.mfu_error_points),
        outcome
            .agent
            .onset_to_verdict_ms
            .map_or_else(|| "no".to_owned(), |ms| ms.to_string()),
    );
    if judgement.top_cause_right && judgement.false_culprits == 0 {
        Ok(text)
    } else {
        Err(text)
    }
}

fn machines(paths: &Paths, programs: &Programs, tally: &mut Tally) -> Result<()> {
    if !cfg!(target_arch = "x86_64") {
        tally.skip("virtual machines", "their kernel is for x86-64");
        return Ok(());
    }
    lab::interrupt::check()?;
    let only = MACHINE_CHECKS.map(str::to_owned);
    match vm::check(paths, programs, &only) {
        Ok(checked) => {
            for check in checked {
                tally.record(&format!("vm {}", check.name), check.result);
            }
        }
        Err(error) => tally.record("vm", Err(format!("{error:#}"))),
    }
    lab::interrupt::check()
}

fn packages(paths: &Paths, tally: &mut Tally) {
    let result = package::build(paths).and_then(|packages| package::test(paths, &packages));
    tally.record(
        "packages",
        result
            .map(|()| String::new())
            .map_err(|error| format!("{error:#}")),
    );
}

fn finish(tally: &Tally, may_skip: bool) -> Result<()> {
    for failure in tally.failures() {
        println!("FAILED: {failure}");
    }
    for (name, why) in tally.skipped() {
        println!("could not run: {name}: {why}");
    }
    println!("{} passed, {} failed", tally.passed(), tally.failures().len());
    if !tally.failures().is_empty() {
        bail!("{} tests failed", tally.failures().len());
    }
    if !tally.skipped().is_empty() && !may_skip {
        bail!(
            "{} tests could not run, and on this machine they should",
            tally.skipped().len()
        );
    }
    Ok(())
}
