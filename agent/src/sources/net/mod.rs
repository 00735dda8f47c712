//! Ports, their queues, and the TCP flows of traced processes, in the agent's own network namespace.
//!
//! # Facade
//! - [`NetSource::open`]`(node_name) -> Result<NetSource, NetError>`.
//! - [`NetSource::poll`]`(now_ns, realtime_offset_ns, &traced_pids) -> Vec<Observation>`: call every 100 to 200 ms; each
//!   call samples, and about once a second it returns one `Fact::Port` per port.
//! - [`NetSource::trouble`]`() -> Option<&str>`: what cannot be seen, for status and report.
//!
//! A port is an interface that is up, not the loopback, and has an address. A flow is an established TCP connection of
//! a traced process that sent something in the window, on the port that has its local address; connections between two
//! addresses of the node use no port and are left out. Sockets of processes in other network namespaces are not seen:
//! run one agent in each namespace that carries traffic of the job. Sockets of the kernel itself (NFS, Ceph, iSCSI, NVMe
//! over TCP) belong to no process and are not seen; what they move is in the port's bytes.

mod ethtool;
mod flows;
mod links;
mod netlink;
mod owners;
mod tcp;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use stallscope_attribution::facts::PortFacts;
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use self::ethtool::Ethtool;
use self::flows::Flows;
use self::links::{Link, Queue};
pub use self::netlink::DumpError;
use self::netlink::Netlink;
use self::owners::Owners;
use crate::observation::{Fact, Observation};

/// How often line rates are read, ns: for some drivers that is a command to firmware.
const RATES_NS: u64 = 10_000_000_000;
/// How often ports are reported.
const REPORT_NS: u64 = 1_000_000_000;
/// Most flows read between two reports; of the others only what they sent is known, not how full they were meanwhile.
const MOST_SAMPLED: usize = 64;

/// Why the network is not seen at all.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// No netlink sockets.
    #[error(
        "no network evidence: a netlink socket cannot be opened ({0}); the seccomp filter or kernel forbids it"
    )]
    Netlink(DumpError),
}

/// The source. All state is that of the window that is being measured.
#[derive(Debug)]
pub struct NetSource {
    node: String,
    class_net: PathBuf,
    diag: Netlink,
    route: Netlink,
    /// `None` on kernels before 5.6, where only `/sys` knows line rates: those of the namespace it was mounted in.
    ethtool: Option<Ethtool>,
    /// By interface, as read last, and when they are read again.
    rates: BTreeMap<i32, Reading<u64>>,
    rates_due_ns: u64,
    owners: Owners,
    flows: Flows,
    addresses: BTreeMap<IpAddr, i32>,
    begun: Option<Begun>,
    backlog: BTreeMap<i32, u32>,
    queue_failure: Option<String>,
    trouble: Option<String>,
}

/// The window's first read.
#[derive(Debug)]
struct Begun {
    at_ns: u64,
    links: BTreeMap<i32, Link>,
    queues: BTreeMap<i32, Queue>,
}

impl NetSource {
    /// Opens the sockets; works without privileges, but sees other users' processes only with `CAP_SYS_PTRACE`.
    ///
    /// # Errors
    /// When the kernel gives no netlink sockets.
    pub fn open(node: impl Into<String>) -> Result<Self, NetError> {
        Ok(Self {
            node: node.into(),
            class_net: PathBuf::from("/sys/class/net"),
            diag: Netlink::open(Some(rustix::net::netlink::SOCK_DIAG)).map_err(NetError::Netlink)?,
            route: Netlink::open(None).map_err(NetError::Netlink)?,
            ethtool: Ethtool::open().ok(),
            rates: BTreeMap::new(),
            rates_due_ns: 0,
            owners: Owners::new("/proc"),
            flows: Flows::default(),
            addresses: BTreeMap::new(),
            begun: None,
            backlog: BTreeMap::new(),
            queue_failure: None,
            trouble: None,
        })
    }

    /// What could not be read at the last call.
    #[must_use]
    pub fn trouble(&self) -> Option<&str> {
        self.trouble.as_deref()
    }

    /// Samples flows and queues; about once a second reports every port.
    pub fn poll(&mut self, now_ns: u64, realtime_offset_ns: i64, traced: &BTreeSet<u32>) -> Vec<Observation> {
        let report_due = self
            .begun
            .as_ref()
            .is_none_or(|begun| now_ns >= begun.at_ns.saturating_add(REPORT_NS));
        if report_due {
            // Flows are looked for once a second: what failed stays true until then.
            self.trouble = None;
            self.find_flows(now_ns, traced);
        } else {
            self.sample_flows();
        }
        let queues = self.sample_queues();
        if report_due {
            self.report(now_ns, realtime_offset_ns, queues)
        } else {
            Vec::new()
        }
    }

    /// Reads the flows that are followed once more, each by itself: how full they were within the window.
    fn sample_flows(&mut self) {
        let ids: Vec<_> = self.flows.ids().take(MOST_SAMPLED).collect();
        for id in ids {
            match tcp::again(&mut self.diag, &id) {
                Ok(Some(socket)) => self.flows.update(&socket),
                Ok(None) => {}
                Err(error) => {
                    self.trouble = Some(format!("flows are not seen: {error}"));
                    return;
                }
            }
        }
    }

    /// Reads all connections: a walk over the table of the whole host, and therefore rare.
    fn find_flows(&mut self, now_ns: u64, traced: &BTreeSet<u32>) {
        if traced.is_empty() {
            return;
        }
        match tcp::established(&mut self.diag) {
            Ok(sockets) => {
                let owners = self
                    .owners
                    .of(now_ns, traced, sockets.iter().map(|socket| socket.inode));
                self.flows.sample(&sockets, owners);
            }
            Err(error) => self.trouble = Some(format!("flows are not seen: {error}")),
        }
    }

    fn sample_queues(&mut self) -> BTreeMap<i32, Queue> {
        match links::queues(&mut self.route) {
            Ok(queues) => {
                for (&index, queue) in &queues {
                    let most = self.backlog.entry(index).or_default();
                    *most = queue.backlog_bytes.max(*most);
                }
                queues
            }
            Err(error) => {
                let why = format!("queues are not seen: {error}");
                self.queue_failure = Some(why.clone());
                self.trouble = Some(why);
                BTreeMap::new()
            }
        }
    }

    fn report(
        &mut self,
        now_ns: u64,
        realtime_offset_ns: i64,
        queues: BTreeMap<i32, Queue>,
    ) -> Vec<Observation> {
        let read =
            links::links(&mut self.route).and_then(|links| Ok((links, links::addresses(&mut self.route)?)));
        let links = match read {
            Ok((links, addresses)) => {
                self.addresses = addresses;
                links
            }
            Err(error) => {
                // The window goes on: the next report covers it.
                self.trouble = Some(format!("ports are not seen: {error}"));
                return Vec::new();
            }
        };
        self.read_rates(now_ns);
        let mut by_port = self.flows.finish(&self.addresses);
        let mut observations = Vec::new();
        if let Some(begun) = &self.begun
            && let Some(window) = Window::new(begun.at_ns, now_ns)
        {
            for (index, link) in &links {
                let has_address = self.addresses.values().any(|of| of == index);
                let Some(before) = begun.links.get(index).filter(|_| has_address) else {
                    continue;
                };
                let facts = PortFacts {
                    node: self.node.clone(),
                    port: link.name.clone(),
                    window,
                    realtime_offset_ns,
                    line_bytes_per_s: self.line_bytes_per_s(*index, link),
                    sent_bytes: link.sent_bytes.saturating_sub(before.sent_bytes),
                    received_bytes: link.received_bytes.saturating_sub(before.received_bytes),
                    backlog_bytes: self.queue_reading(self.backlog.get(index).map(|&bytes| bytes.into())),
                    queue_overlimits: self
                        .queue_reading(overlimits(begun.queues.get(index), queues.get(index))),
                    flows: by_port.remove(index).unwrap_or_default(),
                };
                observations.push(Observation {
                    window,
                    fact: Fact::Port(Box::new(facts)),
                });
            }
        }
        self.backlog.clear();
        self.queue_failure = None;
        self.begun = Some(Begun {
            at_ns: now_ns,
            links,
            queues,
        });
        observations
    }

    fn read_rates(&mut self, now_ns: u64) {
        let Some(ethtool) = self.ethtool.as_mut().filter(|_| now_ns >= self.rates_due_ns) else {
            return;
        };
        self.rates_due_ns = now_ns.saturating_add(RATES_NS);
        // What is not answered is asked of `/sys`.
        self.rates = ethtool.line_rates().unwrap_or_default();
    }

    fn line_bytes_per_s(&self, index: i32, link: &Link) -> Reading<u64> {
        if link.has_no_line {
            return Reading::Unsupported;
        }
        match self.rates.get(&index) {
            Some(rate) => rate.clone(),
            None => links::line_bytes_per_s(&self.class_net, &link.name),
        }
    }

    fn queue_reading(&self, value: Option<u64>) -> Reading<u64> {
        match (value, &self.queue_failure) {
            (Some(value), _) => Reading::Value(value),
            (None, Some(why)) => Reading::Failed(why.clone()),
            (None, None) => Reading::NotMeasured,
        }
    }
}

/// How far the count went; a queue that was made meanwhile starts at zero.
fn overlimits(before: Option<&Queue>, now: Option<&Queue>) -> Option<u64> {
    let now = now?.overlimits;
    let before = before.map_or(0, |before| before.overlimits);
    Some(now.checked_sub(before).unwrap_or(now))
}

#[cfg(test)]
mod tests;
