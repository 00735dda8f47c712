//! Events under way, and the ring of those that ended.

use std::sync::atomic::{AtomicU64, Ordering};

use stallscope_records::profiler::{Event, OPEN, SLOTS, WORDS, flag, header, kind, state};

use crate::abi::{Arguments, Start};
use crate::communicators::{self, Communicator};
use crate::shared::Memory;
use crate::switch;
use crate::thread;

/// Entries that are looked at for a free one.
const TRIES: u64 = 16;
/// When room is short, an event that began so long ago is taken for one whose end was forgotten, ns.
const ABANDONED_NS: u64 = 60_000_000_000;
/// Set in the first word of a slot while it is written.
const SLOT_BUSY: u64 = 1 << 63;
/// Bits of a token that hold the entry's index, from 1.
const INDEX_BITS: u32 = 16;

/// `ncclProfilerProxyCtrlAppendEnd`
const APPEND_END: u8 = 18;
/// `ncclProfilerKernelChStop`
const KERNEL_STOP: u8 = 22;
/// The last state that is known (`ncclProfilerCeBatchComplete`).
const LAST_STATE: u8 = 30;

/// Where the search for a free entry begins.
static NEXT: AtomicU64 = AtomicU64::new(0);

type Words = [AtomicU64; WORDS];

/// An entry of the table that nobody else writes until it is released.
struct Claimed {
    words: &'static Words,
    generation: u64,
    change: u64,
}

/// Begins an event: its token, or 0 when there is no room or nobody asks.
pub(crate) fn start(interface: u8, context: usize, started: Start) -> u64 {
    let mask = switch::current();
    if mask == 0 {
        return 0;
    }
    let Some(memory) = Memory::get() else { return 0 };
    let mut event = started.event;
    event.interface = interface;
    event.start_ns = switch::now_ns();
    event.tid = thread::id();
    if mask & 1 << event.kind != 0 {
        event.flags |= flag::ASKED;
    }
    if started
        .pid
        .is_some_and(|pid| pid.cast_unsigned() != switch::own_pid())
    {
        event.flags |= flag::FOREIGN_PARENT;
        event.parent = 0;
    }
    belong(&mut event, context);
    inherit(memory, &mut event);
    let Some((index, entry)) = claim_free(memory, event.start_ns) else {
        memory.count(header::CROWDED);
        return 0;
    };
    event.token = entry.generation << INDEX_BITS | (index + 1);
    write(entry.words, &event);
    let token = event.token;
    entry.release(state::LIVE);
    token
}

/// Ends an event.
pub(crate) fn stop(token: u64) {
    let Some(memory) = Memory::get() else { return };
    let Some(entry) = claim(memory, token) else {
        memory.count(header::UNPAIRED);
        return;
    };
    let mut event = read(entry.words);
    event.stop_ns = switch::now_ns();
    push(memory, &event);
    entry.release(state::FREE);
}

/// Notes a change of an event's state.
pub(crate) fn record(token: u64, to: u32, arguments: Option<&Arguments>) {
    let Some(memory) = Memory::get() else { return };
    let to = u8::try_from(to).unwrap_or(u8::MAX);
    // Waiting for credit is told anew whenever a proxy thread looks.
    let same = lookup(memory, token).is_some_and(|(words, _)| {
        let [_, _, _, _, _, now, ..] = word(words, 1).load(Ordering::Relaxed).to_le_bytes();
        now == to && to != APPEND_END
    });
    if same {
        return;
    }
    let Some(entry) = claim(memory, token) else {
        memory.count(header::UNPAIRED);
        return;
    };
    let mut event = read(entry.words);
    event.state = to;
    match (event.kind, wait_of(to)) {
        (kind::PROXY_STEP, Some((sends, wait))) => {
            enter(memory, &mut event, sends, wait);
            if let Some(bytes) = arguments
                .map(|arguments| arguments.first)
                .filter(|&bytes| bytes != 0)
            {
                event.amount = bytes;
            }
        }
        (kind::KERNEL_CHANNEL, _) if to == KERNEL_STOP => {
            event.more = arguments.map_or(0, |arguments| arguments.first);
        }
        (kind::PROXY_CTRL, _) if to == APPEND_END => {
            // An `int`: the other half is not set.
            event.more += u64::from(arguments.map_or(0, |arguments| arguments.first as u32));
        }
        _ if to > LAST_STATE => event.flags |= flag::STRANGE,
        _ => {}
    }
    rewrite(entry.words, &event);
    entry.release(state::LIVE);
}

/// A step enters one of its direction's waits. One that goes back to an earlier wait is told in parts, so that within each
/// part the waits follow one another.
fn enter(memory: Memory, event: &mut Event, sends: u8, wait: usize) {
    let now_ns = switch::now_ns();
    let other_way = event.sends != sends && event.entered_ns != [0; 3];
    if other_way
        || event
            .entered_ns
            .iter()
            .skip(wait)
            .any(|&entered_ns| entered_ns != 0)
    {
        let part = Event {
            stop_ns: now_ns,
            flags: event.flags | flag::PART,
            ..*event
        };
        push(memory, &part);
        event.entered_ns = [0; 3];
    }
    event.sends = sends;
    if let Some(entered_ns) = event.entered_ns.get_mut(wait) {
        *entered_ns = now_ns;
    }
}

/// Direction and place of a wait among those of its direction, by NCCL's number.
const fn wait_of(number: u8) -> Option<(u8, usize)> {
    Some(match number {
        8 => (1, 0),
        20 => (1, 1),
        9 => (1, 2),
        10 => (0, 0),
        11 => (0, 1),
        12 => (0, 2),
        _ => return None,
    })
}

/// Fills in what the context tells.
fn belong(event: &mut Event, context: usize) {
    let Some(communicator) = communicators::find(context) else {
        return;
    };
    if event.comm == 0 {
        event.comm = communicator.hash;
    }
    event.ranks = communicator.ranks;
    // The descriptors of the other kinds leave the rank 0.
    let is_ranked = matches!(event.kind, kind::COLL..=kind::PROXY_STEP | kind::NET_PLUGIN);
    if !is_ranked || event.interface < 4 {
        event.rank = event.rank.max(communicator.rank);
    }
}

/// Fills in what an operation's parts do not tell themselves.
fn inherit(memory: Memory, event: &mut Event) {
    let Some((words, first)) = lookup(memory, event.parent) else {
        return;
    };
    let parent = read(words);
    if generation(word(words, 0).load(Ordering::Acquire)) != generation(first) {
        return;
    }
    if event.comm == 0 {
        event.comm = parent.comm;
        event.ranks = parent.ranks;
    }
    if matches!(event.kind, kind::PROXY_STEP | kind::NET_PLUGIN) {
        event.channel = parent.channel;
        event.sends = parent.sends;
        if event.kind == kind::PROXY_STEP {
            event.peer = parent.peer;
        }
    }
}

/// An entry for a new event.
fn claim_free(memory: Memory, now_ns: u64) -> Option<(u64, Claimed)> {
    let from = NEXT.fetch_add(1, Ordering::Relaxed);
    let places = || (0..TRIES).map(move |step| (from.wrapping_add(step)) % OPEN);
    let take = |index: u64, wanted: u64| {
        let words = memory.open(index)?;
        let now = word(words, 0).load(Ordering::Acquire);
        (now & state::MASK == wanted).then_some((words, now))
    };
    let free = places().find_map(|index| {
        let (words, now) = take(index, state::FREE)?;
        Some((index, renew(words, now)?))
    });
    free.or_else(|| {
        let (index, entry) = places().find_map(|index| {
            let (words, now) = take(index, state::LIVE)?;
            let age_ns = now_ns.saturating_sub(word(words, 9).load(Ordering::Relaxed));
            Some((index, (age_ns > ABANDONED_NS).then(|| renew(words, now))??))
        })?;
        memory.count(header::ABANDONED);
        Some((index, entry))
    })
}

/// Takes an entry for another event: tokens of what it held are void.
fn renew(words: &'static Words, now: u64) -> Option<Claimed> {
    let generation = (generation(now) + 1) & u64::from(u32::MAX);
    let busy = generation << 32 | state::BUSY;
    let first = word(words, 0);
    let taken = first.compare_exchange(now, busy, Ordering::AcqRel, Ordering::Relaxed);
    taken.is_ok().then_some(Claimed {
        words,
        generation,
        change: 0,
    })
}

/// The live entry of a token, to change it.
fn claim(memory: Memory, token: u64) -> Option<Claimed> {
    let (words, now) = lookup(memory, token)?;
    let busy = now & !state::MASK | state::BUSY;
    let taken = word(words, 0).compare_exchange(now, busy, Ordering::AcqRel, Ordering::Relaxed);
    taken.is_ok().then_some(Claimed {
        words,
        generation: generation(now),
        change: (now & u64::from(u32::MAX) & !state::MASK).wrapping_add(state::CHANGE),
    })
}

/// The live entry of a token, and its first word.
fn lookup(memory: Memory, token: u64) -> Option<(&'static Words, u64)> {
    let index = (token & ((1 << INDEX_BITS) - 1)).checked_sub(1)?;
    if index >= OPEN {
        return None;
    }
    let words = memory.open(index)?;
    let now = word(words, 0).load(Ordering::Acquire);
    (now & state::MASK == state::LIVE && generation(now) == token >> INDEX_BITS).then_some((words, now))
}

impl Claimed {
    fn release(self, to: u64) {
        let low = self.change & u64::from(u32::MAX) & !state::MASK;
        word(self.words, 0).store(self.generation << 32 | low | to, Ordering::Release);
    }
}

/// Tells of a communicator.
pub(crate) fn made_known(memory: Memory, interface: u8, communicator: Communicator) {
    let now_ns = switch::now_ns();
    let event = Event {
        kind: kind::COMMUNICATOR,
        interface,
        channel: u8::MAX,
        sends: 2,
        peer: -1,
        comm: communicator.hash,
        rank: communicator.rank,
        ranks: communicator.ranks,
        tid: thread::id(),
        start_ns: now_ns,
        stop_ns: now_ns,
        ..Event::default()
    };
    put(memory, &event);
}

/// Puts an event into the ring if its kind was asked for and still is.
fn push(memory: Memory, event: &Event) {
    if event.flags & flag::ASKED != 0 && switch::current() & 1 << event.kind != 0 {
        put(memory, event);
    }
}

/// Puts an event into the ring, over the oldest one.
fn put(memory: Memory, event: &Event) {
    let place = memory.header(header::HEAD).fetch_add(1, Ordering::Relaxed);
    let Some(words) = memory.slot(place % SLOTS) else {
        return;
    };
    let first = word(words, 0);
    let before = first.load(Ordering::Relaxed);
    let sequence = place + 1;
    // A writer that slept for a whole lap must not write over what came since, nor two of them into one slot.
    let is_mine = before & SLOT_BUSY == 0
        && before < sequence
        && first
            .compare_exchange(before, SLOT_BUSY | sequence, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok();
    if !is_mine {
        memory.count(header::DROPPED);
        return;
    }
    write(words, event);
    first.store(sequence, Ordering::Release);
}

const fn generation(first: u64) -> u64 {
    first >> 32
}

fn word(words: &'static Words, index: usize) -> &'static AtomicU64 {
    let [first, ..] = words;
    words.get(index).unwrap_or(first)
}

fn read(words: &Words) -> Event {
    let mut copy = [0; WORDS];
    for (to, from) in copy.iter_mut().zip(words) {
        *to = from.load(Ordering::Relaxed);
    }
    Event::from_words(&copy)
}

/// Writes the words that a change of state changes.
fn rewrite(words: &Words, event: &Event) {
    const CHANGED: [usize; 6] = [1, 8, 11, 12, 13, 15];
    let new = event.to_words();
    for at in CHANGED {
        if let (Some(to), Some(from)) = (words.get(at), new.get(at)) {
            to.store(*from, Ordering::Relaxed);
        }
    }
}

/// Writes all words but the first.
fn write(words: &Words, event: &Event) {
    for (to, from) in words.iter().zip(event.to_words()).skip(1) {
        to.store(from, Ordering::Relaxed);
    }
}
