//! `stallscope doctor`: exit 0 when everything a useful report needs is here, 1 otherwise.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::config::{self, Config};
use crate::doctor;

/// Arguments of `stallscope doctor`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// How to print
    #[arg(long, default_value = "text")]
    format: Format,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    Text,
    Json,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let (config, refused) = match load(args.config.as_deref()) {
        Ok(config) => (config, false),
        Err(error) => {
            eprintln!("{error}; looking with the defaults");
            (Config::default(), true)
        }
    };
    let report = doctor::examine(&config);
    let text = match args.format {
        Format::Text => report.to_text(),
        Format::Json => {
            report
                .to_json()
                .unwrap_or_else(|error| format!("{{\"error\": \"{error}\"}}"))
                + "\n"
        }
    };
    // Whoever reads may have gone; the exit status still tells.
    let _ = std::io::stdout().write_all(text.as_bytes());
    if report.useful && !refused {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// The file named; else the packaged one, if it is there; else the defaults.
fn load(named: Option<&Path>) -> Result<Config, config::ConfigError> {
    let packaged = Path::new(config::DEFAULT_PATH);
    match named {
        Some(path) => Config::load(path),
        None if packaged.exists() => Config::load(packaged),
        None => Ok(Config::default()),
    }
}
