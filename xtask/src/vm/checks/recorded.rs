//! What the product says of the same devices, against the kernel's and perftest's own figures.

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::super::machine::{CARD, End, GPU_SLOT, Machine};
use super::super::pair::{Pair, RDMA, data_address};
use super::super::recording::{QueuePair, Recording, Since, during, findings};
use super::pcie;
use super::rdma::{Counters, Load, PATIENT, counters_of, growth, perftest};

/// Counters that the product must add up to what the kernel counted.
const COUNTERS: [&str; 4] = ["sent_pkts", "rcvd_pkts", "rdma_sends", "rdma_recvs"];

/// Ports and PCI devices while perftest runs and errors hit the card of the left machine and the GPU's slot of the right one,
/// whose card runs below what it could.
pub(super) fn devices(pair: &Pair) -> Result<String> {
    let load = Load::new("ib_send_bw", 100, 32768, PATIENT);
    pair.recorders()?;
    let before = [counters_of(&pair.left)?, counters_of(&pair.right)?];
    let (moved, recordings) = during(pair, Since::Start, || {
        let moved = perftest(pair, load)?;
        pcie::inject(&pair.left, CARD)?;
        pcie::inject(&pair.right, GPU_SLOT)?;
        Ok(moved)
    })?;
    for ((machine, recording), before) in pair.both().into_iter().zip(&recordings).zip(&before) {
        same_counters(machine, recording, before)?;
    }
    let [left, right] = &recordings;
    let (card, slow, gpu) = (
        pcie::card(&pair.left)?,
        pcie::card(&pair.right)?,
        pcie::gpu(&pair.right)?,
    );
    errors(left, &card)?;
    ensure!(
        right.pci_errors(&slow).values().all(|&grew| grew == 0),
        "errors of the left card were recorded right: {:?}",
        right.pci_errors(&slow)
    );
    let findings = findings(pair, &recordings)?;
    let told: Vec<String> = findings
        .iter()
        .map(|finding| {
            let word = |value: &Value| value.as_str().unwrap_or("-").to_owned();
            let place = &finding["where"];
            format!(
                "{} {} {}",
                word(&finding["cause"]),
                word(&place["node"]),
                word(&place["pci"])
            )
        })
        .collect();
    let mut expected = [
        format!("device.pcie right {gpu}"),
        format!("network.pcie left {card}"),
        format!("network.pcie right {slow}"),
    ];
    expected.sort();
    let mut sorted = told;
    sorted.sort();
    ensure!(sorted == expected, "{expected:?} were due, found: {findings:#?}");
    let packets = left.port(RDMA).get("sent_pkts").copied().unwrap_or_default();
    Ok(format!(
        "{} x {} bytes by perftest, {packets} packets recorded as the kernel counted; {}",
        moved.figure.messages,
        moved.figure.size,
        expected.join(", ")
    ))
}

/// What was posted to each queue pair and who is at its other end, as perftest says both: by the calls that newer programs
/// use, and by those of the others.
pub(super) fn queue_pairs(pair: &Pair) -> Result<String> {
    let followed = |load: Load| Load {
        is_followed: true,
        ..load
    };
    let loads = [
        followed(Load::new("ib_write_bw", 100, 65536, PATIENT)),
        Load {
            options: &["--use_old_post_send"],
            from: End::Right,
            ..followed(Load::new("ib_send_bw", 60, 4097, PATIENT))
        },
    ];
    let (moved, recordings) = during(pair, Since::Now, || {
        loads
            .map(|load| perftest(pair, load))
            .into_iter()
            .collect::<Result<Vec<_>>>()
    })?;
    let mut found = Vec::new();
    for (load, moved) in loads.iter().zip(moved) {
        let [left, right] = &recordings;
        let (sender, receiver) = match load.from {
            End::Left => (left, right),
            End::Right => (right, left),
        };
        let figure = moved.figure;
        let [number, peer_number] = figure.queue_pairs;
        let sending = QueuePair {
            number,
            peer_number,
            peer: data_address(load.from.other()),
            posts: figure.messages,
            bytes: figure.messages * figure.size,
            is_exact: true,
        };
        let receiving = QueuePair {
            number: peer_number,
            peer_number: number,
            peer: data_address(load.from),
            ..QueuePair::default()
        };
        let told = [
            sender.queue_pairs(moved.pids[0]),
            receiver.queue_pairs(moved.pids[1]),
        ];
        ensure!(
            told == [vec![sending.clone()], vec![receiving.clone()]],
            "{} says {sending:?} and {receiving:?}; recorded {told:?}",
            load.tool
        );
        found.push(format!(
            "{} {}: {} x {} bytes by perftest, {} recorded of queue pair {number} to {peer_number} at {}",
            load.tool,
            load.from.name(),
            figure.messages,
            figure.size,
            sending.bytes,
            sending.peer
        ));
    }
    Ok(found.join("; "))
}

/// The recorders end as they are asked to.
pub(super) fn stopped(pair: &Pair) -> Result<String> {
    pair.recorders()?.stop(pair)?;
    Ok("both recorders ended well".to_owned())
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
