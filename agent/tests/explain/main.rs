//! What must be found in real traces with known answers, and what must be refused by name.
//!
//! The sweeps are those of an independent integer sweep over the same files; the idle figures of the first four equal
//! HolisticTraceAnalysis 0.5.0 to the microsecond.

mod hostile;
mod oracle;

use std::path::PathBuf;

use stallscope::sources::kineto::{self, Trace};
use stallscope_attribution::activity;
use stallscope_attribution::job::JobAnalysis;

/// A file below `tests/data/traces`.
fn path(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/traces")).join(name)
}

fn trace(name: &str) -> Trace {
    kineto::read_file(&path(name)).expect("trace")
}

fn explain(names: &[&str]) -> JobAnalysis {
    let traces = names
        .iter()
        .map(|name| ((*name).to_owned(), trace(name)))
        .collect();
    activity::analyse(kineto::job("job", traces).expect("job"))
}
