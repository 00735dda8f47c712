//! Links that lose, delay and limit: what the ports' counters say of them, and what the product makes of it.

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::super::machine::{End, Machine};
use super::super::pair::Pair;
use super::super::recording::{Recording, Since, during, findings};
use super::nccl::{self, Transfer};
use super::rdma::{Counters, Load, PATIENT, QUICK, counters_of, growth, perftest};

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
    fn during(pair: &Pair, work: impl FnOnce() -> Result<()>) -> Result<Self> {
        let read = || anyhow::Ok([counters_of(&pair.left)?, counters_of(&pair.right)?]);
        let before = read()?;
        work()?;
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

/// Does work over a spoiled link and counts and records meanwhile.
fn spoiled(
    pair: &Pair,
    end: End,
    discipline: &str,
    work: impl FnOnce() -> Result<()>,
) -> Result<(Counted, [Recording; 2])> {
    during(pair, Since::Now, || {
        let spoiled = Spoiled::with(pair.machine(end), discipline)?;
        let counted = Counted::during(pair, work)?;
        drop(spoiled);
        Ok(counted)
    })
}

/// The one thing found wrong with the network, as cause, node and link.
fn verdict(pair: &Pair, recordings: &[Recording; 2]) -> Result<(String, String, String)> {
    let all = findings(pair, recordings)?;
    // The card that runs below its best is another check's, and stays.
    let of_network = |finding: &&Value| {
        finding["cause"]
            .as_str()
            .is_some_and(|cause| cause.starts_with("network.") && cause != "network.pcie")
    };
    let found: Vec<&Value> = all.iter().filter(of_network).collect();
    let [only] = found.as_slice() else {
        bail!("one finding about the network was due: {found:#?}");
    };
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let place = &only["where"];
    Ok((word(&only["cause"]), word(&place["node"]), word(&place["link"])))
}

/// Packets lost on the way from left to right, of perftest and of the real NCCL: the receiver finds holes, the sender none,
/// fewer arrive than were sent, and the way between them is named.
pub(super) fn loss(pair: &Pair) -> Result<String> {
    let load = Load::new("ib_send_bw", 1000, 1024, QUICK);
    let transfer = Transfer {
        messages: 40,
        size: 32 << 10,
        timeout: QUICK + 1,
    };
    let (counted, recordings) = spoiled(pair, End::Left, "netem loss 2% limit 10000", || {
        perftest(pair, load)?;
        nccl::moved(pair, transfer).map(drop)
    })?;
    let (sent, arrived) = (counted.left("sent_pkts")?, counted.right("rcvd_pkts")?);
    let holes = counted.right("out_of_seq_request")?;
    let elsewhere = counted.left("out_of_seq_request")?;
    let verdict = verdict(pair, &recordings)?;
    let text = format!(
        "{sent} packets sent, {arrived} arrived; holes found right {holes}, found left {elsewhere}; verdict {verdict:?}"
    );
    ensure!(arrived < sent && holes > 0 && elsewhere == 0, "{text}");
    let due = ("network.fabric", "left", "left rxe0:1 -> right rxe0:1");
    ensure!(
        (&*verdict.0, &*verdict.1, &*verdict.2) == due,
        "{due:?} was due: {text}"
    );
    Ok(text)
}

/// Packets later than the sender waits: it sends again what was on its way, nothing is missing, and the way is named.
pub(super) fn delay(pair: &Pair) -> Result<String> {
    let load = Load {
        options: &["-t", "8"],
        ..Load::new("ib_send_bw", 200, 1024, QUICK)
    };
    let (counted, recordings) = spoiled(pair, End::Left, "netem delay 150ms limit 10000", || {
        perftest(pair, load).map(drop)
    })?;
    let (again, twice) = (
        counted.left("completer_retry_err")?,
        counted.right("duplicate_request")?,
    );
    let holes = counted.right("out_of_seq_request")?;
    let verdict = verdict(pair, &recordings)?;
    let text =
        format!("retries left {again}, duplicates right {twice}, holes right {holes}; verdict {verdict:?}");
    ensure!(again > 0 && twice > 0 && holes == 0, "{text}");
    ensure!((&*verdict.0, &*verdict.1) == ("network.fabric", "left"), "{text}");
    Ok(text)
}

/// One side may send less than it is given: nothing is lost or late, and that side's card is named.
pub(super) fn limit(pair: &Pair) -> Result<String> {
    let load = Load {
        from: End::Right,
        ..Load::new("ib_send_bw", 60, 32768, PATIENT)
    };
    let (counted, recordings) = spoiled(pair, End::Right, "tbf rate 4mbit burst 16k limit 4m", || {
        perftest(pair, load).map(drop)
    })?;
    let (sent, arrived) = (counted.right("sent_pkts")?, counted.left("rcvd_pkts")?);
    let holes = counted.left("out_of_seq_request")?;
    let verdict = verdict(pair, &recordings)?;
    let text = format!("{sent} packets sent, {arrived} arrived, holes left {holes}; verdict {verdict:?}");
    ensure!(sent == arrived && holes == 0, "{text}");
    ensure!((&*verdict.0, &*verdict.1) == ("network.nic", "right"), "{text}");
    Ok(text)
}
