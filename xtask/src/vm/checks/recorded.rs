//! What the product says of the same devices, against the kernel's and perftest's own figures.

use anyhow::{Context, Result, ensure};

use super::super::machine::Machine;
use super::super::pair::{Pair, RDMA};
use super::super::recording::{Recording, during};
use super::pcie;
use super::rdma::{Counters, Load, PATIENT, counters_of, growth, perftest};

/// Counters that the product must add up to what the kernel counted.
const COUNTERS: [&str; 4] = ["sent_pkts", "rcvd_pkts", "rdma_sends", "rdma_recvs"];

/// Ports and PCI devices while perftest runs and an error hits the card of the left machine.
pub(super) fn devices(pair: &Pair) -> Result<String> {
    let load = Load {
        tool: "ib_send_bw",
        messages: 200,
        size: 32768,
        timeout: PATIENT,
    };
    let before = [counters_of(&pair.left)?, counters_of(&pair.right)?];
    let (figure, [left, right]) = during(pair, || {
        let figure = perftest(pair, load)?;
        pcie::inject(&pair.left)?;
        Ok(figure)
    })?;
    let ports = [(&pair.left, &left, &before[0]), (&pair.right, &right, &before[1])];
    for (machine, recording, before) in ports {
        same_counters(machine, recording, before)?;
    }
    let (card, other) = (pcie::card(&pair.left)?, pcie::card(&pair.right)?);
    errors(&left, &card)?;
    ensure!(
        right.pci_events().is_empty() && right.pci_errors(&other).values().all(|&grew| grew == 0),
        "errors of the left card were recorded right: {:?}",
        right.pci_events()
    );
    let packets = left.port(RDMA).get("sent_pkts").copied().unwrap_or_default();
    Ok(format!(
        "{} x {} bytes by perftest, {packets} packets recorded as the kernel counted; error of {card} recorded, none right",
        figure.messages, figure.size
    ))
}

/// The recorded growth of a port is what the kernel counted.
fn same_counters(machine: &Machine, recording: &Recording, before: &Counters) -> Result<()> {
    let after = counters_of(machine)?;
    let recorded = recording.port(RDMA);
    for name in COUNTERS {
        let grew = growth(before, &after, name)?;
        let told = recorded.get(name).with_context(|| {
            format!(
                "{name} of {RDMA} was not recorded {}: {recorded:?}",
                machine.end.name()
            )
        })?;
        ensure!(
            *told == grew,
            "{}: {name} grew by {grew}, recorded {told}",
            machine.end.name()
        );
    }
    Ok(())
}

/// One error as it happened, one counted, of the right device, whose place is known.
fn errors(recording: &Recording, card: &str) -> Result<()> {
    let events = recording.pci_events();
    ensure!(
        events == [(card.to_owned(), "NonFatal".to_owned())],
        "one error of {card} was injected, recorded as it happened: {events:?}"
    );
    let counted: u64 = recording
        .pci_errors(card)
        .iter()
        .filter(|(name, _)| name.contains("CmpltTO"))
        .map(|(_, grew)| grew)
        .sum();
    ensure!(counted == 1, "counted by kind: {:?}", recording.pci_errors(card));
    let device = recording.pci(card)?;
    let path = device["path"].as_array().map_or(0, Vec::len);
    ensure!(
        device["kind"] == "Nic" && path == 1,
        "the card was recorded as {device}"
    );
    Ok(())
}
