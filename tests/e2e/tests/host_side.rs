//! The probes on a process and its child: sleeping, competing for a CPU, files, and what discovery hears.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use stallscope::observation::{Fact, FileOp, Observation, OffCpuReason, ProcessKey};
use stallscope::sources::probes::{Outcome, ProbesConfig};
use stallscope::sources::procs::ProcessEvent;
use stallscope_e2e::privileged;
use stallscope_e2e::tracer::{Puppet, Tracer, compile};

const MS: u64 = 1_000_000;

/// Time off the CPU of a process for a reason, and of it runnable, ns.
fn off_cpu(observations: &[Observation], pid: u32, wanted: OffCpuReason) -> (u64, u64) {
    observations
        .iter()
        .fold((0, 0), |(total, waiting), observation| match observation.fact {
            Fact::OffCpu {
                thread,
                reason,
                runnable_ns,
            } if thread.process.pid == pid && reason == wanted => {
                (total + observation.window.len_ns(), waiting + runnable_ns)
            }
            _ => (total, waiting),
        })
}

/// File calls of a process with a record of their own: calls, bytes, time blocked.
fn file_calls(observations: &[Observation], pid: u32, wanted: FileOp) -> (u64, u64, u64) {
    observations.iter().fold(
        (0, 0, 0),
        |(calls, bytes, blocked), observation| match observation.fact {
            Fact::FileIo {
                thread,
                op,
                bytes: done,
                blocked_ns,
            } if thread.process.pid == pid && op == wanted => (calls + 1, bytes + done, blocked + blocked_ns),
            _ => (calls, bytes, blocked),
        },
    )
}

/// File calls of a process that were only counted: calls, bytes.
fn folded_calls(observations: &[Observation], wanted_process: ProcessKey, wanted: FileOp) -> (u64, u64) {
    observations
        .iter()
        .fold((0, 0), |(sum, done), observation| match observation.fact {
            Fact::FileIoFolded {
                process,
                op,
                calls,
                bytes,
                ..
            } if process == wanted_process && op == wanted => (sum + calls, done + bytes),
            _ => (sum, done),
        })
}

fn block_requests(observations: &[Observation], pid: u32) -> (u32, u64) {
    observations
        .iter()
        .fold((0, 0), |(sum, done), observation| match observation.fact {
            Fact::Block {
                process,
                requests,
                bytes,
                ..
            } if process.pid == pid => (sum + requests, done + bytes),
            _ => (sum, done),
        })
}

#[test]
fn waiting_and_files_of_a_process_and_its_child_are_told() -> Result<()> {
    if !privileged("waiting_and_files_of_a_process_and_its_child_are_told") {
        return Ok(());
    }
    // Not in memory: the file has to reach a device.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR"))?;
    let (job, library) = (folder.path().join("host_job"), folder.path().join("libcuda.so.1"));
    compile("host_job.c", &["-ldl".as_ref()], &job)?;
    compile("cuda.c", &["-shared".as_ref(), "-fPIC".as_ref()], &library)?;
    let mut tracer = Tracer::load(ProbesConfig::default())?;
    for program in &tracer.health.programs {
        ensure!(program.outcome == Outcome::Ok, "{program:?}");
    }
    let mut puppet = Puppet::start(Command::new(&job).arg(folder.path().join("data")).arg(&library))?;
    let pid = puppet.pid();
    tracer.drain_until(|tracer| tracer.events.contains(&ProcessEvent::Exec { tgid: pid }))?;
    let parent = tracer.trace(pid)?;
    tracer.events.clear();

    puppet.go()?;
    let said = puppet.line()?;
    let child: u32 = said.rsplit(' ').next().context("no child")?.parse()?;
    let child_key = ProcessKey {
        pid: child,
        start_ticks: 2,
    };
    tracer.drain_until(|tracer| {
        tracer.events.contains(&ProcessEvent::Exit { tgid: child })
            && folded_calls(&tracer.observations, child_key, FileOp::Read).0 >= 900
            && block_requests(&tracer.observations, child).0 > 0
    })?;
    ensure!(
        tracer.events.contains(&ProcessEvent::Fork { parent: pid, child }),
        "{:?}",
        tracer.events
    );
    let seen = std::mem::take(&mut tracer.observations);

    let (asleep, _) = off_cpu(&seen, child, OffCpuReason::Sleep);
    ensure!(
        (40 * MS..400 * MS).contains(&asleep),
        "the child slept {asleep} ns instead of 40 ms"
    );
    let (waited, _) = off_cpu(&seen, pid, OffCpuReason::Sleep);
    ensure!(
        waited >= 40 * MS,
        "the parent waited {waited} ns on its pipe instead of 40 ms"
    );
    ensure!(
        file_calls(&seen, pid, FileOp::Read).0 == 0,
        "waiting on a pipe was taken for a file call: {seen:#?}"
    );

    let (flushes, _, blocked) = file_calls(&seen, child, FileOp::Flush);
    ensure!(
        flushes == 1 && blocked > 0,
        "{flushes} flushes blocked {blocked} ns"
    );
    let written = file_calls(&seen, child, FileOp::Write).1 + folded_calls(&seen, child_key, FileOp::Write).1;
    ensure!(written == (16 << 20) + 1, "{written} bytes written");
    let slow = file_calls(&seen, child, FileOp::Read);
    let quick = folded_calls(&seen, child_key, FileOp::Read);
    ensure!(
        slow.0 + quick.0 == 1000 && slow.1 + quick.1 == 4_096_000,
        "{slow:?} and {quick:?}"
    );
    let (requests, bytes) = block_requests(&seen, child);
    ensure!(
        bytes >= 16 << 20,
        "{requests} requests of {bytes} bytes for a file of 16 MiB"
    );

    puppet.go()?;
    let said = puppet.line()?;
    let rival: u32 = said.rsplit(' ').next().context("no rival")?.parse()?;
    tracer.drain_until(|tracer| tracer.events.contains(&ProcessEvent::Exit { tgid: rival }))?;
    tracer.drain(Duration::from_millis(50))?;
    let (preempted, runnable) = off_cpu(&tracer.observations, pid, OffCpuReason::Preempted);
    ensure!(
        preempted >= 50 * MS,
        "two processes on one CPU, and one waited only {preempted} ns for it"
    );
    ensure!(
        preempted == runnable,
        "{preempted} ns preempted, but only {runnable} ns runnable"
    );

    tracer.events.clear();
    puppet.go()?;
    puppet.line()?;
    tracer.drain_until(|tracer| tracer.events.contains(&ProcessEvent::MapExec { tgid: pid }))?;
    puppet.go()?;
    puppet.ended()?;
    tracer.drain_until(|tracer| tracer.events.contains(&ProcessEvent::Exit { tgid: pid }))?;
    ensure!(tracer.lost() == 0, "records were lost");
    let strangers = tracer
        .observations
        .iter()
        .filter(|observation| match observation.fact {
            Fact::OffCpu { thread, .. } => thread.process != parent && thread.process.start_ticks != 2,
            _ => false,
        });
    ensure!(
        strangers.count() == 0,
        "processes that are not traced were recorded"
    );
    ensure!(
        tracer.decoder.refused().unknown_process == 0,
        "{:?}",
        tracer.decoder.refused()
    );
    Ok(())
}
