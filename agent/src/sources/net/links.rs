//! Interfaces, their addresses and queues, by rtnetlink(7) in this network namespace; line rates from sysfs where
//! ethtool has none.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;

use stallscope_attribution::reading::Reading;

use super::netlink::{DumpError, Netlink, attributes, i32_at, u32_at, u64_at};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_GETADDR: u16 = 22;
const RTM_NEWQDISC: u16 = 36;
const RTM_GETQDISC: u16 = 38;

const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_STATS64: u16 = 23;
const IFLA_INFO_KIND: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const TCA_STATS2: u16 = 7;
const TCA_STATS_QUEUE: u16 = 3;

const IFF_UP: u32 = 1;
const IFF_LOOPBACK: u32 = 8;
/// Parents of queues for received packets start here (`TC_H_INGRESS`); `TC_H_ROOT` is above.
const TC_H_INGRESS: u32 = 0xffff_fff1;

/// Kinds of interfaces that end in the kernel. (A bond, a VLAN or a macvlan has the line of what is below.)
const WITHOUT_LINE: [&[u8]; 8] = [
    b"veth",
    b"tun",
    b"dummy",
    b"bridge",
    b"ifb",
    b"vxlan",
    b"geneve",
    b"wireguard",
];

/// An interface that is up and not the loopback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) name: String,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    /// Software without a line under it; the rate it may tell is made up.
    pub(super) has_no_line: bool,
}

/// The queues of one interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Queue {
    /// Bytes waiting now, in the fullest queue of the interface: a queue inside another is counted by both.
    pub(super) backlog_bytes: u32,
    /// Packets dropped or held back over the limit since the queue was made, of the queue with most.
    pub(super) overlimits: u64,
}

/// Interfaces that are up, by index.
pub(super) fn links(netlink: &mut Netlink) -> Result<BTreeMap<i32, Link>, DumpError> {
    let mut links = BTreeMap::new();
    // struct ifinfomsg
    netlink.dump(RTM_GETLINK, &[0; 16], RTM_NEWLINK, |body| {
        links.extend(parse_link(body))
    })?;
    Ok(links)
}

/// Local addresses, with their interface's index.
pub(super) fn addresses(netlink: &mut Netlink) -> Result<BTreeMap<IpAddr, i32>, DumpError> {
    let mut addresses = BTreeMap::new();
    // struct ifaddrmsg
    netlink.dump(RTM_GETADDR, &[0; 8], RTM_NEWADDR, |body| {
        addresses.extend(parse_address(body))
    })?;
    Ok(addresses)
}

/// Queues by interface index.
pub(super) fn queues(netlink: &mut Netlink) -> Result<BTreeMap<i32, Queue>, DumpError> {
    let mut queues: BTreeMap<i32, Queue> = BTreeMap::new();
    // struct tcmsg
    netlink.dump(RTM_GETQDISC, &[0; 20], RTM_NEWQDISC, |body| {
        if let Some((index, queue)) = parse_queue(body) {
            let whole = queues.entry(index).or_default();
            whole.backlog_bytes = whole.backlog_bytes.max(queue.backlog_bytes);
            whole.overlimits = whole.overlimits.max(queue.overlimits);
        }
    })?;
    Ok(queues)
}

/// The line rate from `speed` (Mbit/s) in `/sys`. Interfaces without one answer `EINVAL` or -1.
pub(super) fn line_bytes_per_s(class_net: &Path, name: &str) -> Reading<u64> {
    const BYTES_PER_MBIT: u64 = 125_000;
    // The name comes from the kernel, but is never let out of the directory.
    if name.is_empty() || name.contains('/') || name.starts_with('.') {
        return Reading::Unsupported;
    }
    match std::fs::read_to_string(class_net.join(name).join("speed")) {
        Ok(text) => match text.trim().parse::<i64>() {
            Ok(..=0) => Reading::Unsupported,
            Ok(mbit) => Reading::Value(mbit.unsigned_abs().saturating_mul(BYTES_PER_MBIT)),
            Err(_) => Reading::Failed(format!("speed is {:?}", text.trim())),
        },
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::InvalidInput | std::io::ErrorKind::NotFound
            ) =>
        {
            Reading::Unsupported
        }
        Err(error) => Reading::Failed(format!("speed cannot be read: {error}")),
    }
}

/// `struct ifinfomsg`: family, padding, type, index, flags, change; `struct rtnl_link_stats64` starts with received and
/// sent packets, received and sent bytes.
fn parse_link(body: &[u8]) -> Option<(i32, Link)> {
    let index = i32_at(body, 4)?;
    let flags = u32_at(body, 8)?;
    if flags & IFF_UP == 0 || flags & IFF_LOOPBACK != 0 {
        return None;
    }
    let find =
        |wanted| attributes(body.get(16..)?).find_map(|(kind, value)| (kind == wanted).then_some(value));
    let name = find(IFLA_IFNAME)?.split(|&byte| byte == 0).next()?;
    let stats = find(IFLA_STATS64)?;
    let link = Link {
        name: String::from_utf8_lossy(name).into_owned(),
        received_bytes: u64_at(stats, 16)?,
        sent_bytes: u64_at(stats, 24)?,
        has_no_line: find(IFLA_LINKINFO).is_some_and(has_no_line),
    };
    Some((index, link))
}

/// Whether the information on a link is that of a kind without a line.
fn has_no_line(information: &[u8]) -> bool {
    let kind = attributes(information).find(|(kind, _)| *kind == IFLA_INFO_KIND);
    kind.and_then(|(_, name)| name.split(|&byte| byte == 0).next())
        .is_some_and(|name| WITHOUT_LINE.contains(&name))
}

/// `struct ifaddrmsg`: family, prefix length, flags, scope, index. On point-to-point links the own address is
/// `IFA_LOCAL`; IPv6 has `IFA_ADDRESS` alone.
fn parse_address(body: &[u8]) -> Option<(IpAddr, i32)> {
    let index = i32_at(body, 4)?;
    let find =
        |wanted| attributes(body.get(8..)?).find_map(|(kind, value)| (kind == wanted).then_some(value));
    let value = find(IFA_LOCAL).or_else(|| find(IFA_ADDRESS))?;
    let address = match value.len() {
        4 => Ipv4Addr::from(*value.first_chunk::<4>()?).into(),
        16 => Ipv6Addr::from(*value.first_chunk::<16>()?).into(),
        _ => return None,
    };
    Some((address, index))
}

/// `struct tcmsg`: family, padding, index, handle, parent, info; `struct gnet_stats_queue`: length, backlog, drops,
/// requeues, overlimits.
fn parse_queue(body: &[u8]) -> Option<(i32, Queue)> {
    let index = i32_at(body, 4)?;
    let parent = u32_at(body, 12)?;
    if (TC_H_INGRESS..u32::MAX).contains(&parent) {
        return None;
    }
    let (_, stats) = attributes(body.get(20..)?).find(|(kind, _)| *kind == TCA_STATS2)?;
    let (_, queue) = attributes(stats).find(|(kind, _)| *kind == TCA_STATS_QUEUE)?;
    let overlimits = u64::from(u32_at(queue, 8)?) + u64::from(u32_at(queue, 16)?);
    Some((
        index,
        Queue {
            backlog_bytes: u32_at(queue, 4)?,
            overlimits,
        },
    ))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::super::netlink::attribute;
    use super::*;

    fn words(values: &[u32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_ne_bytes()).collect()
    }

    fn link(flags: u32) -> Vec<u8> {
        let stats: Vec<u8> = [1_u64, 2, 3000, 4000, 0]
            .iter()
            .flat_map(|value| value.to_ne_bytes())
            .collect();
        [
            words(&[0, 5, flags, 0]),
            attribute(IFLA_IFNAME, b"eth0\0"),
            attribute(IFLA_STATS64, &stats),
        ]
        .concat()
    }

    fn queue(parent: u32) -> Vec<u8> {
        let stats = attribute(TCA_STATS_QUEUE, &words(&[3, 9000, 2, 0, 40]));
        [
            words(&[0, 5, 0x8001_0000, parent, 2]),
            attribute(1, b"tbf\0"),
            attribute(TCA_STATS2, &stats),
        ]
        .concat()
    }

    #[test]
    fn decodes_links_addresses_and_queues() {
        let expected = Link {
            name: "eth0".to_owned(),
            sent_bytes: 4000,
            received_bytes: 3000,
            has_no_line: false,
        };
        assert_eq!(parse_link(&link(IFF_UP)), Some((5, expected)));
        assert_eq!(parse_link(&link(0)), None);
        assert_eq!(parse_link(&link(IFF_UP | IFF_LOOPBACK)), None);

        let point_to_point = [
            words(&[2, 5]),
            attribute(IFA_ADDRESS, &[10, 0, 0, 9]),
            attribute(IFA_LOCAL, &[10, 0, 0, 1]),
        ]
        .concat();
        assert_eq!(
            parse_address(&point_to_point),
            Some(("10.0.0.1".parse().unwrap(), 5))
        );
        let six = [
            words(&[10, 6]),
            attribute(IFA_ADDRESS, &Ipv6Addr::LOCALHOST.octets()),
        ]
        .concat();
        assert_eq!(parse_address(&six), Some(("::1".parse().unwrap(), 6)));

        assert_eq!(
            parse_queue(&queue(u32::MAX)),
            Some((
                5,
                Queue {
                    backlog_bytes: 9000,
                    overlimits: 42
                }
            ))
        );
        assert_eq!(parse_queue(&queue(TC_H_INGRESS)), None);
    }

    #[test]
    fn software_has_no_line() {
        let of = |kind: &[u8]| {
            let information = [attribute(2, &[1, 2]), attribute(IFLA_INFO_KIND, kind)].concat();
            let whole = [link(IFF_UP), attribute(IFLA_LINKINFO, &information)].concat();
            parse_link(&whole).unwrap().1.has_no_line
        };
        assert_eq!(
            [b"veth\0".as_slice(), b"tun", b"bond\0", b"", b"vethx\0"].map(of),
            [true, true, false, false, false]
        );
    }

    #[test]
    fn truncated_messages_give_nothing() {
        for (whole, parse) in [
            (
                link(IFF_UP),
                (|body| parse_link(body).is_some()) as fn(&[u8]) -> bool,
            ),
            (queue(u32::MAX), |body| parse_queue(body).is_some()),
        ] {
            // The last attributes' padding and trailing statistics may be missing; nothing before them may.
            let shortest = (0..=whole.len()).find(|&length| parse(&whole[..length])).unwrap();
            assert!(shortest + 12 >= whole.len(), "{shortest} of {}", whole.len());
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = (parse_link(&bytes), parse_address(&bytes), parse_queue(&bytes));
        }
    }

    #[test]
    fn line_rates() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| {
            std::fs::create_dir_all(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("speed"), text).unwrap();
        };
        put("eth0", "400000\n");
        put("veth", "-1\n");
        put("odd", "fast\n");
        assert_eq!(
            line_bytes_per_s(dir.path(), "eth0"),
            Reading::Value(50_000_000_000)
        );
        assert_eq!(line_bytes_per_s(dir.path(), "veth"), Reading::Unsupported);
        assert_eq!(line_bytes_per_s(dir.path(), "none"), Reading::Unsupported);
        assert_eq!(line_bytes_per_s(dir.path(), "../eth0"), Reading::Unsupported);
        assert!(matches!(line_bytes_per_s(dir.path(), "odd"), Reading::Failed(_)));
    }

    #[test]
    fn the_kernel_answers() {
        let mut netlink = Netlink::open(None).unwrap();
        assert!(
            links(&mut netlink)
                .unwrap()
                .values()
                .all(|link| link.name != "lo")
        );
        assert!(
            addresses(&mut netlink)
                .unwrap()
                .contains_key(&IpAddr::from(Ipv4Addr::LOCALHOST))
        );
        queues(&mut netlink).unwrap();
    }
}
