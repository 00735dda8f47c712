//! What must be found in real traces with known answers, and what must be refused by name.
//!
//! The sweeps are those of an independent integer sweep over the same files; the idle figures of the first four equal
//! HolisticTraceAnalysis 0.5.0 to the microsecond.

mod holistic;
mod hostile;
mod mutation;
mod oracle;
mod snapshots;
mod straggler;

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use stallscope::sources::kineto::{self, Trace};
use stallscope_attribution::activity;
use stallscope_attribution::job::JobAnalysis;

/// A file below `tests/data/traces`.
fn path(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/traces")).join(name)
}

/// The Python with the tools of others; `None`, with the reason said, where there is none.
fn python(test: &str) -> Option<PathBuf> {
    let Some(python) = std::env::var_os("STALLSCOPE_PYTHON").map(PathBuf::from) else {
        println!("skipped: {test}: STALLSCOPE_PYTHON names no Python; `cargo xtask test` sets it");
        return None;
    };
    if !python.exists() {
        println!(
            "skipped: {test}: {} is missing; `cargo xtask setup` makes it",
            python.display()
        );
        return None;
    }
    Some(python)
}

/// What a script of `tests/oracle` prints for these arguments; `None` where there is no Python, which `test` says.
fn oracle_says(
    test: &str,
    script: &str,
    arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
) -> Option<String> {
    let scripts = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/oracle");
    let output = Command::new(python(test)?)
        .arg(Path::new(scripts).join(script))
        .args(arguments)
        .output()
        .expect("Python");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    Some(String::from_utf8(output.stdout).expect("text"))
}

fn trace(name: &str) -> Trace {
    kineto::read_file(&path(name)).expect("trace")
}

fn explain(names: &[&str]) -> JobAnalysis {
    explain_as("job", names)
}

fn explain_as(job: &str, names: &[&str]) -> JobAnalysis {
    let traces = names
        .iter()
        .map(|name| ((*name).to_owned(), trace(name)))
        .collect();
    activity::analyse(kineto::job(job, traces).expect("job"))
}
