//! What the driver of a network interface counts beside the kernel's own: pauses, and losses of its hardware.
//!
//! Only the old call (`SIOCETHTOOL`) has these; over netlink there are standard groups alone. Interfaces are named in the
//! network namespace in which the socket was opened.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// linux/sockios.h
const SIOCETHTOOL: u32 = 0x8946;
/// linux/ethtool.h
const GSTRINGS: u32 = 0x1b;
const GSTATS: u32 = 0x1d;
const GSSET_INFO: u32 = 0x37;
const SS_STATS: u32 = 1;
const STRING_BYTES: usize = 32;
/// Numbers an interface may have; drivers of many queues have thousands.
const MOST_STATS: usize = 1 << 15;
/// Room for numbers that appear between asking how many there are and reading them.
const ROOM: usize = 2 * MOST_STATS;
/// Of them, numbers that are told.
const MOST_TOLD: usize = 128;

/// Numbers that tell of the link and are not about pauses.
const TOLD: [&str; 10] = [
    "rx_discards_phy",
    "tx_discards_phy",
    "rx_crc_errors_phy",
    "rx_symbol_err_phy",
    "rx_pcs_symbol_err_phy",
    "link_down_events_phy",
    "rx_out_of_buffer",
    "outbound_pci_stalled_rd",
    "outbound_pci_stalled_wr",
    "outbound_pci_buffer_overflow",
];

/// A socket to ask by.
#[derive(Debug)]
pub(super) struct NicStats {
    socket: OwnedFd,
}

/// Which numbers of an interface are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chosen {
    count: usize,
    named: Vec<(usize, String)>,
}

impl NicStats {
    pub(super) fn open() -> io::Result<Self> {
        let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
        Ok(Self { socket })
    }

    /// The numbers of the interface that tell something of its link.
    pub(super) fn choose(&self, interface: &str) -> io::Result<Chosen> {
        let count = self.count(interface)?;
        let mut buffer = request(GSTRINGS, SS_STATS, ROOM * STRING_BYTES + 16);
        self.call(interface, &mut buffer)?;
        Ok(chosen(&buffer, count))
    }

    /// The chosen numbers now; `None` when the interface has others than before.
    pub(super) fn read(&self, interface: &str, chosen: &Chosen) -> io::Result<Option<Vec<(String, u64)>>> {
        if self.count(interface)? != chosen.count {
            return Ok(None);
        }
        let count = u32::try_from(chosen.count).unwrap_or(0);
        let mut buffer = request(GSTATS, count, ROOM * size_of::<u64>() + 16);
        self.call(interface, &mut buffer)?;
        // struct ethtool_stats: command, number, values.
        let value = |(index, name): &(usize, String)| Some((name.clone(), *buffer.get(1 + index)?));
        Ok(Some(chosen.named.iter().filter_map(value).collect()))
    }

    /// How many numbers the interface has.
    fn count(&self, interface: &str) -> io::Result<usize> {
        // struct ethtool_sset_info: command, reserved, mask of sets, then a size for each.
        let mut buffer = request(GSSET_INFO, 0, 32);
        buffer[1] = 1 << SS_STATS;
        self.call(interface, &mut buffer)?;
        if buffer[1] == 0 {
            return Ok(0);
        }
        let [low, high] = halves(buffer[2]);
        debug_assert_eq!(high, 0);
        match usize::try_from(low) {
            Ok(count) if count <= MOST_STATS => Ok(count),
            _ => Err(io::Error::other(format!(
                "{low} numbers are more than any device should have"
            ))),
        }
    }

    fn call(&self, interface: &str, buffer: &mut [u64]) -> io::Result<()> {
        let name = interface.as_bytes();
        // SAFETY: all fields are integers and pointers, for which zeros are valid.
        let mut asked: libc::ifreq = unsafe { std::mem::zeroed() };
        if name.is_empty() || name.len() >= asked.ifr_name.len() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        for (to, from) in asked.ifr_name.iter_mut().zip(name) {
            *to = from.cast_signed();
        }
        asked.ifr_ifru.ifru_data = buffer.as_mut_ptr().cast();
        // SAFETY: the socket is open; the kernel reads the name, and writes a header and as many entries as the interface
        // has now, which is twice less than there is room for and does not double between two calls.
        let status = unsafe { libc::ioctl(self.socket.as_raw_fd(), SIOCETHTOOL.into(), &raw mut asked) };
        if status == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// A command with its first argument, and room for the answer.
fn request(command: u32, argument: u32, bytes: usize) -> Vec<u64> {
    let mut buffer = vec![0; bytes.div_ceil(size_of::<u64>())];
    let [a, b, c, d] = command.to_ne_bytes();
    let [e, f, g, h] = argument.to_ne_bytes();
    buffer[0] = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
    buffer
}

/// The two 32-bit fields that share a word, in the order of their offsets.
fn halves(word: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
}

/// struct ethtool_gstrings: command, set, number, then the names.
fn chosen(buffer: &[u64], count: usize) -> Chosen {
    const HEADER: usize = 12;
    let bytes: Vec<u8> = buffer
        .iter()
        .take((HEADER + count * STRING_BYTES).div_ceil(size_of::<u64>()))
        .flat_map(|word| word.to_ne_bytes())
        .collect();
    let names = bytes.get(HEADER..).unwrap_or_default().chunks_exact(STRING_BYTES);
    let named = names
        .take(count)
        .enumerate()
        .filter_map(|(index, name)| {
            let name = name.split(|&byte| byte == 0).next()?;
            let name = std::str::from_utf8(name).ok()?;
            is_told(name).then(|| (index, name.to_owned()))
        })
        .take(MOST_TOLD)
        .collect();
    Chosen { count, named }
}

/// Pauses of the link or of a priority of it (PFC), and some losses. Names are the drivers' own.
fn is_told(name: &str) -> bool {
    let is_name = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    is_name && (name.contains("pause") || name.contains("pfc") || TOLD.contains(&name))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn names_are_chosen_by_what_they_tell() {
        for name in [
            "tx_pause_ctrl_phy",
            "rx_prio3_pause",
            "tx_prio0_pause_duration",
            "tx_pause_storm_warning_events",
            "rx_pfc_ena_frames_pri3",
            "rx_discards_phy",
        ] {
            assert!(is_told(name), "{name}");
        }
        for name in ["rx_packets", "rx0_cache_reuse", "", "tx pause", "tx_pause\u{1b}"] {
            assert!(!is_told(name), "{name}");
        }
    }

    #[test]
    fn names_lie_behind_a_header_of_three_words() {
        let mut bytes = vec![0_u8; 12 + 3 * STRING_BYTES];
        for (index, name) in ["rx_packets", "tx_pause_ctrl_phy", "rx_prio3_pause"]
            .into_iter()
            .enumerate()
        {
            let at = 12 + index * STRING_BYTES;
            bytes[at..at + name.len()].copy_from_slice(name.as_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        let words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| u64::from_ne_bytes(word.try_into().unwrap()))
            .collect();
        let named = vec![
            (1, "tx_pause_ctrl_phy".to_owned()),
            (2, "rx_prio3_pause".to_owned()),
        ];
        assert_eq!(chosen(&words, 3), Chosen { count: 3, named });
        assert_eq!(chosen(&words[..2], 3).named, []);
    }

    #[test]
    fn this_machines_interfaces_answer_or_refuse() {
        let stats = NicStats::open().unwrap();
        for refused in ["", "no-such-interface-here", "nosuch0"] {
            assert!(stats.choose(refused).is_err(), "{refused}");
        }
        let mut asked = 0;
        for entry in std::fs::read_dir("/sys/class/net").unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            // Interfaces without numbers of their own refuse, and so do those of another network namespace.
            let Ok(mut chosen) = stats.choose(&name) else {
                continue;
            };
            chosen.named = (0..chosen.count)
                .map(|index| (index, index.to_string()))
                .collect();
            let read = stats.read(&name, &chosen).unwrap().unwrap();
            assert_eq!(read.len(), chosen.count, "{name}");
            asked += 1;
        }
        println!("{asked} interfaces have numbers of their own");
    }
}
