//! Counters of a port between two reads. Pure.

use std::collections::BTreeMap;

use stallscope_attribution::facts::Counter;
use stallscope_attribution::reading::Reading;

use super::super::sysfs::Lack;

/// One read of a counter.
pub(super) type Read = Result<u64, Lack>;

/// Where counters come from, and with that how they count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Family {
    /// `counters/`: as the InfiniBand specification has them. They stop at their limit and never wrap.
    Standard,
    /// `hw_counters/`, or the interface's own: as the driver likes. Many are 32 bits wide and wrap.
    Device,
}

const WRAP: u64 = 1 << 32;
/// A drop is a wrap only where this much growth explains it: what a counter of packets may gain between two reads.
const MOST_WRAPPED: u64 = WRAP / 4;

/// Counters of words of four octets (`PortXmitData`, `PortRcvData`, InfiniBand volume 1, section 16.1.3.5).
const WORDS: [&str; 2] = ["port_xmit_data", "port_rcv_data"];

/// Where a standard counter stops, by the width it has in `PortCounters` (same section). Wider ones never get there.
const LIMITS: [(&str, u64); 13] = [
    ("symbol_error", 0xffff),
    ("link_error_recovery", 0xff),
    ("link_downed", 0xff),
    ("port_rcv_errors", 0xffff),
    ("port_rcv_remote_physical_errors", 0xffff),
    ("port_rcv_switch_relay_errors", 0xffff),
    ("port_xmit_discards", 0xffff),
    ("port_xmit_constraint_errors", 0xff),
    ("port_rcv_constraint_errors", 0xff),
    ("local_link_integrity_errors", 0xf),
    ("excessive_buffer_overrun_errors", 0xf),
    ("VL15_dropped", 0xffff),
    ("port_xmit_wait", 0xffff_ffff),
];

/// The counters of one port, as last read.
#[derive(Debug, Default)]
pub(super) struct Counters {
    last: BTreeMap<(Family, String), Last>,
}

#[derive(Debug)]
struct Last {
    read: Read,
    /// It was seen above 32 bits, so it is wider.
    is_wide: bool,
}

impl Counters {
    /// Takes one read of all counters, in the order to tell them.
    pub(super) fn take(&mut self, reads: Vec<(Family, String, Read)>) -> Vec<Counter> {
        let mut before = std::mem::take(&mut self.last);
        let mut counters = Vec::with_capacity(reads.len());
        for (family, name, now) in reads {
            let key = (family, name);
            let last = before.remove(&key);
            let is_wide = last.as_ref().is_some_and(|last| last.is_wide)
                || now.as_ref().is_ok_and(|&value| value >= WRAP);
            let wraps = family == Family::Device && !is_wide;
            let growth = growth(last.map(|last| last.read), &now, wraps);
            counters.push(Counter {
                growth: as_told(family, &key.1, growth, &now),
                name: key.1.clone(),
            });
            self.last.insert(key, Last { read: now, is_wide });
        }
        counters
    }
}

fn growth(before: Option<Read>, now: &Read, wraps: bool) -> Reading<u64> {
    let now = match now {
        Ok(now) => *now,
        Err(lack) => return lack.clone().reading(),
    };
    let Some(Ok(before)) = before else {
        return Reading::NotMeasured;
    };
    match now.checked_sub(before) {
        Some(growth) => Reading::Value(growth),
        None if wraps && now + WRAP - before <= MOST_WRAPPED => Reading::Value(now + WRAP - before),
        None => Reading::Failed(format!("the counter was reset: from {before} to {now}")),
    }
}

/// The growth in the units that are told, unless the counter cannot count on.
fn as_told(family: Family, name: &str, growth: Reading<u64>, now: &Read) -> Reading<u64> {
    if family != Family::Standard {
        return growth;
    }
    if WORDS.contains(&name) {
        const BYTES_PER_WORD: u64 = 4;
        return growth.map(|words| words.saturating_mul(BYTES_PER_WORD));
    }
    let limit = LIMITS.iter().find(|(limited, _)| *limited == name);
    match (limit, now, growth) {
        // How it got there was still counted; from there on it stands still.
        (Some((_, limit)), Ok(now), Reading::Value(0)) if now == limit => Reading::Failed(format!(
            "the counter stands at its limit of {limit} and counts no further; clear it (perfquery -R)"
        )),
        (.., growth) => growth,
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn over(family: Family, name: &str, values: &[Read]) -> Vec<Reading<u64>> {
        let mut counters = Counters::default();
        values
            .iter()
            .map(|read| {
                let mut told = counters.take(vec![(family, name.to_owned(), read.clone())]);
                told.remove(0).growth
            })
            .collect()
    }

    fn last(family: Family, name: &str, values: &[u64]) -> Reading<u64> {
        let reads: Vec<Read> = values.iter().map(|value| Ok(*value)).collect();
        over(family, name, &reads).pop().unwrap()
    }

    #[test]
    fn growth_is_between_two_reads() {
        let all = over(Family::Device, "x", &[Ok(5), Ok(5), Ok(12)]);
        assert_eq!(all, [Reading::NotMeasured, Reading::Value(0), Reading::Value(7)]);
    }

    #[test]
    fn words_are_told_as_bytes_and_vendors_bytes_as_they_are() {
        assert_eq!(
            last(Family::Standard, "port_xmit_data", &[100, 350]),
            Reading::Value(1000)
        );
        assert_eq!(last(Family::Device, "tx_bytes", &[100, 350]), Reading::Value(250));
    }

    #[test]
    fn narrow_counters_wrap_and_others_were_reset() {
        let top = u64::from(u32::MAX);
        assert_eq!(
            last(Family::Device, "out_of_sequence", &[top - 9, 5]),
            Reading::Value(15)
        );
        for values in [
            [1000, 5].as_slice(),
            &[WRAP / 2, 5],
            &[WRAP + 7, top - 9, 5],
            &[WRAP, 0],
        ] {
            assert!(
                matches!(last(Family::Device, "x", values), Reading::Failed(why) if why.contains("was reset")),
                "{values:?}"
            );
        }
        assert!(matches!(
            last(Family::Standard, "port_xmit_packets", &[top - 9, 5]),
            Reading::Failed(_)
        ));
    }

    #[test]
    fn a_standing_counter_says_so() {
        assert_eq!(
            last(Family::Standard, "link_downed", &[250, 255]),
            Reading::Value(5)
        );
        assert!(matches!(
            last(Family::Standard, "link_downed", &[255, 255]),
            Reading::Failed(why) if why.contains("limit of 255")
        ));
        assert_eq!(
            last(Family::Device, "link_downed", &[255, 255]),
            Reading::Value(0)
        );
    }

    #[test]
    fn what_cannot_be_read_is_never_zero() {
        let all = over(
            Family::Device,
            "x",
            &[
                Ok(5),
                Err(Lack::Unsupported),
                Ok(9),
                Err(Lack::Gone),
                Err(Lack::Failed("e".to_owned())),
            ],
        );
        assert_eq!(all[1], Reading::Unsupported);
        assert_eq!(all[2], Reading::NotMeasured, "nothing to compare with");
        assert!(matches!(all[3], Reading::Failed(_)) && matches!(all[4], Reading::Failed(_)));
    }

    #[test]
    fn what_is_gone_is_forgotten() {
        let mut counters = Counters::default();
        counters.take(vec![(Family::Device, "a".to_owned(), Ok(1))]);
        counters.take(vec![(Family::Device, "b".to_owned(), Ok(1))]);
        assert_eq!(counters.last.len(), 1);
    }
}
