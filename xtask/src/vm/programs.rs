//! What runs inside the machines, built as `cargo test` builds it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::build::Programs;
use crate::paths::{self, Paths};
use crate::shell;

/// Programs as paths of the host, which are paths of the guest.
#[derive(Debug)]
pub(super) struct Inside {
    /// The product.
    pub(super) stallscope: PathBuf,
    /// The BPF object.
    pub(super) bpf_object: PathBuf,
    /// The first process of a guest.
    pub(super) guest: PathBuf,
    /// Counts what the verifier walks.
    pub(super) verifier_counts: PathBuf,
    /// Calls the real NCCL.
    pub(super) nccl_caller: PathBuf,
    /// Prints what a recording holds of devices, and cuts it; runs on the host.
    pub(super) recorded_hardware: PathBuf,
    /// Makes a program one of a GPU job when it is preloaded.
    pub(super) gpu_library: PathBuf,
}

/// Builds them.
pub(super) fn build(paths: &Paths, programs: &Programs) -> Result<Inside> {
    shell::run(
        Command::new(paths::cargo())
            .current_dir(&paths.root)
            .args(["build", "--quiet", "--locked", "--bins"])
            .args(["--package", "stallscope-vm", "--package", "stallscope-e2e"]),
    )
    .context("the programs for the machines do not build")?;
    Ok(Inside {
        stallscope: programs.stallscope.clone(),
        bpf_object: programs.bpf_object.clone(),
        guest: paths.built("dev", "vm-guest"),
        verifier_counts: paths.built("dev", "verifier-counts"),
        nccl_caller: paths.built("dev", "nccl_caller"),
        recorded_hardware: paths.built("dev", "recorded-hardware"),
        gpu_library: gpu_library(paths)?,
    })
}

/// Compiles what stands for the driver's library, under the driver's name.
fn gpu_library(paths: &Paths) -> Result<PathBuf> {
    let folder = paths.target.join("vm");
    std::fs::create_dir_all(&folder).with_context(|| format!("failed to create {}", folder.display()))?;
    let library = folder.join("libcuda.so.1");
    // Most programs that load it have no library for RDMA, which it needs only when called: so it is bound late.
    let arguments = ["-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-Wl,-z,lazy", "-o"];
    shell::run(
        Command::new("cc")
            .args(arguments)
            .arg(&library)
            .arg(paths.root.join("tests/vm/fixtures/libcuda.c")),
    )
    .context("the library that stands for the driver's does not compile")?;
    Ok(library)
}
