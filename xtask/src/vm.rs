//! `cargo xtask vm`: what this host lacks, in machines that have it.
//!
//! Two virtual machines with Debian's stock kernel are connected by two cables and run the host's own files, which they see
//! read-only. There the programs meet a second kernel, RDMA runs over soft-`RoCE`, links lose packets and PCIe devices
//! report errors. The guests only do what they are told; every check is code of the host.

mod checks;
mod guest;
mod initramfs;
mod machine;
mod modules;
mod pair;
mod programs;
mod recording;

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::build::{self, Programs};
use crate::lab::interrupt;
use crate::paths::Paths;
use crate::setup;
use pair::Pair;

/// For how long new checks are begun: the whole takes 3 minutes on two idle cores, emulated.
const BEGIN_WITHIN: Duration = Duration::from_secs(15 * 60);

/// Arguments of the machines.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Only checks whose names hold one of these
    #[arg(value_name = "NAME")]
    only: Vec<String>,
}

/// One check and what came of it.
#[derive(Debug)]
pub struct Checked {
    /// Its name.
    pub name: &'static str,
    /// What was found, or what is wrong.
    pub result: Result<String, String>,
    /// How long it took, s.
    pub seconds: u64,
}

/// Boots, checks, prints each check and one verdict line.
///
/// # Errors
/// A check failed, or the machines could not be started.
pub fn run(paths: &Paths, args: &Args) -> Result<()> {
    setup::ensure(paths, setup::Scope::All)?;
    let programs = build::programs(paths)?;
    let started = Instant::now();
    let checked = check(paths, &programs, &args.only)?;
    for check in &checked {
        let (word, text) = match &check.result {
            Ok(text) => ("ok", text),
            Err(text) => ("FAILED", text),
        };
        println!("{:<24} {word:<6} {:>4} s  {text}", check.name, check.seconds);
    }
    let failed: Vec<&str> = checked
        .iter()
        .filter(|check| check.result.is_err())
        .map(|check| check.name)
        .collect();
    let seconds = started.elapsed().as_secs();
    if failed.is_empty() && !checked.is_empty() {
        println!("verdict: all {} checks passed in {seconds} s", checked.len());
        return Ok(());
    }
    println!(
        "verdict: {} of {} checks failed in {seconds} s: {}",
        failed.len(),
        checked.len(),
        failed.join(", ")
    );
    bail!(
        "{} of {} checks in the machines failed",
        failed.len(),
        checked.len()
    )
}

/// Boots the machines and makes every check whose name holds a word of `only`, or all.
///
/// # Errors
/// The machines could not be built or started: no check was made.
pub fn check(paths: &Paths, programs: &Programs, only: &[String]) -> Result<Vec<Checked>> {
    let started = Instant::now();
    let inside = programs::build(paths, programs)?;
    let (pair, boot) = Pair::boot(paths, inside)?;
    let mut checked = vec![Checked {
        name: "boot",
        result: Ok(boot),
        seconds: started.elapsed().as_secs(),
    }];
    for (name, check) in checks::ALL {
        if !only.is_empty() && !only.iter().any(|only| name.contains(only)) {
            continue;
        }
        interrupt::check()?;
        let begun = Instant::now();
        let result = if started.elapsed() < BEGIN_WITHIN {
            check(&pair).map_err(|error| format!("{error:#}"))
        } else {
            Err(format!("not begun: {BEGIN_WITHIN:?} were over"))
        };
        let seconds = begun.elapsed().as_secs();
        match &result {
            Ok(text) => eprintln!("vm: {name}: ok after {seconds} s: {text}"),
            Err(text) => eprintln!("vm: {name}: FAILED after {seconds} s: {text}"),
        }
        checked.push(Checked {
            name,
            result,
            seconds,
        });
    }
    Ok(checked)
}
