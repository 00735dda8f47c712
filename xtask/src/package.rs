//! The .deb and the .rpm, and the proof that the .deb installs, runs and leaves nothing.

mod root;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::paths::{self, Paths};
use crate::{build, shell};

/// The most a package may weigh.
const MAX_BYTES: u64 = 8 << 20;

/// Every file a package must hold.
const FILES: &[&str] = &[
    "/usr/bin/stallscope",
    "/usr/lib/stallscope/stallscope.bpf.o",
    "/usr/lib/stallscope/libnccl-profiler-stallscope.so",
    "/usr/lib/systemd/system/stallscope.service",
    "/etc/stallscope/stallscope.toml",
];

/// The packages that were made.
#[derive(Debug, Clone)]
pub struct Packages {
    /// For Debian and its kin.
    pub deb: PathBuf,
    /// For Red Hat and its kin.
    pub rpm: PathBuf,
}

/// Builds both packages into `<target>/packages`.
///
/// # Errors
/// Something does not build, or a package is too big or lacks a file.
pub fn build(paths: &Paths) -> Result<Packages> {
    let programs = build::programs(paths)?;
    write_default_config(paths, &programs.stallscope)?;
    let folder = paths.target.join("packages");
    fs::create_dir_all(&folder)?;
    let packages = Packages {
        deb: deb(paths, &folder)?,
        rpm: rpm(paths, &folder)?,
    };
    check(&packages.deb, &deb_files(&packages.deb)?)?;
    check(&packages.rpm, &rpm_files(&packages.rpm)?)?;
    Ok(packages)
}

/// Installs the .deb into a fresh Debian root, runs it there, removes it and looks for leftovers.
///
/// # Errors
/// A step failed or something was left behind.
pub fn test(paths: &Paths, packages: &Packages) -> Result<()> {
    root::Root::unpack(paths)?.try_package(&packages.deb, FILES)
}

fn write_default_config(paths: &Paths, stallscope: &Path) -> Result<()> {
    let text = shell::output(Command::new(stallscope).args(["config", "default"]))?;
    let file = paths.built(build::PROFILE, "package/stallscope.toml");
    fs::create_dir_all(file.parent().context("a file has a folder")?)?;
    fs::write(&file, text).with_context(|| format!("failed to write {}", file.display()))
}

fn deb(paths: &Paths, folder: &Path) -> Result<PathBuf> {
    let output = folder.join("stallscope.deb");
    shell::run(
        Command::new(paths.tool("cargo-deb"))
            .current_dir(&paths.root)
            .args([
                "--no-build",
                "--no-strip",
                "--quiet",
                "--package",
                "stallscope",
                "--output",
            ])
            .arg(&output)
            .env("CARGO_TARGET_DIR", &paths.target)
            .env("CARGO", paths::cargo()),
    )?;
    Ok(output)
}

fn rpm(paths: &Paths, folder: &Path) -> Result<PathBuf> {
    let output = folder.join("stallscope.rpm");
    // The tool is a cargo subcommand and expects its own name first.
    shell::run(
        Command::new(paths.tool("cargo-generate-rpm"))
            .current_dir(&paths.root)
            .args([
                "generate-rpm",
                "--package",
                "agent",
                "--payload-compress",
                "xz",
                "--auto-req",
                "builtin",
                "--target-dir",
            ])
            .arg(&paths.target)
            .arg("--output")
            .arg(&output),
    )?;
    Ok(output)
}

fn check(package: &Path, files: &str) -> Result<()> {
    let bytes = fs::metadata(package)?.len();
    ensure!(
        bytes <= MAX_BYTES,
        "{} has {bytes} bytes, at most {MAX_BYTES} are allowed",
        package.display()
    );
    for file in FILES {
        ensure!(
            files.lines().any(|line| line == *file),
            "{} lacks {file}",
            package.display()
        );
    }
    if let Some(exposed) = files.lines().find(|line| exposes(line)) {
        bail!(
            "{} holds {exposed}: the loader would find it, and with it every job that uses NCCL",
            package.display()
        );
    }
    eprintln!("package: {} ({bytes} bytes)", package.display());
    Ok(())
}

/// Whether a file is a library where the loader looks, changes where it looks, or has the name under which NCCL loads a
/// plugin into every job.
fn exposes(file: &str) -> bool {
    let (folder, name) = file.rsplit_once('/').unwrap_or(("", file));
    let is_library = name.ends_with(".so") || name.contains(".so.");
    (is_library && folder != "/usr/lib/stallscope")
        || name == "libnccl-profiler.so"
        || folder.starts_with("/etc/ld.so")
        || name == "nccl.conf"
}

fn deb_files(package: &Path) -> Result<String> {
    let listing = shell::output(Command::new("dpkg-deb").arg("--contents").arg(package))?;
    let names = listing.lines().filter_map(|line| line.split_whitespace().nth(5));
    Ok(names
        .map(|name| format!("{}\n", name.trim_start_matches('.')))
        .collect())
}

fn rpm_files(package: &Path) -> Result<String> {
    shell::output(
        Command::new("rpm")
            .args(["--query", "--list", "--package"])
            .arg(package),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_load_the_plugin_unasked_is_seen() {
        for exposed in [
            "/usr/lib/libnccl-profiler-stallscope.so",
            "/usr/lib/x86_64-linux-gnu/libnccl-profiler-stallscope.so",
            "/usr/lib64/libother.so.1",
            "/usr/lib/stallscope/libnccl-profiler.so",
            "/etc/ld.so.conf.d/stallscope.conf",
            "/etc/nccl.conf",
        ] {
            assert!(exposes(exposed), "{exposed}");
        }
        assert!(FILES.iter().all(|file| !exposes(file)));
    }
}
