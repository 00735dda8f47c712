//! What each program gives on this kernel.

use super::programs::PROGRAMS;

/// What one program gives here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is loaded, and attached where that does not depend on a library.
    Ok,
    /// This kernel lacks what it needs.
    Unsupported(String),
    /// It should work here and does not.
    Broken(String),
}

/// One program's intent and outcome.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProgramHealth {
    /// The program.
    pub program: &'static str,
    /// Its world: `nccl`, `cuda`, `sched`, `block`, `procs`, `verbs`.
    pub world: &'static str,
    /// What it is for, and so what is lost without it.
    pub intent: &'static str,
    /// What became of it.
    pub outcome: Outcome,
}

/// What every program gives here.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Health {
    /// One entry per program of the object.
    pub programs: Vec<ProgramHealth>,
}

impl Health {
    /// Of programs of which nothing bad is known yet.
    pub(super) fn of_all() -> Self {
        let programs = PROGRAMS.iter().map(|spec| ProgramHealth {
            program: spec.name,
            world: spec.ring.name(),
            intent: spec.intent,
            outcome: Outcome::Ok,
        });
        Self {
            programs: programs.collect(),
        }
    }

    /// The programs that give nothing.
    pub fn missing(&self) -> impl Iterator<Item = &ProgramHealth> {
        self.programs
            .iter()
            .filter(|program| program.outcome != Outcome::Ok)
    }

    pub(super) fn set(&mut self, name: &str, outcome: Outcome) {
        if let Some(program) = self.programs.iter_mut().find(|program| program.program == name) {
            program.outcome = outcome;
        }
    }

    pub(super) fn of(&self, name: &str) -> Option<&Outcome> {
        self.programs
            .iter()
            .find(|program| program.program == name)
            .map(|program| &program.outcome)
    }
}
