//! Public calls, and the names of communicators.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use stallscope::observation::{Collective, CollectiveFunction as Function, CommCreated, Fact};
use stallscope::sources::probes::{ProbesConfig, Refused};
use stallscope_e2e::tracer::Tracer;

use crate::{Real, Traced, collectives, number, trace};

/// Public calls that the versions do not have.
const ABSENT: [(&str, &[&str]); 3] = [
    (
        "2.21.5",
        &[
            "ncclCommInitRankScalable",
            "ncclCommShrink",
            "ncclAlltoAll",
            "ncclGather",
            "ncclScatter",
        ],
    ),
    ("2.27.5", &["ncclAlltoAll", "ncclGather", "ncclScatter"]),
    ("2.32.3", &[]),
];
/// Further ones that only 2.32.3 has.
const NEWEST: [&str; 10] = [
    "ncclAllReduceConfig",
    "ncclReduceScatterConfig",
    "ncclAllGatherConfig",
    "ncclAlltoAllConfig",
    "ncclBroadcastConfig",
    "ncclReduceConfig",
    "ncclGatherConfig",
    "ncclScatterConfig",
    "ncclCommGrow",
    "ncclCommRevoke",
];

/// Name, function, count, datatype and peer of every call that the caller makes; its stream ends with the count's last digits.
const CALLS: [(&str, Function, u64, u32, Option<i32>); 19] = [
    ("ncclAllReduce", Function::AllReduce, 1, 7, None),
    ("ncclReduceScatter", Function::ReduceScatter, 2, 9, None),
    ("ncclAllGather", Function::AllGather, 3, 6, None),
    ("ncclBroadcast", Function::Broadcast, 4, 0, Some(3)),
    ("ncclBcast", Function::Broadcast, 5, 1, Some(2)),
    ("ncclReduce", Function::Reduce, 6, 8, Some(4)),
    ("ncclSend", Function::Send, 7, 2, Some(6)),
    ("ncclRecv", Function::Recv, 8, 3, Some(-1)),
    ("ncclAlltoAll", Function::AllToAll, 9, 5, None),
    ("ncclGather", Function::Gather, 10, 4, Some(5)),
    ("ncclScatter", Function::Scatter, 11, 3, Some(1)),
    ("ncclAllReduceConfig", Function::AllReduce, 12, 7, None),
    ("ncclReduceScatterConfig", Function::ReduceScatter, 13, 9, None),
    ("ncclAllGatherConfig", Function::AllGather, 14, 6, None),
    ("ncclAlltoAllConfig", Function::AllToAll, 15, 5, None),
    ("ncclBroadcastConfig", Function::Broadcast, 16, 0, Some(3)),
    ("ncclReduceConfig", Function::Reduce, 17, 8, Some(4)),
    ("ncclGatherConfig", Function::Gather, 18, 4, Some(5)),
    ("ncclScatterConfig", Function::Scatter, 19, 3, Some(1)),
];

pub(crate) fn one(real: &Real) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let log = folder.path().join("log");
    let mut traced = trace(&real.library, &log, ProbesConfig::default())?;
    exports(real, &traced)?;
    names(real, &mut traced, &log)?;
    public_calls(&mut traced)?;
    let expected = Refused {
        // The communicator of the refused calls has no identity.
        strange_comms: 1,
        ..Refused::default()
    };
    let refused = traced.tracer.decoder.refused();
    ensure!(refused == expected, "{refused:?}");
    ensure!(traced.tracer.lost() == 0, "records were lost");
    Ok(())
}

fn exports(real: &Real, traced: &Traced) -> Result<()> {
    let attached = &traced.attached;
    let name = real.version.to_string();
    let (_, absent) = ABSENT
        .iter()
        .find(|(version, _)| *version == name)
        .context("a version")?;
    let newest: &[&str] = if name == "2.32.3" { &[] } else { &NEWEST };
    let mut expected: Vec<&str> = absent.iter().chain(newest).copied().collect();
    let mut found = attached.absent.clone();
    expected.sort_unstable();
    found.sort_unstable();
    ensure!(found == expected, "absent are {found:?} instead of {expected:?}");
    ensure!(attached.version == Some(real.version), "{:?}", attached.version);
    Ok(())
}

fn made(tracer: &Tracer) -> Vec<&CommCreated> {
    tracer
        .observations
        .iter()
        .filter_map(|observation| match &observation.fact {
            Fact::CommCreated(made) => Some(made),
            _ => None,
        })
        .collect()
}

/// `NAME=RESULT` words.
fn results<'a>(words: impl Iterator<Item = &'a str>) -> Result<Vec<(&'a str, i32)>> {
    words
        .map(|word| {
            let (name, result) = word.split_once('=').context("a word without a result")?;
            Ok((name, result.parse()?))
        })
        .collect()
}

fn public_calls(traced: &mut Traced) -> Result<()> {
    traced.tracer.observations.clear();
    let said = traced.puppet.asked("collectives")?;
    let mut words = said.split(' ');
    let comm: u64 = number(words.next())?;
    let results: BTreeMap<&str, i32> = results(words)?.into_iter().collect();
    let expected: Vec<Collective> = CALLS
        .iter()
        .filter_map(|(name, function, number, datatype, peer)| {
            Some(Collective {
                thread: traced.thread,
                comm,
                function: *function,
                count: 1_000_000 + number,
                datatype: *datatype,
                peer: *peer,
                stream: 0xabc0_0000 + number,
                result: Some(*results.get(name)?),
            })
        })
        .collect();
    let tracer = &mut traced.tracer;
    tracer.drain_until(|tracer| {
        let ended = |fact: &Fact| matches!(fact, Fact::CommDestroyed { .. });
        collectives(tracer).len() >= expected.len()
            && tracer
                .observations
                .iter()
                .any(|observation| ended(&observation.fact))
    })?;
    let observed: Vec<_> = collectives(tracer).into_iter().cloned().collect();
    ensure!(observed == expected, "{observed:#?} instead of {expected:#?}");
    let thread = traced.thread;
    let groups = tracer
        .observations
        .iter()
        .filter(|observation| observation.fact == Fact::GroupEnd { thread })
        .count();
    ensure!(groups == 1, "{groups} outermost groups instead of one");
    Ok(())
}

/// A constructor as the caller saw it.
struct Constructed<'a> {
    name: &'a str,
    result: i32,
    comm: u64,
    /// What the library wrote into the communicator.
    hash: u64,
}

fn constructed(word: &str) -> Result<Constructed<'_>> {
    let (name, rest) = word.split_once('=').context("a word without a result")?;
    let mut numbers = rest.split(':');
    Ok(Constructed {
        name,
        result: number(numbers.next())?,
        comm: number(numbers.next())?,
        hash: number(numbers.next())?,
    })
}

/// Rank, ranks and device as the arguments of the constructors tell them, in the order of the calls.
fn told_by_arguments(name: &str, rank: u32) -> (Option<u32>, Option<u32>, Option<u32>) {
    match name {
        "ncclCommInitRank" => (Some(1), Some(3), None),
        "ncclCommInitRankConfig" => (Some(4), Some(11), None),
        "ncclCommInitRankScalable" => (Some(3), Some(9), None),
        "ncclCommInitAll" => (Some(rank), Some(2), Some([3, 1][rank as usize])),
        _ => (None, None, None),
    }
}

/// The library writes a communicator's name into it, logs it, and reads its fields through its exported functions: what the probes
/// say must be the same.
fn names(real: &Real, traced: &mut Traced, log: &std::path::Path) -> Result<()> {
    let said = traced.puppet.asked("communicators")?;
    println!("the caller: {said}");
    let mut words = said.split(' ');
    let offsets: [u32; 3] = [
        number(words.next())?,
        number(words.next())?,
        number(words.next())?,
    ];
    let layout = traced.attached.layout.context("no layout was derived")?;
    let [rank_at, ..] = offsets;
    ensure!(
        offsets == [layout.rank, rank_at + 4, rank_at + 8],
        "{layout:?}, but the accessors read at {offsets:?}"
    );
    let used: u64 = number(words.next())?;
    let all: Vec<Constructed<'_>> = words.map(constructed).collect::<Result<_>>()?;
    let tracer = &mut traced.tracer;
    // One more for the second device of ncclCommInitAll, and one that was used, by two calls.
    tracer.drain_until(|tracer| made(tracer).len() >= all.len() + 2 && collectives(tracer).len() >= 2)?;
    let mut seen = made(tracer).into_iter();
    let mut keys = BTreeMap::new();
    for of in &all {
        ensure!(of.hash != 0 && of.result == 0, "{} made nothing", of.name);
        let count = if of.name == "ncclCommInitAll" { 2 } else { 1 };
        for rank in 0..count {
            let made = seen.next().context("a communicator is missing")?;
            ensure!(
                made.key == Some(of.hash) && made.is_nccl_hash,
                "{}: {made:?} is {}",
                of.name,
                of.hash
            );
            ensure!(rank > 0 || made.comm == of.comm, "{}: {made:?}", of.name);
            ensure!(
                made.result == 0 && !made.found_in_use && made.thread == traced.thread,
                "{made:?}"
            );
            let told = (made.rank, made.ranks, made.device);
            let expected = match of.name {
                "ncclCommGrow" if made.rank.is_some() => (Some(10), Some(12), None),
                "ncclCommGrow" => (None, Some(5), None),
                name => told_by_arguments(name, rank),
            };
            ensure!(told == expected, "{}: {made:?} instead of {expected:?}", of.name);
        }
        *keys.entry(of.hash).or_insert(0) += 1;
    }
    // Until 2.23 NCCL gave two splits by one colour the same name.
    let twice = keys.values().filter(|count| **count > 1).count();
    let expected = usize::from(real.version.to_string() == "2.21.5");
    // The scalable constructor was given the second constructor's id.
    let shared = usize::from(all.iter().any(|of| of.name == "ncclCommInitRankScalable"));
    ensure!(twice == expected + shared, "{keys:?}");
    let expected = CommCreated {
        thread: traced.thread,
        comm: used,
        key: Some(0x1122_3344_5566_7788),
        is_nccl_hash: true,
        rank: Some(3),
        ranks: Some(8),
        device: Some(2),
        result: 0,
        found_in_use: true,
    };
    let found = seen.next().context("the one in use is missing")?;
    ensure!(*found == expected, "{found:?} instead of {expected:?}");
    ensure!(seen.next().is_none(), "it was told twice");
    // In its log 2.21.5 names communicators by another hash.
    if real.version.to_string() != "2.21.5" {
        let text = std::fs::read_to_string(log)?;
        let named = |of: &Constructed<'_>| text.contains(&format!("commId 0x{:x} ", of.hash));
        let by_id = |of: &&Constructed<'_>| of.name.starts_with("ncclCommInit");
        ensure!(
            all.iter().filter(by_id).all(named),
            "the library logged other names:\n{text}"
        );
    }
    Ok(())
}

pub(crate) fn killed(real: &Real) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut traced = trace(&real.library, &folder.path().join("log"), ProbesConfig::default())?;
    traced.puppet.tell("crash")?;
    let status = traced.puppet.ended()?;
    ensure!(!status.success(), "the call did not kill its process");
    let tracer = &mut traced.tracer;
    tracer.drain_until(|tracer| !collectives(tracer).is_empty() && !tracer.events.is_empty())?;
    let expected = Collective {
        thread: traced.thread,
        comm: 0xdead_0000,
        function: Function::AllReduce,
        count: 424_242,
        datatype: 7,
        peer: None,
        stream: 0xdead_beef,
        result: None,
    };
    ensure!(collectives(tracer) == [&expected], "{:?}", collectives(tracer));
    Ok(())
}
