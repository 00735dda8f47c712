//! Queue pairs and events as facts. What comes from a process's memory may be anything.

use std::net::Ipv6Addr;

use stallscope_attribution::facts::{DeviceEvent, DeviceEventKind, HardwareFact, HardwareFacts, QueuePair};
use stallscope_attribution::time::Window;
use stallscope_records::verbs::{NAME_BYTES, Qp, VerbsEvent, qp_flag};

use super::PairGrowth;
use crate::observation::Fact;

/// The fact, but for what only the running agent knows: node and clock offset.
pub(in super::super) fn hardware(window: Window, fact: HardwareFact) -> Fact {
    Fact::Hardware(Box::new(HardwareFacts {
        node: String::new(),
        window,
        realtime_offset_ns: 0,
        fact,
    }))
}

pub(in super::super) fn queue_pair(tgid: u32, growth: &PairGrowth) -> HardwareFact {
    let qp = &growth.qp;
    HardwareFact::QueuePair(QueuePair {
        pid: tgid,
        device: device(&qp.device),
        port: qp.port,
        number: qp.number,
        transport: transport(qp.kind).to_owned(),
        peer: peer(qp),
        peer_number: qp.peer_number,
        posts: growth.posts,
        posted_bytes: growth.bytes,
        refused: 0,
        in_error: qp.flags & qp_flag::ERROR != 0,
        cut_calls: growth.cut,
        posts_unseen: growth.unseen,
    })
}

pub(in super::super) fn event(record: &VerbsEvent) -> HardwareFact {
    HardwareFact::Event(DeviceEvent {
        pci: String::new(),
        kind: DeviceEventKind::Verbs {
            device: device(&record.device),
            event: record.event,
            element: record.element,
        },
    })
}

/// A device's name; empty when it is none that the kernel would give.
fn device(bytes: &[u8; NAME_BYTES]) -> String {
    let name = bytes.split(|&byte| byte == 0).next().unwrap_or_default();
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    if name.len() < NAME_BYTES && name.iter().all(plain) && !name.starts_with(b".") {
        String::from_utf8_lossy(name).into_owned()
    } else {
        String::new()
    }
}

/// `enum ibv_qp_type`.
const fn transport(kind: u32) -> &'static str {
    match kind {
        2 => "RC",
        3 => "UC",
        4 => "UD",
        8 => "RAW_PACKET",
        9 => "XRC_SEND",
        10 => "XRC_RECV",
        0xff => "DRIVER",
        _ => "",
    }
}

fn peer(qp: &Qp) -> String {
    if qp.flags & qp_flag::GID != 0 {
        Ipv6Addr::from(qp.peer).to_string()
    } else if qp.flags & qp_flag::LID != 0 {
        format!("lid {}", u16::from_ne_bytes([qp.peer[0], qp.peer[1]]))
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &[u8]) -> [u8; NAME_BYTES] {
        let mut bytes = [0xee; NAME_BYTES];
        bytes[..name.len()].copy_from_slice(name);
        if let Some(end) = bytes.get_mut(name.len()) {
            *end = 0;
        }
        bytes
    }

    #[test]
    fn a_name_ends_at_its_zero_and_is_no_path() {
        assert_eq!(device(&named(b"mlx5_3")), "mlx5_3");
        assert_eq!(device(&named(b"")), "");
        assert_eq!(device(&named(b"../../etc/passwd")), "");
        assert_eq!(device(&named(b"..")), "");
        assert_eq!(device(&[b'a'; NAME_BYTES]), "", "it never ends");
        assert_eq!(device(&named(b"\xff\xfe")), "");
    }

    #[test]
    fn a_peer_is_named_by_what_addresses_it() {
        let mut qp = Qp {
            born_ns: 0,
            posts: 0,
            bytes: 0,
            cut: 0,
            post_send: 0,
            number: 0,
            kind: 2,
            peer_number: 0,
            port: 0,
            flags: 0,
            changes: 0,
            peer: [0; 16],
            device: named(b"mlx5_0"),
        };
        assert_eq!(peer(&qp), "", "nobody said");
        qp.peer = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3];
        qp.flags = qp_flag::GID;
        assert_eq!(peer(&qp), "::ffff:10.1.2.3");
        qp.peer = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9];
        assert_eq!(peer(&qp), "fe80::9");
        qp.flags = qp_flag::LID;
        [qp.peer[0], qp.peer[1]] = 4711u16.to_ne_bytes();
        assert_eq!(peer(&qp), "lid 4711");
    }
}
