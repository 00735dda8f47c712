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
    /// Prints what a recording holds of devices; runs on the host.
    pub(super) recorded_hardware: PathBuf,
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
    })
}
