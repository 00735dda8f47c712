//! `cargo xtask ci`: the gates, then every test.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::paths::{self, Paths};
use crate::{bpf, setup, shell, testing};

/// Runs all gates in the order of their price.
///
/// # Errors
/// The first gate that does not pass.
pub fn run(paths: &Paths) -> Result<()> {
    setup::ensure(paths, setup::Scope::All)?;
    gate("formatting", || formatting(paths))?;
    gate("licences, bans and sources", || {
        deny(paths, &["licenses", "bans", "sources"])
    })?;
    gate("advisories", || advisories(paths))?;
    gate("clippy", || {
        cargo(
            paths,
            &[
                "clippy",
                "--locked",
                "--workspace",
                "--all-targets",
                "--quiet",
                "--",
                "--deny",
                "warnings",
            ],
        )
    })?;
    gate("documentation", || documentation(paths))?;
    gate("BPF build and verifier", || bpf::verifier::gate(paths, false))?;
    testing::run(
        paths,
        testing::Args {
            quick: false,
            unprivileged: false,
        },
    )
}

fn gate(name: &str, check: impl FnOnce() -> Result<()>) -> Result<()> {
    let started = std::time::Instant::now();
    check().with_context(|| format!("gate {name} did not pass"))?;
    eprintln!("gate {name}: passed in {:.0} s", started.elapsed().as_secs_f64());
    Ok(())
}

fn cargo(paths: &Paths, arguments: &[&str]) -> Result<()> {
    shell::run(
        Command::new(paths::cargo())
            .current_dir(&paths.root)
            .args(arguments),
    )
}

fn formatting(paths: &Paths) -> Result<()> {
    cargo(paths, &["fmt", "--all", "--check"])?;
    cargo(paths, &["fmt", "--manifest-path", "ebpf/Cargo.toml", "--check"])
}

fn documentation(paths: &Paths) -> Result<()> {
    shell::run(
        Command::new(paths::cargo())
            .current_dir(&paths.root)
            .args([
                "doc",
                "--locked",
                "--workspace",
                "--no-deps",
                "--document-private-items",
                "--quiet",
            ])
            .env("RUSTDOCFLAGS", "--deny warnings"),
    )
}

fn deny(paths: &Paths, what: &[&str]) -> Result<()> {
    for manifest in ["Cargo.toml", "ebpf/Cargo.toml"] {
        shell::run(deny_command(paths, manifest).args(what))?;
    }
    Ok(())
}

fn deny_command(paths: &Paths, manifest: &str) -> Command {
    let mut command = Command::new(paths.tool("cargo-deny"));
    command.current_dir(&paths.root).args([
        "--manifest-path",
        manifest,
        "--config",
        "deny.toml",
        "check",
        "--hide-inclusion-graph",
    ]);
    command
}

/// Known holes in dependencies. The list comes from the network; without it the gate says so and passes.
fn advisories(paths: &Paths) -> Result<()> {
    let output = deny_command(paths, "Cargo.toml")
        .arg("advisories")
        .output()
        .context("failed to start cargo-deny")?;
    let text = String::from_utf8_lossy(&output.stderr);
    if output.status.success() {
        return Ok(());
    }
    if text.contains("failed to fetch advisory database") {
        eprintln!("gate advisories: NOT CHECKED, the advisory database cannot be reached from here");
        return Ok(());
    }
    bail!("{text}")
}
