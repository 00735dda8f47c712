//! RDMA between the machines, against perftest's own figures.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::super::guest::program;
use super::super::machine::Machine;
use super::super::pair::{Pair, RDMA, talk_address};

/// How much one run moves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// perftest's program.
    pub(super) tool: &'static str,
    /// Messages.
    pub(super) messages: u64,
    /// Bytes of one.
    pub(super) size: u64,
    /// How long a queue pair waits for an acknowledgement: 4.096 us times two to this power.
    pub(super) timeout: u32,
}

/// Long enough (4 s) that a sender whose turn on a busy host comes late does not send again.
pub(super) const PATIENT: u32 = 20;

/// perftest's own (67 ms), short enough for a lossy link.
pub(super) const QUICK: u32 = 14;

/// What perftest says it moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Figure {
    /// Messages.
    pub(super) messages: u64,
    /// Bytes of one.
    pub(super) size: u64,
    /// Payload of a packet, bytes.
    pub(super) mtu: u64,
}

/// A port's counters as the kernel shows them.
pub(super) type Counters = BTreeMap<String, u64>;

/// A write moves into the peer's memory unseen by it, a send is received.
const LOADS: [Load; 2] = [
    Load {
        tool: "ib_write_bw",
        messages: 100,
        size: 65536,
        timeout: PATIENT,
    },
    Load {
        tool: "ib_send_bw",
        messages: 100,
        size: 32768,
        timeout: PATIENT,
    },
];

/// Packets counted by the ports, against what perftest moved.
pub(super) fn counters(pair: &Pair) -> Result<String> {
    let mut found = Vec::new();
    for load in LOADS {
        let before = [counters_of(&pair.left)?, counters_of(&pair.right)?];
        let figure = perftest(pair, load)?;
        let after = [counters_of(&pair.left)?, counters_of(&pair.right)?];
        let grew = |end: usize, name: &str| growth(&before[end], &after[end], name);
        let sent = grew(0, "sent_pkts")?;
        let arrived = grew(1, "rcvd_pkts")?;
        ensure!(
            (figure.messages, figure.size) == (load.messages, load.size),
            "{} was asked for {load:?} and says {figure:?}",
            load.tool
        );
        let data = figure.messages * figure.size.div_ceil(figure.mtu);
        // A sender that waits too long for its turn on a busy host sends again, and says so.
        let again = grew(0, "completer_retry_err")? != 0 || grew(1, "duplicate_request")? != 0;
        ensure!(
            if again { sent >= data } else { sent == data },
            "{}: {data} packets of data, {sent} sent (repeated: {again})",
            load.tool
        );
        ensure!(arrived == sent, "{}: {sent} sent, {arrived} arrived", load.tool);
        found.push(format!(
            "{}: {} x {} bytes, {data} packets of {} bytes, {sent} counted",
            load.tool, figure.messages, figure.size, figure.mtu
        ));
    }
    Ok(found.join("; "))
}

/// Runs perftest from left to right.
pub(super) fn perftest(pair: &Pair, load: Load) -> Result<Figure> {
    let (messages, size, timeout) = (
        load.messages.to_string(),
        load.size.to_string(),
        load.timeout.to_string(),
    );
    // The third address of a port is its IPv4 address; numbers of clocks are of no use here (-F).
    let words = [
        load.tool, "-d", RDMA, "-x", "1", "-n", &messages, "-s", &size, "-u", &timeout, "-F",
    ];
    let server = pair.right.guest.start(program(&words), "perftest-server.log")?;
    let listening =
        "for i in $(seq 200); do [ -n \"$(ss -Hltn 'sport = :18515')\" ] && exit 0; sleep 0.1; done; exit 1";
    pair.right.guest.shell(listening, 60)?;
    let peer = talk_address(pair.right.end);
    let said = pair.left.guest.output(&[&words[..], &[&peer]].concat(), 240)?;
    server.ended(60)?;
    figure(&said).with_context(|| format!("{} said no figure:\n{said}", load.tool))
}

/// The figure in what perftest prints: the path's `Mtu`, then a table with bytes and messages first.
fn figure(said: &str) -> Option<Figure> {
    let mtu = said
        .lines()
        .find_map(|line| line.trim().strip_prefix("Mtu"))
        .and_then(|rest| {
            rest.trim_start_matches([' ', ':'])
                .split('[')
                .next()?
                .parse()
                .ok()
        })?;
    let row = said
        .lines()
        .skip_while(|line| !line.trim().starts_with("#bytes"))
        .nth(1)?;
    let mut numbers = row.split_whitespace();
    Some(Figure {
        size: numbers.next()?.parse().ok()?,
        messages: numbers.next()?.parse().ok()?,
        mtu,
    })
}

/// The port's counters, read by nobody but the shell.
pub(super) fn counters_of(machine: &Machine) -> Result<Counters> {
    let text = machine.guest.shell(
        &format!("cd /sys/class/infiniband/{RDMA}/ports/1/hw_counters; grep -H . *"),
        30,
    )?;
    Ok(text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .filter_map(|(name, value)| Some((name.to_owned(), value.trim().parse().ok()?)))
        .collect())
}

/// By how much a counter grew.
pub(super) fn growth(before: &Counters, after: &Counters, name: &str) -> Result<u64> {
    let of = |counters: &Counters| counters.get(name).copied();
    let (before, after) = of(before)
        .zip(of(after))
        .with_context(|| format!("the port has no counter {name}"))?;
    after
        .checked_sub(before)
        .with_context(|| format!("{name} fell from {before} to {after}"))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_figure_is_read_from_what_perftest_prints() {
        let said = " Connection type : RC\t\tUsing SRQ      : OFF\n Mtu             : 1024[B]\n Link type       : Ethernet\n\
                    ------\n #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n \
                    65536      500              2.96               2.76   \t\t   0.000044\n------\n";
        assert_eq!(
            figure(said).unwrap(),
            Figure {
                messages: 500,
                size: 65536,
                mtu: 1024
            }
        );
        assert_eq!(figure("Couldn't connect"), None);
    }
}
