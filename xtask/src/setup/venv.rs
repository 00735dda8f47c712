//! A Python environment with the tools of others that the tests compare with.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::Scope;
use crate::paths::Paths;
use crate::shell;

/// What is installed in it, dependencies included. HolisticTraceAnalysis asks for a whole JupyterLab that its analysis
/// never loads, and does not run with pandas 3.
const REQUIREMENTS: &[&str] = &[
    "HolisticTraceAnalysis==0.5.0",
    "narwhals==2.29.0",
    "networkx==3.6.1",
    "numpy==2.4.6",
    "packaging==26.3",
    "pandas==2.3.3",
    "plotly==7.1.0",
    "pyarrow==26.0.1",
    "psutil==7.2.2",
    "pydot==4.0.1",
    "pyparsing==3.3.3",
    "PyYAML==6.0.3",
    "python-dateutil==4.0.0",
    "pytz==2026.6",
    "six==1.17.0",
    "tzdata==2026.6",
];

/// The environment's interpreter.
#[must_use]
pub fn python(paths: &Paths) -> PathBuf {
    folder(paths).join("bin/python3")
}

fn folder(paths: &Paths) -> PathBuf {
    paths.cache.join("venv")
}

/// Written last: an environment without it, or with another text in it, was not finished.
fn receipt(paths: &Paths) -> PathBuf {
    folder(paths).join("installed.txt")
}

/// Whether the scope needs it and it is not there.
pub(super) fn is_missing(paths: &Paths, scope: Scope) -> bool {
    scope == Scope::All
        && !(python(paths).exists()
            && fs::read_to_string(receipt(paths)).is_ok_and(|text| text == REQUIREMENTS.join(" ")))
}

fn create_command(paths: &Paths) -> Command {
    let mut command = Command::new("python3");
    command.args(["-m", "venv", "--clear"]).arg(folder(paths));
    command
}

fn install_command(paths: &Paths) -> Command {
    let mut command = Command::new(python(paths));
    command
        .args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
        ])
        .args(REQUIREMENTS);
    command
}

/// The installation as a person would type it.
pub(super) fn command_line(paths: &Paths) -> String {
    format!(
        "{} && {} && printf %s '{}' > {}",
        shell::line(&create_command(paths)),
        shell::line(&install_command(paths)),
        REQUIREMENTS.join(" "),
        receipt(paths).display()
    )
}

/// Makes it anew.
pub(super) fn install(paths: &Paths) -> Result<()> {
    eprintln!("setup: installing {} for Python", REQUIREMENTS.join(" "));
    shell::run(&mut create_command(paths))?;
    shell::run(&mut install_command(paths))?;
    let receipt = receipt(paths);
    fs::write(&receipt, REQUIREMENTS.join(" "))
        .with_context(|| format!("failed to write {}", receipt.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unfinished_or_older_environment_is_missing() -> Result<()> {
        let cache = tempfile::tempdir()?;
        let paths = Paths {
            root: cache.path().into(),
            cache: cache.path().into(),
            target: cache.path().into(),
        };
        assert!(is_missing(&paths, Scope::All) && !is_missing(&paths, Scope::Run));
        fs::create_dir_all(folder(&paths).join("bin"))?;
        fs::write(python(&paths), "")?;
        assert!(is_missing(&paths, Scope::All), "no receipt");
        fs::write(receipt(&paths), "HolisticTraceAnalysis==0.4.0")?;
        assert!(is_missing(&paths, Scope::All), "another version");
        fs::write(receipt(&paths), REQUIREMENTS.join(" "))?;
        assert!(!is_missing(&paths, Scope::All));
        Ok(())
    }
}
