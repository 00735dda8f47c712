//! `stallscope agent`: exit 0 on a clean stop, 2 on a bad configuration, 1 when it cannot run at all.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::config::{Config, DEFAULT_PATH};
use crate::runtime::{self, Options};

/// Arguments of `stallscope agent`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration file (TOML); its default place when absent
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Also write every observation to this file, for replay
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> ExitCode {
    let config = match load(args.config.as_deref()) {
        Ok(config) => config,
        Err(code) => return code,
    };
    let options = Options {
        config,
        record: args.record,
        ..Options::default()
    };
    finish(runtime::run(&options))
}

/// The configuration named, else the default file where there is one, else the defaults.
pub(super) fn load(file: Option<&Path>) -> Result<Config, ExitCode> {
    let default = Path::new(DEFAULT_PATH);
    let file = file.or_else(|| default.exists().then_some(default));
    let loaded = file.map_or_else(|| Ok(Config::default()), Config::load);
    loaded.map_err(|error| {
        eprintln!("{error}");
        ExitCode::from(2)
    })
}

pub(super) fn finish(result: Result<(), runtime::RunError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
