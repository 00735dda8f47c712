//! The program and the libraries beside it.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

/// The program.
pub(crate) fn vnode() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vnode"))
}

/// The folder with the stand-in libraries, built now: cargo builds no other package's libraries for a test.
pub(crate) fn folder() -> Result<PathBuf> {
    static BUILT: OnceLock<bool> = OnceLock::new();
    let folder = vnode().parent().context("the program lies nowhere")?.to_owned();
    let build = || {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(env!("CARGO_MANIFEST_DIR"));
        cargo.args([
            "build",
            "--locked",
            "-p",
            "virtual-cuda",
            "-p",
            "virtual-nccl",
            "-p",
            "virtual-nvml",
        ]);
        if folder.ends_with("release") {
            cargo.arg("--release");
        }
        cargo.status().is_ok_and(|status| status.success())
    };
    ensure!(*BUILT.get_or_init(build), "the stand-in libraries did not build");
    Ok(folder)
}
