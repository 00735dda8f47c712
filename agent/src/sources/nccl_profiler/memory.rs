//! Reading the plugin's memory, which belongs to the job.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;

use stallscope_records::profiler::{
    EVENT_BYTES, Event, MAGIC, OPEN, OPEN_AT, RING_AT, SLOTS, VERSION, WORDS, ask, header, kind, state,
};

use super::find::last_id;
use crate::sources::clock;

/// Slots that are read at once.
const CHUNK: u64 = 512;
/// A place that is not written yet is waited for until so many further ones were given out.
const PATIENCE: u64 = 1024;
/// Most threads of a process whose ids are kept.
const MAX_THREADS: usize = 1024;
/// A loss beyond this in one turn is a lie or a wreck, and counted as this.
const MOST_LOST: u64 = 1 << 24;

/// Why a file is not, or no longer, the plugin's memory.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refused {
    /// The layout is of another version.
    #[error(
        "its NCCL profiler plugin is of another version (layout {found}, here {VERSION}); install the plugin of this package and \
         restart the job"
    )]
    Version {
        /// Its version.
        found: u32,
    },
    /// It belongs to another process.
    #[error("the memory of its NCCL profiler plugin belongs to process {owner}")]
    Other {
        /// Which.
        owner: u32,
    },
    /// Not the plugin's at all.
    #[error(
        "what is called like the memory of its NCCL profiler plugin is something else, and is left alone"
    )]
    Magic,
    /// Nobody looks at it any more.
    #[error("its NCCL profiler plugin does not answer: the process is stopped, or runs another program now")]
    Silent,
    /// The kernel does not let it be read or written.
    #[error("the memory of its NCCL profiler plugin cannot be read: {0}; its network waits come from probes")]
    Read(#[from] io::Error),
}

/// One reading.
#[derive(Debug, Default)]
pub(super) struct Turn {
    /// Up to when it tells everything, ns.
    pub(super) to_ns: u64,
    /// When the plugin last gave a sign of life, ns.
    pub(super) alive_ns: u64,
    /// Since when the plugin tells of steps; `None` while it does not.
    pub(super) switched_ns: Option<u64>,
    /// Steps under way at that time.
    pub(super) open: Vec<Event>,
    /// Steps that ended since the last reading, some of them after that time.
    pub(super) ended: Vec<Event>,
    /// Steps that ended and were not read.
    pub(super) lost: u64,
    /// Events that contradict themselves.
    pub(super) refused: u64,
}

/// The memory of one plugin.
#[derive(Debug)]
pub(super) struct Memory {
    file: File,
    interface: u8,
    /// The place in the ring that is read next; `None` before the first reading.
    tail: Option<u64>,
    /// A place that was not written yet at the last reading.
    waited_for: Option<u64>,
    crowded: u64,
    buffer: Vec<u8>,
    /// Ids of threads, by those in the process's own namespace.
    threads: HashMap<u32, u32>,
}

type Header = [u64; header::WORDS];

impl Memory {
    /// Checks that the file is the memory of the process with the id `owner`, as it sees it.
    pub(super) fn open(file: File, owner: u32) -> Result<Self, Refused> {
        let mut memory = Self {
            file,
            interface: 0,
            tail: None,
            waited_for: None,
            crowded: 0,
            buffer: Vec::new(),
            threads: HashMap::new(),
        };
        let header = memory.header()?;
        let found = (header[header::LAYOUT] >> 32) as u32;
        if found != owner {
            return Err(Refused::Other { owner: found });
        }
        memory.crowded = header[header::CROWDED];
        Ok(memory)
    }

    /// The version of the profiler interface that NCCL chose.
    pub(super) const fn interface(&self) -> u8 {
        self.interface
    }

    fn header(&mut self) -> Result<Header, Refused> {
        let mut bytes = [0; 8 * header::WORDS];
        self.file.read_exact_at(&mut bytes, 0)?;
        let mut header = [0; header::WORDS];
        for (word, bytes) in header.iter_mut().zip(bytes.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        if header[header::MAGIC] != MAGIC {
            return Err(Refused::Magic);
        }
        let found = header[header::LAYOUT] as u32;
        if found != VERSION {
            return Err(Refused::Version { found });
        }
        self.interface = u8::try_from(header[header::INTERFACE]).unwrap_or(u8::MAX);
        Ok(header)
    }

    /// Says that the agent is there, and which kinds of events it wants.
    pub(super) fn ask(&self, now_ns: u64, mask: u32) -> Result<(), Refused> {
        const _: () = assert!(header::ASK == header::HEARTBEAT + 1);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&now_ns.to_ne_bytes());
        bytes[8..].copy_from_slice(&ask(mask).to_ne_bytes());
        Ok(self.file.write_all_at(&bytes, 8 * header::HEARTBEAT as u64)?)
    }

    /// Reads what there is to know now.
    pub(super) fn turn(&mut self) -> Result<Turn, Refused> {
        let before = self.header()?;
        let mut turn = Turn {
            to_ns: clock::monotonic_ns(),
            alive_ns: before[header::ALIVE],
            ..Turn::default()
        };
        let is_on = before[header::MASK] & 1 << kind::PROXY_STEP != 0;
        let switched_ns = before[header::SWITCHED];
        turn.switched_ns = (is_on && (1..=turn.to_ns).contains(&switched_ns)).then_some(switched_ns);
        // The table first: what ends while the ring is read is in both, and known by its token.
        self.read_open(&mut turn)?;
        self.read_ring(&mut turn)?;
        let crowded = before[header::CROWDED];
        turn.lost += crowded.saturating_sub(self.crowded);
        turn.lost = turn.lost.min(MOST_LOST);
        self.crowded = crowded;
        Ok(turn)
    }

    fn read_open(&mut self, turn: &mut Turn) -> Result<(), Refused> {
        if turn.switched_ns.is_none() {
            return Ok(());
        }
        let bytes = (OPEN * EVENT_BYTES) as usize;
        let mut first = std::mem::take(&mut self.buffer);
        first.resize(bytes, 0);
        self.file.read_exact_at(&mut first, OPEN_AT)?;
        let live: Vec<(usize, [u64; WORDS])> = entries(&first)
            .enumerate()
            .filter(|(_, words)| words[0] & state::MASK == state::LIVE)
            .collect();
        if !live.is_empty() {
            // An entry whose first word is the same again was not changed between.
            self.file.read_exact_at(&mut first, OPEN_AT)?;
            for (at, words) in live {
                let again = first
                    .get(at * EVENT_BYTES as usize..)
                    .and_then(<[u8]>::first_chunk);
                if again.is_some_and(|bytes| u64::from_ne_bytes(*bytes) == words[0]) {
                    turn.keep(&words, false);
                }
            }
        }
        self.buffer = first;
        Ok(())
    }

    fn read_ring(&mut self, turn: &mut Turn) -> Result<(), Refused> {
        let head = self.header()?[header::HEAD];
        let mut next = match self.tail {
            Some(tail) if tail <= head => tail,
            // The first reading, or a head that went back.
            _ => head,
        };
        let oldest = head.saturating_sub(SLOTS);
        if next < oldest {
            turn.lost = turn.lost.saturating_add(oldest - next);
            next = oldest;
        }
        while next < head {
            let count = CHUNK.min(head - next).min(SLOTS - next % SLOTS);
            let read = self.read_slots(next, count, turn)?;
            next += read;
            if read < count {
                break;
            }
        }
        self.tail = Some(next);
        Ok(())
    }

    /// Reads `count` slots that lie in a row; gives how many are done with. It is fewer when one is still being written.
    fn read_slots(&mut self, from: u64, count: u64, turn: &mut Turn) -> Result<u64, Refused> {
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize((count * EVENT_BYTES) as usize, 0);
        let at = RING_AT + from % SLOTS * EVENT_BYTES;
        self.file.read_exact_at(&mut buffer, at)?;
        // A slot that is written over has its new place counted first.
        let last = self.header()?[header::HEAD];
        let overwritten = last.saturating_sub(SLOTS);
        let mut done = count;
        for (place, words) in (from..).zip(entries(&buffer)) {
            let last = last.max(place);
            if words[0] == place + 1 && place >= overwritten {
                turn.keep(&words, true);
            } else if place < overwritten || last - place > PATIENCE || self.waited_for == Some(place) {
                turn.lost = turn.lost.saturating_add(1);
            } else {
                self.waited_for = Some(place);
                done = place - from;
                break;
            }
        }
        self.buffer = buffer;
        Ok(done)
    }

    /// A thread's id in the agent's namespace; the process's own id when it cannot be found.
    pub(super) fn tid(&mut self, pid: u32, inner: u32) -> u32 {
        if inner == 0 {
            return pid;
        }
        if let Some(tid) = self.threads.get(&inner) {
            return *tid;
        }
        if self.threads.len() >= MAX_THREADS {
            self.threads.clear();
        }
        let tids = fs::read_dir(format!("/proc/{pid}/task"))
            .into_iter()
            .flatten()
            .flatten();
        let tids = tids.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        let found = std::iter::once(inner)
            .chain(tids.take(MAX_THREADS))
            .find(|tid: &u32| last_id(&format!("/proc/{pid}/task/{tid}/status"), "NSpid:") == Some(inner));
        let tid = found.unwrap_or(pid);
        self.threads.insert(inner, tid);
        tid
    }
}

/// The entries in bytes.
fn entries(bytes: &[u8]) -> impl Iterator<Item = [u64; WORDS]> {
    let (all, _) = bytes.as_chunks::<{ EVENT_BYTES as usize }>();
    all.iter().map(|entry| {
        let mut words = [0; WORDS];
        for (word, bytes) in words.iter_mut().zip(entry.as_chunks().0) {
            *word = u64::from_ne_bytes(*bytes);
        }
        words
    })
}

impl Turn {
    /// Keeps a step that makes sense.
    fn keep(&mut self, words: &[u64; WORDS], has_ended: bool) {
        let event = Event::from_words(words);
        if event.kind != kind::PROXY_STEP {
            return;
        }
        let mut order = event.start_ns;
        let mut ascends = |at_ns: u64| {
            let ascends = at_ns == 0 || at_ns >= order;
            order = order.max(at_ns);
            ascends
        };
        let in_order = event.entered_ns.into_iter().all(&mut ascends);
        let ends = (event.stop_ns != 0) == has_ended && ascends(event.stop_ns);
        // What ended after the reading began is a moment ahead of it.
        let is_past = order <= self.to_ns.saturating_add(1_000_000_000);
        let told = event.entered_ns == [0; 3] || event.sends < 2;
        match has_ended {
            _ if !(in_order && ends && is_past && told) => self.refused += 1,
            true => self.ended.push(event),
            false => self.open.push(event),
        }
    }
}
