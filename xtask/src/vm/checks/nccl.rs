//! The real NCCL's own InfiniBand transport between the machines.

use std::fs;

use anyhow::{Context, Result, ensure};
use stallscope_vm::Program;

use super::super::machine::End;
use super::super::pair::{Pair, RDMA, data_address, talk_address};
use super::super::recording::{Since, during, followed};
use super::rdma::{PATIENT, counters_of, growth};
use crate::setup;

/// How much is moved from left to right.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    /// Messages.
    pub(super) messages: u64,
    /// Bytes of one.
    pub(super) size: u64,
    /// How long a queue pair waits for an acknowledgement: 4.096 us times two to this power.
    pub(super) timeout: u32,
}

/// Without trouble.
const PLAIN: Transfer = Transfer {
    messages: 40,
    size: 256 << 10,
    timeout: PATIENT,
};

/// Payload of a packet over a cable with the usual 1,500 bytes.
const PACKET: u64 = 1024;

/// What was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moved {
    /// Bytes, as both sides say.
    pub(super) bytes: u64,
    /// The process that sent, then the one that received.
    pub(super) pids: [u32; 2],
}

/// Messages through listen, connect, accept, regMr, isend, irecv and test: both sides name the same bytes, the ports counted
/// the packets that carry them, and what was recorded of the queue pair that sent is exactly that.
pub(super) fn transport(pair: &Pair) -> Result<String> {
    let (counted, recordings) = during(pair, Since::Now, || {
        let before = [counters_of(&pair.left)?, counters_of(&pair.right)?];
        let moved = moved(pair, PLAIN)?;
        let packets = growth(&before[0], &counters_of(&pair.left)?, "sent_pkts")?;
        let arrived = growth(&before[1], &counters_of(&pair.right)?, "rcvd_pkts")?;
        Ok((moved, packets, arrived))
    })?;
    let (moved, packets, arrived) = counted;
    let data = PLAIN.messages * PLAIN.size.div_ceil(PACKET);
    ensure!(
        packets >= data && arrived == packets,
        "{data} packets of data, {packets} sent, {arrived} arrived"
    );
    let [left, right] = &recordings;
    let (sending, receiving) = (left.queue_pairs(moved.pids[0]), right.queue_pairs(moved.pids[1]));
    let text = || format!("{moved:?}; recorded left {sending:?}, right {receiving:?}");
    ensure!(
        sending
            .iter()
            .chain(&receiving)
            .all(|queue_pair| queue_pair.is_exact),
        "some went uncounted: {}",
        text()
    );
    let bytes: u64 = sending.iter().map(|queue_pair| queue_pair.bytes).sum();
    ensure!(
        bytes == moved.bytes,
        "{} bytes were sent: {}",
        moved.bytes,
        text()
    );
    let carrier = sending
        .iter()
        .find(|queue_pair| queue_pair.bytes > 0)
        .with_context(text)?;
    ensure!(carrier.peer == data_address(End::Right), "{}", text());
    let other = receiving
        .iter()
        .find(|other| (other.number, other.peer_number) == (carrier.peer_number, carrier.number))
        .with_context(text)?;
    ensure!(other.peer == data_address(End::Left), "{}", text());
    Ok(format!(
        "{} x {} bytes by ncclNetIb of the wheel, {} bytes moved, {packets} packets counted; recorded {bytes} bytes of queue pair \
         {} to {} at {}",
        PLAIN.messages, PLAIN.size, moved.bytes, carrier.number, carrier.peer_number, carrier.peer
    ))
}

/// Moves everything from left to right by programs that the recorders follow; both sides must agree on the bytes.
pub(super) fn moved(pair: &Pair, transfer: Transfer) -> Result<Moved> {
    let server = pair
        .right
        .guest
        .start(caller(pair, "serve", transfer), "nccl-receiver.log")?;
    let receiver = server.pid();
    let said = pair.left.guest.run(caller(pair, "send", transfer), 150)?;
    let log = || {
        let log = fs::read(pair.right.shared().join("nccl-receiver.log")).unwrap_or_default();
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
        sent == transfer.messages * transfer.size && received == sent,
        "{transfer:?} was to move; sent {sent}, received {received}"
    );
    Ok(Moved {
        bytes: sent,
        pids: [said.pid, receiver],
    })
}

fn caller(pair: &Pair, role: &str, transfer: Transfer) -> Program {
    let library = setup::nccl_library(&pair.paths).display().to_string();
    let address = talk_address(End::Right);
    let (messages, size) = (transfer.messages.to_string(), transfer.size.to_string());
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
        ("NCCL_IB_TIMEOUT", transfer.timeout.to_string()),
        ("NCCL_DEBUG", "INFO".to_owned()),
        ("NCCL_DEBUG_SUBSYS", "INIT,NET".to_owned()),
        // It is to send only when that is seen.
        ("WAIT_FOR_PROBE", "1".to_owned()),
    ];
    let program = Program {
        words: words.map(ToString::to_string).into(),
        variables: variables.map(|(name, value)| (name.to_owned(), value)).into(),
    };
    followed(pair, program)
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
