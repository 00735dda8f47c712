//! The commands, one file each; no logic here.
//!
//! A command's file has `Args` (clap) and `run(args) -> ExitCode`.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::sources::nvml::trial;

mod agent;
mod check;
mod collect;
mod config;
mod doctor;
mod duration;
mod explain;
mod record;
mod report;
mod socket;

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
    /// Say in one line whether this node's GPUs are fit: exit 0 fit, 1 degraded, 2 unfit, 3 agent unreachable
    Check(check::Args),
    /// Validate the configuration, or print the default file
    Config(config::Args),
    /// What can be seen on this node, what cannot, why, and how to fix it
    Doctor(doctor::Args),
    /// Explain PyTorch profiler traces, one per rank: no agent and no GPU needed; exit 2 when an input is unusable
    Explain(explain::Args),
    /// Capture what the sources observe, for replay
    Record(record::Args),
    #[command(hide = true, name = trial::COMMAND)]
    NvmlTrial {
        /// The library to start
        library: String,
    },
    /// Show where GPU time went, who caused it and on what evidence: exit 3 when nothing is recorded
    Report(report::Args),
}

/// Parses the command line and runs the command. Exit codes are each command's own; 2 is bad usage.
#[must_use]
pub fn run() -> ExitCode {
    match Cli::parse().command {
        Command::Agent(args) => agent::run(args),
        Command::Collect(args) => collect::run(args),
        Command::Check(args) => check::run(&args),
        Command::Config(args) => config::run(&args),
        Command::Doctor(args) => doctor::run(&args),
        Command::Explain(args) => explain::run(args),
        Command::NvmlTrial { library } => {
            trial::run(&library);
            ExitCode::SUCCESS
        }
        Command::Record(args) => record::run(args),
        Command::Report(args) => report::run(args),
    }
}
