//! `stallscope explain`: exit 0 with a report, 2 when an input cannot be used, 1 when the report cannot be written.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use stallscope_attribution::activity::{self, Declared};
use stallscope_attribution::flops::{self, Shape};
use stallscope_attribution::peaks::Precision;
use stallscope_report::document::Document;

use crate::answers::{self, Format, recordings};
use crate::record::Replay;
use crate::sources::kineto;

/// Arguments of `stallscope explain`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// PyTorch profiler traces (.json or .json.gz), one per rank of one job; or recordings of `stallscope record`,
    /// one per node
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    #[command(flatten)]
    known: Known,
    /// How to write it
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
    /// Write it to this file instead of standard output
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// What the traces do not tell.
#[derive(Debug, clap::Args)]
struct Known {
    /// The model's FLOPs per GPU and step, like 3.2e14; else of STALLSCOPE_MODEL_FLOPS_PER_STEP, else of
    /// --model-shape, else from the shapes of operators in the traces
    #[arg(long, value_name = "FLOPS", value_parser = whole)]
    model_flops: Option<u64>,
    /// Shape of a transformer, as params=7e9,layers=32,heads=32,head_size=128,sequence=4096,tokens=65536 with the
    /// tokens of one GPU and step, and recompute=0 to 1 for the repeated share of the forward pass; else of
    /// STALLSCOPE_MODEL_SHAPE
    #[arg(long, value_name = "SHAPE")]
    model_shape: Option<Shape>,
    /// Dense peak of one GPU in TFLOP/s, in place of the table's
    #[arg(long, value_name = "TFLOPS", value_parser = giga)]
    peak_tflops: Option<Scaled>,
    /// Precision whose peak counts, in place of that of most arithmetic
    #[arg(long, value_name = "fp32|tf32|bf16|fp8", value_parser = precision)]
    precision: Option<Precision>,
    /// Bus bandwidth that collectives should reach in GB/s, in place of the best in the traces
    #[arg(long, value_name = "GBPS", value_parser = giga)]
    busbw: Option<Scaled>,
    /// What the job is: pretrain, finetune, rl, prefill, decode or other
    #[arg(long, value_name = "KIND", value_parser = ["pretrain", "finetune", "rl", "prefill", "decode", "other"])]
    kind: Option<String>,
}

/// A number in billions per second.
#[derive(Debug, Clone, Copy)]
struct Scaled(u64);

fn whole(text: &str) -> Result<u64, String> {
    flops::whole(text)
        .filter(|number| *number > 0)
        .ok_or_else(|| "not a whole number above 0 like 3.2e14".to_owned())
}

fn giga(text: &str) -> Result<Scaled, String> {
    whole(&format!("{text}e9"))
        .map(Scaled)
        .map_err(|_| "not a number above 0 like 46.5".to_owned())
}

fn precision(text: &str) -> Result<Precision, String> {
    Precision::from_name(text).ok_or_else(|| "not one of fp32, tf32, bf16, fp16, fp8".to_owned())
}

impl Known {
    /// What is declared, arguments before the environment.
    fn declared(&self, variable: impl Fn(&str) -> Option<String>) -> Result<Declared, String> {
        let of_variable = |name: &str| variable(name).filter(|value| !value.is_empty());
        let wrong = |name: &str, why: &dyn std::fmt::Display| format!("{name}: {why}");
        let flops = match (self.model_flops, of_variable("STALLSCOPE_MODEL_FLOPS_PER_STEP")) {
            (Some(flops), _) => Some(flops),
            (None, Some(text)) if self.model_shape.is_none() => {
                Some(whole(&text).map_err(|why| wrong("STALLSCOPE_MODEL_FLOPS_PER_STEP", &why))?)
            }
            (None, _) => None,
        };
        let shape = match (self.model_shape, of_variable("STALLSCOPE_MODEL_SHAPE")) {
            (Some(shape), _) => Some(shape),
            (None, Some(text)) => Some(
                text.parse::<Shape>()
                    .map_err(|why| wrong("STALLSCOPE_MODEL_SHAPE", &why))?,
            ),
            (None, None) => None,
        };
        let of_shape = |of: fn(&Shape) -> Result<u64, flops::ShapeError>| {
            let shape = shape.filter(|_| flops.is_none());
            shape.as_ref().map(of).transpose().map_err(|why| why.to_string())
        };
        let shaped = of_shape(Shape::model_flops_per_step)?;
        let repeats = shape.is_some_and(|shape| shape.recompute_ppm > 0);
        Ok(Declared {
            model_flops_per_step: flops.or(shaped),
            hardware_flops_per_step: of_shape(Shape::hardware_flops_per_step)?.filter(|_| repeats),
            flops_from: if flops.is_some() {
                "as declared per GPU and step".to_owned()
            } else {
                "of the declared shape, 6N + 12LHQT per token with full attention (PaLM's convention)"
                    .to_owned()
            },
            peak_flops_per_s: self.peak_tflops.map(|Scaled(giga)| giga.saturating_mul(1000)),
            precision: self.precision,
            bus_bytes_per_s: self.busbw.map(|Scaled(bytes)| bytes),
        })
    }
}

pub(super) fn run(args: Args) -> ExitCode {
    let document = match explain(&args.files, &args.known) {
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

fn explain(files: &[PathBuf], known: &Known) -> Result<Document, String> {
    let recordings = files.iter().filter(|file| Replay::is_one(file).unwrap_or(false));
    match recordings.count() {
        0 => explain_traces(files, known),
        all if all == files.len() => recordings::document(files).map_err(|error| error.to_string()),
        some => Err(format!(
            "{some} of {} files are recordings of observations and the others are not; give files of one kind",
            files.len()
        )),
    }
}

fn explain_traces(files: &[PathBuf], known: &Known) -> Result<Document, String> {
    let declared = known.declared(|name| std::env::var(name).ok())?;
    let read = |file: &PathBuf| match kineto::read_file(file) {
        Ok(trace) => Ok((file.display().to_string(), trace)),
        Err(error @ kineto::TraceError::Open { .. }) => Err(error.to_string()),
        Err(error) => Err(format!("{}: {error}", file.display())),
    };
    let traces = files.iter().map(read).collect::<Result<Vec<_>, _>>()?;
    let mut job = kineto::job(&name(files), traces).map_err(|error| error.to_string())?;
    job.declared = declared;
    if let Some(kind) = &known.kind {
        job.kind.clone_from(kind);
    }
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

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        known: Known,
    }

    const SHAPE: &str = "params=7e9,layers=32,heads=32,head_size=128,sequence=4096,tokens=1000";
    /// (6 * 7e9 + 12 * 32 * 32 * 128 * 4096) * 1000.
    const FLOPS: u64 = 48_442_450_944_000;

    fn declared(line: &[&str], environment: &[(&str, &str)]) -> Result<Declared, String> {
        let line = std::iter::once(&"explain").chain(line);
        let known = Line::try_parse_from(line)
            .map_err(|error| error.to_string())?
            .known;
        known.declared(|name| {
            let value = environment.iter().find(|(known, _)| *known == name);
            value.map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn arguments_come_before_the_environment_and_flops_before_a_shape() {
        let environment = [
            ("STALLSCOPE_MODEL_FLOPS_PER_STEP", "2e12"),
            ("STALLSCOPE_MODEL_SHAPE", SHAPE),
        ];
        let flops = |line: &[&str], environment: &[(&str, &str)]| {
            declared(line, environment).unwrap().model_flops_per_step
        };
        assert_eq!(
            flops(&["--model-flops", "1e12"], &environment),
            Some(1_000_000_000_000)
        );
        assert_eq!(flops(&[], &environment), Some(2_000_000_000_000));
        assert_eq!(flops(&["--model-shape", SHAPE], &environment), Some(FLOPS));
        assert_eq!(flops(&[], &environment[1..]), Some(FLOPS));
        assert_eq!(flops(&[], &[]), None);
    }

    #[test]
    fn rates_are_read_in_their_unit() {
        let found = declared(
            &["--busbw", "46.5", "--peak-tflops", "989.4", "--precision", "fp16"],
            &[],
        )
        .unwrap();
        assert_eq!(found.bus_bytes_per_s, Some(46_500_000_000));
        assert_eq!(found.peak_flops_per_s, Some(989_400_000_000_000));
        assert_eq!(found.precision, Some(Precision::Half));
    }

    #[test]
    fn what_is_no_number_is_refused_by_name() {
        assert!(
            declared(&["--busbw", "fast"], &[])
                .unwrap_err()
                .contains("--busbw")
        );
        let environment = [("STALLSCOPE_MODEL_SHAPE", "params=7e9")];
        assert!(
            declared(&[], &environment)
                .unwrap_err()
                .contains("STALLSCOPE_MODEL_SHAPE")
        );
    }
}
