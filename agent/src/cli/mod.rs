//! The commands, one file each; no logic here.
//!
//! A command's file has `Args` (clap) and `run(args) -> ExitCode`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod agent;
mod collect;
mod config;

/// Where every lost GPU FLOP went, who caused it, and on what evidence.
#[derive(Debug, Parser)]
#[command(name = "stallscope", version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon: sources to budgets to sinks
    Agent(agent::Args),
    /// Take the streams of agents, keep them, answer reports
    Collect(collect::Args),
    /// Validate the configuration, or print the default file
    Config(config::Args),
}

/// Parses the command line and runs the command. Exit codes are each command's own; 2 is bad usage.
#[must_use]
pub fn run() -> ExitCode {
    match Cli::parse().command {
        Command::Agent(args) => agent::run(args),
        Command::Collect(args) => collect::run(args),
        Command::Config(args) => config::run(&args),
    }
}
