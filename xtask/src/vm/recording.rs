//! What the product saw in a machine while something happened there.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use super::guest::{Running, program};
use super::machine::Machine;
use super::pair::Pair;
use crate::lab::interrupt;
use crate::shell;

/// How long a recorder runs before anything happens: its programs load, and every device is read once, so that what grows
/// is known. Devices are read every two seconds; an emulated machine is slow.
const WARM_UP: Duration = Duration::from_secs(12);

/// How long it runs after that: two more reads of every device.
const COOL_DOWN: Duration = Duration::from_secs(6);

/// How long it may take to stop, s.
const STOP_S: u64 = 60;

/// The facts about one machine's devices, in the order in which they were recorded.
#[derive(Debug)]
pub(super) struct Recording(Vec<Value>);

/// Runs `work` while both machines are recorded: what it gave, then left and right.
pub(super) fn during<T>(pair: &Pair, work: impl FnOnce() -> Result<T>) -> Result<(T, [Recording; 2])> {
    let left = start(pair, &pair.left)?;
    let right = start(pair, &pair.right)?;
    pause(WARM_UP)?;
    let done = work();
    pause(COOL_DOWN)?;
    // Both are stopped, whatever became of the work.
    let stopped = [left.stopped(STOP_S), right.stopped(STOP_S)];
    let done = done?;
    for stopped in stopped {
        stopped?;
    }
    Ok((done, [read(pair, &pair.left)?, read(pair, &pair.right)?]))
}

fn start<'a>(pair: &Pair, machine: &'a Machine) -> Result<Running<'a>> {
    let config = format!(
        "[probes]\nobject = \"{}\"\n[store]\ndir = \"/run/store\"\n[control]\nsocket = \"/run/control\"\n",
        pair.inside.bpf_object.display()
    );
    fs::write(machine.shared().join("agent.toml"), config)?;
    let at = |name: &str| format!("{}/{name}", stallscope_vm::SHARED_FOLDER);
    let words = [
        &pair.inside.stallscope.display().to_string(),
        "record",
        &at("recording"),
        "--config",
        &at("agent.toml"),
    ];
    machine.guest.start(program(&words), "recorder.log")
}

fn pause(how_long: Duration) -> Result<()> {
    interrupt::check()?;
    std::thread::sleep(how_long);
    interrupt::check()
}

fn read(pair: &Pair, machine: &Machine) -> Result<Recording> {
    let file = machine.shared().join("recording");
    let text = facts(&pair.inside.recorded_hardware, &file).with_context(|| {
        let log = fs::read(machine.shared().join("recorder.log")).unwrap_or_default();
        format!("the recorder said:\n{}", String::from_utf8_lossy(&log))
    })?;
    let facts = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok(Recording(facts))
}

fn facts(reader: &Path, file: &Path) -> Result<String> {
    shell::output(Command::new(reader).arg(file))
}

impl Recording {
    /// Facts of one kind.
    fn of<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Value> {
        self.0.iter().filter_map(move |fact| fact.get(kind))
    }

    /// By how much the counters of an RDMA device's first port grew in all.
    pub(super) fn port(&self, device: &str) -> Counters {
        grown(
            self.of("port")
                .filter(|port| port["device"] == device && port["port"] == 1),
            "counters",
        )
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

    #[test]
    fn what_grew_in_parts_is_summed_by_device() {
        let port = |device: &str, sent: u64| json!({"port": {"device": device, "port": 1, "counters": {"sent_pkts": sent}}});
        let recording = Recording(vec![port("rxe0", 3), port("rxe1", 100), port("rxe0", 4)]);
        assert_eq!(recording.port("rxe0"), Counters::from([("sent_pkts".into(), 7)]));
    }
}
