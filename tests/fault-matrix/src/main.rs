//! Plays the matrix and prints its tables as Markdown.
//!
//! `stallscope-fault-matrix [SEEDS [NAME [explain]]]`: how many seeds, only variants whose name contains this, and
//! their verdicts in words instead of the tables.

use std::process::ExitCode;

use stallscope_fault_matrix::matrix;
use stallscope_fault_matrix::score::{Score, explain, explain_traced, score, score_traced};
use stallscope_fault_matrix::variant::Variant;
use stallscope_fault_matrix::{table, traced};

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
    let mut traced = traced::variants(0..seeds);
    if let Some(only) = &only {
        traced.retain(|variant| variant.name().contains(only.as_str()));
    }
    if std::env::args().nth(3).is_some() {
        let told = variants.iter().map(explain);
        told.chain(traced.iter().map(explain_traced))
            .for_each(|told| println!("{told}\n"));
        return ExitCode::SUCCESS;
    }
    print!("{}", table::markdown(&scores(&variants, score)));
    println!("\n## Traces of generated jobs\n\n{TRACES}");
    print!("{}", table::markdown(&scores(&traced, score_traced)));
    ExitCode::SUCCESS
}

const TRACES: &str = "\
The same jobs as profiler traces of all ranks (Tier A), 20 steps each, on nodes whose clocks are minutes apart and drift. \
A trace tells nothing of heat, power, other processes, run queues and storage: right is `kernel.clock` for a slow device \
whatever slowed it, `data.loader` for a loader that reads, `host.launch` for one without a CPU. That the ranks' compute \
varies may be said of the job (`job.imbalance`).
";

/// All scores, in the order of the variants, on all CPUs.
fn scores(variants: &[Variant], score: fn(&Variant) -> Score) -> Vec<Score> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let chunk = variants.len().div_ceil(threads).max(1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = variants
            .chunks(chunk)
            .map(|part| scope.spawn(move || part.iter().map(score).collect::<Vec<_>>()))
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().unwrap_or_default())
            .collect()
    })
}
