//! `stallscope record FILE`: exit 0 when recorded, 2 on a bad configuration or a file that cannot be written.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use super::agent::load;
use crate::runtime::{self, Options, RunError};

/// Arguments of `stallscope record`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Where to write the observations
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Stop after so long, like 30s or 5m; until interrupted when absent
    #[arg(long = "for", value_name = "DURATION", value_parser = super::duration::parse)]
    run_for: Option<Duration>,
    /// Configuration file (TOML); its default place when absent
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> ExitCode {
    let config = match load(args.config.as_deref()) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let options = Options {
        config,
        record: Some(args.file),
        record_only: true,
        run_for: args.run_for,
    };
    match runtime::run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error @ RunError::Record(_)) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
