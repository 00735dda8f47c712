//! Debian packages.

use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::Scope;
use crate::shell;

/// Package and the least scope that needs it.
const PACKAGES: &[(&str, Scope)] = &[
    ("gcc", Scope::Run),
    ("g++", Scope::Run),
    ("libc6-dev", Scope::Run),
    ("pkg-config", Scope::Run),
    ("rustc-web", Scope::Run),
    ("libstd-rust-web-dev-bpf", Scope::Run),
    ("llvm-22-dev", Scope::Run),
    ("libpolly-22-dev", Scope::Run),
    ("zlib1g-dev", Scope::Run),
    ("libzstd-dev", Scope::Run),
    ("iproute2", Scope::Run),
    ("nftables", Scope::Run),
    ("util-linux", Scope::Run),
    ("mount", Scope::Run),
    ("e2fsprogs", Scope::Run),
    ("bpftool", Scope::Run),
    ("ca-certificates", Scope::Run),
    ("python3", Scope::All),
    ("python3-pip", Scope::All),
    ("python3-venv", Scope::All),
    ("dpkg-dev", Scope::All),
    ("debootstrap", Scope::All),
    ("rpm", Scope::All),
    ("libibverbs-dev", Scope::All),
    ("liblzma-dev", Scope::All),
    ("git", Scope::All),
    ("qemu-system-x86", Scope::All),
    ("busybox-static", Scope::All),
    ("kmod", Scope::All),
    ("perftest", Scope::All),
    ("rdma-core", Scope::All),
    ("ibverbs-providers", Scope::All),
];

/// Packages that only Debian's security suite carries in the version that is needed.
const FROM_SECURITY: &[&str] = &[
    "rustc-web",
    "libstd-rust-web-dev-bpf",
    "llvm-22-dev",
    "libpolly-22-dev",
];

/// Whether this is Debian.
pub(super) fn is_debian() -> Result<bool> {
    let text = fs::read_to_string("/etc/os-release").context("failed to read /etc/os-release")?;
    Ok(text.lines().any(|line| line == "ID=debian"))
}

/// Packages of the scope that are not installed. Where there is no dpkg, all of them.
pub(super) fn missing(scope: Scope) -> Result<Vec<&'static str>> {
    let wanted: Vec<&'static str> = PACKAGES
        .iter()
        .filter(|(_, least)| *least <= scope)
        .map(|(name, _)| *name)
        .collect();
    let query = Command::new("dpkg-query")
        .args([
            "--show",
            "--showformat",
            "${binary:Package} ${db:Status-Status}\n",
        ])
        .args(&wanted)
        .stderr(Stdio::null())
        .output();
    let Ok(query) = query else { return Ok(wanted) };
    let installed = installed(&String::from_utf8(query.stdout).context("dpkg-query printed no text")?);
    Ok(wanted
        .into_iter()
        .filter(|name| !installed.contains(*name))
        .collect())
}

/// Names without architecture from lines of `name:arch status`.
fn installed(listing: &str) -> BTreeSet<String> {
    listing
        .lines()
        .filter_map(|line| line.split_once(' '))
        .filter(|(_, status)| *status == "installed")
        .map(|(name, _)| name.split(':').next().unwrap_or(name).to_owned())
        .collect()
}

/// The command that brings the lists of packages up to date: a fresh system has none.
pub(super) fn update_command() -> Command {
    let mut command = Command::new("apt-get");
    command.args(["update", "--quiet=2"]);
    command
}

/// The command that installs packages, and removes none to get there.
pub(super) fn install_command(packages: &[&str]) -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args([
            "install",
            "--yes",
            "--quiet=2",
            "--no-install-recommends",
            "--no-remove",
        ])
        .args(packages);
    command
}

/// Installs packages, after looking whether the machine's sources have them all.
pub(super) fn install(packages: &[&str]) -> Result<()> {
    eprintln!("setup: installing {}", packages.join(" "));
    if !without_candidate(packages)?.is_empty() || !lists_are_fresh() {
        shell::run(&mut update_command())?;
    }
    let unknown = without_candidate(packages)?;
    if !unknown.is_empty() {
        let hint = if unknown.iter().any(|name| FROM_SECURITY.contains(&name.as_str())) {
            "; the compiler for BPF comes from the suite bookworm-security: add \
             `deb http://deb.debian.org/debian-security bookworm-security main` to /etc/apt/sources.list"
        } else {
            ""
        };
        bail!("apt knows no package {}{hint}", unknown.join(", "));
    }
    shell::run(&mut install_command(packages))
}

fn without_candidate(packages: &[&str]) -> Result<Vec<String>> {
    let policy = shell::output(
        Command::new("apt-cache")
            .arg("policy")
            .args(packages)
            .env("LC_ALL", "C"),
    )?;
    let known = with_candidate(&policy);
    Ok(packages
        .iter()
        .filter(|name| !known.contains(**name))
        .map(|name| (*name).to_owned())
        .collect())
}

/// Names that `apt-cache policy` shows with a candidate.
fn with_candidate(policy: &str) -> BTreeSet<&str> {
    let mut known = BTreeSet::new();
    let mut name = "";
    for line in policy.lines() {
        if let Some(package) = line.strip_suffix(':').filter(|line| !line.starts_with(' ')) {
            name = package;
        } else if line
            .trim_start()
            .strip_prefix("Candidate: ")
            .is_some_and(|version| version != "(none)")
        {
            known.insert(name);
        }
    }
    known
}

/// Package lists younger than a day: older ones name versions that mirrors no longer hold.
fn lists_are_fresh() -> bool {
    fs::metadata("/var/lib/apt/lists")
        .and_then(|metadata| metadata.modified())
        .ok()
        .and_then(|at| at.elapsed().ok())
        .is_some_and(|age| age.as_secs() < 24 * 60 * 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_counts_only_when_installed() {
        let names = installed("zlib1g-dev:amd64 installed\nrpm config-files\ngcc installed\n");
        assert_eq!(names.into_iter().collect::<Vec<_>>(), ["gcc", "zlib1g-dev"]);
    }

    #[test]
    fn a_package_without_candidate_is_seen() {
        let policy =
            "rpm:\n  Installed: (none)\n  Candidate: 4.18\n  Version table:\nx:\n  Candidate: (none)\n";
        assert_eq!(with_candidate(policy).into_iter().collect::<Vec<_>>(), ["rpm"]);
    }

    #[test]
    fn the_small_scope_leaves_test_packages_out() {
        let of = |scope| PACKAGES.iter().filter(|(_, least)| *least <= scope).count();
        assert!(of(Scope::Run) < of(Scope::All));
        assert_eq!(of(Scope::All), PACKAGES.len());
    }
}
