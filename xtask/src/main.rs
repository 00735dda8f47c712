//! `cargo xtask`: setup, builds, demo, scenarios, tests, packages.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::paths::Paths;
use xtask::{bpf, setup};

/// Tasks around stallscope
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what build and tests need
    Setup {
        /// Only what building and running need, not the tests
        #[arg(long)]
        run_only: bool,
    },
    /// Build the eBPF programs into one object
    BuildBpf {
        /// With the programs' debug output
        #[arg(long)]
        debug: bool,
    },
}

fn main() -> ExitCode {
    xtask::lab::interrupt::catch();
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let paths = Paths::find()?;
    match task {
        Task::Setup { run_only } => setup::ensure(
            &paths,
            if run_only {
                setup::Scope::Run
            } else {
                setup::Scope::All
            },
        ),
        Task::BuildBpf { debug } => bpf::build(&paths, debug).map(drop),
    }
}
