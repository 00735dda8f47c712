//! TCP sockets of this network namespace by `INET_DIAG` (sock_diag(7)).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use rustix::io::Errno;

use super::netlink::{DumpError, Netlink, attributes, u32_at, u64_at};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const INET_DIAG_INFO: u16 = 2;
/// `1 << TCP_ESTABLISHED`
const ESTABLISHED: u32 = 1 << 1;
/// Size of `struct inet_diag_msg`; attributes follow.
const MESSAGE: usize = 72;
/// The kernel's "not yet measured".
const NO_MIN_RTT: u32 = u32::MAX;

/// What the kernel finds a connection by, as it told it: family, and `struct inet_diag_sockid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SocketId {
    family: u8,
    id: [u8; 48],
}

#[cfg(test)]
impl SocketId {
    /// An id no kernel gave, of a connection that differs from another's by its number.
    pub(super) fn made_up(number: u8) -> Self {
        Self {
            family: AF_INET,
            id: [number; 48],
        }
    }
}

/// One established connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TcpSocket {
    pub(super) id: SocketId,
    pub(super) inode: u32,
    pub(super) local: SocketAddr,
    pub(super) peer: SocketAddr,
    /// Received and not read by the process, now.
    pub(super) unread_bytes: u32,
    pub(super) info: TcpInfo,
}

/// What of `struct tcp_info` (linux/tcp.h) is used. Counters are since the connection began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct TcpInfo {
    pub(super) rtt_us: u32,
    /// `None` before the first measurement.
    pub(super) min_rtt_us: Option<u32>,
    pub(super) retransmits: u32,
    pub(super) acked_bytes: u64,
    pub(super) unsent_bytes: u32,
    /// Time with data to send.
    pub(super) busy_us: u64,
    /// Of that, limited by the receiver's window.
    pub(super) receiver_limited_us: u64,
    /// Probes of the peer's closed window that did not open it, now.
    pub(super) window_probes: u32,
}

/// All established connections, IPv4 and IPv6.
pub(super) fn established(netlink: &mut Netlink) -> Result<Vec<TcpSocket>, DumpError> {
    let mut sockets = Vec::new();
    for family in [AF_INET, AF_INET6] {
        netlink.dump(
            SOCK_DIAG_BY_FAMILY,
            &request(family),
            SOCK_DIAG_BY_FAMILY,
            |body| {
                sockets.extend(parse(body));
            },
        )?;
    }
    Ok(sockets)
}

/// One connection again; `None` when it is established no more. A dump walks the whole table of the host's connections,
/// this finds one by its hash.
pub(super) fn again(netlink: &mut Netlink, id: &SocketId) -> Result<Option<TcpSocket>, DumpError> {
    let mut found = None;
    let asked = netlink.ask(SOCK_DIAG_BY_FAMILY, &question(id), SOCK_DIAG_BY_FAMILY, |body| {
        found = parse(body);
    });
    match asked {
        Ok(()) => Ok(found),
        Err(DumpError::System(Errno::NOENT | Errno::STALE)) => Ok(None),
        Err(error) => Err(error),
    }
}

/// `struct inet_diag_req_v2`: family, protocol, extensions, padding, states, and an empty socket id.
fn request(family: u8) -> [u8; 56] {
    question(&SocketId { family, id: [0; 48] })
}

fn question(id: &SocketId) -> [u8; 56] {
    let mut question = [0; 56];
    question[..4].copy_from_slice(&[id.family, IPPROTO_TCP, 1 << (INET_DIAG_INFO - 1), 0]);
    question[4..8].copy_from_slice(&ESTABLISHED.to_ne_bytes());
    question[8..].copy_from_slice(&id.id);
    question
}

/// `struct inet_diag_msg`: 4 bytes, socket id (ports and addresses in network order) of 48, then expires, rqueue,
/// wqueue, uid, inode. A connection without information on TCP is left out.
fn parse(body: &[u8]) -> Option<TcpSocket> {
    let family = *body.first()?;
    let address = |at: usize| -> Option<IpAddr> {
        let bytes = body.get(at..)?;
        match family {
            AF_INET => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
            // A dual-stack socket's IPv4 peer is the same as an IPv4 socket's.
            AF_INET6 => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).to_canonical()),
            _ => None,
        }
    };
    let port = |at: usize| {
        body.get(at..)?
            .first_chunk::<2>()
            .map(|bytes| u16::from_be_bytes(*bytes))
    };
    let local = SocketAddr::new(address(8)?, port(4)?);
    let peer = SocketAddr::new(address(24)?, port(6)?);
    let inode = u32_at(body, 68)?;
    let (_, info) = attributes(body.get(MESSAGE..)?).find(|(kind, _)| *kind == INET_DIAG_INFO)?;
    Some(TcpSocket {
        id: SocketId {
            family,
            id: *body.get(4..)?.first_chunk()?,
        },
        inode,
        local,
        peer,
        unread_bytes: u32_at(body, 56)?,
        info: parse_info(info)?,
    })
}

/// Offsets in `struct tcp_info`. `busy_time` is in kernels since 4.10; an older one gives a shorter structure and is
/// refused as a whole rather than read as zeros.
fn parse_info(info: &[u8]) -> Option<TcpInfo> {
    Some(TcpInfo {
        rtt_us: u32_at(info, 68)?,
        retransmits: u32_at(info, 100)?,
        acked_bytes: u64_at(info, 120)?,
        unsent_bytes: u32_at(info, 144)?,
        min_rtt_us: u32_at(info, 148).map(|rtt| (rtt != NO_MIN_RTT).then_some(rtt))?,
        busy_us: u64_at(info, 168)?,
        receiver_limited_us: u64_at(info, 176)?,
        window_probes: (*info.get(3)?).into(),
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt as _;

    use super::super::netlink::attribute;
    use super::*;

    fn tcp_info() -> Vec<u8> {
        let mut info = vec![0_u8; 232];
        let mut put = |at: usize, bytes: &[u8]| info[at..at + bytes.len()].copy_from_slice(bytes);
        put(3, &[6]);
        put(68, &1500_u32.to_ne_bytes());
        put(100, &3_u32.to_ne_bytes());
        put(120, &(5_u64 << 32).to_ne_bytes());
        put(144, &4096_u32.to_ne_bytes());
        put(148, &90_u32.to_ne_bytes());
        put(168, &777_u64.to_ne_bytes());
        put(176, &55_u64.to_ne_bytes());
        info
    }

    fn message(family: u8, local: &[u8], peer: &[u8], info: &[u8]) -> Vec<u8> {
        let mut body = vec![0_u8; MESSAGE];
        body[0] = family;
        body[1] = 1;
        body[4..6].copy_from_slice(&29500_u16.to_be_bytes());
        body[6..8].copy_from_slice(&40000_u16.to_be_bytes());
        body[8..8 + local.len()].copy_from_slice(local);
        body[24..24 + peer.len()].copy_from_slice(peer);
        body[56..60].copy_from_slice(&65_432_u32.to_ne_bytes());
        body[68..72].copy_from_slice(&123_456_u32.to_ne_bytes());
        [body, attribute(8, &[0]), attribute(INET_DIAG_INFO, info)].concat()
    }

    #[test]
    fn decodes_a_connection() {
        let expected = TcpInfo {
            rtt_us: 1500,
            min_rtt_us: Some(90),
            retransmits: 3,
            acked_bytes: 5 << 32,
            unsent_bytes: 4096,
            busy_us: 777,
            receiver_limited_us: 55,
            window_probes: 6,
        };
        let v4 = parse(&message(AF_INET, &[10, 0, 0, 1], &[10, 0, 0, 2], &tcp_info())).unwrap();
        assert_eq!(v4.local.to_string(), "10.0.0.1:29500");
        assert_eq!(
            (v4.peer.to_string().as_str(), v4.inode, v4.info),
            ("10.0.0.2:40000", 123_456, expected)
        );
        assert_eq!(v4.unread_bytes, 65_432);
        let mapped = Ipv4Addr::new(10, 0, 0, 1).to_ipv6_mapped().octets();
        let v6 = parse(&message(
            AF_INET6,
            &mapped,
            &Ipv6Addr::LOCALHOST.octets(),
            &tcp_info(),
        ))
        .unwrap();
        assert_eq!(
            (v6.local.to_string().as_str(), v6.peer.to_string().as_str()),
            ("10.0.0.1:29500", "[::1]:40000")
        );
    }

    #[test]
    fn truncated_messages_give_nothing() {
        let whole = message(AF_INET, &[10, 0, 0, 1], &[10, 0, 0, 2], &tcp_info()[..184]);
        assert!(parse(&whole).is_some());
        for length in 0..whole.len() {
            assert_eq!(parse(&whole[..length]), None, "{length}");
        }
        assert_eq!(
            parse(&message(99, &[10, 0, 0, 1], &[10, 0, 0, 2], &tcp_info())),
            None
        );
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }

    #[test]
    fn sees_this_processs_own_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut receiver, _) = listener.accept().unwrap();
        sender.write_all(&[7; 100_000]).unwrap();
        receiver.read_exact(&mut [0; 100_000]).unwrap();
        let inode = std::fs::metadata(format!(
            "/proc/self/fd/{}",
            std::os::fd::AsRawFd::as_raw_fd(&sender)
        ))
        .unwrap()
        .ino();
        let mut netlink = Netlink::open(Some(rustix::net::netlink::SOCK_DIAG)).unwrap();
        let all = established(&mut netlink).unwrap();
        let own = all
            .iter()
            .find(|socket| u64::from(socket.inode) == inode)
            .unwrap();
        assert_eq!(
            (own.local, own.peer),
            (sender.local_addr().unwrap(), sender.peer_addr().unwrap())
        );
        assert!(own.info.acked_bytes >= 100_000, "{own:?}");
        assert!(own.info.rtt_us > 0, "{own:?}");

        sender.write_all(&[7; 50_000]).unwrap();
        receiver.read_exact(&mut [0; 50_000]).unwrap();
        let later = again(&mut netlink, &own.id).unwrap().unwrap();
        assert_eq!(
            (later.id, later.inode, later.local, later.peer),
            (own.id, own.inode, own.local, own.peer)
        );
        assert!(
            later.info.acked_bytes >= own.info.acked_bytes + 50_000,
            "{later:?}"
        );
        // Neither side reads on: what lies in the receiver's socket is told, and in the end its window is probed.
        sender.set_nonblocking(true).unwrap();
        let mut sent = 0;
        while let Ok(more) = sender.write(&[7; 1 << 16]) {
            sent += more;
        }
        let begin = std::time::Instant::now();
        let (mut unread, mut probes) = (0, 0);
        while begin.elapsed() < std::time::Duration::from_secs(5) && (unread == 0 || probes == 0) {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let all = established(&mut netlink).unwrap();
            let peer = all
                .iter()
                .find(|socket| (socket.local, socket.peer) == (own.peer, own.local));
            unread = peer.map_or(0, |peer| peer.unread_bytes);
            let own = again(&mut netlink, &own.id).unwrap().unwrap();
            probes = own.info.window_probes;
        }
        assert!(unread > 1000 && unread as usize <= sent, "{unread} of {sent}");
        assert!(probes > 0, "the peer's window is closed");

        drop((sender, receiver));
        assert_eq!(again(&mut netlink, &own.id).unwrap(), None, "a closed connection");
    }
}
