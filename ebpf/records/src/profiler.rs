//! The memory that NCCL's profiler plugin in a job shares with the agent: a file of fixed size without a name ([`NAME`] is for
//! people and for finding it), made and filled by the plugin.
//!
//! All of it is 64-bit words in the machine's byte order: a header ([`header`]), a table of the events under way, and a ring
//! of those that ended. Entries of both are [`Event`]s of [`WORDS`] words, the first of which belongs to the table or ring.
//! The job owns this memory and may write anything into it; a reader believes nothing that it has not checked.

/// Name of the file.
pub const NAME: &str = "stallscope-nccl";
/// First word of the header.
pub const MAGIC: u64 = u64::from_le_bytes(*b"stscnccl");
/// Version of this layout.
pub const VERSION: u32 = 1;

/// Words of an event.
pub const WORDS: usize = 16;
/// Bytes of an event.
pub const EVENT_BYTES: u64 = 8 * WORDS as u64;
/// Entries of the table of events under way, a power of two.
pub const OPEN: u64 = 1 << 12;
/// Slots of the ring, a power of two: half a second of the busiest GPU's network steps.
pub const SLOTS: u64 = 1 << 16;
/// Where the table begins, bytes.
pub const OPEN_AT: u64 = 4096;
/// Where the ring begins, bytes.
pub const RING_AT: u64 = OPEN_AT + OPEN * EVENT_BYTES;
/// Size of the whole, bytes.
pub const BYTES: u64 = RING_AT + SLOTS * EVENT_BYTES;

/// The plugin takes the agent for gone when it has given no sign of life for so long, ns.
pub const PATIENCE_NS: u64 = 3_000_000_000;

/// Indexes of the header's words. The agent writes [`header::HEARTBEAT`] and [`header::ASK`], the plugin the others.
pub mod header {
    /// [`MAGIC`](super::MAGIC).
    pub const MAGIC: usize = 0;
    /// [`VERSION`](super::VERSION) in the low half; in the high half the process's id in its own namespace.
    pub const LAYOUT: usize = 1;
    /// When the agent last gave a sign of life, `CLOCK_MONOTONIC` ns.
    pub const HEARTBEAT: usize = 8;
    /// The kinds of events that the agent asks for; see [`ask`](super::ask).
    pub const ASK: usize = 9;
    /// Events that were given a place in the ring so far.
    pub const HEAD: usize = 16;
    /// The kinds of events that are on.
    pub const MASK: usize = 24;
    /// When that last changed, `CLOCK_MONOTONIC` ns.
    pub const SWITCHED: usize = 25;
    /// The profiler interface that NCCL took, from 2.
    pub const INTERFACE: usize = 26;
    /// Communicators that were made known.
    pub const COMMUNICATORS: usize = 27;
    /// When the plugin last looked what the agent asks for, `CLOCK_MONOTONIC` ns; a few times a second while it lives.
    pub const ALIVE: usize = 28;
    /// Events that found their slot of the ring still being written.
    pub const DROPPED: usize = 32;
    /// Events that found no room in the table.
    pub const CROWDED: usize = 33;
    /// Ends and changes of events that are not under way.
    pub const UNPAIRED: usize = 34;
    /// Events whose end never came, so that their room was taken.
    pub const ABANDONED: usize = 35;
    /// Words that are in use.
    pub const WORDS: usize = 36;
}

/// The word by which the agent asks for kinds of events: a copy that is torn shows.
#[must_use]
pub const fn ask(mask: u32) -> u64 {
    (mask as u64) | (!mask as u64) << 32
}

/// The kinds of events in such a word; `None` when it is torn.
#[must_use]
pub const fn asked(word: u64) -> Option<u32> {
    let mask = word as u32;
    if (word >> 32) as u32 == !mask {
        Some(mask)
    } else {
        None
    }
}

/// Bits of NCCL's activation mask (`nccl_profiler.h`); a kind of event is the number of its bit.
pub mod kind {
    /// A collective.
    pub const COLL: u8 = 1;
    /// A send or receive.
    pub const P2P: u8 = 2;
    /// What a proxy thread does for one channel of one of these.
    pub const PROXY_OP: u8 = 3;
    /// One transfer of that.
    pub const PROXY_STEP: u8 = 4;
    /// The proxy thread itself.
    pub const PROXY_CTRL: u8 = 5;
    /// A kernel's work on a channel, in the GPU's time.
    pub const KERNEL_CHANNEL: u8 = 6;
    /// Told by the network plugin.
    pub const NET_PLUGIN: u8 = 7;
    /// The first kind that NCCL does not have.
    pub const END: u8 = 15;
    /// A communicator was made known: told without being asked for.
    pub const COMMUNICATOR: u8 = 15;
}

/// Bits of [`Event::flags`].
pub mod flag {
    /// Its kind was asked for: else it is kept for what it tells of its children.
    pub const ASKED: u8 = 1;
    /// A part of an event that went back to an earlier wait and goes on.
    pub const PART: u8 = 2;
    /// The event that it belongs to lives in another process.
    pub const FOREIGN_PARENT: u8 = 4;
    /// It changed to a state without a known meaning.
    pub const STRANGE: u8 = 8;
}

/// First word of an entry of the table: generation in the high half, then how it stands.
pub mod state {
    /// Nobody's.
    pub const FREE: u64 = 0;
    /// Being written.
    pub const BUSY: u64 = 1;
    /// An event under way.
    pub const LIVE: u64 = 2;
    /// These bits tell which.
    pub const MASK: u64 = 3;
    /// Added with every change of a live entry; wraps around below the generation.
    pub const CHANGE: u64 = 4;
}

/// An event.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Event {
    /// Number of the bit in NCCL's mask.
    pub kind: u8,
    /// The profiler interface that NCCL used.
    pub interface: u8,
    /// See [`flag`].
    pub flags: u8,
    /// See [`function`](mod@function); of a network plugin's event its operation code.
    pub function: u8,
    /// Channel; 255 when unknown.
    pub channel: u8,
    /// NCCL's number of the state it is in; 0 before the first.
    pub state: u8,
    /// Whether it sends: 0 no, 1 yes, 2 unknown.
    pub sends: u8,
    /// Names it in its process.
    pub token: u64,
    /// Token of the event it belongs to; 0 for none.
    pub parent: u64,
    /// Hash of the communicator, `commHash`; 0 when unknown.
    pub comm: u64,
    /// Rank.
    pub rank: u32,
    /// Ranks; 0 when unknown.
    pub ranks: u32,
    /// The other rank; -1 when there is none or it is unknown.
    pub peer: i32,
    /// Thread; 0 when unknown.
    pub tid: u32,
    /// Of a collective its number, of a step its number, of an operation its steps.
    pub seq: u64,
    /// Elements of a collective, bytes of anything else.
    pub amount: u64,
    /// Start, ns.
    pub start_ns: u64,
    /// End, ns; 0 while it is under way.
    pub stop_ns: u64,
    /// When a step entered each of its direction's three waits, in their order, ns; 0 for those it did not.
    pub entered_ns: [u64; 3],
    /// Of a network plugin's event its id, and in the high half the queue pair or socket; of a kernel its start, GPU ns.
    pub detail: u64,
    /// Of a network plugin's event the work request; of a kernel its end, GPU ns; of a proxy thread the operations it took up.
    pub more: u64,
}

impl Event {
    /// From an entry; its first word is not the event's.
    #[must_use]
    pub const fn from_words(words: &[u64; WORDS]) -> Self {
        let what = words[1].to_le_bytes();
        Self {
            kind: what[0],
            interface: what[1],
            flags: what[2],
            function: what[3],
            channel: what[4],
            state: what[5],
            sends: what[6],
            token: words[2],
            parent: words[3],
            comm: words[4],
            rank: words[5] as u32,
            ranks: (words[5] >> 32) as u32,
            peer: words[6] as i32,
            tid: (words[6] >> 32) as u32,
            seq: words[7],
            amount: words[8],
            start_ns: words[9],
            stop_ns: words[10],
            entered_ns: [words[11], words[12], words[13]],
            detail: words[14],
            more: words[15],
        }
    }

    /// The words of an entry, without the first.
    #[must_use]
    pub const fn to_words(self) -> [u64; WORDS] {
        [
            0,
            u64::from_le_bytes([
                self.kind,
                self.interface,
                self.flags,
                self.function,
                self.channel,
                self.state,
                self.sends,
                0,
            ]),
            self.token,
            self.parent,
            self.comm,
            self.rank as u64 | (self.ranks as u64) << 32,
            self.peer as u32 as u64 | (self.tid as u64) << 32,
            self.seq,
            self.amount,
            self.start_ns,
            self.stop_ns,
            self.entered_ns[0],
            self.entered_ns[1],
            self.entered_ns[2],
            self.detail,
            self.more,
        ]
    }
}

/// NCCL's functions.
pub mod function {
    /// Not known, or none.
    pub const UNKNOWN: u8 = 0;

    /// Their names as NCCL gives them (`ncclFuncToString`); the number of a function is its place, from 1.
    pub const NAMES: [&[u8]; 12] = [
        b"AllReduce",
        b"AllGather",
        b"ReduceScatter",
        b"Broadcast",
        b"Reduce",
        b"AlltoAll",
        b"Gather",
        b"Scatter",
        b"Send",
        b"Recv",
        b"SendRecv",
        b"AlltoAllV",
    ];
}

const _: () =
    assert!(OPEN.is_power_of_two() && SLOTS.is_power_of_two() && 8 * header::WORDS as u64 <= OPEN_AT);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_hold_an_event_whole() {
        let mut words = [0; WORDS];
        for (at, word) in words.iter_mut().enumerate().skip(1) {
            *word = 0x0101_0101_0101_0101 * at as u64 + 7;
        }
        // The last byte of the first word of the event is no one's.
        words[1] &= u64::MAX >> 8;
        assert_eq!(Event::from_words(&words).to_words(), words);
    }

    #[test]
    fn a_torn_ask_shows() {
        let (none, some) = (ask(0), ask(0x18));
        assert_eq!((asked(none), asked(some)), (Some(0), Some(0x18)));
        for cut in 1..8 {
            let torn = (none >> (8 * cut) << (8 * cut)) | (some & ((1 << (8 * cut)) - 1));
            assert!(
                asked(torn).is_none() || torn == none || torn == some,
                "{torn:#x} at {cut}"
            );
        }
        assert_eq!(asked(0), None);
    }
}
