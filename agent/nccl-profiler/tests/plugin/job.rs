//! The plugin as NCCL sees it, and what it leaves in its memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use object::{Object as _, ObjectSymbol as _};
use stallscope_records::profiler::{
    BYTES, EVENT_BYTES, Event, MAGIC, NAME, OPEN, OPEN_AT, RING_AT, SLOTS, VERSION, WORDS, ask, flag,
    function, header, kind, state,
};

use crate::caller::{Caller, VERSIONS, plugin};

const ALL: u32 = (1 << kind::END) - 1;
const HASH: u64 = 0x1122_3344_5566_7788;

/// The plugin's memory, read plainly.
struct Shared(File);

impl Shared {
    fn of(pid: u32) -> Result<Self> {
        let name = format!("/memfd:{NAME} (deleted)");
        for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
            let path = entry?.path();
            if fs::read_link(&path).is_ok_and(|to| to.to_string_lossy() == name) {
                return Ok(Self(OpenOptions::new().read(true).write(true).open(path)?));
            }
        }
        anyhow::bail!("the process has no memory of the plugin")
    }

    fn words<const N: usize>(&self, at: u64) -> Result<[u64; N]> {
        let mut bytes = vec![0; 8 * N];
        self.0.read_exact_at(&mut bytes, at)?;
        let mut words = [0; N];
        for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_ne_bytes(bytes.try_into()?);
        }
        Ok(words)
    }

    fn header(&self, index: usize) -> Result<u64> {
        Ok(self.words::<{ header::WORDS }>(0)?[index])
    }

    /// As the agent that was there `ago_ns` ago.
    fn ask(&self, mask: u32, ago_ns: u64) -> Result<()> {
        let words = [now_ns() - ago_ns, ask(mask)];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Ok(self.0.write_all_at(&bytes, 8 * header::HEARTBEAT as u64)?)
    }

    /// The event at a place of the ring, if it is there.
    fn ended(&self, place: u64) -> Result<Option<Event>> {
        let words: [u64; WORDS] = self.words(RING_AT + place % SLOTS * EVENT_BYTES)?;
        Ok((words[0] == place + 1).then(|| Event::from_words(&words)))
    }

    /// Everything but the communicator that every caller makes.
    fn all_ended(&self) -> Result<Vec<Event>> {
        (1..self.header(header::HEAD)?)
            .map(|place| self.ended(place)?.context("a hole in the ring"))
            .collect()
    }

    /// Entries of the table by how they stand.
    fn table(&self) -> Result<BTreeMap<u64, usize>> {
        let mut table = BTreeMap::new();
        for at in 0..OPEN {
            let [first] = self.words(OPEN_AT + at * EVENT_BYTES)?;
            *table.entry(first & state::MASK).or_default() += 1;
        }
        Ok(table)
    }
}

fn now_ns() -> u64 {
    let mut now = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is whole.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}

/// A caller whose plugin has everything on.
fn started(version: u8, mask: u32) -> Result<(Caller, Shared)> {
    let mut caller = Caller::start(version)?;
    ensure!(caller.ask("init")? == "0", "a mask without an agent");
    let shared = Shared::of(caller.pid())?;
    ensure!(shared.0.metadata()?.len() == BYTES, "{:?}", shared.0.metadata()?);
    ensure!(shared.header(header::MAGIC)? == MAGIC);
    let layout = u64::from(VERSION) | u64::from(caller.pid()) << 32;
    ensure!(shared.header(header::LAYOUT)? == layout);
    let made = shared.ended(0)?.context("no communicator")?;
    ensure!(
        made.kind == kind::COMMUNICATOR && made.interface == version,
        "{made:?}"
    );
    let named = if version < 4 { (0, 0, 0) } else { (HASH, 3, 16) };
    ensure!((made.comm, made.rank, made.ranks) == named, "{made:?}");
    switch(&mut caller, &shared, mask)?;
    Ok((caller, shared))
}

/// Asks until NCCL's own variable has the mask.
fn switch(caller: &mut Caller, shared: &Shared, mask: u32) -> Result<()> {
    shared.ask(mask, 0)?;
    let seen = caller.ask(&format!("mask {mask}"))?;
    ensure!(
        seen == mask.to_string(),
        "NCCL's mask is {seen} instead of {mask}"
    );
    Ok(())
}

fn number_of(name: &str) -> u8 {
    let at = function::NAMES.iter().position(|known| *known == name.as_bytes());
    at.map_or(function::UNKNOWN, |at| at as u8 + 1)
}

fn one(events: &[Event], of: u8) -> Result<Event> {
    let found: Vec<&Event> = events.iter().filter(|event| event.kind == of).collect();
    ensure!(found.len() == 1, "of kind {of} there are {found:?}");
    Ok(*found[0])
}

#[test]
fn every_field_of_every_version_arrives() -> Result<()> {
    VERSIONS
        .into_iter()
        .try_for_each(|version| fields(version).with_context(|| format!("version {version}")))
}

fn fields(version: u8) -> Result<()> {
    let (mut caller, shared) = started(version, ALL)?;
    let said = caller.ask("each")?;
    let said: Vec<u64> = said.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let [before, after, coll_token, op_token] = said[..] else {
        anyhow::bail!("{said:?}")
    };
    let events = shared.all_ended()?;
    for event in &events {
        ensure!(
            event.interface == version && event.flags & flag::ASKED != 0,
            "{event:?}"
        );
        ensure!(event.tid == caller.pid(), "{event:?}");
        ensure!(event.comm == HASH || version < 4, "{event:?}");
        ensure!(event.start_ns > 0 && event.stop_ns >= event.start_ns, "{event:?}");
    }
    let coll = one(&events, kind::COLL)?;
    ensure!(
        coll.function == number_of("ReduceScatter") && coll.function != 0,
        "{coll:?}"
    );
    ensure!(
        (coll.seq, coll.amount, coll.rank, coll.comm) == (41, 123_456_789, 3, HASH),
        "{coll:?}"
    );
    ensure!(
        coll.token == coll_token && coll.parent == one(&events, 0)?.token,
        "{coll:?}"
    );
    ensure!(coll.ranks == if version < 4 { 0 } else { 16 }, "{coll:?}");
    let p2p = one(&events, kind::P2P)?;
    ensure!(
        (p2p.peer, p2p.amount, p2p.function) == (6, 4321, number_of("Send")),
        "{p2p:?}"
    );
    let ops: Vec<&Event> = events
        .iter()
        .filter(|event| event.kind == kind::PROXY_OP)
        .collect();
    let [back, op] = ops[..] else {
        anyhow::bail!("{ops:?}")
    };
    ensure!(
        (op.token, op.parent, op.sends) == (op_token, coll_token, 1),
        "{op:?}"
    );
    ensure!(
        (op.channel, op.peer, op.seq, op.amount) == (5, 7, 17, 524_288),
        "{op:?}"
    );
    ensure!(op.comm == HASH, "of its collective: {op:?}");
    // Its parent lives in another process, so the token must not be taken for one of this.
    ensure!((back.parent, back.sends, back.channel) == (0, 0, 9), "{back:?}");
    ensure!(back.flags & flag::FOREIGN_PARENT != 0 && op.flags & flag::FOREIGN_PARENT == 0);
    steps(version, &events, op, back, before..=after)?;
    if version >= 3 {
        let net = one(&events, kind::NET_PLUGIN)?;
        ensure!(
            net.detail == (1 << 16 | 1) | 1234 << 32 && net.more == 0xabcd_ef01_2345_6789,
            "{net:?}"
        );
        ensure!((net.amount, net.peer, net.function) == (99_999, 2, 4), "{net:?}");
        let kernel = one(&events, kind::KERNEL_CHANNEL)?;
        let timers = if version == 3 { (0, 0) } else { (777_000, 888_000) };
        ensure!(
            (kernel.channel, kernel.detail, kernel.more) == (8, timers.0, timers.1),
            "{kernel:?}"
        );
    }
    if version >= 5 {
        let api = one(&events, 9)?;
        ensure!(
            (api.function, api.amount, api.rank) == (number_of("AllGather"), 55, 3),
            "{api:?}"
        );
    }
    if version >= 6 {
        let copy = one(&events, 12)?;
        ensure!(
            (copy.function, copy.amount, copy.seq) == (number_of("AlltoAll"), 77, 66),
            "{copy:?}"
        );
        let batch = one(&events, 14)?;
        ensure!((batch.seq, batch.amount) == (3, 1 << 33), "{batch:?}");
    }
    let expected = [7, 9, 9, 10, 12][usize::from(version - 2)];
    ensure!(
        events.len() == expected,
        "{} events instead of {expected}",
        events.len()
    );
    ensure!(shared.header(header::UNPAIRED)? == 0 && shared.header(header::CROWDED)? == 0);
    ensure!(
        shared.table()? == BTreeMap::from([(state::FREE, OPEN as usize)]),
        "something stays under way"
    );
    Ok(())
}

/// What the caller slept through is what the step waited for.
fn steps(
    version: u8,
    events: &[Event],
    op: &Event,
    back: &Event,
    within: std::ops::RangeInclusive<u64>,
) -> Result<()> {
    let steps: Vec<&Event> = events
        .iter()
        .filter(|event| event.kind == kind::PROXY_STEP)
        .collect();
    let [sent, received] = steps[..] else {
        anyhow::bail!("{steps:?}")
    };
    ensure!(
        (sent.parent, sent.seq, sent.sends) == (op.token, 11, 1),
        "{sent:?}"
    );
    ensure!(
        (sent.channel, sent.peer, sent.comm) == (5, 7, HASH),
        "of its operation: {sent:?}"
    );
    let [gpu_ns, credit_ns, wire_ns] = sent.entered_ns;
    ensure!(
        within.contains(&sent.start_ns) && within.contains(&sent.stop_ns),
        "{sent:?} {within:?}"
    );
    ensure!(
        sent.start_ns <= gpu_ns && wire_ns + 2_000_000 <= sent.stop_ns,
        "{sent:?}"
    );
    if version >= 4 {
        // The same state told three times is entered once.
        ensure!(
            gpu_ns + 3_000_000 <= credit_ns && credit_ns + 3_000_000 <= wire_ns,
            "{sent:?}"
        );
        ensure!((sent.amount, received.amount) == (65_536, 4096), "{sent:?}");
    } else {
        ensure!(gpu_ns + 3_000_000 <= wire_ns && credit_ns == 0, "{sent:?}");
    }
    ensure!(sent.flags & flag::PART == 0, "{sent:?}");
    ensure!(
        (received.parent, received.seq, received.sends) == (back.token, 12, 0),
        "{received:?}"
    );
    ensure!(
        received
            .entered_ns
            .iter()
            .all(|at_ns| *at_ns >= received.start_ns),
        "{received:?}"
    );
    ensure!(
        received.entered_ns.is_sorted() && received.entered_ns[2] <= received.stop_ns,
        "{received:?}"
    );
    Ok(())
}

#[test]
fn what_nccl_does_wrong_costs_counters_only() -> Result<()> {
    for version in [2, 6] {
        let (mut caller, shared) = started(version, ALL)?;
        caller.ask("wrong")?;
        // Stopped twice, changed after its end, two handles that were never given, and one that is old.
        ensure!(
            shared.header(header::UNPAIRED)? == 5,
            "{}",
            shared.header(header::UNPAIRED)?
        );
        let strange = shared.all_ended()?;
        let strange: Vec<_> = strange
            .iter()
            .filter(|event| event.flags & flag::STRANGE != 0)
            .collect();
        ensure!(strange.len() == 1 && strange[0].seq == 2, "{strange:?}");
        ensure!(
            shared.table()?.get(&state::LIVE) == Some(&1),
            "the one that never ends"
        );
        ensure!(caller.ask("fork")? == "0", "a forked child");
        caller.ask("communicators")?;
        ensure!(
            shared.table()?.get(&state::LIVE) == Some(&1),
            "a child changed its parent's events"
        );
        ensure!(caller.ask("each").is_ok(), "it works on");
    }
    Ok(())
}

#[test]
fn masks_follow_the_agent_and_go_without_it() -> Result<()> {
    let (mut caller, shared) = started(6, 0x18)?;
    switch(&mut caller, &shared, 0)?;
    caller.ask("each")?;
    ensure!(shared.header(header::HEAD)? == 1, "events that nobody asked for");
    switch(&mut caller, &shared, ALL)?;
    let asked = Instant::now();
    // No sign of life any more.
    ensure!(
        caller.ask("mask 0")? == "0",
        "the agent is gone and the mask stays"
    );
    ensure!(
        asked.elapsed().as_millis() > 2_500,
        "{:?}: the plugin has no patience",
        asked.elapsed()
    );
    switch(&mut caller, &shared, 0x10)?;
    // NCCL closes the plugin with its last communicator, and opens it again with the next.
    ensure!(caller.ask("finalize")? == "16");
    ensure!(caller.ask("close")? == "0");
    std::thread::sleep(std::time::Duration::from_millis(600));
    shared.ask(0x10, 0)?;
    ensure!(
        caller.ask("init")? == "16",
        "a communicator made under an agent is seen from the start"
    );
    Ok(())
}

#[test]
fn eight_threads_lose_and_tear_nothing() -> Result<()> {
    const ROUNDS: u64 = 900;
    let (mut caller, shared) = started(4, 1 << kind::PROXY_STEP)?;
    caller.tell(&format!("hammer {ROUNDS}"))?;
    let mut read: BTreeMap<u32, BTreeSet<u64>> = BTreeMap::new();
    let (mut place, mut last_ask) = (1, Instant::now());
    let all = 8 * ROUNDS * 8;
    let deadline = Instant::now() + std::time::Duration::from_secs(120);
    while place <= all {
        if last_ask.elapsed().as_millis() > 500 {
            shared.ask(1 << kind::PROXY_STEP, 0)?;
            last_ask = Instant::now();
        }
        let Some(event) = shared.ended(place)? else {
            ensure!(Instant::now() < deadline, "only {place} of {all} events came");
            std::thread::sleep(std::time::Duration::from_millis(1));
            continue;
        };
        place += 1;
        whole(&event)?;
        ensure!(
            read.entry(event.tid).or_default().insert(event.seq),
            "twice: {event:?}"
        );
    }
    ensure!(caller.answer("hammer")? == (all / 8).to_string());
    let every: BTreeSet<u64> = (0..ROUNDS * 8).collect();
    ensure!(
        read.len() == 8 && read.values().all(|seqs| *seqs == every),
        "not every step of every thread"
    );
    ensure!(
        [header::DROPPED, header::UNPAIRED, header::CROWDED]
            .iter()
            .all(|index| shared.header(*index).is_ok_and(|count| count == 0))
    );
    ensure!(shared.header(header::HEAD)? == all + 1);
    Ok(())
}

/// What one call wrote fits together.
fn whole(event: &Event) -> Result<()> {
    let sends = u8::from(event.seq / 8 % 2 == 1);
    let entered = if sends == 1 {
        [true, false, true]
    } else {
        [true, true, false]
    };
    ensure!(
        event.kind == kind::PROXY_STEP && event.sends == sends,
        "{event:?}"
    );
    ensure!(
        (event.channel, event.peer, event.comm) == (1, 2, HASH),
        "{event:?}"
    );
    ensure!(event.entered_ns.map(|at_ns| at_ns != 0) == entered, "{event:?}");
    let times = [event.start_ns]
        .into_iter()
        .chain(event.entered_ns.into_iter().filter(|ns| *ns != 0));
    ensure!(times.chain([event.stop_ns]).is_sorted(), "{event:?}");
    Ok(())
}

#[test]
fn nothing_is_allocated_after_init() -> Result<()> {
    let (mut caller, shared) = started(6, ALL)?;
    let said = caller.ask("allocate")?;
    ensure!(said == "0 0", "bytes allocated by 512 operations: {said}");
    ensure!(
        shared.header(header::HEAD)? == 2 * 512 * 9 + 1,
        "the calls did something"
    );
    Ok(())
}

#[test]
fn five_tables_are_exported_and_the_library_stays() -> Result<()> {
    let bytes = fs::read(plugin()?)?;
    let file = object::File::parse(&*bytes)?;
    let symbols: Vec<_> = file.dynamic_symbols().collect();
    let mut exported: Vec<&str> = symbols
        .iter()
        .filter(|symbol| symbol.is_definition() && symbol.is_global())
        .filter_map(|symbol| symbol.name().ok())
        .collect();
    exported.sort_unstable();
    let expected: Vec<String> = VERSIONS
        .iter()
        .map(|version| format!("ncclProfiler_v{version}"))
        .collect();
    ensure!(exported == expected, "exported are {exported:?}");
    let said = Command::new("readelf").arg("-d").arg(plugin()?).output()?;
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    ensure!(
        said.contains("NODELETE") && said.contains("[libnccl-profiler-stallscope.so]"),
        "{said}"
    );
    Ok(())
}
