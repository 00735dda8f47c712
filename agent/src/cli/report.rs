//! `stallscope report`: exit 0 with a report, 3 when nothing is recorded, 2 on bad usage or configuration, 1 when the
//! report cannot be had or written.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crate::answers::{self, AnswerError, Format, Question, Source};
use crate::config::Stream;

/// Arguments of `stallscope report`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this job
    #[arg(long)]
    job: Option<String>,
    /// Only the last so long, like 90s, 10m, 2h or 1d
    #[arg(long, value_name = "DURATION", value_parser = super::duration::parse)]
    since: Option<Duration>,
    /// Ask this collector instead of this node; certificates come from the configuration or from here
    #[arg(long, value_name = "HOST:PORT")]
    collector: Option<String>,
    /// Name in the collector's certificate; its host when absent
    #[arg(long, value_name = "NAME", requires = "collector")]
    server_name: Option<String>,
    /// Certificates that may sign the collector's (PEM)
    #[arg(long, value_name = "FILE", requires = "collector")]
    ca: Option<PathBuf>,
    /// Own certificate (PEM)
    #[arg(long, value_name = "FILE", requires = "collector")]
    cert: Option<PathBuf>,
    /// Own key (PEM)
    #[arg(long, value_name = "FILE", requires = "collector")]
    key: Option<PathBuf>,
    /// Read this store instead of the configured one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["collector", "socket"])]
    store: Option<PathBuf>,
    /// How to write it
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// Write it to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    agent: super::socket::AgentArgs,
}

pub(super) fn run(args: Args) -> ExitCode {
    let source = match source(&args) {
        Ok(source) => source,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    let question = Question {
        job: args.job.clone(),
        since: args.since,
    };
    let document = match answers::ask(&source, &question) {
        Ok(document) => document,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(if matches!(error, AnswerError::NothingRecorded(_)) {
                3
            } else {
                1
            });
        }
    };
    let colour = args.output.is_none() && wants_colour();
    let written = answers::render(&document, args.format, colour)
        .map_err(std::io::Error::from)
        .and_then(|text| match &args.output {
            Some(file) => std::fs::write(file, text),
            None => std::io::stdout().write_all(text.as_bytes()),
        });
    match written {
        // Whoever read the output has seen enough.
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            let to = args
                .output
                .map_or_else(|| "standard output".to_owned(), |file| file.display().to_string());
            eprintln!("failed to write the report to {to}: {error}");
            ExitCode::FAILURE
        }
        Ok(()) => ExitCode::SUCCESS,
    }
}

fn source(args: &Args) -> Result<Source, String> {
    let config = args.agent.config()?;
    let Some(collector) = args.collector.clone() else {
        return Ok(match (&args.store, args.agent.socket_named()) {
            (Some(dir), _) => Source::Store { dir: dir.clone() },
            (None, Some(socket)) => Source::Agent { socket },
            (None, None) => Source::Node {
                dir: config.store.dir,
                socket: config.control.socket,
            },
        });
    };
    let stream = Stream {
        server_name: args.server_name.clone().or_else(|| {
            // The configured name is that of the configured collector, not of any other.
            config
                .stream
                .server_name
                .clone()
                .filter(|_| config.stream.collector.as_ref() == Some(&collector))
        }),
        collector: Some(collector),
        ca: args.ca.clone().or(config.stream.ca),
        cert: args.cert.clone().or(config.stream.cert),
        key: args.key.clone().or(config.stream.key),
    };
    let target = stream
        .target()
        .map_err(|error| format!("{error}, or pass --ca, --cert and --key"))?;
    let target = target.ok_or_else(|| "--collector needs an address".to_owned())?;
    Ok(Source::Collector {
        target: Box::new(target),
    })
}

pub(super) fn wants_colour() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
    !refused && !dumb && std::io::stdout().is_terminal()
}
