//! Plays the matrix and prints its tables as Markdown.
//!
//! `stallscope-fault-matrix [SEEDS [NAME [explain]]]`: how many seeds, only variants whose name contains this, and
//! their verdicts in words instead of the tables.

use std::process::ExitCode;

use stallscope_fault_matrix::matrix;
use stallscope_fault_matrix::score::{Score, explain, score};
use stallscope_fault_matrix::table;
use stallscope_fault_matrix::variant::Variant;

fn main() -> ExitCode {
    let seeds = std::env::args()
        .nth(1)
        .and_then(|text| text.parse().ok())
        .unwrap_or(4);
    let only = std::env::args().nth(2);
    let mut variants = matrix::variants(0..seeds);
    if let Some(only) = &only {
        variants.retain(|variant| variant.name().contains(only.as_str()));
    }
    if std::env::args().nth(3).is_some() {
        variants
            .iter()
            .for_each(|variant| println!("{}\n", explain(variant)));
        return ExitCode::SUCCESS;
    }
    print!("{}", table::markdown(&scores(&variants)));
    ExitCode::SUCCESS
}

/// All scores, in the order of the variants, on all CPUs.
fn scores(variants: &[Variant]) -> Vec<Score> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let chunk = variants.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = variants
            .chunks(chunk)
            .map(|part| scope.spawn(|| part.iter().map(score).collect::<Vec<_>>()))
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_default())
            .collect()
    })
}
