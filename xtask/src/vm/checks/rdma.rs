//! RDMA between the machines, against perftest's own figures.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result, ensure};
use stallscope_vm::Program;

use super::super::guest::program;
use super::super::machine::{End, Machine};
use super::super::pair::{Pair, RDMA, talk_address};
use super::super::recording::followed;

/// How much one run moves.
#[derive(Debug, Clone, Copy)]
pub(super) struct Load {
    /// perftest's program.
    pub(super) tool: &'static str,
    /// What else it is told.
    pub(super) options: &'static [&'static str],
    /// Messages.
    pub(super) messages: u64,
    /// Bytes of one.
    pub(super) size: u64,
    /// How long a queue pair waits for an acknowledgement: 4.096 us times two to this power.
    pub(super) timeout: u32,
    /// Who sends.
    pub(super) from: End,
    /// Whether both sides count as processes of a GPU job.
    pub(super) is_followed: bool,
}

impl Load {
    /// Messages from left to right that nobody follows.
    pub(super) const fn new(tool: &'static str, messages: u64, size: u64, timeout: u32) -> Self {
        Self {
            tool,
            options: &[],
            messages,
            size,
            timeout,
            from: End::Left,
            is_followed: false,
        }
    }
}

/// Long enough (4 s) that a sender whose turn on a busy host comes late does not send again.
pub(super) const PATIENT: u32 = 20;

/// perftest's own (67 ms), short enough for a lossy link.
pub(super) const QUICK: u32 = 14;

/// How long one run may take, s: 5 s on two idle cores, emulated.
const RUN_S: u64 = 100;

/// What perftest says it moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Figure {
    /// Messages.
    pub(super) messages: u64,
    /// Bytes of one.
    pub(super) size: u64,
    /// Payload of a packet, bytes.
    pub(super) mtu: u64,
    /// Number of the queue pair that sends, then of the one that receives.
    pub(super) queue_pairs: [u64; 2],
}

/// One run of perftest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Moved {
    /// What it says.
    pub(super) figure: Figure,
    /// The process that sent, then the one that received.
    pub(super) pids: [u32; 2],
}

/// A port's counters as the kernel shows them.
pub(super) type Counters = BTreeMap<String, u64>;

/// A write moves into the peer's memory unseen by it, a send is received.
const LOADS: [Load; 2] = [
    Load::new("ib_write_bw", 100, 65536, PATIENT),
    Load::new("ib_send_bw", 100, 32768, PATIENT),
];

/// Packets counted by the ports, against what perftest moved.
pub(super) fn counters(pair: &Pair) -> Result<String> {
    let mut found = Vec::new();
    for load in LOADS {
        let before = [counters_of(&pair.left)?, counters_of(&pair.right)?];
        let figure = perftest(pair, load)?.figure;
        let after = [counters_of(&pair.left)?, counters_of(&pair.right)?];
        let grew = |end: usize, name: &str| growth(&before[end], &after[end], name);
        let sent = grew(0, "sent_pkts")?;
        let arrived = grew(1, "rcvd_pkts")?;
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

/// Runs perftest.
pub(super) fn perftest(pair: &Pair, load: Load) -> Result<Moved> {
    const SERVER_LOG: &str = "perftest-server.log";
    let (sender, receiver) = (pair.machine(load.from), pair.machine(load.from.other()));
    let (messages, size, timeout) = (
        load.messages.to_string(),
        load.size.to_string(),
        load.timeout.to_string(),
    );
    // The second address of a port is its IPv4 address; numbers of clocks are of no use here (-F).
    let words = [
        load.tool, "-d", RDMA, "-x", "1", "-n", &messages, "-s", &size, "-u", &timeout, "-F",
    ];
    let prepared = |words: &[&str]| -> Program {
        let program = program(&[words, load.options].concat());
        if load.is_followed {
            followed(pair, program)
        } else {
            program
        }
    };
    let server = receiver.guest.start(prepared(&words), SERVER_LOG)?;
    let server_said = || {
        let log = fs::read(receiver.shared().join(SERVER_LOG)).unwrap_or_default();
        format!("the receiver said:\n{}", String::from_utf8_lossy(&log))
    };
    let receiver_pid = server.pid();
    let listening =
        "for i in $(seq 300); do [ -n \"$(ss -Hltn 'sport = :18515')\" ] && exit 0; sleep 0.1; done; exit 1";
    receiver.guest.shell(listening, 90).with_context(server_said)?;
    let peer = talk_address(receiver.end);
    let said = sender
        .guest
        .run(prepared(&[&words[..], &[&peer]].concat()), RUN_S)?;
    ensure!(
        said.code == Some(0),
        "{} ended with {:?}:\n{}{}\n{}",
        load.tool,
        said.code,
        said.stdout,
        said.stderr,
        server_said()
    );
    server.ended(60).with_context(server_said)?;
    let figure =
        figure(&said.stdout).with_context(|| format!("{} said no figure:\n{}", load.tool, said.stdout))?;
    ensure!(
        (figure.messages, figure.size) == (load.messages, load.size),
        "{} was asked for {load:?} and says {figure:?}",
        load.tool
    );
    Ok(Moved {
        figure,
        pids: [said.pid, receiver_pid],
    })
}

/// The figure in what the sender prints: the path's `Mtu`, both queue pairs, then a table with bytes and messages first.
fn figure(said: &str) -> Option<Figure> {
    let queue_pair = |side: &str| {
        let line = said.lines().find(|line| line.trim().starts_with(side))?;
        let number = line.split_once("QPN 0x")?.1.split_whitespace().next()?;
        u64::from_str_radix(number, 16).ok()
    };
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
        queue_pairs: [queue_pair("local address:")?, queue_pair("remote address:")?],
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
                    ------\n local address: LID 0000 QPN 0x0011 PSN 0x4c8f7b RKey 0x00026d VAddr 0x005577bd34d000\n \
                    GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:77:01:01\n remote address: LID 0000 QPN 0x001a PSN 0x895871 \
                    RKey 0x000222 VAddr 0x005632b56c5000\n GID: 00:00:00:00:00:00:00:00:00:00:255:255:10:77:01:02\n \
                    ------\n #bytes     #iterations    BW peak[MB/sec]    BW average[MB/sec]   MsgRate[Mpps]\n \
                    65536      500              2.96               2.76   \t\t   0.000044\n------\n";
        assert_eq!(
            figure(said).unwrap(),
            Figure {
                messages: 500,
                size: 65536,
                mtu: 1024,
                queue_pairs: [0x11, 0x1a],
            }
        );
        assert_eq!(figure("Couldn't connect"), None);
    }
}
