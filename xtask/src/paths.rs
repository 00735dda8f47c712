//! Where things lie: the checkout, the build folder, the cache outside the checkout.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::shell;

/// The folders every task works in.
#[derive(Debug, Clone)]
pub struct Paths {
    /// The checkout.
    pub root: PathBuf,
    /// Tools, wheels and tarballs that outlive the checkout.
    pub cache: PathBuf,
    /// Cargo's target folder.
    pub target: PathBuf,
}

impl Paths {
    /// Finds the folders of this checkout.
    ///
    /// # Errors
    /// No home folder for the cache, or `cargo metadata` failed.
    pub fn find() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("the xtask package lies at the top of the file system")?
            .to_owned();
        Ok(Self {
            target: target_folder(&root)?,
            cache: cache_folder()?,
            root,
        })
    }

    /// Where installed tools lie; their binaries are in `bin` below it.
    #[must_use]
    pub fn tools(&self) -> PathBuf {
        self.cache.join("tools")
    }

    /// One installed tool.
    #[must_use]
    pub fn tool(&self, name: &str) -> PathBuf {
        self.tools().join("bin").join(name)
    }

    /// Where downloaded wheels lie.
    #[must_use]
    pub fn wheels(&self) -> PathBuf {
        self.cache.join("wheels")
    }

    /// Where the kernel for virtual machines lies.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.cache.join("kernel")
    }

    /// The BPF object as `build-bpf` leaves it.
    #[must_use]
    pub fn bpf_object(&self) -> PathBuf {
        self.target.join("bpf").join("stallscope.bpf.o")
    }

    /// A binary or library built with a profile.
    #[must_use]
    pub fn built(&self, profile: &str, file: &str) -> PathBuf {
        let folder = if profile == "dev" { "debug" } else { profile };
        self.target.join(folder).join(file)
    }
}

/// The `PATH` with the tools folder in front.
///
/// # Errors
/// A folder name that holds the path separator.
pub fn path_with_tools(paths: &Paths) -> Result<std::ffi::OsString> {
    let old = std::env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(paths.tools().join("bin")).chain(std::env::split_paths(&old));
    Ok(std::env::join_paths(folders)?)
}

/// The cargo that runs this task.
#[must_use]
pub fn cargo() -> PathBuf {
    std::env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}

fn cache_folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os("STALLSCOPE_CACHE").filter(|value| !value.is_empty()) {
        return Ok(PathBuf::from(folder));
    }
    if let Some(folder) = std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
        return Ok(Path::new(&folder).join("stallscope"));
    }
    match std::env::var_os("HOME").filter(|value| !value.is_empty()) {
        Some(home) => Ok(Path::new(&home).join(".cache/stallscope")),
        None => bail!("no cache folder: set STALLSCOPE_CACHE, XDG_CACHE_HOME or HOME"),
    }
}

fn target_folder(root: &Path) -> Result<PathBuf> {
    let metadata = shell::output(
        Command::new(cargo())
            .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
            .current_dir(root),
    )?;
    let metadata: serde_json::Value =
        serde_json::from_str(&metadata).context("cargo metadata is not JSON")?;
    let folder = metadata["target_directory"]
        .as_str()
        .context("cargo metadata names no target folder")?;
    Ok(PathBuf::from(folder))
}
