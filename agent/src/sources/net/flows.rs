//! Flows of traced processes over the window that is being measured. Pure.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};

use stallscope_attribution::facts::FlowFacts;

use super::tcp::{SocketId, TcpInfo, TcpSocket};

/// Most flows reported of one port; the ones that sent most.
const MAX_FLOWS: usize = 256;

/// Less than this is read between two samples by any process that keeps up.
const BACKLOG_BYTES: u64 = 64 << 10;

/// By socket inode.
#[derive(Debug, Default)]
pub(super) struct Flows {
    flows: HashMap<u32, Flow>,
}

#[derive(Debug)]
struct Flow {
    id: SocketId,
    pid: u32,
    local: SocketAddr,
    peer: SocketAddr,
    /// At the window's begin, or when the connection was first seen.
    before: TcpInfo,
    now: TcpInfo,
    most_unsent_bytes: u32,
    most_rtt_us: u32,
    most_unread_bytes: u32,
    most_window_probes: u32,
    /// Seen in this window; a connection that was not is closed.
    seen: bool,
}

impl Flows {
    /// Takes in one dump.
    pub(super) fn sample(&mut self, sockets: &[TcpSocket], owners: &HashMap<u32, u32>) {
        for socket in sockets {
            let Some(&pid) = owners.get(&socket.inode) else {
                continue;
            };
            let loopback = socket.local.ip().is_loopback() || socket.peer.ip() == socket.local.ip();
            if loopback {
                continue;
            }
            let flow = self
                .flows
                .entry(socket.inode)
                .or_insert_with(|| Flow::new(pid, socket));
            if (flow.local, flow.peer) != (socket.local, socket.peer) {
                // The inode of a closed socket was given to another.
                *flow = Flow::new(pid, socket);
            }
            flow.take(socket);
        }
    }

    /// The connections of the flows that are followed.
    pub(super) fn ids(&self) -> impl Iterator<Item = SocketId> {
        self.flows.values().map(|flow| flow.id)
    }

    /// Takes in one of [`Flows::ids`], read again.
    pub(super) fn update(&mut self, socket: &TcpSocket) {
        if let Some(flow) = self.flows.get_mut(&socket.inode)
            && flow.id == socket.id
        {
            flow.take(socket);
        }
    }

    /// Ends the window: the flows that sent something, by the index of the port with their local address.
    pub(super) fn finish(&mut self, addresses: &BTreeMap<IpAddr, i32>) -> BTreeMap<i32, Vec<FlowFacts>> {
        let mut by_port: BTreeMap<i32, Vec<FlowFacts>> = BTreeMap::new();
        for flow in self
            .flows
            .values()
            .filter(|flow| !addresses.contains_key(&flow.peer.ip()))
        {
            let Some(&port) = addresses.get(&flow.local.ip()) else {
                continue;
            };
            let facts = flow.facts();
            let sends = facts.acked_bytes > 0 || facts.busy_ns > 0 || facts.unsent_bytes > 0;
            // Who only receives is told of when its process does not keep up.
            if sends || facts.receive_backlog_bytes >= BACKLOG_BYTES {
                by_port.entry(port).or_default().push(facts);
            }
        }
        for flows in by_port.values_mut() {
            flows.sort_by(|a, b| {
                b.acked_bytes
                    .cmp(&a.acked_bytes)
                    .then_with(|| a.local.cmp(&b.local))
            });
            flows.truncate(MAX_FLOWS);
        }
        self.flows.retain(|_, flow| flow.seen);
        self.flows.values_mut().for_each(Flow::begin);
        by_port
    }
}

impl Flow {
    fn new(pid: u32, socket: &TcpSocket) -> Self {
        Self {
            id: socket.id,
            pid,
            local: socket.local,
            peer: socket.peer,
            before: socket.info,
            now: socket.info,
            most_unsent_bytes: 0,
            most_rtt_us: 0,
            most_unread_bytes: 0,
            most_window_probes: 0,
            seen: true,
        }
    }

    fn take(&mut self, socket: &TcpSocket) {
        self.now = socket.info;
        self.most_unsent_bytes = self.most_unsent_bytes.max(socket.info.unsent_bytes);
        self.most_rtt_us = self.most_rtt_us.max(socket.info.rtt_us);
        self.most_unread_bytes = self.most_unread_bytes.max(socket.unread_bytes);
        self.most_window_probes = self.most_window_probes.max(socket.info.window_probes);
        self.seen = true;
    }

    fn begin(&mut self) {
        self.before = self.now;
        self.most_unsent_bytes = 0;
        self.most_rtt_us = 0;
        self.most_unread_bytes = 0;
        self.most_window_probes = 0;
        self.seen = false;
    }

    fn facts(&self) -> FlowFacts {
        const NS_PER_US: u64 = 1000;
        let Self { before, now, .. } = self;
        let rtt_us = self.most_rtt_us.max(now.rtt_us);
        FlowFacts {
            pid: self.pid,
            local: self.local.to_string(),
            peer: self.peer.to_string(),
            acked_bytes: now.acked_bytes.saturating_sub(before.acked_bytes),
            busy_ns: now
                .busy_us
                .saturating_sub(before.busy_us)
                .saturating_mul(NS_PER_US),
            receiver_limited_ns: now
                .receiver_limited_us
                .saturating_sub(before.receiver_limited_us)
                .saturating_mul(NS_PER_US),
            unsent_bytes: self.most_unsent_bytes.into(),
            retransmits: now.retransmits.wrapping_sub(before.retransmits).into(),
            rtt_us,
            min_rtt_us: now.min_rtt_us.unwrap_or(rtt_us),
            receive_backlog_bytes: self.most_unread_bytes.into(),
            window_probes: self.most_window_probes,
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn socket(
        inode: u32,
        local: &str,
        peer: &str,
        acked_bytes: u64,
        unsent_bytes: u32,
        rtt_us: u32,
    ) -> TcpSocket {
        let info = TcpInfo {
            rtt_us,
            min_rtt_us: Some(40),
            retransmits: u32::try_from(acked_bytes / 1000).unwrap(),
            acked_bytes,
            unsent_bytes,
            busy_us: acked_bytes / 10,
            receiver_limited_us: acked_bytes / 100,
            window_probes: u32::from(unsent_bytes > 500),
        };
        TcpSocket {
            id: SocketId::made_up(u8::try_from(inode).unwrap()),
            inode,
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
            unread_bytes: 2 * unsent_bytes,
            info,
        }
    }

    fn addresses() -> BTreeMap<IpAddr, i32> {
        [("10.0.0.1", 2), ("10.1.0.1", 3)]
            .map(|(ip, index)| (ip.parse().unwrap(), index))
            .into()
    }

    #[test]
    fn deltas_and_maxima_of_one_window() {
        let owners = HashMap::from([(1, 77)]);
        let mut flows = Flows::default();
        let at = |acked, unsent, rtt| socket(1, "10.0.0.1:5", "10.0.0.2:6", acked, unsent, rtt);
        flows.sample(&[at(1000, 10, 100)], &owners);
        assert_eq!(flows.ids().collect::<Vec<_>>(), [SocketId::made_up(1)]);
        flows.update(&at(3000, 900, 700));
        let another = TcpSocket {
            id: SocketId::made_up(9),
            ..at(1, 9999, 9999)
        };
        flows.update(&another);
        flows.sample(&[at(5000, 0, 90)], &owners);
        let by_port = flows.finish(&addresses());
        let expected = FlowFacts {
            pid: 77,
            local: "10.0.0.1:5".to_owned(),
            peer: "10.0.0.2:6".to_owned(),
            acked_bytes: 4000,
            busy_ns: 400_000,
            receiver_limited_ns: 40_000,
            unsent_bytes: 900,
            retransmits: 4,
            rtt_us: 700,
            min_rtt_us: 40,
            receive_backlog_bytes: 1800,
            window_probes: 1,
        };
        assert_eq!(by_port, BTreeMap::from([(2, vec![expected])]));
        // The next window starts where this one ended; a closed flow is reported no more.
        flows.sample(&[socket(1, "10.0.0.1:5", "10.0.0.2:6", 5500, 0, 90)], &owners);
        assert_eq!(flows.finish(&addresses())[&2][0].acked_bytes, 500);
        assert!(flows.finish(&addresses()).is_empty());
        assert!(flows.flows.is_empty());
    }

    #[test]
    fn leaves_out_what_uses_no_port() {
        let owners = HashMap::from([(1, 7), (2, 7), (3, 7), (4, 7)]);
        let mut flows = Flows::default();
        for acked in [0, 100] {
            flows.sample(
                &[
                    socket(1, "127.0.0.1:5", "127.0.0.1:6", acked, 0, 1),
                    socket(2, "10.0.0.1:5", "10.1.0.1:6", acked, 0, 1),
                    socket(3, "10.9.9.9:5", "10.0.0.2:6", acked, 0, 1),
                    socket(4, "10.0.0.1:9", "10.0.0.2:6", 0, 0, 1),
                    socket(5, "10.0.0.1:9", "10.0.0.2:7", acked, 0, 1),
                ],
                &owners,
            );
        }
        assert_eq!(flows.finish(&addresses()), BTreeMap::new());
    }

    #[test]
    fn a_flow_that_only_receives_is_told_when_its_process_does_not_read() {
        let owners = HashMap::from([(1, 7), (2, 7)]);
        let mut flows = Flows::default();
        let receiving = |inode, unread_bytes| TcpSocket {
            unread_bytes,
            ..socket(inode, "10.0.0.1:5", "10.0.0.2:6", 0, 0, 1)
        };
        flows.sample(&[receiving(1, 60_000), receiving(2, 900_000)], &owners);
        flows.sample(&[receiving(1, 0), receiving(2, 0)], &owners);
        let by_port = flows.finish(&addresses());
        let unread: Vec<u64> = by_port[&2]
            .iter()
            .map(|flow| flow.receive_backlog_bytes)
            .collect();
        assert_eq!(unread, [900_000]);
    }

    #[test]
    fn a_reused_inode_is_another_flow() {
        let owners = HashMap::from([(1, 7)]);
        let mut flows = Flows::default();
        flows.sample(&[socket(1, "10.0.0.1:5", "10.0.0.2:6", 9000, 0, 1)], &owners);
        flows.sample(&[socket(1, "10.0.0.1:8", "10.0.0.2:6", 50, 0, 1)], &owners);
        flows.sample(&[socket(1, "10.0.0.1:8", "10.0.0.2:6", 70, 0, 1)], &owners);
        let by_port = flows.finish(&addresses());
        assert_eq!(
            (by_port[&2][0].local.as_str(), by_port[&2][0].acked_bytes),
            ("10.0.0.1:8", 20)
        );
    }
}
