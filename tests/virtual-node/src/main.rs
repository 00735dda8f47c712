//! `vnode`: GPU nodes without the silicon, a training job on them, and faults at known places. See README.md.
#![deny(unsafe_code)]

mod cotenant;
mod faults;
mod plan;
mod run;
mod scenario;
mod signals;
mod topology;
mod trainer;
mod truth;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(
    name = "vnode",
    about = "GPU nodes without the silicon, for tests of stallscope"
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a scenario; prints JSON lines, writes the truth, removes everything it made.
    Run {
        /// Scenario file.
        #[arg(long)]
        scenario: PathBuf,
        /// Folder for state, logs and truth; created when missing.
        #[arg(long)]
        dir: PathBuf,
        /// Folder with the stand-in libraries; default: beside this program.
        #[arg(long)]
        libraries: Option<PathBuf>,
    },
    /// One rank of the job (internal).
    #[command(hide = true)]
    Trainer {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        rank: u32,
    },
    /// One data-loader process of a rank (internal).
    #[command(hide = true)]
    Loader {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        rank: u32,
        #[arg(long)]
        worker: u64,
        #[arg(long)]
        of: u64,
    },
    /// Another job's process on a GPU (internal).
    #[command(hide = true)]
    Cotenant {
        #[arg(long)]
        dir: PathBuf,
        #[arg(long)]
        node: String,
        #[arg(long)]
        gpu: u32,
        #[arg(long)]
        share_percent: f64,
    },
    /// Remove what killed runs left behind.
    Clean,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run {
            scenario,
            dir,
            libraries,
        } => run::run(&scenario, &dir, libraries.as_deref()),
        Command::Trainer { dir, rank } => trainer::run(&dir, rank),
        Command::Loader {
            dir,
            rank,
            worker,
            of,
        } => trainer::loader::run(&dir, rank, worker, of),
        Command::Cotenant {
            dir,
            node,
            gpu,
            share_percent,
        } => cotenant::run(&dir, &node, gpu, share_percent),
        Command::Clean => {
            topology::clean_leftovers();
            Ok(())
        }
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vnode: {error:#}");
            ExitCode::FAILURE
        }
    }
}
