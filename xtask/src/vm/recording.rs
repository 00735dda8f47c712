//! What the product saw in a machine while something happened there.
//!
//! One recorder per machine runs from the first check that needs it: on an emulated machine its start takes ten seconds. What
//! belongs to a check is cut out of what it wrote by then.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stallscope_vm::{Program, SHARED_FOLDER};

use super::guest::program;
use super::machine::Machine;
use super::pair::Pair;
use crate::lab::interrupt;
use crate::shell;

/// How long a recorder may take until it follows processes: 6 s on an idle host.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long it runs before anything happens: every device is read once, so that what grows is known. Devices are read every
/// two seconds; an emulated machine is slow.
const WARM_UP: Duration = Duration::from_secs(6);

/// How long after something happened its end is told: two more reads of every device.
const COOL_DOWN: Duration = Duration::from_secs(6);

/// How long it may take to stop, s.
const STOP_S: u64 = 60;

/// What the recorder says, in the shared folder.
const LOG: &str = "recorder.log";

/// What it writes there.
const RECORDING: &str = "recording";

/// The variable by which a preloaded program learns where the recorder says whom it follows (`tests/vm/fixtures/libcuda.c`).
const FOLLOWER_LOG: &str = "FOLLOWER_LOG";

/// The recorders of both machines, left first.
#[derive(Debug)]
pub(super) struct Recorders {
    pids: [u32; 2],
}

/// The facts about one machine's devices while something happened, in the order in which they were recorded.
#[derive(Debug)]
pub(super) struct Recording {
    facts: Vec<Value>,
    /// The same as a recording.
    file: PathBuf,
}

/// From when on something belongs to a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Since {
    /// The recorders' start, when every device is told of once.
    Start,
    /// The beginning of the work.
    Now,
}

/// Does work while both machines are recorded: what it gave, then left and right.
pub(super) fn during<T>(
    pair: &Pair,
    since: Since,
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, [Recording; 2])> {
    pair.recorders()?;
    let [left, right] = pair.both();
    let from = match since {
        Since::Start => [0, 0],
        Since::Now => [clock(left)?, clock(right)?],
    };
    let done = work()?;
    pause(COOL_DOWN)?;
    let parts = [
        Recording::cut(pair, left, from[0])?,
        Recording::cut(pair, right, from[1])?,
    ];
    Ok((done, parts))
}

/// A program that counts as one of a GPU job; it begins when the recorder follows it, and sends when that is watched.
pub(super) fn followed(pair: &Pair, mut program: Program) -> Program {
    program.variables.extend([
        preloaded(pair),
        (FOLLOWER_LOG.to_owned(), format!("{SHARED_FOLDER}/{LOG}")),
    ]);
    program
}

fn preloaded(pair: &Pair) -> (String, String) {
    (
        "LD_PRELOAD".to_owned(),
        pair.inside.gpu_library.display().to_string(),
    )
}

/// The machine's own clock, ns.
fn clock(machine: &Machine) -> Result<u64> {
    let text = machine.guest.shell("cut -d' ' -f1 /proc/uptime", 20)?;
    let (seconds, hundredths) = text.trim().split_once('.').context("no uptime")?;
    Ok(seconds.parse::<u64>()? * 1_000_000_000 + hundredths.parse::<u64>()? * 10_000_000)
}

fn log(machine: &Machine) -> String {
    let log = fs::read(machine.shared().join(LOG)).unwrap_or_default();
    String::from_utf8_lossy(&log).into_owned()
}

fn pause(how_long: Duration) -> Result<()> {
    interrupt::check()?;
    std::thread::sleep(how_long);
    interrupt::check()
}

impl Recorders {
    /// Starts both and waits until they follow processes and have read every device.
    pub(super) fn start(pair: &Pair) -> Result<Self> {
        let [left, right] = pair.both();
        let pids = [start(pair, left)?, start(pair, right)?];
        // What a recorder knows of a process is read while any is followed: this one stays.
        for machine in pair.both() {
            let keeper = Program {
                variables: vec![preloaded(pair)],
                ..program(&["sleep", "100000"])
            };
            let keeper = machine.guest.start(keeper, "keeper.log")?.pid();
            until_followed(machine, keeper)?;
        }
        pause(WARM_UP)?;
        Ok(Self { pids })
    }

    /// Asks both to stop; they must end well and must not have given up a part of their own.
    pub(super) fn stop(&self, pair: &Pair) -> Result<()> {
        for (machine, pid) in pair.both().into_iter().zip(self.pids) {
            let running = machine.guest.started(pid, "the recorder");
            let stopped = running.stopped(STOP_S);
            stopped.with_context(|| format!("it said:\n{}", log(machine)))?;
            ensure!(!log(machine).contains("panicked"), "{}", log(machine));
        }
        Ok(())
    }
}

fn start(pair: &Pair, machine: &Machine) -> Result<u32> {
    let config = format!(
        "[probes]\nobject = \"{}\"\n[store]\ndir = \"/run/store\"\n[control]\nsocket = \"/run/control\"\n",
        pair.inside.bpf_object.display()
    );
    fs::write(machine.shared().join("agent.toml"), config)?;
    let at = |name: &str| format!("{SHARED_FOLDER}/{name}");
    let words = [
        &pair.inside.stallscope.display().to_string(),
        "record",
        &at(RECORDING),
        "--config",
        &at("agent.toml"),
    ];
    Ok(machine.guest.start(program(&words), LOG)?.pid())
}

fn until_followed(machine: &Machine, pid: u32) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let word = format!(" pid={pid} ");
    while !log(machine).contains(&word) {
        interrupt::check()?;
        ensure!(
            Instant::now() < deadline,
            "the recorder on {} follows nobody after {PATIENCE:?}; it said:\n{}",
            machine.end.name(),
            log(machine)
        );
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// What `stallscope explain` finds wrong with the links of recordings of both machines.
pub(super) fn findings(pair: &Pair, recordings: &[Recording; 2]) -> Result<Vec<Value>> {
    let text = shell::output(
        Command::new(&pair.inside.stallscope)
            .arg("explain")
            .args(recordings.iter().map(|recording| &recording.file))
            .args(["--format", "json"]),
    )?;
    let report: Value = serde_json::from_str(&text).context("the report is not JSON")?;
    let findings = report["links"]["findings"].as_array();
    findings.cloned().context("the report has no findings of links")
}

impl Recording {
    /// What was told on a machine after `from`, ns of its clock, up to now.
    fn cut(pair: &Pair, machine: &Machine, from: u64) -> Result<Self> {
        let whole = machine.shared().join(RECORDING);
        let file = machine.shared().join(format!("part-{from}"));
        let (from, to) = (from.to_string(), clock(machine)?.to_string());
        let reader = || Command::new(&pair.inside.recorded_hardware);
        let said = || format!("the recorder said:\n{}", log(machine));
        shell::run(reader().arg(&whole).args([&from, &to]).arg(&file)).with_context(said)?;
        let text = shell::output(reader().arg(&file)).with_context(said)?;
        let facts = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
        Ok(Self { facts, file })
    }

    /// Facts of one kind.
    fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.facts.iter().filter_map(move |fact| fact.get(kind))
    }

    /// By how much the counters of an RDMA device's first port grew in all.
    pub(super) fn port(&self, device: &str) -> Counters {
        grown(
            self.of("port")
                .filter(|port| port["device"] == device && port["port"] == 1),
            "counters",
        )
    }

    /// The queue pairs of a process, each with all that was posted to it.
    pub(super) fn queue_pairs(&self, pid: u32) -> Vec<QueuePair> {
        let mut pairs: BTreeMap<u64, QueuePair> = BTreeMap::new();
        for fact in self.of("queue_pair").filter(|pair| pair["pid"] == pid) {
            let number = |member: &str| fact[member].as_u64().unwrap_or_default();
            let pair = pairs.entry(number("number")).or_default();
            pair.number = number("number");
            pair.peer_number = number("peer_number");
            pair.peer = fact["peer"].as_str().unwrap_or_default().to_owned();
            pair.posts += number("posts");
            pair.bytes += number("posted_bytes");
            // What was not counted whole is not exact, whatever the sum.
            pair.is_exact &= number("cut_calls") == 0;
        }
        pairs.into_values().collect()
    }

    /// By how much the error counters of a PCI device grew in all.
    pub(super) fn pci_errors(&self, address: &str) -> Counters {
        grown(
            self.of("pci").filter(|device| device["address"] == address),
            "errors",
        )
    }

    /// What was told last of a PCI device.
    pub(super) fn pci(&self, address: &str) -> Result<&Value> {
        self.of("pci")
            .filter(|device| device["address"] == address)
            .last()
            .with_context(|| format!("nothing was recorded of {address}"))
    }

    /// Severity of each PCI Express error that was told as it happened, with its device.
    pub(super) fn pci_events(&self) -> Vec<(String, String)> {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        self.of("event")
            .filter(|event| event["kind"].get("aer").is_some())
            .map(|event| (text(&event["pci"]), text(&event["kind"]["aer"]["severity"])))
            .collect()
    }
}

/// A queue pair as it was told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct QueuePair {
    /// Its number.
    pub(super) number: u64,
    /// The number of the one at the other end.
    pub(super) peer_number: u64,
    /// The address there.
    pub(super) peer: String,
    /// Work requests posted.
    pub(super) posts: u64,
    /// Bytes posted.
    pub(super) bytes: u64,
    /// No call was counted in part. Whether all were seen is not told of one made before its probe; that nothing was sent
    /// before is what [`followed`] sees to.
    pub(super) is_exact: bool,
}

impl Default for QueuePair {
    fn default() -> Self {
        Self {
            number: 0,
            peer_number: 0,
            peer: String::new(),
            posts: 0,
            bytes: 0,
            is_exact: true,
        }
    }
}

/// Counters by name.
pub(super) type Counters = BTreeMap<String, u64>;

fn grown<'a>(facts: impl Iterator<Item = &'a Value>, member: &str) -> Counters {
    let mut sums = Counters::new();
    for fact in facts {
        for (name, growth) in fact[member].as_object().into_iter().flatten() {
            *sums.entry(name.clone()).or_default() += growth.as_u64().unwrap_or_default();
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn recording(facts: Vec<Value>) -> Recording {
        Recording {
            facts,
            file: PathBuf::new(),
        }
    }

    #[test]
    fn what_grew_in_parts_is_summed_by_device() {
        let port = |device: &str, sent: u64| json!({"port": {"device": device, "port": 1, "counters": {"sent_pkts": sent}}});
        let recording = recording(vec![port("rxe0", 3), port("rxe1", 100), port("rxe0", 4)]);
        assert_eq!(recording.port("rxe0"), Counters::from([("sent_pkts".into(), 7)]));
    }

    #[test]
    fn posts_are_summed_by_queue_pair_and_one_uncounted_call_spoils_it() {
        let fact = |pid: u32, number: u64, bytes: u64, cut: u64| {
            json!({"queue_pair": {"pid": pid, "number": number, "peer": "a", "peer_number": 9, "posts": 1,
                   "posted_bytes": bytes, "cut_calls": cut}})
        };
        let all = recording(vec![
            fact(7, 1, 10, 0),
            fact(7, 1, 5, 0),
            fact(8, 1, 99, 0),
            fact(7, 2, 1, 2),
        ]);
        let pairs = all.queue_pairs(7);
        let told: Vec<_> = pairs
            .iter()
            .map(|pair| (pair.number, pair.posts, pair.bytes, pair.is_exact))
            .collect();
        assert_eq!(told, [(1, 2, 15, true), (2, 1, 1, false)]);
    }
}
