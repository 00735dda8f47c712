//! Line rates by ethtool over generic netlink: of the network namespace that the socket was opened in, while
//! `/sys/class/net` shows the namespace that the file system was mounted in.

use std::collections::BTreeMap;

use stallscope_attribution::reading::Reading;

use super::netlink::{DumpError, Netlink, attribute, attributes, i32_at, u16_at, u32_at};

/// `GENL_ID_CTRL`: the family that knows the numbers of the others.
const CONTROL: u16 = 0x10;
const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

/// `ETHTOOL_MSG_LINKMODES_GET` (linux/ethtool_netlink.h).
const LINKMODES_GET: u8 = 4;
const LINKMODES_HEADER: u16 = 1;
const LINKMODES_SPEED: u16 = 5;
const HEADER_DEV_INDEX: u16 = 1;
const HEADER_FLAGS: u16 = 3;
/// `ETHTOOL_FLAG_COMPACT_BITSETS`: the link modes as bits and not as a list of names.
const COMPACT_BITSETS: u32 = 1;

/// `NLA_F_NESTED`: this family refuses nests without it.
const NESTED: u16 = 0x8000;

/// `struct genlmsghdr`: command, version, reserved.
const GENERIC_HEADER: usize = 4;

const BYTES_PER_MBIT: u64 = 125_000;
/// `SPEED_UNKNOWN`: no link, or a device without a rate.
const UNKNOWN: u32 = u32::MAX;

/// A socket to the kernel's ethtool family, in kernels since 5.6.
#[derive(Debug)]
pub(super) struct Ethtool {
    netlink: Netlink,
    family: u16,
}

impl Ethtool {
    pub(super) fn open() -> Result<Self, DumpError> {
        let mut netlink = Netlink::open(Some(rustix::net::netlink::GENERIC))?;
        let mut family = None;
        let name = attribute(CTRL_ATTR_FAMILY_NAME, b"ethtool\0");
        netlink.ask(CONTROL, &generic(CTRL_CMD_GETFAMILY, &name), CONTROL, |body| {
            family = parse_family(body);
        })?;
        let family = family.ok_or(DumpError::Malformed("a family without a number"))?;
        Ok(Self { netlink, family })
    }

    /// Line rates in bytes per second, by interface index; what has none is left out or unsupported.
    pub(super) fn line_rates(&mut self) -> Result<BTreeMap<i32, Reading<u64>>, DumpError> {
        let mut rates = BTreeMap::new();
        let flags = attribute(HEADER_FLAGS, &COMPACT_BITSETS.to_ne_bytes());
        let request = generic(LINKMODES_GET, &attribute(NESTED | LINKMODES_HEADER, &flags));
        self.netlink.dump(self.family, &request, self.family, |body| {
            rates.extend(parse_rate(body));
        })?;
        Ok(rates)
    }
}

fn generic(command: u8, attributes: &[u8]) -> Vec<u8> {
    const VERSION: u8 = 1;
    [&[command, VERSION, 0, 0], attributes].concat()
}

fn find(bytes: Option<&[u8]>, wanted: u16) -> Option<&[u8]> {
    attributes(bytes?).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

fn parse_family(body: &[u8]) -> Option<u16> {
    u16_at(find(body.get(GENERIC_HEADER..), CTRL_ATTR_FAMILY_ID)?, 0)
}

fn parse_rate(body: &[u8]) -> Option<(i32, Reading<u64>)> {
    let body = body.get(GENERIC_HEADER..);
    let index = i32_at(find(find(body, LINKMODES_HEADER), HEADER_DEV_INDEX)?, 0)?;
    let rate = match find(body, LINKMODES_SPEED).and_then(|speed| u32_at(speed, 0)) {
        None | Some(0 | UNKNOWN) => Reading::Unsupported,
        Some(mbit) => Reading::Value(u64::from(mbit) * BYTES_PER_MBIT),
    };
    Some((index, rate))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn answer(index: i32, speed: Option<u32>) -> Vec<u8> {
        let device = [
            attribute(HEADER_DEV_INDEX, &index.to_ne_bytes()),
            attribute(2, b"eth0\0"),
        ]
        .concat();
        let speed = speed.map_or_else(Vec::new, |mbit| attribute(LINKMODES_SPEED, &mbit.to_ne_bytes()));
        let parts = [attribute(LINKMODES_HEADER, &device), attribute(2, &[1]), speed].concat();
        generic(LINKMODES_GET, &parts)
    }

    #[test]
    fn decodes_rates() {
        assert_eq!(
            parse_rate(&answer(7, Some(400_000))),
            Some((7, Reading::Value(50_000_000_000)))
        );
        for none in [None, Some(0), Some(UNKNOWN)] {
            assert_eq!(parse_rate(&answer(7, none)), Some((7, Reading::Unsupported)));
        }
        let whole = answer(7, Some(10_000));
        for length in 0..whole.len() {
            let cut = parse_rate(&whole[..length]);
            assert!(
                cut.is_none() || cut == Some((7, Reading::Unsupported)),
                "{length}: {cut:?}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = (parse_rate(&bytes), parse_family(&bytes));
        }
    }

    #[test]
    fn the_kernel_answers() {
        let mut ethtool = match Ethtool::open() {
            Ok(ethtool) => ethtool,
            Err(error) => {
                println!("skipped: the_kernel_answers: no ethtool over netlink: {error}");
                return;
            }
        };
        ethtool.line_rates().unwrap();
    }
}
