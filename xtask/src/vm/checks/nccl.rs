//! The real NCCL's own InfiniBand transport between the machines.

use anyhow::{Context, Result, ensure};
use stallscope_vm::Program;

use super::super::pair::{Pair, RDMA, talk_address};
use super::rdma::{PATIENT, counters_of, growth};
use crate::setup;

/// How much is moved.
const MESSAGES: u64 = 40;
const SIZE: u64 = 256 << 10;

/// Payload of a packet over a cable with the usual 1,500 bytes.
const PACKET: u64 = 1024;

/// Messages through listen, connect, accept, regMr, isend, irecv and test: both sides name the same bytes, and the ports
/// counted the packets that carry them.
pub(super) fn transport(pair: &Pair) -> Result<String> {
    let before = [counters_of(&pair.left)?, counters_of(&pair.right)?];
    let sent = moved(pair)?;
    let after = [counters_of(&pair.left)?, counters_of(&pair.right)?];
    let packets = growth(&before[0], &after[0], "sent_pkts")?;
    let arrived = growth(&before[1], &after[1], "rcvd_pkts")?;
    let data = MESSAGES * SIZE.div_ceil(PACKET);
    ensure!(
        packets >= data && arrived == packets,
        "{data} packets of data, {packets} sent, {arrived} arrived"
    );
    Ok(format!(
        "{MESSAGES} x {SIZE} bytes by ncclNetIb of the wheel, {sent} bytes moved, {packets} packets counted"
    ))
}

/// Moves everything from left to right and hands back the bytes, on which both sides must agree.
pub(super) fn moved(pair: &Pair) -> Result<u64> {
    let server = pair
        .right
        .guest
        .start(caller(pair, "serve"), "nccl-receiver.log")?;
    let said = pair.left.guest.run(caller(pair, "send"), 150)?;
    let log = || {
        let log = std::fs::read(pair.right.shared().join("nccl-receiver.log")).unwrap_or_default();
        String::from_utf8_lossy(&log).into_owned()
    };
    ensure!(
        said.code == Some(0),
        "the sender said:\n{}{}\nthe receiver said:\n{}",
        said.stdout,
        said.stderr,
        log()
    );
    server.ended(60).with_context(log)?;
    let (sent, received) = (bytes(&said.stdout)?, bytes(&log())?);
    ensure!(
        sent == MESSAGES * SIZE && received == sent,
        "{} were to move; sent {sent}, received {received}",
        MESSAGES * SIZE
    );
    Ok(sent)
}

fn caller(pair: &Pair, role: &str) -> Program {
    let library = setup::nccl_library(&pair.paths).display().to_string();
    let address = talk_address(pair.right.end);
    let (messages, size) = (MESSAGES.to_string(), SIZE.to_string());
    let words = [
        &pair.inside.nccl_caller.display().to_string(),
        &library,
        role,
        &address,
        &messages,
        &size,
    ];
    let variables = [
        ("NCCL_SOCKET_IFNAME", "talk".to_owned()),
        ("NCCL_IB_HCA", RDMA.to_owned()),
        ("NCCL_IB_TIMEOUT", PATIENT.to_string()),
        ("NCCL_DEBUG", "INFO".to_owned()),
        ("NCCL_DEBUG_SUBSYS", "INIT,NET".to_owned()),
    ];
    Program {
        words: words.map(ToString::to_string).into(),
        variables: variables.map(|(name, value)| (name.to_owned(), value)).into(),
    }
}

/// The figure in `... bytes=N`.
fn bytes(said: &str) -> Result<u64> {
    said.split_whitespace()
        .find_map(|word| word.strip_prefix("bytes="))
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("no figure in:\n{said}"))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_figure_is_found_among_the_librarys_own_words() {
        let said = "x NCCL INFO NET/IB : Using [0]rxe0:1/RoCE\nIB devices=1 messages=40 bytes=1024\n";
        assert_eq!(bytes(said).unwrap(), 1024);
        assert!(bytes("IB devices=1").is_err());
    }
}
