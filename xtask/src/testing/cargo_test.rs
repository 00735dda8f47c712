//! Cargo's tests, with their output read line by line.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use super::tally::Tally;
use crate::build::Programs;
use crate::paths::{self, Paths};
use crate::setup;

/// A test that cannot run prints a line with this prefix, its name and the reason, and passes.
const SKIPPED: &str = "skipped: ";

/// Runs the tests of all packages; those of the lab alone and one at a time, because they measure time.
pub(super) fn run(paths: &Paths, programs: &Programs, privileged: bool, tally: &mut Tally) -> Result<()> {
    run_one(
        command(
            paths,
            programs,
            privileged,
            &["--workspace", "--exclude", "stallscope-e2e"],
            &[],
        ),
        tally,
    )?;
    run_one(
        command(
            paths,
            programs,
            privileged,
            &["--package", "stallscope-e2e"],
            &["--test-threads", "1"],
        ),
        tally,
    )
}

fn command(
    paths: &Paths,
    programs: &Programs,
    privileged: bool,
    packages: &[&str],
    options: &[&str],
) -> Command {
    let mut command = Command::new(paths::cargo());
    command
        .current_dir(&paths.root)
        .args(["test", "--locked", "--no-fail-fast"])
        .args(packages)
        .args(["--", "--show-output"])
        .args(options)
        .env("STALLSCOPE_BPF_OBJECT", &programs.bpf_object)
        .env("STALLSCOPE_CACHE", &paths.cache)
        // A report that changed fails, and nothing is written into the tree.
        .env("INSTA_UPDATE", "no")
        .env("STALLSCOPE_REAL_NCCL", setup::nccl_library(paths))
        .env("STALLSCOPE_REAL_NCCLS", joined(&setup::nccl_libraries(paths)))
        .env("STALLSCOPE_PYTHON", setup::python(paths));
    if privileged {
        command.env("STALLSCOPE_PRIVILEGED", "1");
    } else {
        command.env_remove("STALLSCOPE_PRIVILEGED");
    }
    command
}

/// Paths as in `PATH`.
fn joined(paths: &[std::path::PathBuf]) -> std::ffi::OsString {
    std::env::join_paths(paths).unwrap_or_default()
}

fn run_one(mut command: Command, tally: &mut Tally) -> Result<()> {
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let mut reader = Reader::default();
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        println!("{line}");
        reader.line(&line, tally);
    }
    let status = child.wait()?;
    if !status.success() && !reader.saw_failure {
        // A crash or a build error leaves no line of its own.
        tally.fail(format!("cargo test ended with {status}"));
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Reader {
    saw_failure: bool,
}

impl Reader {
    fn line(&mut self, line: &str, tally: &mut Tally) {
        if let Some(rest) = line.strip_prefix("test ") {
            if let Some(name) = rest.strip_suffix(" ... FAILED") {
                self.saw_failure = true;
                tally.fail(name.to_owned());
            } else if let Some((name, why)) = rest.split_once(" ... ignored") {
                let why = why.trim_start_matches([',', ' ']);
                tally.skip(name, if why.is_empty() { "ignored" } else { why });
            } else if let Some(passed) = rest.strip_prefix("result: ").and_then(passed) {
                tally.add_passed(passed);
            }
        } else if let Some(rest) = line.strip_prefix(SKIPPED) {
            let (name, why) = rest.split_once(": ").unwrap_or((rest, "no reason given"));
            tally.skip(name, why);
        }
    }
}

/// The number before `passed` in `ok. 3 passed; 0 failed; ...`.
fn passed(result: &str) -> Option<u64> {
    let (before, _) = result.split_once(" passed")?;
    before.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_failures_and_reasons_are_counted() {
        let mut tally = Tally::default();
        let mut reader = Reader::default();
        let output = "test a ... ok\ntest b ... FAILED\ntest c ... ignored, needs a GPU\nskipped: d: not root\n\
                      test result: FAILED. 2 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out\n\
                      test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        for line in output.lines() {
            reader.line(line, &mut tally);
        }
        assert_eq!(tally.passed(), 5);
        assert_eq!(tally.failures(), ["b"]);
        let skipped: Vec<_> = tally
            .skipped()
            .iter()
            .map(|(name, why)| format!("{name}={why}"))
            .collect();
        assert_eq!(skipped, ["c=needs a GPU", "d=not root"]);
    }
}
