//! `recorded-hardware FILE`: what a recording holds of the node's devices, one JSON object per line.
//!
//! `recorded-hardware FILE FROM TO PART`: writes what was told of devices and links after FROM and up to TO, nanoseconds of the
//! node's clock, to another recording. FILE may still grow.
#![forbid(unsafe_code)]

use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use stallscope::observation::{Fact, Observation};
use stallscope::record::{Recorder, Replay};
use stallscope_attribution::facts::{
    Counter, DeviceEvent, DeviceEventKind, HardwareFact, PciDevice, QueuePair, RdmaPort,
};

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    match words.as_slice() {
        [file] => tell(Path::new(file)),
        [file, from, to, part] => {
            let after: u64 = from.parse().context("FROM is no number")?;
            let span = after.saturating_add(1)..=to.parse().context("TO is no number")?;
            cut(Path::new(file), &span, Path::new(part))
        }
        _ => bail!("FILE [FROM TO PART]"),
    }
}

/// What ends within the span; a window that began before it holds nothing else when the devices were idle then.
fn cut(file: &Path, span: &RangeInclusive<u64>, part: &Path) -> Result<()> {
    let mut replay = Replay::open(file)?;
    let mut recorder = Recorder::create(part, replay.node())?;
    let belongs = |observation: &Observation| match observation.fact {
        Fact::Hardware(_) | Fact::Port(_) => span.contains(&observation.window.end_ns()),
        Fact::RealtimeOffset { .. } => true,
        _ => false,
    };
    while let Some(mut batch) = replay.next_batch()? {
        batch.retain(belongs);
        recorder.write(&batch)?;
    }
    Ok(recorder.finish()?)
}

fn tell(file: &Path) -> Result<()> {
    let mut replay = Replay::open(file)?;
    while let Some(batch) = replay.next_batch()? {
        for observation in batch {
            if let Fact::Hardware(facts) = observation.fact {
                println!("{}", told(&facts.fact));
            }
        }
    }
    Ok(())
}

fn told(fact: &HardwareFact) -> Value {
    match fact {
        HardwareFact::RdmaPort(port) => json!({ "port": rdma_port(port) }),
        HardwareFact::QueuePair(pair) => json!({ "queue_pair": queue_pair(pair) }),
        HardwareFact::Pci(device) => json!({ "pci": pci(device) }),
        HardwareFact::Waits(waits) => {
            json!({ "waits": { "pid": waits.pid, "watched_ns": waits.watched_ns } })
        }
        HardwareFact::Event(event) => json!({ "event": device_event(event) }),
    }
}

fn rdma_port(port: &RdmaPort) -> Value {
    json!({
        "device": port.device,
        "port": port.port,
        "pci": port.pci,
        "netdev": port.netdev,
        "link_layer": port.link_layer,
        "active": port.active.value(),
        "rate_bytes_per_s": port.rate_bytes_per_s.value(),
        "counters": counters(&port.counters),
    })
}

fn queue_pair(pair: &QueuePair) -> Value {
    json!({
        "pid": pair.pid,
        "device": pair.device,
        "number": pair.number,
        "transport": pair.transport,
        "peer": pair.peer,
        "peer_number": pair.peer_number,
        "posts": pair.posts,
        "posted_bytes": pair.posted_bytes,
        "cut_calls": pair.cut_calls,
    })
}

fn pci(device: &PciDevice) -> Value {
    let link = device.link.value().map(|link| {
        json!({
            "rate_mt_per_s": link.rate_mt_per_s,
            "lanes": link.lanes,
            "best_rate_mt_per_s": link.best_rate_mt_per_s,
            "best_lanes": link.best_lanes,
        })
    });
    json!({
        "address": device.address,
        "kind": format!("{:?}", device.kind),
        "name": device.name,
        "path": device.path,
        "link": link,
        "errors": counters(&device.errors),
    })
}

fn device_event(event: &DeviceEvent) -> Value {
    let kind = match &event.kind {
        DeviceEventKind::Aer { severity, status } => {
            json!({ "aer": { "severity": format!("{severity:?}"), "status": status } })
        }
        DeviceEventKind::Xid { code, message } => json!({ "xid": { "code": code, "message": message } }),
        DeviceEventKind::Verbs {
            device,
            event,
            element,
        } => json!({ "verbs": { "device": device, "event": event, "element": element } }),
    };
    json!({ "pci": event.pci, "kind": kind })
}

/// Growth by name; what was not measured is left out.
fn counters(counters: &[Counter]) -> Value {
    counters
        .iter()
        .filter_map(|counter| Some((counter.name.clone(), Value::from(*counter.growth.value()?))))
        .collect::<serde_json::Map<_, _>>()
        .into()
}
