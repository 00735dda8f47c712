//! What a hit of a probe costs on this machine before its program runs.
//!
//! Published figures are of bare metal. A hypervisor may take each of the two traps itself, and a hit then costs several times
//! as much: a budget for the job's threads that is kept by the published figure would be exceeded as many times. So a function
//! of the agent's own is called with a probe and without.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::time::Instant;

use aya::Ebpf;

use super::super::attach::attach_program;
use super::super::detach;
use super::super::verbs::Place;

/// Calls timed at once, and how often: the middle one counts.
const CALLS: u64 = 64;
const ROUNDS: usize = 9;

#[cfg(target_arch = "x86_64")]
mod target {
    // Begins as NCCL's hooks do: relative to the instruction pointer, so that the kernel executes it out of line and traps again.
    std::arch::global_asm!(
        ".hidden stallscope_trap",
        ".globl stallscope_trap",
        ".type stallscope_trap, @function",
        "stallscope_trap:",
        "lea rax, [rip + stallscope_trap]",
        "ret",
        ".size stallscope_trap, . - stallscope_trap",
    );

    // SAFETY: as the C ABI asks, it takes nothing and changes the register of the result alone.
    unsafe extern "C" {
        safe fn stallscope_trap() -> u64;
    }

    pub(super) fn call() -> u64 {
        stallscope_trap()
    }

    pub(super) fn address() -> Option<u64> {
        // It returns where it lies.
        Some(stallscope_trap())
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod target {
    pub(super) const fn call() -> u64 {
        0
    }

    pub(super) const fn address() -> Option<u64> {
        None
    }
}

/// Nanoseconds a probe adds to a call where its program has nothing to do. `None` where that cannot be found out.
pub(super) fn cost_ns(ebpf: &mut Ebpf) -> Option<u64> {
    let maps = BufReader::new(File::open("/proc/self/maps").ok()?);
    let offset = Place::of(maps, target::address()?).ok()??.file_offset;
    let bare_ns = call_ns();
    // The agent is no traced process: the program leaves at once.
    let link = attach_program(ebpf, Path::new("/proc/self/exe"), "nccl_step_stop", offset, None).ok()?;
    let probed_ns = call_ns();
    let _ = detach::in_background(move || drop(link));
    Some(probed_ns.saturating_sub(bare_ns))
}

fn call_ns() -> u64 {
    let mut rounds = [0; ROUNDS];
    for round in &mut rounds {
        let begun = Instant::now();
        for _ in 0..CALLS {
            std::hint::black_box(target::call());
        }
        *round = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX) / CALLS;
    }
    rounds.sort_unstable();
    rounds[ROUNDS / 2]
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::super::super::{Probes, ProbesConfig};
    use super::*;

    #[test]
    fn a_probe_costs_what_two_traps_cost() {
        if std::env::var_os("STALLSCOPE_PRIVILEGED").is_none() {
            println!("skipped: a_probe_costs_what_two_traps_cost: STALLSCOPE_PRIVILEGED is not set");
            return;
        }
        let mut probes = Probes::load(&ProbesConfig::default()).unwrap().probes;
        let (ebpf, _) = probes.parts();
        let cost_ns = cost_ns(ebpf).unwrap();
        println!("a hit costs {cost_ns} ns here");
        assert!(
            (200..1_000_000).contains(&cost_ns),
            "{cost_ns} ns: no trap is that cheap, none that dear"
        );
    }
}
