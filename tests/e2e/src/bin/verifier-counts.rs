//! Loads the BPF object as the agent does and prints `program instructions` lines, one per program, as the kernel's
//! verifier counted them. Fails when the kernel did not take a program.
#![forbid(unsafe_code)]

use anyhow::{Context, Result, ensure};
use stallscope::sources::probes::{Outcome, Probes, ProbesConfig};

fn main() -> Result<()> {
    let loaded = Probes::load(&ProbesConfig::default()).context("the BPF object was not loaded")?;
    let refused: Vec<String> = loaded
        .health
        .programs
        .iter()
        .filter_map(|program| match &program.outcome {
            Outcome::Ok => None,
            Outcome::Unsupported(why) => Some(format!("{}: unsupported: {why}", program.program)),
            Outcome::Broken(why) => Some(format!("{}: broken: {why}", program.program)),
        })
        .collect();
    ensure!(
        refused.is_empty(),
        "the kernel did not take\n  {}",
        refused.join("\n  ")
    );
    let counts = loaded.probes.verifier_stats();
    ensure!(
        !counts.is_empty(),
        "this kernel does not tell instruction counts; 5.16 and later do"
    );
    for count in counts {
        println!("{} {}", count.program, count.verified_instructions);
    }
    Ok(())
}
