//! Builds the binaries and stand-ins that the lab runs.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::paths::{self, Paths};
use crate::{bpf, shell};

/// The profile the lab and the packages use.
pub const PROFILE: &str = "release";

/// What the lab runs.
#[derive(Debug, Clone)]
pub struct Programs {
    /// The product's one binary.
    pub stallscope: PathBuf,
    /// The virtual nodes.
    pub vnode: PathBuf,
    /// The BPF object.
    pub bpf_object: PathBuf,
    /// The plugin for NCCL's profiler.
    pub nccl_profiler: PathBuf,
}

/// Builds the product, its BPF object and the virtual nodes.
///
/// # Errors
/// Something does not build.
pub fn programs(paths: &Paths) -> Result<Programs> {
    let packages = [
        "stallscope",
        "stallscope-nccl-profiler",
        "virtual-node",
        "virtual-cuda",
        "virtual-nccl",
        "virtual-nvml",
    ];
    let mut command = Command::new(paths::cargo());
    command
        .current_dir(&paths.root)
        .args(["build", "--locked", "--profile", PROFILE]);
    for package in packages {
        command.args(["--package", package]);
    }
    shell::run(&mut command).context("the workspace does not build")?;
    bpf::build(paths, false)?;
    built(paths)
}

/// The programs as they were built last.
///
/// # Errors
/// One of them was not built.
pub fn built(paths: &Paths) -> Result<Programs> {
    let programs = Programs {
        stallscope: paths.built(PROFILE, "stallscope"),
        vnode: paths.built(PROFILE, "vnode"),
        bpf_object: paths.bpf_object(),
        nccl_profiler: paths.built(PROFILE, "libnccl_profiler_stallscope.so"),
    };
    for file in [
        &programs.stallscope,
        &programs.vnode,
        &programs.bpf_object,
        &programs.nccl_profiler,
    ] {
        ensure!(
            file.exists(),
            "{} is not built; `cargo xtask test` builds it",
            file.display()
        );
    }
    Ok(programs)
}
