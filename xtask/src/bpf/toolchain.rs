//! Which compiler builds for `bpfel-unknown-none` here.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, bail};

use crate::paths;
use crate::shell;

/// The target of the programs.
pub const TARGET: &str = "bpfel-unknown-none";

/// A compiler with a core library for the target, or with the source to build one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Toolchain {
    /// A compiler whose distribution ships a built core for the target.
    PrebuiltCore {
        /// The compiler.
        rustc: PathBuf,
        /// What it says it is.
        version: String,
    },
    /// Rustup's nightly with the component rust-src: core is built with the programs.
    NightlySource {
        /// What it says it is.
        version: String,
    },
}

impl Toolchain {
    /// The first that works here.
    ///
    /// # Errors
    /// There is neither.
    pub fn find() -> Result<Self> {
        if let Some(found) = prebuilt(Path::new("/usr/bin/rustc")).or_else(nightly) {
            return Ok(found);
        }
        bail!(
            "no compiler for {TARGET}: install Debian's rustc-web with libstd-rust-web-dev-bpf, or \
             `rustup toolchain install nightly --component rust-src`"
        )
    }

    /// A cargo command with this compiler, ready for `build` and its arguments.
    #[must_use]
    pub fn build_command(&self) -> Command {
        match self {
            Self::PrebuiltCore { rustc, .. } => {
                let mut command = Command::new(paths::cargo());
                command
                    .arg("build")
                    .env("RUSTC", rustc)
                    .env("RUSTC_BOOTSTRAP", "1");
                command
            }
            Self::NightlySource { .. } => {
                let mut command = Command::new("rustup");
                command
                    .args(["run", "nightly", "cargo", "build", "-Zbuild-std=core"])
                    .env_remove("RUSTC")
                    .env_remove("RUSTUP_TOOLCHAIN");
                command
            }
        }
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PrebuiltCore { rustc, version } => {
                write!(
                    f,
                    "the distribution's package ({} {version}, prebuilt core)",
                    rustc.display()
                )
            }
            Self::NightlySource { version } => {
                write!(f, "rustup's nightly ({version}, core built from rust-src)")
            }
        }
    }
}

fn prebuilt(rustc: &Path) -> Option<Toolchain> {
    if !rustc.exists() {
        return None;
    }
    let sysroot = quiet_output(Command::new(rustc).args(["--print", "sysroot"]))?;
    let libraries = Path::new(&sysroot).join("lib/rustlib").join(TARGET).join("lib");
    let has_core = std::fs::read_dir(libraries).ok()?.flatten().any(|entry| {
        let name = entry.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    });
    let version = quiet_output(Command::new(rustc).arg("--version"))?;
    has_core.then(|| Toolchain::PrebuiltCore {
        rustc: rustc.to_owned(),
        version,
    })
}

fn nightly() -> Option<Toolchain> {
    let rustc =
        |argument: &str| quiet_output(Command::new("rustup").args(["run", "nightly", "rustc", argument]));
    let sysroot =
        quiet_output(Command::new("rustup").args(["run", "nightly", "rustc", "--print", "sysroot"]))?;
    let source = Path::new(&sysroot).join("lib/rustlib/src/rust/library/core");
    source
        .exists()
        .then(|| rustc("--version"))
        .flatten()
        .map(|version| Toolchain::NightlySource { version })
}

fn quiet_output(command: &mut Command) -> Option<String> {
    let output = command.stdin(std::process::Stdio::null()).output().ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// A shell-like check that the linker runs at all.
pub(super) fn linker_runs(linker: &Path) -> bool {
    shell::succeeds(Command::new(linker).arg("--version"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_without_core_is_not_taken() {
        assert_eq!(prebuilt(Path::new("/nonexistent/rustc")), None);
    }
}
