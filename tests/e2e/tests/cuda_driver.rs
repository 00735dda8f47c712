//! The probes on a driver without a device: launches are folded, waits and copies are told one by one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use stallscope::observation::{CopyDirection, Fact, Observation, SyncTarget, Thread};
use stallscope::sources::probes::ProbesConfig;
use stallscope::sources::procs::LibraryKind;
use stallscope_e2e::privileged;
use stallscope_e2e::tracer::{Puppet, Tracer, compile};

const GAP_NS: u64 = 50_000_000;
const RUN_NS: u64 = 100_000_000;

fn build(folder: &Path) -> Result<(PathBuf, PathBuf)> {
    let library = folder.join("libcuda.so.1");
    let job = folder.join("cuda_job");
    compile("cuda.c", &["-shared".as_ref(), "-fPIC".as_ref()], &library)?;
    compile("cuda_job.c", &[library.as_os_str()], &job)?;
    Ok((library, job))
}

/// Launch runs as (stream, kernels, graphs).
fn runs(observations: &[Observation]) -> Vec<(u64, u32, u32)> {
    observations
        .iter()
        .filter_map(|observation| match observation.fact {
            Fact::LaunchRun {
                stream,
                kernels,
                graphs,
                ..
            } => Some((stream, kernels, graphs)),
            _ => None,
        })
        .collect()
}

fn drained(observations: &[Observation]) -> bool {
    observations.iter().any(|observation| {
        matches!(
            observation.fact,
            Fact::Sync {
                target: SyncTarget::Context,
                ..
            }
        )
    })
}

#[test]
fn launches_are_folded_and_waits_and_copies_are_told() -> Result<()> {
    if !privileged("launches_are_folded_and_waits_and_copies_are_told") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let (library, job) = build(folder.path())?;
    let mut puppet = Puppet::start(Command::new(job).env("LD_LIBRARY_PATH", folder.path()))?;
    // Wide enough that a busy machine does not split what belongs together.
    let config = ProbesConfig {
        launch_gap_ns: GAP_NS,
        launch_run_ns: RUN_NS,
        ..ProbesConfig::default()
    };
    let mut tracer = Tracer::load(config)?;
    let attached = tracer.attach(LibraryKind::Cuda, &library, puppet.pid())?;
    println!("{attached:?}");
    let before = std::time::Instant::now();
    let process = tracer.trace(puppet.pid())?;
    println!("tracing after {:?}", before.elapsed());
    let thread = Thread {
        process,
        tid: puppet.pid(),
    };

    let mut step = |tracer: &mut Tracer,
                    enough: &dyn Fn(&[Observation]) -> bool|
     -> Result<(String, Vec<Observation>)> {
        puppet.go()?;
        let said = puppet.line()?;
        tracer.drain_until(|tracer| enough(&tracer.observations))?;
        let cuda = |observation: &Observation| {
            !matches!(
                observation.fact,
                Fact::OffCpu { .. } | Fact::FileIo { .. } | Fact::FileIoFolded { .. } | Fact::Block { .. }
            )
        };
        Ok((
            said,
            std::mem::take(&mut tracer.observations)
                .into_iter()
                .filter(cuda)
                .collect(),
        ))
    };

    let (said, seen) = step(&mut tracer, &|seen| {
        seen.iter().any(|seen| matches!(seen.fact, Fact::Sync { .. }))
    })?;
    ensure!(runs(&seen) == [(0x1111, 100, 0)], "{seen:#?}");
    let [_, sync] = &seen[..] else {
        anyhow::bail!("{seen:#?}");
    };
    ensure!(
        sync.fact
            == Fact::Sync {
                thread,
                target: SyncTarget::Stream(0x1111),
                result: 0
            },
        "{sync:?}"
    );
    let times: Vec<u64> = said
        .split(' ')
        .skip(1)
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    ensure!(sync.window.len_ns() >= 20_000_000, "{sync:?}");
    ensure!(
        times[0] <= sync.window.start_ns() && sync.window.end_ns() <= times[1],
        "{sync:?} outside of {times:?}"
    );

    let (_, seen) = step(&mut tracer, &drained)?;
    let mut folded = runs(&seen);
    folded.sort_unstable();
    // Stream 2 is what the per-thread twin calls stream 0.
    ensure!(
        folded == [(2, 0, 1), (0xa, 2, 0), (0xa, 3, 0), (0xb, 4, 1)],
        "{seen:#?}"
    );

    let event_wait = Fact::Sync {
        thread,
        target: SyncTarget::Event(0x51),
        result: 700,
    };
    let (_, seen) = step(&mut tracer, &|seen| {
        seen.iter().any(|seen| seen.fact == event_wait)
    })?;
    let facts: Vec<_> = seen.iter().map(|seen| seen.fact.clone()).collect();
    let copy = |bytes, direction, stream| Fact::Copy {
        thread,
        bytes,
        direction,
        stream,
    };
    let expected = [
        copy(4096, CopyDirection::ToDevice, None),
        copy(8192, CopyDirection::ToHost, Some(0x2222)),
        copy(77, CopyDirection::Unknown, Some(2)),
        copy(12, CopyDirection::ToHost, None),
        Fact::EventRecord {
            thread,
            event: 0x51,
            stream: 0x1111,
        },
        Fact::StreamWait {
            thread,
            stream: 0x2222,
            event: 0x51,
        },
        event_wait.clone(),
    ];
    ensure!(facts == expected, "{facts:#?} instead of {expected:#?}");
    ensure!(seen[0].window.len_ns() >= 2_000_000, "{:?}", seen[0]);
    ensure!(seen[3].window.len_ns() >= 20_000_000, "{:?}", seen[3]);

    // A run whose thread does nothing more is told all the same, and only once.
    let (_, seen) = step(&mut tracer, &|seen| !runs(seen).is_empty())?;
    ensure!(runs(&seen) == [(0xc, 5, 0)], "{seen:#?}");
    tracer.drain(Duration::from_millis(600))?;
    let (_, seen) = step(&mut tracer, &drained)?;
    ensure!(runs(&seen).is_empty(), "{seen:#?}");

    let (_, seen) = step(&mut tracer, &drained)?;
    let long = runs(&seen);
    ensure!(
        long.iter().map(|(_, kernels, _)| kernels).sum::<u32>() == 300,
        "{long:?}"
    );
    ensure!(long.len() >= 3, "{long:?}");
    for run in seen
        .iter()
        .filter(|seen| matches!(seen.fact, Fact::LaunchRun { .. }))
    {
        ensure!(run.window.len_ns() <= RUN_NS, "{run:?}");
    }

    // The end of the thread ends its run.
    puppet.go()?;
    puppet.ended()?;
    tracer.drain_until(|tracer| runs(&tracer.observations) == [(0xe, 9, 0)])?;
    ensure!(tracer.lost() == 0, "records were lost");
    Ok(())
}
