//! Links that lose and delay, and what the ports' counters say of them.

use anyhow::{Result, ensure};

use super::super::machine::Machine;
use super::super::pair::Pair;
use super::rdma::{Counters, Load, QUICK, counters_of, growth, perftest};

/// A discipline on one machine's end of the cable for data, gone with this value.
#[derive(Debug)]
pub(super) struct Spoiled<'a>(&'a Machine);

impl<'a> Spoiled<'a> {
    /// Puts a queueing discipline, in the words of `tc`, on what the machine sends.
    pub(super) fn with(machine: &'a Machine, discipline: &str) -> Result<Self> {
        machine
            .guest
            .shell(&format!("tc qdisc replace dev data root {discipline}"), 20)?;
        Ok(Self(machine))
    }
}

impl Drop for Spoiled<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.guest.shell("tc qdisc del dev data root", 20) {
            eprintln!("vm: a spoiled link stays: {error:#}");
        }
    }
}

/// What both ports counted during a run from left to right.
struct Counted {
    before: [Counters; 2],
    after: [Counters; 2],
}

impl Counted {
    fn during(pair: &Pair, load: Load) -> Result<Self> {
        let read = || anyhow::Ok([counters_of(&pair.left)?, counters_of(&pair.right)?]);
        let before = read()?;
        perftest(pair, load)?;
        Ok(Self {
            before,
            after: read()?,
        })
    }

    fn left(&self, name: &str) -> Result<u64> {
        growth(&self.before[0], &self.after[0], name)
    }

    fn right(&self, name: &str) -> Result<u64> {
        growth(&self.before[1], &self.after[1], name)
    }
}

/// Packets lost on the way from left to right: the receiver finds holes, the sender none, fewer arrive than were sent.
pub(super) fn loss(pair: &Pair) -> Result<String> {
    let load = Load {
        tool: "ib_send_bw",
        messages: 3000,
        size: 1024,
        timeout: QUICK,
    };
    let spoiled = Spoiled::with(&pair.left, "netem loss 3% limit 10000")?;
    let counted = Counted::during(pair, load)?;
    drop(spoiled);
    let (sent, arrived) = (counted.left("sent_pkts")?, counted.right("rcvd_pkts")?);
    let holes = counted.right("out_of_seq_request")?;
    let elsewhere = counted.left("out_of_seq_request")?;
    let text =
        format!("{sent} packets sent, {arrived} arrived; holes found right {holes}, found left {elsewhere}");
    ensure!(arrived < sent && holes > 0 && elsewhere == 0, "{text}");
    Ok(text)
}

/// Packets later than the sender waits: it sends again what was on its way, nothing is missing.
pub(super) fn delay(pair: &Pair) -> Result<String> {
    let load = Load {
        tool: "ib_send_bw",
        messages: 20,
        size: 1024,
        timeout: QUICK,
    };
    let spoiled = Spoiled::with(&pair.left, "netem delay 150ms limit 10000")?;
    let counted = Counted::during(pair, load)?;
    drop(spoiled);
    let (again, twice) = (
        counted.left("completer_retry_err")?,
        counted.right("duplicate_request")?,
    );
    let holes = counted.right("out_of_seq_request")?;
    let text = format!("retries left {again}, duplicates right {twice}, holes right {holes}");
    ensure!(again > 0 && twice > 0 && holes == 0, "{text}");
    Ok(text)
}
