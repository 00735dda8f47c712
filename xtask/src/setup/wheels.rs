//! Python wheels that carry the real libraries the tests attach to.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Scope;
use crate::paths::Paths;
use crate::shell;

/// A wheel at a pinned version, and the library inside that is wanted.
#[derive(Debug)]
pub(super) struct Wheel {
    name: &'static str,
    version: &'static str,
    library: &'static str,
}

/// One NCCL before its profiler's hooks, the one that the stand-in is modelled on, and a recent one.
const WHEELS: &[Wheel] = &[nccl("2.21.5"), NCCL, nccl("2.32.3")];

const NCCL: Wheel = nccl("2.27.5");

const fn nccl(version: &'static str) -> Wheel {
    Wheel {
        name: "nvidia-nccl-cu12",
        version,
        library: "nvidia/nccl/lib/libnccl.so.2",
    }
}

/// Takes one file out of an archive: the rest of a wheel is of no use here.
const EXTRACT: &str = "import sys, zipfile; zipfile.ZipFile(sys.argv[1]).extract(sys.argv[2], sys.argv[3])";

impl Wheel {
    fn folder(&self, paths: &Paths) -> PathBuf {
        paths.wheels().join(format!("{}-{}", self.name, self.version))
    }

    fn library(&self, paths: &Paths) -> PathBuf {
        self.folder(paths).join(self.library)
    }

    /// Name and version as they begin the wheel's file name.
    fn file_prefix(&self) -> String {
        format!("{}-{}-", self.name.replace('-', "_"), self.version)
    }

    fn download_command(&self, paths: &Paths) -> Command {
        let mut command = Command::new("python3");
        command
            .args([
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "--dest",
            ])
            .arg(paths.wheels())
            .arg(format!("{}=={}", self.name, self.version));
        command
    }

    /// The download as a person would type it.
    pub(super) fn command_line(&self, paths: &Paths) -> String {
        format!(
            "{} && python3 -c '{EXTRACT}' {}/{}*.whl {} {}",
            shell::line(&self.download_command(paths)),
            paths.wheels().display(),
            self.file_prefix(),
            self.library,
            self.folder(paths).display()
        )
    }

    /// Downloads it and unpacks its library, which appears under its final name only when it is whole; then the wheel goes.
    pub(super) fn fetch(&self, paths: &Paths) -> Result<()> {
        fs::create_dir_all(paths.wheels())?;
        if self.file(paths)?.is_none() {
            eprintln!("setup: downloading {} {}", self.name, self.version);
            shell::run(&mut self.download_command(paths))?;
        }
        let Some(file) = self.file(paths)? else {
            bail!(
                "pip left no {}*.whl in {}",
                self.file_prefix(),
                paths.wheels().display()
            );
        };
        let unpacked = tempfile::tempdir_in(paths.wheels())?;
        shell::run(
            Command::new("python3")
                .args(["-c", EXTRACT])
                .arg(&file)
                .arg(self.library)
                .arg(unpacked.path()),
        )
        .with_context(|| format!("{} is damaged: delete it and run setup again", file.display()))?;
        let folder = self.folder(paths);
        if folder.exists() {
            fs::remove_dir_all(&folder)?;
        }
        fs::rename(unpacked.keep(), &folder)
            .with_context(|| format!("failed to create {}", folder.display()))?;
        fs::remove_file(&file).with_context(|| format!("failed to remove {}", file.display()))
    }

    fn file(&self, paths: &Paths) -> Result<Option<PathBuf>> {
        for entry in fs::read_dir(paths.wheels())? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(&self.file_prefix()) && name.ends_with(".whl") {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }
}

/// Wheels of the scope that are not unpacked.
pub(super) fn missing(paths: &Paths, scope: Scope) -> Vec<&'static Wheel> {
    match scope {
        Scope::Run => Vec::new(),
        Scope::All => WHEELS
            .iter()
            .filter(|wheel| !wheel.library(paths).exists())
            .collect(),
    }
}

/// The real `libnccl.so.2`, where setup unpacked it.
#[must_use]
pub fn nccl_library(paths: &Paths) -> PathBuf {
    NCCL.library(paths)
}

/// Every real `libnccl.so.2`, by version.
#[must_use]
pub fn nccl_libraries(paths: &Paths) -> Vec<PathBuf> {
    WHEELS.iter().map(|wheel| wheel.library(paths)).collect()
}
