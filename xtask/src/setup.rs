//! Installs what build and tests need; a second run finds everything there and changes nothing.

mod apt;
mod kernel;
mod lab;
mod mounts;
mod tools;
mod venv;
mod wheels;

pub use kernel::{Kernel, stock_kernel};
pub use venv::python;
pub use wheels::{nccl_libraries, nccl_library};

use std::fs::File;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use crate::bpf::toolchain::Toolchain;
use crate::paths::Paths;
use crate::shell;

/// How much of the setup a task needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Building and running: the demo and scenarios.
    Run,
    /// Also the tests, the gates and the packages.
    All,
}

/// What is not there yet, and how to get it.
#[derive(Debug, Default)]
struct Missing {
    packages: Vec<&'static str>,
    components: Vec<&'static str>,
    tools: Vec<&'static tools::Tool>,
    wheels: Vec<&'static wheels::Wheel>,
    kernel: bool,
    venv: bool,
    mounts: Vec<&'static mounts::Mount>,
}

impl Missing {
    fn find(paths: &Paths, scope: Scope) -> Result<Self> {
        Ok(Self {
            packages: apt::missing(scope)?,
            components: missing_components(scope),
            tools: tools::missing(paths, scope),
            wheels: wheels::missing(paths, scope),
            kernel: kernel::is_missing(paths, scope),
            venv: venv::is_missing(paths, scope),
            mounts: mounts::missing()?,
        })
    }

    fn is_empty(&self) -> bool {
        self.packages.is_empty()
            && self.components.is_empty()
            && self.tools.is_empty()
            && self.wheels.is_empty()
            && !self.kernel
            && !self.venv
            && self.mounts.is_empty()
    }

    /// The commands that bring what is missing, as a person would type them.
    fn commands(&self, paths: &Paths) -> Vec<String> {
        let mut lines = Vec::new();
        if !self.packages.is_empty() {
            lines.push(shell::line(&apt::update_command()));
            lines.push(shell::line(&apt::install_command(&self.packages)));
        }
        if !self.components.is_empty() {
            lines.push(shell::line(&component_command(&self.components)));
        }
        lines.extend(self.tools.iter().map(|tool| tool.command_line(paths)));
        lines.extend(self.wheels.iter().map(|wheel| wheel.command_line(paths)));
        lines.extend(self.kernel.then(|| kernel::command_line(paths)));
        lines.extend(self.venv.then(|| venv::command_line(paths)));
        lines.extend(self.mounts.iter().map(|mount| shell::line(&mount.command())));
        lines
    }

    fn install(&self, paths: &Paths) -> Result<()> {
        if !self.packages.is_empty() {
            apt::install(&self.packages)?;
        }
        if !self.components.is_empty() {
            shell::run(&mut component_command(&self.components))?;
        }
        for mount in &self.mounts {
            shell::run(&mut mount.command())?;
        }
        for tool in &self.tools {
            tool.install(paths)?;
        }
        for wheel in &self.wheels {
            wheel.fetch(paths)?;
        }
        if self.kernel {
            kernel::install(paths)?;
        }
        if self.venv {
            venv::install(paths)?;
        }
        Ok(())
    }
}

/// Makes this machine able to do what `scope` needs.
///
/// # Errors
/// Something is missing and could not be installed; the message holds the commands to type.
pub fn ensure(paths: &Paths, scope: Scope) -> Result<()> {
    let started = Instant::now();
    std::fs::create_dir_all(&paths.cache)
        .with_context(|| format!("failed to create {}", paths.cache.display()))?;
    let _lock = lock(paths)?;
    let missing = Missing::find(paths, scope)?;
    if !missing.is_empty() {
        if !may_install()? {
            bail!(
                "this is not Debian as root, so nothing was installed; these commands do it as root on Debian 12, \
                 use your system's names elsewhere:\n  {}",
                missing.commands(paths).join("\n  ")
            );
        }
        missing.install(paths)?;
        let left = Missing::find(paths, scope)?;
        if !left.is_empty() {
            bail!(
                "still missing after the installation:\n  {}",
                left.commands(paths).join("\n  ")
            );
        }
    }
    let toolchain = Toolchain::find()?;
    eprintln!(
        "setup: BPF core from {toolchain}; ready in {:.1} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Makes sure that virtual nodes can run here: they need more of the machine than a build does.
///
/// # Errors
/// The machine lacks something; the message names all of it and what helps.
pub fn ensure_lab() -> Result<()> {
    let lacks: Vec<String> = lab::lacks().iter().map(ToString::to_string).collect();
    if lacks.is_empty() {
        return Ok(());
    }
    bail!(
        "virtual nodes cannot run on this machine:\n  {}",
        lacks.join("\n  ")
    )
}

/// Only one setup at a time: two would fight over apt and over the tools folder.
fn lock(paths: &Paths) -> Result<File> {
    let path = paths.cache.join("setup.lock");
    let file = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
        .with_context(|| format!("failed to lock {}", path.display()))?;
    Ok(file)
}

fn may_install() -> Result<bool> {
    Ok(rustix::process::geteuid().is_root() && apt::is_debian()?)
}

fn missing_components(scope: Scope) -> Vec<&'static str> {
    if scope == Scope::Run {
        return Vec::new();
    }
    ["clippy", "fmt"]
        .into_iter()
        .filter(|name| !shell::succeeds(Command::new(crate::paths::cargo()).args([name, "--version"])))
        .map(|name| if name == "fmt" { "rustfmt" } else { name })
        .collect()
}

fn component_command(components: &[&str]) -> Command {
    let mut command = Command::new("rustup");
    command.args(["component", "add"]).args(components);
    command
}
