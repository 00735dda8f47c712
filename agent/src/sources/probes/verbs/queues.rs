//! The kernel's map of queue pairs, read out as growth.

use std::collections::HashMap as StdHashMap;
use std::sync::PoisonError;

use aya::maps::{HashMap, MapData};
use stallscope_attribution::time::Window;
use stallscope_records::Field as _;
use stallscope_records::verbs::{Qp, QpGone};

use super::super::rings::RawEvent;
use super::Watched;

/// How often the map is read.
const INTERVAL_NS: u64 = 2_000_000_000;

/// What a queue pair did in a window.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PairGrowth {
    /// The queue pair at the window's end.
    pub qp: Qp,
    /// Work requests posted in the window.
    pub posts: u64,
    /// Bytes they carry.
    pub bytes: u64,
    /// Calls of which not everything was counted.
    pub cut: u64,
    /// Nobody watched the function through which it posts for some of the window.
    pub unseen: bool,
}

/// A key of the map: address of the `ibv_qp`, thread group id.
type Key = [u64; 2];

/// What was told of a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Told {
    qp: Qp,
    /// It was not in the map at the last read: its end lies in the ring or is lost.
    is_missing: bool,
}

/// Reads the map of queue pairs.
pub(in super::super) struct Queues {
    pairs: HashMap<MapData, Key, [u64; Qp::WORDS]>,
    /// Addresses are used again: a queue pair is one of its address from its birth on.
    told: StdHashMap<(Key, u64), Told>,
    watched: Watched,
    last_ns: u64,
    /// Processes that ended since the last read.
    gone: Vec<u32>,
}

impl Queues {
    pub(in super::super) fn new(
        pairs: HashMap<MapData, Key, [u64; Qp::WORDS]>,
        watched: Watched,
        now_ns: u64,
    ) -> Self {
        Self {
            pairs,
            told: StdHashMap::new(),
            watched,
            last_ns: now_ns,
            gone: Vec::new(),
        }
    }

    pub(in super::super) fn process_gone(&mut self, tgid: u32) {
        self.gone.push(tgid);
    }

    /// Tells the last of a queue pair that is gone.
    pub(in super::super) fn gone(&mut self, gone: &QpGone, out: &mut dyn FnMut(RawEvent<'_>)) {
        let tgid = gone.head.tgid;
        let key = [gone.qp, u64::from(tgid)];
        let told = self.told.remove(&(key, gone.last.born_ns));
        let end_ns = gone.head.begin_ns.max(self.last_ns);
        if let Some(window) = Window::new(self.last_ns, end_ns) {
            self.tell(window, tgid, gone.last, told, out);
        }
    }

    /// Reads the map when it is time.
    pub(in super::super) fn poll(&mut self, now_ns: u64, out: &mut dyn FnMut(RawEvent<'_>)) {
        if now_ns.saturating_sub(self.last_ns) < INTERVAL_NS {
            return;
        }
        let Some(window) = Window::new(self.last_ns, now_ns) else {
            return;
        };
        let mut before = std::mem::take(&mut self.told);
        let pairs: Vec<(Key, Qp)> = self
            .pairs
            .iter()
            .filter_map(Result::ok)
            .filter_map(read)
            .collect();
        for (key, qp) in pairs {
            let tgid = key[1] as u32;
            let told = before.remove(&(key, qp.born_ns));
            self.tell(window, tgid, qp, told, out);
            if self.gone.contains(&tgid) {
                let _ = self.pairs.remove(&key);
            } else {
                let told = Told {
                    qp,
                    is_missing: false,
                };
                self.told.insert((key, qp.born_ns), told);
            }
        }
        // The end of one that is missing for the first time may come with the next records.
        for (key, told) in before {
            if !told.is_missing && !self.gone.contains(&(key.0[1] as u32)) {
                let told = Told {
                    is_missing: true,
                    ..told
                };
                self.told.insert(key, told);
            }
        }
        self.gone.clear();
        self.last_ns = now_ns;
    }

    fn tell(&self, window: Window, tgid: u32, qp: Qp, told: Option<Told>, out: &mut dyn FnMut(RawEvent<'_>)) {
        if let Some(pair) = growth(qp, told.map(|told| told.qp), self.is_unseen(window, tgid, &qp)) {
            out(RawEvent::QueuePair {
                window,
                tgid,
                pair: &pair,
            });
        }
    }

    /// Whether the queue pair was there before the probe on the function through which it posts.
    fn is_unseen(&self, window: Window, tgid: u32, qp: &Qp) -> bool {
        let watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        watched
            .get(&(tgid, qp.post_send))
            .is_none_or(|&since_ns| since_ns > window.start_ns().max(qp.born_ns))
    }
}

fn read((key, words): (Key, [u64; Qp::WORDS])) -> Option<(Key, Qp)> {
    let mut bytes = [0; 8 * Qp::WORDS];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    Some((key, Qp::read(&bytes)?))
}

/// What is new; `None` when nothing is.
fn growth(qp: Qp, before: Option<Qp>, unseen: bool) -> Option<PairGrowth> {
    let from = |field: fn(&Qp) -> u64| field(&qp).saturating_sub(before.as_ref().map_or(0, field));
    let (posts, bytes, cut) = (from(|qp| qp.posts), from(|qp| qp.bytes), from(|qp| qp.cut));
    let is_same = before.is_some_and(|before| {
        (before.changes, before.flags, before.number) == (qp.changes, qp.flags, qp.number)
    });
    let nothing = posts == 0 && bytes == 0 && cut == 0 && is_same;
    (!nothing).then_some(PairGrowth {
        qp,
        posts,
        bytes,
        cut,
        unseen,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qp(posts: u64, bytes: u64, changes: u32) -> Qp {
        Qp {
            born_ns: 7,
            posts,
            bytes,
            cut: 0,
            post_send: 1,
            number: 17,
            kind: 2,
            peer_number: 0,
            port: 1,
            flags: 0,
            changes,
            peer: [0; 16],
            device: [0; 64],
        }
    }

    #[test]
    fn only_what_is_new_is_told() {
        let first = growth(qp(5, 500, 3), None, false).map(|pair| (pair.posts, pair.bytes));
        assert_eq!(first, Some((5, 500)));
        let more = growth(qp(7, 900, 3), Some(qp(5, 500, 3)), false).map(|pair| (pair.posts, pair.bytes));
        assert_eq!(more, Some((2, 400)));
        assert_eq!(growth(qp(7, 900, 3), Some(qp(7, 900, 3)), false), None);
        let changed = growth(qp(7, 900, 4), Some(qp(7, 900, 3)), false).map(|pair| (pair.posts, pair.bytes));
        assert_eq!(changed, Some((0, 0)), "it was modified");
    }

    #[test]
    fn the_words_of_the_map_are_the_record() {
        let mut words = [0u64; Qp::WORDS];
        // Of the layout: born, posts, bytes, cut, post_send, number and type in one word.
        words[..5].copy_from_slice(&[7, 5, 500, 0, 1]);
        words[5] = u64::from_ne_bytes([17, 0, 0, 0, 2, 0, 0, 0]);
        words[6] = u64::from_ne_bytes([0, 0, 0, 0, 1, 0, 0, 0]);
        words[7] = u64::from_ne_bytes([0, 0, 0, 0, 3, 0, 0, 0]);
        assert_eq!(read(([1, 2], words)), Some(([1, 2], qp(5, 500, 3))));
    }
}
