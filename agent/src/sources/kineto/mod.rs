//! Traces of the PyTorch profiler (Kineto): GPU activity records, runtime calls, operators and steps.
//!
//! A trace is read as a stream: memory holds one event's text and a compact record of each event that matters,
//! whatever the length of the file. Damaged parts are counted and named, never read as zero.

mod collect;
mod decimal;
mod event;
mod header;
mod host;
mod job;
mod operators;
mod scan;
mod walk;

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use stallscope_attribution::activity::RankTrace;

use scan::{Cut, Scanner};

pub use job::{JobError, job};

/// Why a trace cannot be explained.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file cannot be read.
    #[error("{}: {error}", path.display())]
    Open {
        /// Which file.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file is something else.
    #[error("not a Kineto trace: neither an object with traceEvents nor an array of events; {found}")]
    NotATrace {
        /// What it seems to be.
        found: String,
    },
    /// One value is longer than any writer makes it.
    #[error("the value at byte {at_byte} is longer than {limit} bytes; the file is damaged there")]
    TooLong {
        /// Where it begins in the uncompressed text.
        at_byte: u64,
        /// The limit.
        limit: usize,
    },
    /// There is more than the memory of a common machine holds.
    #[error(
        "more than {limit} calls, operators and GPU events in one trace: reading it could take tens of GB of memory; profile \
         fewer steps, or cut the file into parts"
    )]
    TooMany {
        /// The limit.
        limit: u64,
    },
    /// There is nothing to account for.
    #[error(
        "no GPU events among {events} events{lost}; record with ProfilerActivity.CUDA, and on a machine with a GPU"
    )]
    NoGpuEvents {
        /// Events read.
        events: u64,
        /// What was lost, if anything.
        lost: String,
    },
    /// There is nothing to divide.
    #[error("none of its {events} GPU events takes any time; record more than the start of a step")]
    NoGpuTime {
        /// GPU events read.
        events: u64,
    },
}

/// Calls, operators and GPU events taken of one file: some times what 10 GB of text hold.
const MOST_TAKEN: u64 = 128_000_000;

/// What one file held.
#[derive(Debug, Clone)]
pub struct Trace {
    /// Rank, when the file says.
    pub rank: Option<u32>,
    /// Ranks of the job; 0 when the file does not say.
    pub world: u32,
    /// Host name; empty when the file does not say.
    pub host: String,
    /// Its records.
    pub records: RankTrace,
    /// Events read, of any kind.
    pub events: u64,
    /// Bytes of text read, uncompressed.
    pub bytes: u64,
}

/// Reads a trace file, compressed with gzip or not.
///
/// # Errors
/// When the file cannot be read, is no trace, or holds no GPU event.
pub fn read_file(path: &Path) -> Result<Trace, TraceError> {
    let open = |error| TraceError::Open {
        path: path.to_owned(),
        error,
    };
    let file = std::fs::File::open(path).map_err(open)?;
    let mut file = BufReader::with_capacity(1 << 17, file);
    let gzip = file.fill_buf().map_err(open)?.starts_with(&[0x1f, 0x8b]);
    if gzip {
        read(MultiGzDecoder::new(file))
    } else {
        read(file)
    }
}

/// Reads a trace from its uncompressed text.
///
/// # Errors
/// When it is no trace or holds no GPU event.
pub fn read(reader: impl Read) -> Result<Trace, TraceError> {
    read_at_most(MOST_TAKEN, reader)
}

fn read_at_most(limit: u64, reader: impl Read) -> Result<Trace, TraceError> {
    let mut scanner = Scanner::new(reader);
    let mut collector = collect::Collector::at_most(limit);
    let mut header = header::Header::default();
    let whole = match scanner.peek() {
        Some(b'[') => events(&mut scanner, &mut collector),
        Some(b'{') => object(&mut scanner, &mut collector, &mut header),
        first => return Err(not_a_trace(first, scanner.broken())),
    };
    if let Err(Cut::Failed(error)) = whole {
        return Err(error);
    }
    let cut = match (scanner.broken(), whole) {
        (Some(why), _) => Some(format!(
            "the file breaks off after byte {}: {why}",
            scanner.offset()
        )),
        (None, Err(_)) => Some(format!(
            "the file ends inside the trace, after byte {}: events after that are lost",
            scanner.offset()
        )),
        (None, Ok(())) => None,
    };
    collector.finish(header, cut, scanner.offset())
}

fn not_a_trace(first: Option<u8>, broken: Option<&str>) -> TraceError {
    let found = match (first, broken) {
        (_, Some(why)) => format!("it cannot be read: {why}"),
        (None, None) => "it is empty".to_owned(),
        (Some(byte), None) => format!("it begins with {:?}", char::from(byte)),
    };
    TraceError::NotATrace { found }
}

/// An object with the events in one of its fields.
fn object<R: Read>(
    scanner: &mut Scanner<R>,
    collector: &mut collect::Collector,
    header: &mut header::Header,
) -> Result<(), Cut> {
    scanner.skip();
    let mut found = false;
    loop {
        match scanner.peek() {
            None => return Err(Cut::Ended),
            Some(b'}') if found => return Ok(()),
            Some(b'}') => {
                return Err(Cut::Failed(TraceError::NotATrace {
                    found: "the object has no traceEvents".to_owned(),
                }));
            }
            Some(b',' | b':') => scanner.skip(),
            Some(b'"') => {
                let key = String::from_utf8_lossy(scanner.value()?).into_owned();
                if scanner.peek() == Some(b':') {
                    scanner.skip();
                }
                let key = key.trim_matches('"');
                if key == "traceEvents" && scanner.peek() == Some(b'[') {
                    found = true;
                    events(scanner, collector)?;
                } else if header::Header::wants(key) {
                    let value = scanner.value()?;
                    header.set(key, value);
                } else {
                    scanner.skip_value()?;
                }
            }
            Some(_) => return Err(Cut::Ended),
        }
    }
}

/// The elements of an array of events.
fn events<R: Read>(scanner: &mut Scanner<R>, collector: &mut collect::Collector) -> Result<(), Cut> {
    scanner.skip();
    loop {
        match scanner.peek() {
            None => return Err(Cut::Ended),
            Some(b']') => {
                scanner.skip();
                return Ok(());
            }
            Some(b',') => scanner.skip(),
            Some(b'{') => match scanner.event()? {
                Some(event) => collector.event(event).map_err(Cut::Failed)?,
                None => collector.malformed(),
            },
            Some(b'}' | b':') => {
                scanner.skip();
                collector.malformed();
            }
            Some(_) => {
                scanner.value()?;
                collector.malformed();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_of_too_many_events_is_refused_by_name() {
        let kernel = |at: u64| {
            format!(
                r#"{{"ph":"X","cat":"kernel","name":"k","pid":0,"tid":7,"ts":{at},"dur":1,"args":{{"device":0}}}}"#
            )
        };
        let of = |count: u64| format!("[{}]", (1..=count).map(kernel).collect::<Vec<_>>().join(","));
        assert!(read_at_most(10, of(10).as_bytes()).is_ok());
        let refused = read_at_most(10, of(11).as_bytes());
        assert!(
            matches!(refused, Err(TraceError::TooMany { limit: 10 })),
            "{refused:?}"
        );
    }
}
