//! The profiler plugin, loaded by the library itself.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stallscope::sources::clock::monotonic_ns;
use stallscope_e2e::tracer::Puppet;
use stallscope_records::profiler::{EVENT_BYTES, Event, NAME, RING_AT, WORDS, ask, header, kind};

use crate::{Real, number};

/// The interface that each version takes of the plugin's.
const INTERFACES: [(&str, u8); 2] = [("2.27.5", 4), ("2.32.3", 6)];
/// Proxy threads.
const CONTROL: u32 = 1 << kind::PROXY_CTRL;
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn one(real: &Real) -> Result<()> {
    let version = real.version.to_string();
    let interface = INTERFACES.iter().find(|(known, _)| *known == version);
    let (_, programs) = stallscope_e2e::programs()?;
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("log");
    let mut command = Command::new(env!("CARGO_BIN_EXE_nccl_caller"));
    command
        .arg(&real.library)
        .env("NCCL_PROFILER_PLUGIN", &programs.nccl_profiler)
        .env("NCCL_DEBUG", "INFO")
        .env("NCCL_DEBUG_SUBSYS", "INIT")
        .env("NCCL_DEBUG_FILE", &log)
        .env("NCCL_SOCKET_IFNAME", "lo")
        .stderr(Stdio::null());
    let mut puppet = Puppet::start(&mut command)?;
    let said = puppet.asked("communicators")?;
    let Some((_, interface)) = interface else {
        ensure!(memory(puppet.pid())?.is_none(), "NCCL {version} loads profilers");
        return Ok(());
    };
    let memory = memory(puppet.pid())?.with_context(|| {
        format!(
            "NCCL {version} did not load the plugin: {}",
            fs::read_to_string(&log).unwrap_or_default()
        )
    })?;
    ensure!(
        word(&memory, header::INTERFACE)? == u64::from(*interface),
        "another interface"
    );
    communicators(&memory, &said)?;
    switched(&memory, &mut puppet, *interface)?;
    let text = fs::read_to_string(&log)?;
    ensure!(
        text.contains("stallscope"),
        "the library does not name the plugin:\n{text}"
    );
    Ok(())
}

/// Every communicator is known by the name that the library wrote into it, and by rank and ranks.
fn communicators(memory: &File, said: &str) -> Result<()> {
    let made: Vec<(&str, u64)> = said
        .split(' ')
        .skip(4)
        .map(|word| {
            let (name, rest) = word.split_once('=').context("a word without a result")?;
            Ok((name, number(rest.rsplit(':').next())?))
        })
        .collect::<Result<_>>()?;
    let all = word(memory, header::COMMUNICATORS)?;
    let events: Vec<Event> = (0..word(memory, header::HEAD)?)
        .map(|place| event(memory, place))
        .collect::<Result<_>>()?;
    let known: Vec<&Event> = events
        .iter()
        .filter(|event| event.kind == kind::COMMUNICATOR)
        .collect();
    // ncclCommInitAll makes two.
    ensure!(
        known.len() as u64 == all && known.len() == made.len() + 1,
        "{known:?} of {made:?}"
    );
    for (name, hash) in &made {
        let of: Vec<(u32, u32)> = known
            .iter()
            .filter(|event| event.comm == *hash)
            .map(|event| (event.rank, event.ranks))
            .collect();
        let expected = match *name {
            "ncclCommInitRank" => (1, 3),
            "ncclCommInitRankConfig" => (4, 11),
            "ncclCommInitRankScalable" => (3, 9),
            "ncclCommInitAll" => (1, 2),
            _ => {
                ensure!(!of.is_empty(), "{name} {hash:#x} is not known");
                continue;
            }
        };
        ensure!(
            of.contains(&expected),
            "{name} {hash:#x}: {of:?} instead of {expected:?}"
        );
    }
    println!("{} communicators: {known:x?}", known.len());
    Ok(())
}

/// What the agent asks for reaches the library's own variable, and what its functions then tell reaches the ring.
fn switched(memory: &File, puppet: &mut Puppet, interface: u8) -> Result<()> {
    ensure!(
        puppet.asked("mask")? == "0" && puppet.asked("control")? == "0",
        "events without an agent"
    );
    let deadline = Instant::now() + PATIENCE;
    while puppet.asked("mask")? != CONTROL.to_string() {
        ensure!(Instant::now() < deadline, "the library's mask stays");
        let words = [monotonic_ns(), ask(CONTROL)];
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        memory.write_all_at(&bytes, 8 * header::HEARTBEAT as u64)?;
        std::thread::sleep(Duration::from_millis(50));
    }
    let place = word(memory, header::HEAD)?;
    ensure!(
        puppet.asked("control")? == "1",
        "the library does not call the plugin"
    );
    let told = event(memory, place)?;
    ensure!(
        (told.kind, told.interface, told.state) == (kind::PROXY_CTRL, interface, 18),
        "{told:?}"
    );
    ensure!(told.more == 7 && told.tid == puppet.pid(), "{told:?}");
    ensure!(told.start_ns > 0 && told.stop_ns >= told.start_ns, "{told:?}");
    Ok(())
}

/// The plugin's memory in a process.
fn memory(pid: u32) -> Result<Option<File>> {
    let name = format!("/memfd:{NAME} (deleted)");
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let path = entry?.path();
        if fs::read_link(&path).is_ok_and(|to| to.to_string_lossy() == name) {
            return Ok(Some(OpenOptions::new().read(true).write(true).open(path)?));
        }
    }
    Ok(None)
}

fn word(memory: &File, index: usize) -> Result<u64> {
    let mut bytes = [0; 8];
    memory.read_exact_at(&mut bytes, 8 * index as u64)?;
    Ok(u64::from_ne_bytes(bytes))
}

fn event(memory: &File, place: u64) -> Result<Event> {
    let mut words = [0; WORDS];
    for (at, to) in words.iter_mut().enumerate() {
        *to = word(memory, ((RING_AT + place * EVENT_BYTES) / 8) as usize + at)?;
    }
    ensure!(words[0] == place + 1, "a hole in the ring at {place}");
    Ok(Event::from_words(&words))
}
