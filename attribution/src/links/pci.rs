//! PCI Express: links below what device and slot can, and errors of the links.

use std::collections::BTreeMap;

use super::gather::{Device, Happened, Hardware, join};
use super::{Finding, FindingCost, Severity, Side, evidence, ruled_out};
use crate::cause::{Cause, Place};
use crate::facts::{AerSeverity, DeviceEventKind, PPM, PciKind, PciLink};
use crate::job::Evidence;
use crate::time::Window;

/// Correctable errors per hour that a healthy link stays below: it resends at every one.
const CORRECTABLE_PER_HOUR: u64 = 60;
/// One device stands out when it shows this many times the errors of the others.
const STANDS_OUT: u64 = 4;
const HOUR_NS: u64 = 3_600_000_000_000;

/// The cause a slow or faulty link of that kind of device is.
const fn cause(kind: PciKind) -> Option<Cause> {
    Some(match kind {
        PciKind::Gpu => Cause::DevicePcie,
        PciKind::Nic => Cause::NetworkPcie,
        PciKind::Storage => Cause::DataStorage,
        PciKind::Bridge | PciKind::Other => return None,
    })
}

pub(super) fn find(seen: &Hardware, findings: &mut Vec<Finding>) {
    for device in seen.devices.values() {
        findings.extend(slow_link(seen, device));
    }
    errors(seen, findings);
}

fn label(device: &Device) -> String {
    let kind = match device.last.kind {
        PciKind::Gpu => "GPU",
        PciKind::Nic => "network interface",
        PciKind::Storage => "storage",
        PciKind::Bridge => "bridge",
        PciKind::Other => "device",
    };
    if device.last.name.is_empty() {
        format!("{kind} {}", device.last.address)
    } else {
        format!("{kind} {} ({})", device.last.name, device.last.address)
    }
}

fn place(device: &Device) -> Place {
    let name = Some(device.last.name.clone()).filter(|name| !name.is_empty());
    Place {
        node: Some(device.node.clone()),
        pci: Some(device.last.address.clone()),
        nic_port: name.filter(|_| device.last.kind == PciKind::Nic),
        ..Place::default()
    }
}

fn words(link: &PciLink) -> String {
    format!(
        "x{} at {}.{} GT/s",
        link.lanes,
        link.rate_mt_per_s / 1000,
        link.rate_mt_per_s % 1000 / 100
    )
}

/// Lanes count always, the rate only under load: [`PciLink::ppm`].
fn slow_link(seen: &Hardware, device: &Device) -> Option<Finding> {
    let cause = cause(device.last.kind)?;
    let (link, window) = device.worst?;
    // A link that recovered is told by its errors.
    let last = device.last.link.value()?;
    if last.ppm() >= PPM {
        return None;
    }
    let best = PciLink {
        rate_mt_per_s: link.best_rate_mt_per_s,
        lanes: link.best_lanes,
        ..link
    };
    let mut rows = vec![evidence(
        format!("PCIe link of {}", label(device)),
        format!(
            "{}{}",
            words(&link),
            if link.under_load { ", under load" } else { "" }
        ),
        format!("{}: device and slot can do that", words(&best)),
    )];
    rows.extend(alike(seen, device));
    let mut not = Vec::new();
    if link.lanes < link.best_lanes {
        not.push(ruled_out(
            Cause::None,
            "an idle device lowers the rate of its link and keeps its lanes",
        ));
    }
    Some(Finding {
        cause,
        place: place(device),
        side: Side::Device,
        severity: Severity::Degraded,
        summary: format!(
            "{} on {} has a PCIe link of {}, not {}",
            label(device),
            device.node,
            words(&link),
            words(&best)
        ),
        evidence: rows,
        ruled_out: not,
        window,
        carries_ppm: Some(link.ppm()),
        cost: FindingCost::NotMeasured,
    })
}

/// What the other devices of the kind run at.
fn alike(seen: &Hardware, device: &Device) -> Option<Evidence> {
    let others: Vec<&PciLink> = seen
        .devices
        .values()
        .filter(|other| other.last.kind == device.last.kind)
        .filter(|other| (&other.node, &other.last.address) != (&device.node, &device.last.address))
        .filter_map(|other| other.last.link.value())
        .collect();
    let whole = others.iter().filter(|link| link.ppm() >= PPM).count();
    (!others.is_empty()).then(|| {
        evidence(
            "links like it that run at their best",
            format!("{whole} of {}", others.len()),
            "all",
        )
    })
}

/// Errors of one device over the record, from counters and live events.
#[derive(Default)]
struct Errors {
    /// By severity: the larger of what counters and events say, for both count the same errors.
    counted: BTreeMap<AerSeverity, u64>,
    events: BTreeMap<AerSeverity, u64>,
    names: Vec<String>,
    status: u32,
    window: Option<Window>,
}

impl Errors {
    fn of(&self, severity: AerSeverity) -> u64 {
        let get = |map: &BTreeMap<AerSeverity, u64>| map.get(&severity).copied().unwrap_or(0);
        get(&self.counted).max(get(&self.events))
    }

    fn total(&self) -> u64 {
        [
            AerSeverity::Correctable,
            AerSeverity::NonFatal,
            AerSeverity::Fatal,
        ]
        .into_iter()
        .fold(0, |sum: u64, severity| sum.saturating_add(self.of(severity)))
    }
}

fn severity_of(counter: &str) -> Option<AerSeverity> {
    // Totals repeat what the named ones count.
    if counter.contains("TOTAL") {
        return None;
    }
    let (file, _) = counter.split_once('.')?;
    Some(match file {
        "aer_dev_correctable" => AerSeverity::Correctable,
        "aer_dev_nonfatal" => AerSeverity::NonFatal,
        "aer_dev_fatal" => AerSeverity::Fatal,
        _ => return None,
    })
}

fn errors(seen: &Hardware, findings: &mut Vec<Finding>) {
    let mut by_device: BTreeMap<(&str, &str), Errors> = BTreeMap::new();
    for ((node, address), device) in &seen.devices {
        let grown = device
            .counters
            .iter()
            .filter(|(_, tally)| tally.total > 0)
            .filter_map(|(name, tally)| severity_of(name).map(|severity| (severity, name, tally)));
        for (severity, name, tally) in grown {
            let errors = by_device.entry((node, address)).or_default();
            *errors.counted.entry(severity).or_default() += tally.total;
            let short = name.split_once('.').map_or(name.as_str(), |(_, short)| short);
            errors.names.push(format!("{short} {}", tally.total));
            errors.window = tally
                .grew
                .map(|grew| errors.window.map_or(grew, |window| join(window, grew)));
        }
    }
    for event in &seen.events {
        let DeviceEventKind::Aer { severity, status } = &event.kind else {
            continue;
        };
        let Happened {
            node, pci, window, ..
        } = event;
        let errors = by_device.entry((node, pci)).or_default();
        *errors.events.entry(*severity).or_default() += 1;
        errors.status |= status;
        errors.window = Some(errors.window.map_or(*window, |known| join(known, *window)));
    }
    for ((node, address), errors) in &by_device {
        findings.extend(faulty(seen, node, address, errors, &by_device));
    }
}

fn faulty(
    seen: &Hardware,
    node: &str,
    address: &str,
    errors: &Errors,
    all: &BTreeMap<(&str, &str), Errors>,
) -> Option<Finding> {
    let device = seen.behind(node, address);
    let cause = device
        .and_then(|device| cause(device.last.kind))
        .unwrap_or(Cause::Unknown);
    let others = all
        .iter()
        .filter(|(key, _)| **key != (node, address))
        .map(|(_, errors)| errors.total())
        .max()
        .unwrap_or(0);
    let whole = device.map_or(0, |device| device.window.len_ns()).max(1);
    let correctable = errors.of(AerSeverity::Correctable);
    let per_hour = crate::budget::arith::mul_div(correctable, HOUR_NS, whole.max(HOUR_NS / 60));
    let stands_out = correctable >= 10 && errors.total() >= others.saturating_mul(STANDS_OUT);
    let severity = if errors.of(AerSeverity::Fatal) > 0 {
        Severity::Failed
    } else if errors.of(AerSeverity::NonFatal) > 0 || stands_out && per_hour >= CORRECTABLE_PER_HOUR {
        Severity::Degraded
    } else {
        Severity::Notice
    };
    let counts: Vec<String> = [
        AerSeverity::Fatal,
        AerSeverity::NonFatal,
        AerSeverity::Correctable,
    ]
    .into_iter()
    .filter(|severity| errors.of(*severity) > 0)
    .map(|severity| format!("{} {}", errors.of(severity), severity.word()))
    .collect();
    let name = device.map_or_else(|| address.to_owned(), label);
    let mut rows = vec![evidence(
        format!("PCIe errors at {address}"),
        counts.join(", "),
        format!("none fatal, below {CORRECTABLE_PER_HOUR} correctable an hour"),
    )];
    if !errors.names.is_empty() {
        rows.push(evidence("by kind", errors.names.join(", "), "0"));
    }
    if errors.status != 0 {
        rows.push(evidence(
            "status bits of live events",
            format!("{:#010x}", errors.status),
            "none",
        ));
    }
    Some(Finding {
        cause,
        place: device.map_or_else(
            || Place {
                node: Some(node.to_owned()),
                pci: Some(address.to_owned()),
                ..Place::default()
            },
            place,
        ),
        side: Side::Device,
        severity,
        summary: format!(
            "the PCIe link of {name} on {node} reports errors: {}",
            counts.join(", ")
        ),
        evidence: rows,
        ruled_out: Vec::new(),
        window: errors.window.unwrap_or_default(),
        carries_ppm: None,
        cost: FindingCost::NotMeasured,
    })
}
