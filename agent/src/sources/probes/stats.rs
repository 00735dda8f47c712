//! What the programs themselves cost, as the kernel counts it.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};

/// Size of one program as the verifier saw it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifierStats {
    /// The program.
    pub program: &'static str,
    /// Instructions the verifier walked; the kernel's limit is 1,000,000.
    pub verified_instructions: u64,
}

/// How often and how long one program ran since run-time counting was switched on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunStats {
    /// The program.
    pub program: &'static str,
    /// Runs.
    pub runs: u64,
    /// Time in it, ns.
    pub run_ns: u64,
}

impl RunStats {
    /// Mean time of a run, ns; `None` before the first.
    #[must_use]
    pub fn mean_ns(&self) -> Option<u64> {
        self.run_ns.checked_div(self.runs)
    }
}

/// The counters that `/proc/self/fdinfo` shows for a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Counters {
    pub(super) verified_instructions: Option<u64>,
    pub(super) runs: Option<u64>,
    pub(super) run_ns: Option<u64>,
}

impl Counters {
    pub(super) fn read(program: &impl AsFd) -> Self {
        let path = format!("/proc/self/fdinfo/{}", program.as_fd().as_raw_fd());
        fs::read_to_string(path)
            .map(|text| Self::parse(&text))
            .unwrap_or_default()
    }

    fn parse(text: &str) -> Self {
        let value = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))
                .and_then(|value| value.trim().parse().ok())
        };
        Self {
            verified_instructions: value("verified_insns"),
            runs: value("run_cnt"),
            run_ns: value("run_time_ns"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_name() {
        let text = "pos:\t0\nprog_type:\t2\nrun_time_ns:\t1234\nrun_cnt:\t5\nrecursion_misses:\t0\nverified_insns:\t77\n";
        let counters = Counters {
            verified_instructions: Some(77),
            runs: Some(5),
            run_ns: Some(1234),
        };
        assert_eq!(Counters::parse(text), counters);
        assert_eq!(Counters::parse("pos:\t0\n"), Counters::default());
    }
}
