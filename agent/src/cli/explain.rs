//! `stallscope explain`: exit 0 with a report, 2 when an input cannot be used, 1 when the report cannot be written.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use stallscope_attribution::activity;
use stallscope_report::document::Document;

use crate::answers::{self, Format};
use crate::sources::kineto;

/// Arguments of `stallscope explain`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// PyTorch profiler traces (.json or .json.gz), one per rank of one job
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// How to write it
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// Write it to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

pub(super) fn run(args: Args) -> ExitCode {
    let document = match explain(&args.files) {
        Ok(document) => document,
        Err(why) => {
            eprintln!("{why}");
            return ExitCode::from(2);
        }
    };
    let colour = args.output.is_none() && super::report::wants_colour();
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
            eprintln!("failed to write the report: {error}");
            ExitCode::FAILURE
        }
        Ok(()) => ExitCode::SUCCESS,
    }
}

fn explain(files: &[PathBuf]) -> Result<Document, String> {
    let read = |file: &PathBuf| match kineto::read_file(file) {
        Ok(trace) => Ok((file.display().to_string(), trace)),
        Err(error @ kineto::TraceError::Open { .. }) => Err(error.to_string()),
        Err(error) => Err(format!("{}: {error}", file.display())),
    };
    let traces = files.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let job = kineto::job(&name(files), traces).map_err(|error| error.to_string())?;
    Ok(Document::from(&activity::analyse(job)))
}

/// One trace is a job of its own name; the traces of several ranks have that of their folder.
fn name(files: &[PathBuf]) -> String {
    let name = match files {
        [one] => one.file_name(),
        [first, ..] => first.parent().and_then(Path::file_name),
        [] => None,
    };
    let name = name.map_or_else(|| "trace".to_owned(), |name| name.to_string_lossy().into_owned());
    [".gz", ".json", ".trace", ".pt"]
        .iter()
        .fold(name.as_str(), |name, end| name.strip_suffix(end).unwrap_or(name))
        .to_owned()
}
