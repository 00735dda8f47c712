//! PCI Express: errors that the emulator injects, and a link below what its slot allows.

use anyhow::{Context, Result, ensure};

use super::super::machine::{CARD, Machine};
use super::super::pair::Pair;

/// Where the kernel counts errors that lost a transaction.
const NON_FATAL: &str = "aer_dev_nonfatal";

/// PCI address of the card that carries RDMA.
pub(super) fn card(machine: &Machine) -> Result<String> {
    let path = machine.guest.shell(
        "basename $(dirname $(readlink -f /sys/class/net/data/device))",
        20,
    )?;
    Ok(path.trim().to_owned())
}

/// PCI address of the display device, a GPU to the bus.
pub(super) fn gpu(machine: &Machine) -> Result<String> {
    let path = machine.guest.shell(
        "for d in /sys/bus/pci/devices/*; do case $(cat $d/class) in 0x03*) basename $d;; esac; done",
        20,
    )?;
    Ok(path.trim().to_owned())
}

/// Injects an error that lost a transaction into a device of a machine, by the emulator's name of it.
pub(super) fn inject(machine: &Machine, device: &str) -> Result<()> {
    let answer = machine.monitor(&format!("pcie_aer_inject_error {device} COMP_TIME"))?;
    ensure!(answer.starts_with("OK"), "the emulator said {answer:?}");
    Ok(())
}

/// Errors of a device that lost a transaction, by the kernel's own count.
fn non_fatal(machine: &Machine, address: &str) -> Result<u64> {
    let text = machine
        .guest
        .shell(&format!("cat /sys/bus/pci/devices/{address}/{NON_FATAL}"), 20)?;
    text.lines()
        .find_map(|line| line.strip_prefix("TOTAL_ERR_NONFATAL "))
        .and_then(|count| count.trim().parse().ok())
        .with_context(|| format!("{NON_FATAL} of {address} has no total:\n{text}"))
}

/// An injected error fires the kernel's event for the card, and is counted there and nowhere else.
pub(super) fn errors(pair: &Pair) -> Result<String> {
    const TRACING: &str = "/sys/kernel/tracing/instances/check";
    let (left, right) = (card(&pair.left)?, card(&pair.right)?);
    let before = [non_fatal(&pair.left, &left)?, non_fatal(&pair.right, &right)?];
    pair.left.guest.shell(
        &format!("mkdir {TRACING}; echo 1 > {TRACING}/events/ras/aer_event/enable"),
        20,
    )?;
    inject(&pair.left, CARD)?;
    let event = pair.left.guest.shell(
        &format!(
            "for i in $(seq 100); do grep -m1 aer_event: {TRACING}/trace && exit 0; sleep 0.1; done; exit 1"
        ),
        40,
    );
    pair.left.guest.shell(&format!("rmdir {TRACING}"), 20)?;
    let event = event.context("the kernel fired no event")?;
    ensure!(
        event.contains(&left) && event.contains("Completion Timeout"),
        "the event is {event:?}, the card {left}"
    );
    let grew = non_fatal(&pair.left, &left)? - before[0];
    let elsewhere = non_fatal(&pair.right, &right)? - before[1];
    ensure!(
        grew == 1 && elsewhere == 0,
        "counted {grew} left and {elsewhere} right"
    );
    Ok(format!(
        "{left}: one Completion Timeout injected, one event, one counted"
    ))
}

/// The slot above the card carries less than it could, as the kernel reads both.
pub(super) fn width(pair: &Pair) -> Result<String> {
    let address = card(&pair.left)?;
    let text = pair.left.guest.shell(
        &format!(
            "cd $(readlink -f /sys/bus/pci/devices/{address}/..); cat current_link_speed current_link_width max_link_speed \
             max_link_width"
        ),
        20,
    )?;
    let lines: Vec<&str> = text.lines().collect();
    ensure!(
        lines == ["2.5 GT/s PCIe", "1", "16.0 GT/s PCIe", "16"],
        "the slot's link reads {lines:?}"
    );
    Ok("slot of the card at 2.5 GT/s x1 of 16 GT/s x16".to_owned())
}
