//! Cargo-installed tools, kept in the cache so that a new checkout needs no new build.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::Scope;
use crate::paths::{self, Paths};
use crate::shell;

/// Debian's LLVM 22, as its package `llvm-22-dev` lays it out.
const LLVM_PREFIX: &str = "/usr/lib/llvm-22";

/// A tool at a pinned version.
#[derive(Debug)]
pub(super) struct Tool {
    name: &'static str,
    version: &'static str,
    arguments: &'static [&'static str],
    scope: Scope,
    links_llvm: bool,
}

const TOOLS: &[Tool] = &[
    Tool {
        name: "bpf-linker",
        version: "0.13.0",
        arguments: &["--no-default-features", "--features", "llvm-22"],
        scope: Scope::Run,
        links_llvm: true,
    },
    Tool {
        name: "cargo-deny",
        version: "0.20.2",
        arguments: &[],
        scope: Scope::All,
        links_llvm: false,
    },
    Tool {
        name: "cargo-deb",
        version: "3.8.0",
        arguments: &[],
        scope: Scope::All,
        links_llvm: false,
    },
    Tool {
        name: "cargo-generate-rpm",
        version: "0.21.1",
        arguments: &[],
        scope: Scope::All,
        links_llvm: false,
    },
];

impl Tool {
    fn is_installed(&self, paths: &Paths, receipt: &str) -> bool {
        paths.tool(self.name).exists() && receipt.contains(&format!("\"{} {} (", self.name, self.version))
    }

    fn command(&self, paths: &Paths) -> Command {
        let mut command = Command::new(paths::cargo());
        command
            .args([
                "install",
                "--quiet",
                "--locked",
                self.name,
                "--version",
                self.version,
            ])
            .args(self.arguments)
            .arg("--root")
            .arg(paths.tools());
        for (name, value) in self.variables() {
            command.env(name, value);
        }
        command.env("CARGO_TARGET_DIR", paths.cache.join("tools-build"));
        command
    }

    fn variables(&self) -> Vec<(&'static str, String)> {
        if self.links_llvm {
            // Without the search path the link against Debian's LLVM fails.
            return vec![
                ("LLVM_PREFIX", LLVM_PREFIX.to_owned()),
                ("RUSTFLAGS", format!("-L {LLVM_PREFIX}/lib")),
            ];
        }
        // These run for seconds and take minutes to optimise.
        vec![
            ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "0".to_owned()),
            ("CARGO_PROFILE_RELEASE_LTO", "off".to_owned()),
            ("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "16".to_owned()),
            ("CARGO_PROFILE_RELEASE_STRIP", "symbols".to_owned()),
        ]
    }

    /// The installation as a person would type it.
    pub(super) fn command_line(&self, paths: &Paths) -> String {
        let variables: Vec<_> = self
            .variables()
            .into_iter()
            .map(|(name, value)| format!("{name}='{value}'"))
            .collect();
        let command = self.command(paths);
        let arguments = shell::line(&command);
        let arguments = arguments
            .split_once(' ')
            .map_or(arguments.as_str(), |(_, rest)| rest);
        format!("{} cargo {arguments}", variables.join(" "))
    }

    /// Builds and installs it; minutes on two cores.
    pub(super) fn install(&self, paths: &Paths) -> Result<()> {
        if self.links_llvm && !Path::new(LLVM_PREFIX).exists() {
            bail!(
                "{} needs LLVM 22 at {LLVM_PREFIX}, which the package llvm-22-dev brings",
                self.name
            );
        }
        eprintln!("setup: building {} {} (minutes, once)", self.name, self.version);
        let mut command = self.command(paths);
        command.arg("--force");
        shell::run(&mut command).with_context(|| format!("failed to install {}", self.name))?;
        let build = paths.cache.join("tools-build");
        std::fs::remove_dir_all(&build).with_context(|| format!("failed to remove {}", build.display()))
    }
}

/// Tools of the scope that are not installed at their version.
pub(super) fn missing(paths: &Paths, scope: Scope) -> Vec<&'static Tool> {
    let receipt = std::fs::read_to_string(paths.tools().join(".crates.toml")).unwrap_or_default();
    TOOLS
        .iter()
        .filter(|tool| tool.scope <= scope && !tool.is_installed(paths, &receipt))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_version_counts_as_missing() -> Result<()> {
        let cache = tempfile::tempdir()?;
        let paths = Paths {
            root: cache.path().into(),
            cache: cache.path().into(),
            target: cache.path().into(),
        };
        std::fs::create_dir_all(paths.tools().join("bin"))?;
        std::fs::write(paths.tool("bpf-linker"), "")?;
        let receipt = paths.tools().join(".crates.toml");
        std::fs::write(
            &receipt,
            "[v1]\n\"bpf-linker 0.12.0 (registry+x)\" = [\"bpf-linker\"]\n",
        )?;
        assert_eq!(missing(&paths, Scope::Run).len(), 1);
        std::fs::write(
            &receipt,
            "[v1]\n\"bpf-linker 0.13.0 (registry+x)\" = [\"bpf-linker\"]\n",
        )?;
        assert_eq!(missing(&paths, Scope::Run).len(), 0);
        assert_eq!(missing(&paths, Scope::All).len(), TOOLS.len() - 1);
        Ok(())
    }

    #[test]
    fn the_printed_command_holds_its_variables() -> Result<()> {
        let paths = Paths {
            root: "/r".into(),
            cache: "/c".into(),
            target: "/t".into(),
        };
        let linker = TOOLS
            .iter()
            .find(|tool| tool.links_llvm)
            .context("no tool links LLVM")?;
        let line = linker.command_line(&paths);
        assert!(
            line.starts_with(
                "LLVM_PREFIX='/usr/lib/llvm-22' RUSTFLAGS='-L /usr/lib/llvm-22/lib' cargo install"
            ),
            "{line}"
        );
        assert!(line.ends_with("--root /c/tools"), "{line}");
        Ok(())
    }
}
