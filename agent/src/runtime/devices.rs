//! The sources that read the node's devices, as the gathering thread has them.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stallscope_attribution::facts::{DeviceEvent, DeviceEventKind, HardwareFact, HardwareFacts, RecordGap};
use stallscope_attribution::time::Window;

use super::shared::Shared;
use super::status::Condition;
use crate::observation::{Fact, Observation};
use crate::sources::clock;
use crate::sources::load::Load;
use crate::sources::pcie::PcieSource;
use crate::sources::rdma::{self, RdmaSource};
use crate::sources::xid::{Teller, Xid, XidSource};

/// Between two looks at what the threads have read, ns.
const POLL_NS: u64 = 500_000_000;
/// A GPU computes above this share of its time.
const COMPUTES_PPM: u32 = 100_000;
/// An interface moves data above this share of its line rate, per cent; without one, above so many bytes a second.
const MOVES_PER_CENT: u128 = 2;
const MOVES_BYTES_PER_S: u128 = 10_000_000;

/// RDMA ports, PCI devices, and what is told of them at one moment.
#[derive(Debug)]
pub(super) struct Devices {
    rdma: Option<RdmaSource>,
    pcie: Option<PcieSource>,
    xids: XidSource,
    load: Arc<Load>,
    sys: PathBuf,
    due_ns: u64,
    troubles: [Option<String>; 2],
}

const PARTS: [&str; 2] = ["rdma", "pcie"];

impl Devices {
    /// Nothing to read; for tests.
    #[cfg(test)]
    pub(super) fn none() -> Self {
        Self {
            rdma: None,
            pcie: None,
            xids: XidSource::without_log(),
            load: Arc::default(),
            sys: PathBuf::new(),
            due_ns: 0,
            troubles: [None, None],
        }
    }

    /// Begins to read the devices below `sys`.
    pub(super) fn open(sys: &Path, shared: &Shared) -> Self {
        let load = Arc::new(Load::default());
        let rdma = RdmaSource::start(&shared.node, sys, Arc::clone(&load));
        let pcie = PcieSource::start(&shared.node, sys, Arc::clone(&load));
        Self {
            rdma: started(PARTS[0], rdma, shared),
            pcie: started(PARTS[1], pcie, shared),
            xids: open_xids(),
            load,
            sys: sys.to_owned(),
            due_ns: 0,
            troubles: [None, None],
        }
    }

    /// Adds what only the running agent knows of a device that probes told of: node, clock offset, and the PCI address of
    /// an event's device.
    pub(super) fn complete(&self, facts: &mut HardwareFacts, node: &str) {
        node.clone_into(&mut facts.node);
        facts.realtime_offset_ns = clock::realtime_offset_ns();
        if let HardwareFact::Event(event) = &mut facts.fact
            && event.pci.is_empty()
            && let DeviceEventKind::Verbs { device, .. } = &event.kind
            && !device.is_empty()
        {
            event.pci = rdma::pci_of(&self.sys, device);
        }
    }

    /// Adds what was read meanwhile.
    pub(super) fn poll(&mut self, now_ns: u64, batch: &mut Vec<Observation>, shared: &Shared) {
        if now_ns < self.due_ns {
            return;
        }
        self.due_ns = now_ns + POLL_NS;
        let mut troubles = [None, None];
        if let Some(rdma) = &mut self.rdma {
            batch.extend(rdma.poll(now_ns));
            troubles[0] = rdma.trouble(now_ns);
        }
        if let Some(pcie) = &mut self.pcie {
            batch.extend(pcie.poll(now_ns));
            troubles[1] = pcie.trouble(now_ns);
        }
        let xids = self.xids.poll(now_ns);
        batch.extend(xids.into_iter().map(|xid| fault(now_ns, xid, shared)));
        let overruns = self.xids.take_overruns();
        if overruns > 0 {
            shared.add_gap(RecordGap {
                node: shared.node.clone(),
                window: None,
                what:
                    "the kernel's log was overwritten before it was read: faults of GPUs in it may be missing"
                        .to_owned(),
                count: overruns,
            });
        }
        for (part, (before, now)) in PARTS.into_iter().zip(self.troubles.iter_mut().zip(troubles)) {
            show(part, before, now, shared);
        }
    }

    /// Whether the driver's tracepoint tells a fault that another has told already.
    pub(super) fn is_repeated(&mut self, observation: &Observation) -> bool {
        let Fact::Hardware(facts) = &observation.fact else {
            return false;
        };
        let HardwareFact::Event(DeviceEvent {
            pci,
            kind: DeviceEventKind::Xid { code, message },
        }) = &facts.fact
        else {
            return false;
        };
        let xid = Xid {
            pci: pci.clone(),
            code: *code,
            message: message.clone(),
        };
        !self
            .xids
            .offer(Teller::Tracepoint, &xid, observation.window.start_ns())
    }

    /// Takes faults that NVML told.
    pub(super) fn take_faults(
        &mut self,
        faults: Vec<(u64, Xid)>,
        batch: &mut Vec<Observation>,
        shared: &Shared,
    ) {
        for (at_ns, xid) in faults {
            if self.xids.offer(Teller::Nvml, &xid, at_ns) {
                batch.push(fault(at_ns, xid, shared));
            }
        }
    }

    /// Notes what a reading says of who moves data.
    pub(super) fn note(&self, observation: &Observation) {
        let now_ns = observation.window.end_ns();
        match &observation.fact {
            Fact::Gpu(reading) if reading.busy_ppm.value().is_some_and(|&ppm| ppm > COMPUTES_PPM) => {
                self.load.mark(&reading.pci, now_ns);
            }
            Fact::Port(port) => {
                let moved = u128::from(port.sent_bytes.max(port.received_bytes)) * 1_000_000_000;
                let rate = moved / u128::from(observation.window.len_ns().max(1));
                let line = port.line_bytes_per_s.value().map(|&line| u128::from(line));
                let enough = line.map_or(MOVES_BYTES_PER_S, |line| line * MOVES_PER_CENT / 100);
                if rate > enough {
                    self.load.mark(&port.port, now_ns);
                }
            }
            _ => {}
        }
    }
}

/// The kernel's log is one of several that tell of faults: without it the others do.
fn open_xids() -> XidSource {
    let xids = XidSource::open();
    if let Some(why) = xids.no_log() {
        tracing::info!(
            why,
            "faults of GPUs are told by the driver's tracepoint and by NVML only"
        );
    }
    xids
}

/// Something that happened to a device, as an observation.
pub(super) fn event(at_ns: u64, event: DeviceEvent, shared: &Shared) -> Observation {
    match &event.kind {
        DeviceEventKind::Aer { severity, status } => {
            tracing::warn!(pci = event.pci, ?severity, status, "a PCI Express error");
        }
        DeviceEventKind::Xid { code, message } => {
            tracing::warn!(pci = event.pci, code, message, "the GPU driver reports a fault");
        }
        DeviceEventKind::Verbs { .. } => {}
    }
    let window = Window::new(at_ns, at_ns.saturating_add(1)).unwrap_or(Window::instant(at_ns));
    Observation {
        window,
        fact: Fact::Hardware(Box::new(HardwareFacts {
            node: shared.node.clone(),
            window,
            realtime_offset_ns: clock::realtime_offset_ns(),
            fact: HardwareFact::Event(event),
        })),
    }
}

fn fault(at_ns: u64, xid: Xid, shared: &Shared) -> Observation {
    let kind = DeviceEventKind::Xid {
        code: xid.code,
        message: xid.message,
    };
    event(at_ns, DeviceEvent { pci: xid.pci, kind }, shared)
}

fn started<T>(part: &'static str, source: std::io::Result<T>, shared: &Shared) -> Option<T> {
    match source {
        Ok(source) => {
            super::works(shared, part);
            Some(source)
        }
        Err(error) => {
            super::missing(shared, part, &error);
            None
        }
    }
}

/// Says in log and status what changed.
fn show(part: &'static str, before: &mut Option<String>, now: Option<String>, shared: &Shared) {
    if *before == now {
        return;
    }
    let condition = match &now {
        Some(why) => {
            tracing::warn!(part, why, "evidence of devices is incomplete");
            Condition::Degraded(why.clone())
        }
        None => Condition::Works,
    };
    *before = now;
    shared.status.lock().set_health(part, condition);
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use stallscope_attribution::facts::PortFacts;
    use stallscope_attribution::reading::Reading;
    use stallscope_attribution::time::Window;

    use super::*;

    #[test]
    fn an_interface_is_under_load_by_its_line_rate() {
        const S: u64 = 1_000_000_000;
        let devices = Devices::none();
        let port = |name: &str, sent_bytes, line: Reading<u64>, second: u64| {
            let window = Window::new(second * S, (second + 1) * S).unwrap();
            Observation {
                window,
                fact: Fact::Port(Box::new(PortFacts {
                    node: String::new(),
                    port: name.to_owned(),
                    window,
                    realtime_offset_ns: 0,
                    line_bytes_per_s: line,
                    sent_bytes,
                    received_bytes: 0,
                    backlog_bytes: Reading::NotMeasured,
                    queue_overlimits: Reading::NotMeasured,
                    flows: Vec::new(),
                })),
            }
        };
        for second in 0..4 {
            devices.note(&port("busy", 30_000_000, Reading::Value(1_250_000_000), second));
            devices.note(&port("chatty", 20_000_000, Reading::Value(1_250_000_000), second));
            devices.note(&port("unknown", 20_000_000, Reading::Unsupported, second));
        }
        let lasts = |name: &str| devices.load.lasts(name, 4 * S);
        assert_eq!(
            [lasts("busy"), lasts("chatty"), lasts("unknown")],
            [true, false, true]
        );
    }
}
