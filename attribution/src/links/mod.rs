//! What the devices told about the links: which GPU reaches which port, and what is wrong with ports, PCIe and GPUs.
//!
//! A finding accuses only what stands out: against the other ports, against the device's own past, or against what the
//! device says is its best. What a finding costs is not its business: a job's verdicts say that, and a finding that costs
//! no job anything measurable stays a finding. What was not measured is listed as not seen, never as healthy.

mod faults;
mod gather;
mod loss;
mod map;
mod pci;
mod ports;
mod queues;
#[cfg(test)]
mod tests;
mod unseen;

use crate::budget::arith::mul_div;
use crate::cause::{Cause, Place};
use crate::facts::{GpuSubject, HardwareFacts, PortFacts};
use crate::job::{Evidence, RuledOut, evidence, ruled_out};
use crate::time::Window;
use gather::Hardware;

pub use faults::accuses_gpu;
pub use map::{Distance, GpuPath, PathPort};

/// Most findings told; what is worst comes first.
const MOST_FINDINGS: usize = 64;
/// Most lines of what was not seen.
const MOST_UNSEEN: usize = 64;

/// Which end of a transfer a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Side {
    /// What the place sends.
    Sender,
    /// What the place takes in.
    Receiver,
    /// The way between the ends.
    Path,
    /// The device itself, whatever it sends or takes in.
    Device,
}

impl Side {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Sender => "sender",
            Self::Receiver => "receiver",
            Self::Path => "path",
            Self::Device => "device",
        }
    }
}

/// How bad a finding is by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Severity {
    /// It happened, and the link recovered by itself.
    Notice,
    /// The link or device works below what it can.
    Degraded,
    /// The link or device does not work, or lost what it was given.
    Failed,
}

impl Severity {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Notice => "notice",
            Self::Degraded => "degraded",
            Self::Failed => "failed",
        }
    }
}

/// What a finding costs a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub enum FindingCost {
    /// A verdict names it, with its cost.
    Named,
    /// Jobs were seen here, and lost nothing measurable to it.
    NothingMeasured,
    /// No job's time was measured beside it.
    #[default]
    NotMeasured,
}

impl FindingCost {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Named => "verdict",
            Self::NothingMeasured => "nothing_measured",
            Self::NotMeasured => "not_measured",
        }
    }
}

/// Something that is wrong with a link or a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it is; the cause a job would lose time to.
    pub cause: Cause,
    /// Where.
    pub place: Place,
    /// Which end.
    pub side: Side,
    /// How bad by itself.
    pub severity: Severity,
    /// In one sentence without its full stop.
    pub summary: String,
    /// What was seen, and what a healthy link shows.
    pub evidence: Vec<Evidence>,
    /// What it was not.
    pub ruled_out: Vec<RuledOut>,
    /// From the first window or event that shows it to the last, `CLOCK_REALTIME`.
    pub window: Window,
    /// What the link carries of what it should, parts per million, where that is what the finding says.
    pub carries_ppm: Option<u64>,
    /// What it costs a job.
    pub cost: FindingCost,
}

impl Finding {
    /// Whether a verdict of that cause at that place speaks of the same thing: the same cause, and no part of the place
    /// that both know differs.
    #[must_use]
    pub fn is_meant_by(&self, cause: Cause, place: &Place) -> bool {
        fn agree<T: PartialEq>(one: Option<&T>, other: Option<&T>) -> bool {
            one.zip(other).is_none_or(|(one, other)| one == other)
        }
        self.cause == cause
            && agree(self.place.node.as_ref(), place.node.as_ref())
            && agree(self.place.gpu.as_ref(), place.gpu.as_ref())
            && agree(self.place.rank.as_ref(), place.rank.as_ref())
            && agree(self.place.nic_port.as_ref(), place.nic_port.as_ref())
    }

    /// Whether it was there in any part of a window of `CLOCK_REALTIME`.
    #[must_use]
    pub fn overlaps(&self, window: Window) -> bool {
        self.window.start_ns() < window.end_ns() && window.start_ns() < self.window.end_ns()
    }
}

/// Something nobody could look at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Unseen {
    /// Node.
    pub node: String,
    /// What, and why, as a sentence fragment.
    pub what: String,
}

/// Paths, findings, and what was not seen.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LinkReport {
    /// Which GPU reaches which ports, by node and rank.
    pub paths: Vec<GpuPath>,
    /// Findings, worst first.
    pub findings: Vec<Finding>,
    /// What was not seen.
    pub unseen: Vec<Unseen>,
}

impl LinkReport {
    /// Whether there is nothing to tell.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.paths.is_empty() && self.findings.is_empty() && self.unseen.is_empty()
    }
}

/// Looks at what the devices told, and at the ports that TCP flows use.
///
/// `subjects` are the GPUs known, of whichever job; without any, findings carry no rank.
#[must_use]
pub fn examine(hardware: &[HardwareFacts], ports: &[PortFacts], subjects: &[&GpuSubject]) -> LinkReport {
    let seen = Hardware::gather(hardware, ports);
    let mut findings = Vec::new();
    queues::find(&seen, &mut findings);
    loss::find(&seen, &mut findings);
    ports::find(&seen, &mut findings);
    pci::find(&seen, &mut findings);
    faults::find(&seen, &mut findings);
    for finding in &mut findings {
        map::complete(&mut finding.place, subjects);
    }
    findings.sort_by(|a, b| {
        b.severity
            .cmp(&a.severity)
            .then(a.cause.cmp(&b.cause))
            .then_with(|| a.place.cmp(&b.place))
            .then_with(|| a.summary.cmp(&b.summary))
    });
    let mut unseen = seen.unseen(subjects);
    if findings.len() > MOST_FINDINGS {
        let what = format!("{} lesser findings are left out", findings.len() - MOST_FINDINGS);
        findings.truncate(MOST_FINDINGS);
        unseen.push(Unseen {
            node: String::new(),
            what,
        });
    }
    unseen.sort();
    unseen.dedup();
    unseen.truncate(MOST_UNSEEN);
    LinkReport {
        paths: map::paths(&seen, ports, subjects),
        findings,
        unseen,
    }
}

/// A share of something in parts per billion, as a percentage with as many digits as it needs.
fn share(ppb: u64) -> String {
    let hundred_thousandths = ppb / 100;
    let (whole, part) = (hundred_thousandths / 100_000, hundred_thousandths % 100_000);
    if whole > 0 {
        return format!("{whole}.{} %", part / 10_000);
    }
    format!("0.{part:05} %")
}

/// Parts per billion.
fn ppb(part: u64, whole: u64) -> u64 {
    mul_div(part, 1_000_000_000, whole)
}

/// The middle value of some, asked for again and again with one left out.
struct Middle {
    sorted: Vec<u64>,
}

impl Middle {
    fn of(values: impl Iterator<Item = u64>) -> Self {
        let mut sorted: Vec<u64> = values.collect();
        sorted.sort_unstable();
        Self { sorted }
    }

    /// The middle one (of two, the lower) of all but one of that value; `None` without others.
    fn without(&self, value: u64) -> Option<u64> {
        let own = self.sorted.partition_point(|other| *other < value);
        let middle = self.sorted.len().checked_sub(2)? / 2;
        self.sorted.get(middle + usize::from(middle >= own)).copied()
    }
}
