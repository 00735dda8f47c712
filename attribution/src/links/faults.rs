//! Faults that drivers report: XIDs of GPUs, asynchronous events of RDMA devices.

use std::collections::BTreeMap;

use super::gather::{Happened, Hardware, join};
use super::{Finding, FindingCost, Severity, Side, evidence, ruled_out};
use crate::cause::{Cause, Place};
use crate::facts::DeviceEventKind;
use crate::job::Evidence;

/// Whose fault an XID is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Whose {
    /// The device's.
    Device(Severity),
    /// The link's to other GPUs.
    Nvlink(Severity),
    /// The program's, or a consequence of another XID.
    Program,
}

/// XIDs with a known meaning, as NVIDIA's catalogue of XID errors gives it.
const XIDS: &[(u32, Whose, &str)] = &[
    (
        13,
        Whose::Program,
        "graphics engine exception: a kernel's illegal access or instruction",
    ),
    (31, Whose::Program, "memory page fault: a kernel's illegal access"),
    (
        32,
        Whose::Device(Severity::Degraded),
        "invalid or corrupted push buffer: bad PCIe link, driver or program",
    ),
    (38, Whose::Device(Severity::Degraded), "driver firmware error"),
    (
        43,
        Whose::Program,
        "a program's channel was stopped after its own error",
    ),
    (
        45,
        Whose::Program,
        "a program's channels were cleaned up after an earlier error, or when it was killed",
    ),
    (46, Whose::Device(Severity::Failed), "GPU stopped processing"),
    (
        48,
        Whose::Device(Severity::Failed),
        "uncorrectable (double bit) memory error",
    ),
    (
        61,
        Whose::Device(Severity::Degraded),
        "internal micro-controller breakpoint or warning",
    ),
    (
        62,
        Whose::Device(Severity::Failed),
        "internal micro-controller halted",
    ),
    (
        63,
        Whose::Device(Severity::Degraded),
        "a memory row was remapped or a page retired: reset the GPU when the job ends",
    ),
    (
        64,
        Whose::Device(Severity::Failed),
        "remapping a row or retiring a page failed",
    ),
    (69, Whose::Program, "graphics engine class error"),
    (74, Whose::Nvlink(Severity::Degraded), "NVLink error"),
    (79, Whose::Device(Severity::Failed), "GPU has fallen off the bus"),
    (
        92,
        Whose::Device(Severity::Degraded),
        "high rate of single-bit memory errors",
    ),
    (
        94,
        Whose::Device(Severity::Degraded),
        "contained memory error: the program that hit it was ended",
    ),
    (
        95,
        Whose::Device(Severity::Failed),
        "uncontained memory error: the GPU needs a reset",
    ),
    (109, Whose::Device(Severity::Degraded), "context switch timed out"),
    (
        119,
        Whose::Device(Severity::Failed),
        "the GPU's system processor did not answer",
    ),
    (
        120,
        Whose::Device(Severity::Failed),
        "the GPU's system processor failed",
    ),
    (
        121,
        Whose::Nvlink(Severity::Notice),
        "corrected error on the chip-to-chip link",
    ),
    (140, Whose::Device(Severity::Failed), "unrecovered memory error"),
    (
        143,
        Whose::Device(Severity::Failed),
        "the GPU could not be initialised",
    ),
    (
        144,
        Whose::Nvlink(Severity::Degraded),
        "NVLink: error of the link's switch interface",
    ),
    (
        145,
        Whose::Nvlink(Severity::Degraded),
        "NVLink: error of the link's remote loopback",
    ),
    (
        146,
        Whose::Nvlink(Severity::Degraded),
        "NVLink: error of the transaction layer's window",
    ),
    (
        147,
        Whose::Nvlink(Severity::Degraded),
        "NVLink: error of the transaction layer",
    ),
    (
        148,
        Whose::Nvlink(Severity::Degraded),
        "NVLink: error of the transport's reset",
    ),
    (
        149,
        Whose::Nvlink(Severity::Degraded),
        "NVLink: error of the network layer",
    ),
    (
        150,
        Whose::Nvlink(Severity::Degraded),
        "NVLink: error of the management layer",
    ),
    (
        154,
        Whose::Device(Severity::Degraded),
        "the driver asks for a recovery action",
    ),
];

/// Asynchronous events of verbs that are faults, by `enum ibv_event_type`.
const VERBS: &[(u32, Severity, &str)] = &[
    (0, Severity::Failed, "error of a completion queue"),
    (1, Severity::Failed, "a queue pair failed"),
    (2, Severity::Degraded, "a queue pair's request failed"),
    (3, Severity::Degraded, "a queue pair's access failed"),
    (8, Severity::Failed, "the device failed"),
    (10, Severity::Failed, "the port went down"),
];

fn meaning(code: u32) -> Option<(Whose, &'static str)> {
    XIDS.iter()
        .find(|(known, ..)| *known == code)
        .map(|(_, whose, meaning)| (*whose, *meaning))
}

/// Whether the driver accuses the GPU itself by an XID: not a program on it, not a link to other GPUs. Codes of no known
/// meaning accuse nobody.
#[must_use]
pub fn accuses_gpu(xid: u32) -> bool {
    matches!(meaning(xid), Some((Whose::Device(_), _)))
}

/// One code on one device, however often.
struct Told<'a> {
    first: &'a Happened,
    last: &'a Happened,
    count: u64,
    text: &'a str,
}

pub(super) fn find(seen: &Hardware, findings: &mut Vec<Finding>) {
    let mut xids: BTreeMap<(&str, &str, u32), Told<'_>> = BTreeMap::new();
    let mut verbs: BTreeMap<(&str, &str, u32), Told<'_>> = BTreeMap::new();
    for event in &seen.events {
        let (told, key, text) = match &event.kind {
            DeviceEventKind::Xid { code, message } => (
                &mut xids,
                (event.node.as_str(), event.pci.as_str(), *code),
                message.as_str(),
            ),
            DeviceEventKind::Verbs {
                device, event: code, ..
            } => (&mut verbs, (event.node.as_str(), device.as_str(), *code), ""),
            DeviceEventKind::Aer { .. } => continue,
        };
        let entry = told.entry(key).or_insert(Told {
            first: event,
            last: event,
            count: 0,
            text,
        });
        entry.last = event;
        entry.count += 1;
    }
    for ((node, pci, code), told) in &xids {
        findings.push(xid(node, pci, *code, told, &xids));
    }
    for ((node, device, code), told) in &verbs {
        findings.extend(verb(node, device, *code, told));
    }
}

fn xid(
    node: &str,
    pci: &str,
    code: u32,
    told: &Told<'_>,
    all: &BTreeMap<(&str, &str, u32), Told<'_>>,
) -> Finding {
    let (cause, severity, meaning) = match meaning(code) {
        Some((Whose::Device(severity), meaning)) => (Cause::DeviceFault, severity, meaning),
        Some((Whose::Nvlink(severity), meaning)) => (Cause::NetworkNvlink, severity, meaning),
        Some((Whose::Program, meaning)) => (Cause::Unknown, Severity::Notice, meaning),
        None => (Cause::Unknown, Severity::Notice, "a code of no known meaning"),
    };
    let mut rows = vec![evidence(
        format!("XID {code} of GPU {pci}"),
        format!("{} times: {meaning}", told.count),
        "none",
    )];
    if !told.text.is_empty() {
        rows.push(evidence("the driver's own words", excerpt(told.text), "none"));
    }
    rows.extend(before(node, pci, code, told, all));
    let not = (cause == Cause::Unknown).then(|| {
        let why = if self::meaning(code).is_some() {
            "the program, or an earlier error, makes the driver report this; it does not accuse the GPU"
        } else {
            "nobody says that this code accuses the GPU"
        };
        ruled_out(Cause::DeviceFault, why)
    });
    Finding {
        cause,
        place: Place {
            node: Some(node.to_owned()),
            pci: Some(pci.to_owned()).filter(|pci| !pci.is_empty()),
            ..Place::default()
        },
        side: Side::Device,
        severity,
        summary: format!("GPU {pci} on {node} reported XID {code}: {meaning}"),
        evidence: rows,
        ruled_out: not.into_iter().collect(),
        window: join(told.first.window, told.last.window),
        carries_ppm: None,
        cost: FindingCost::NotMeasured,
    }
}

/// The first code of a cascade on the device is the one to look at.
fn before(
    node: &str,
    pci: &str,
    code: u32,
    told: &Told<'_>,
    all: &BTreeMap<(&str, &str, u32), Told<'_>>,
) -> Option<Evidence> {
    let (first, _) = all
        .iter()
        .filter(|((on, of, _), _)| (*on, *of) == (node, pci))
        .min_by_key(|(_, told)| told.first.window.start_ns())
        .filter(|((.., first), other)| {
            *first != code && other.first.window.start_ns() < told.first.window.start_ns()
        })?;
    Some(evidence(
        "reported before it on this GPU",
        format!("XID {}", first.2),
        "none",
    ))
}

fn verb(node: &str, device: &str, code: u32, told: &Told<'_>) -> Option<Finding> {
    let (_, severity, meaning) = VERBS.iter().find(|(known, ..)| *known == code)?;
    let name = if device.is_empty() {
        "an RDMA device"
    } else {
        device
    };
    Some(Finding {
        cause: Cause::NetworkNic,
        place: Place {
            node: Some(node.to_owned()),
            nic_port: Some(device.to_owned()).filter(|device| !device.is_empty()),
            ..Place::default()
        },
        side: Side::Device,
        severity: *severity,
        summary: format!("{name} on {node} told a process: {meaning}"),
        evidence: vec![evidence(
            format!("asynchronous event {code} of {name}"),
            format!("{} times: {meaning}", told.count),
            "none",
        )],
        ruled_out: Vec::new(),
        window: join(told.first.window, told.last.window),
        carries_ppm: None,
        cost: FindingCost::NotMeasured,
    })
}

/// The beginning of a text.
fn excerpt(text: &str) -> String {
    text.chars().take(120).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVIDIA's catalogue: 13, 31, 43, 45 and 69 are of the application, 74 of NVLink, 48, 79 and 95 of the hardware.
    #[test]
    fn only_faults_of_the_device_accuse_the_gpu() {
        for of_others in [13, 31, 43, 45, 69, 74, 9_999] {
            assert!(!accuses_gpu(of_others), "{of_others}");
        }
        for own in [48, 79, 95] {
            assert!(accuses_gpu(own), "{own}");
        }
    }
}
