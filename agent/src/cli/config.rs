//! `stallscope config check`.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::config;

/// Arguments of `stallscope config`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    action: ConfigAction,
}

#[derive(Debug, clap::Subcommand)]
enum ConfigAction {
    /// Validate a file; messages carry file:line. Exit 0 usable, 2 not.
    Check {
        /// The file.
        #[arg(default_value = config::DEFAULT_PATH)]
        file: PathBuf,
    },
    /// Print the commented default file.
    Default,
}

/// Runs it: 0 when usable, 2 when the agent would refuse the file.
#[must_use]
pub(super) fn run(args: &Args) -> ExitCode {
    match &args.action {
        ConfigAction::Default => {
            say(&config::default_file());
            ExitCode::SUCCESS
        }
        ConfigAction::Check { file } => check(file),
    }
}

fn check(file: &Path) -> ExitCode {
    match config::check(file) {
        Ok((config, warnings)) => {
            for warning in warnings {
                eprintln!("warning: {}", warning.text);
            }
            say(&format!(
                "{}: usable; this node is {}\n",
                file.display(),
                config.node_name()
            ));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// Whoever reads may have gone; the exit status still tells.
fn say(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}
