//! The probes on the real NCCL of the Python wheel, in a live process: every argument is decoded exactly.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use stallscope::observation::{Collective, CollectiveFunction as Function, CommCreated, Fact, Thread};
use stallscope::sources::probes::{Outcome, ProbesConfig};
use stallscope::sources::procs::LibraryKind;
use stallscope_e2e::privileged;
use stallscope_e2e::tracer::{Puppet, Tracer};

/// The library, or why there is none.
fn library(test: &str) -> Option<PathBuf> {
    let library = std::env::var_os("STALLSCOPE_REAL_NCCL").map(PathBuf::from);
    match library {
        Some(library) if library.exists() => Some(library),
        _ => {
            println!(
                "skipped: {test}: there is no real NCCL; `cargo xtask setup` fetches it and STALLSCOPE_REAL_NCCL names it"
            );
            None
        }
    }
}

fn start(library: &PathBuf) -> Result<(Puppet, Tracer, Thread)> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nccl_caller"));
    command
        .arg(library)
        .env("NCCL_DEBUG", "NONE")
        .stderr(std::process::Stdio::null());
    let puppet = Puppet::start(&mut command)?;
    let before = std::time::Instant::now();
    let mut tracer = Tracer::load(ProbesConfig::default())?;
    println!("loaded in {:?}", before.elapsed());
    for program in &tracer.health.programs {
        ensure!(program.outcome == Outcome::Ok, "{program:?}");
    }
    let attached = tracer.attach(LibraryKind::Nccl, library, puppet.pid())?;
    println!("{attached:?}");
    ensure!(attached.failed.is_empty(), "{attached:?}");
    // What 2.27.5 does not have yet.
    let absent = [
        "ncclAlltoAll",
        "ncclGather",
        "ncclScatter",
        "ncclCommGrow",
        "ncclCommRevoke",
    ];
    ensure!(
        attached.absent == absent && attached.functions == 19,
        "{attached:?}"
    );
    let process = tracer.trace(puppet.pid())?;
    let thread = Thread {
        process,
        tid: puppet.pid(),
    };
    Ok((puppet, tracer, thread))
}

fn collectives(tracer: &Tracer) -> Vec<&Collective> {
    tracer
        .observations
        .iter()
        .filter_map(|observation| match &observation.fact {
            Fact::Collective(collective) => Some(collective),
            _ => None,
        })
        .collect()
}

#[test]
fn every_argument_of_every_call_is_decoded() -> Result<()> {
    let test = "every_argument_of_every_call_is_decoded";
    if !privileged(test) {
        return Ok(());
    }
    let Some(library) = library(test) else {
        return Ok(());
    };
    let (mut puppet, mut tracer, thread) = start(&library)?;

    puppet.go()?;
    let said = puppet.line()?;
    let said: Vec<_> = said.split(' ').collect();
    let [_, result, comm, id] = said[..] else {
        anyhow::bail!("the caller said {said:?}");
    };
    tracer.drain_until(|tracer| !tracer.observations.is_empty())?;
    let made = tracer
        .observations
        .iter()
        .find_map(|observation| match &observation.fact {
            Fact::CommCreated(made) => Some((observation.window, made)),
            _ => None,
        });
    let (window, made) = made.context("no communicator")?;
    let expected = CommCreated {
        thread,
        comm: comm.parse()?,
        key: Some(fnv(id)?),
        rank: Some(5),
        ranks: Some(7),
        result: result.parse()?,
    };
    ensure!(*made == expected, "{made:?} instead of {expected:?}");
    ensure!(!window.is_empty(), "the constructor's call has no duration");

    puppet.go()?;
    let said = puppet.line()?;
    let numbers: Vec<i64> = said.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let comm = u64::try_from(numbers[0])?;
    let results: Vec<i32> = numbers[1..]
        .iter()
        .map(|result| i32::try_from(*result))
        .collect::<Result<_, _>>()?;
    tracer.drain_until(|tracer| {
        collectives(tracer).len() >= 8
            && tracer
                .observations
                .iter()
                .any(|observation| matches!(observation.fact, Fact::CommDestroyed { .. }))
    })?;
    let calls = [
        (Function::AllReduce, 1_000_001, 7, None, 0),
        (Function::ReduceScatter, 1_000_002, 9, None, 1),
        (Function::AllGather, 1_000_003, 6, None, 2),
        (Function::Broadcast, 1_000_004, 0, Some(3), 3),
        (Function::Broadcast, 1_000_005, 1, Some(2), 4),
        (Function::Reduce, 1_000_006, 8, Some(4), 5),
        (Function::Send, 1_000_007, 2, Some(6), 8),
        (Function::Recv, 1_000_008, 3, Some(-1), 9),
    ];
    let expected: Vec<_> = calls
        .iter()
        .zip(1..)
        .map(|((function, count, datatype, peer, result), number)| Collective {
            thread,
            comm,
            function: *function,
            count: *count,
            datatype: *datatype,
            peer: *peer,
            stream: 0xabc0_0000 + number,
            result: Some(results[*result]),
        })
        .collect();
    let observed: Vec<_> = collectives(&tracer).into_iter().cloned().collect();
    ensure!(observed == expected, "{observed:#?} instead of {expected:#?}");
    let groups = tracer
        .observations
        .iter()
        .filter(|observation| observation.fact == Fact::GroupEnd { thread })
        .count();
    ensure!(groups == 1, "{groups} outermost groups instead of one");
    ensure!(tracer.lost() == 0, "records were lost");
    ensure!(
        tracer.decoder.refused() == Default::default(),
        "{:?}",
        tracer.decoder.refused()
    );
    Ok(())
}

#[test]
fn a_call_that_kills_its_process_is_told_without_a_result() -> Result<()> {
    let test = "a_call_that_kills_its_process_is_told_without_a_result";
    if !privileged(test) {
        return Ok(());
    }
    let Some(library) = library(test) else {
        return Ok(());
    };
    let (mut puppet, mut tracer, thread) = start(&library)?;
    for _ in 0..2 {
        puppet.go()?;
        puppet.line()?;
    }
    tracer.drain_until(|tracer| collectives(tracer).len() >= 8)?;
    tracer.observations.clear();
    puppet.go()?;
    let status = puppet.ended()?;
    ensure!(!status.success(), "the call did not kill its process");
    tracer.drain_until(|tracer| !collectives(tracer).is_empty() && !tracer.events.is_empty())?;
    let expected = Collective {
        thread,
        comm: 0xdead_0000,
        function: Function::AllReduce,
        count: 424_242,
        datatype: 7,
        peer: None,
        stream: 0xdead_beef,
        result: None,
    };
    ensure!(collectives(&tracer) == [&expected], "{:?}", collectives(&tracer));
    Ok(())
}

/// The key of a unique id as the decoder documents it: FNV-1a over its 128 bytes.
fn fnv(hex: &str) -> Result<u64> {
    ensure!(hex.len() == 256, "an id of {} digits", hex.len());
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for at in (0..hex.len()).step_by(2) {
        let byte = u64::from_str_radix(&hex[at..at + 2], 16)?;
        hash = (hash ^ byte).wrapping_mul(0x0100_0000_01b3);
    }
    Ok(hash)
}
