//! `stallscope agent`: exit 0 on a clean stop, 2 on a bad configuration.

use std::path::PathBuf;
use std::process::ExitCode;

/// Arguments of `stallscope agent`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Also write every observation to this file, for replay
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> ExitCode {
    tracing::error!(config = ?args.config, record = ?args.record, "sources are not joined yet");
    ExitCode::FAILURE
}
