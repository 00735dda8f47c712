//! Ranks that ended while others of their job went on: killed, crashed, or done too early.
//!
//! Ranks of a job that ends do so within moments of each other, so a lone ending shows only after a while.

use stallscope_attribution::facts::GpuSubject;

use crate::observation::ProcessKey;

/// How long others of the job have to go on, ns.
const GO_ON_NS: u64 = 2_000_000_000;
/// Endings watched at a time; beyond, the oldest is let go.
const MOST: usize = 256;

/// An ending whose meaning is not known yet.
#[derive(Debug)]
struct Ending {
    subject: GpuSubject,
    at_ns: u64,
    /// Processes of the job that ran on the node when it ended.
    others: Vec<ProcessKey>,
}

/// A rank that ended alone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct EndedAlone {
    pub(super) subject: GpuSubject,
    /// When, `CLOCK_MONOTONIC` ns.
    pub(super) at_ns: u64,
    /// How many others went on.
    pub(super) others: usize,
}

/// The endings that are watched.
#[derive(Debug, Default)]
pub(super) struct Endings {
    open: Vec<Ending>,
}

impl Endings {
    /// A rank's process ended while `others` of its job ran on the node.
    pub(super) fn ended(&mut self, subject: GpuSubject, at_ns: u64, others: Vec<ProcessKey>) {
        if others.is_empty() {
            return;
        }
        if self.open.len() >= MOST {
            self.open.remove(0);
        }
        self.open.push(Ending {
            subject,
            at_ns,
            others,
        });
    }

    /// Endings after which others have gone on for long enough by `now_ns`.
    pub(super) fn alone(&mut self, now_ns: u64, is_running: impl Fn(&ProcessKey) -> bool) -> Vec<EndedAlone> {
        let mut alone = Vec::new();
        self.open.retain(|ending| {
            if now_ns < ending.at_ns.saturating_add(GO_ON_NS) {
                return true;
            }
            let others = ending.others.iter().filter(|other| is_running(other)).count();
            if others > 0 {
                alone.push(EndedAlone {
                    subject: ending.subject.clone(),
                    at_ns: ending.at_ns,
                    others,
                });
            }
            false
        });
        alone
    }
}
