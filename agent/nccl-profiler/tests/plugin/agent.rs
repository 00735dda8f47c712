//! What the agent makes of it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stallscope::observation::{Fact, Observation, ProcessKey, StepWait, StepWaits};
use stallscope::sources::clock::monotonic_ns;
use stallscope::sources::nccl_profiler::NcclProfiler;
use stallscope::sources::probes::WaitsConfig;
use stallscope_attribution::time::Window;

use crate::caller::Caller;

/// Between two looks of the agent.
const TURN: Duration = Duration::from_millis(100);
const PATIENCE: Duration = Duration::from_secs(30);

/// One window of the only thread.
struct Told {
    window: Window,
    tid: u32,
    waits: StepWaits,
}

fn told(observations: Vec<Observation>, key: ProcessKey) -> Result<Vec<Told>> {
    let one = |Observation { window, fact }| match fact {
        Fact::StepWaits { thread, waits } => {
            ensure!(thread.process == key, "{thread:?}");
            Ok(Told {
                window,
                tid: thread.tid,
                waits: *waits,
            })
        }
        other => anyhow::bail!("{other:?}"),
    };
    observations.into_iter().map(one).collect()
}

fn key_of(pid: u32) -> Result<ProcessKey> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("a process without a name")?;
    let start_ticks = fields
        .split_ascii_whitespace()
        .nth(19)
        .context("no start")?
        .parse()?;
    Ok(ProcessKey { pid, start_ticks })
}

/// Polls until `done` or time is up.
fn poll_until(
    plugins: &mut NcclProfiler,
    mut done: impl FnMut(Vec<Observation>) -> Result<bool>,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done(plugins.poll(monotonic_ns()))? {
        ensure!(
            Instant::now() < deadline,
            "nothing came; {:?}",
            plugins.troubles()
        );
        std::thread::sleep(TURN);
    }
    Ok(())
}

#[test]
fn the_agent_tells_what_the_steps_of_a_job_waited_for() -> Result<()> {
    [2, 4, 6]
        .into_iter()
        .try_for_each(|version| waits(version).with_context(|| format!("version {version}")))
}

fn waits(version: u8) -> Result<()> {
    let mut caller = Caller::start(version)?;
    let key = key_of(caller.pid())?;
    let mut plugins = NcclProfiler::new(WaitsConfig {
        // No pauses.
        budget_ppm: 1_000_000_000,
        window_ns: 1_000_000_000,
    });
    plugins.traced(key);
    ensure!(
        plugins.poll(monotonic_ns()).is_empty() && !plugins.serves(key.pid),
        "there is no plugin yet"
    );
    caller.ask("init")?;
    caller.tell("mask 16")?;
    // It is on when the first window begins; the caller is told to go once it says so.
    let switched = Instant::now();
    poll_until(&mut plugins, |_| Ok(switched.elapsed() > Duration::from_secs(3)))?;
    ensure!(plugins.serves(key.pid) && plugins.serves_all() && plugins.served() == 1);
    ensure!(caller.answer("mask")? == "16", "NCCL was not switched on");
    let said = caller.ask("each")?;
    let said: Vec<u64> = said.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let longest = said[1] - said[0];
    let mut sum = StepWaits::default();
    let mut credit = None;
    poll_until(&mut plugins, |given| {
        for one in told(given, key)? {
            ensure!(one.tid == key.pid, "thread {}", one.tid);
            ensure!(one.window.len_ns() >= 1_000_000_000, "{:?}", one.window);
            sum.sent += one.waits.sent;
            sum.received += one.waits.received;
            sum.send_gpu = add(sum.send_gpu, one.waits.send_gpu);
            sum.send_wire = add(sum.send_wire, one.waits.send_wire);
            credit = one
                .waits
                .send_credit
                .map(|wait| add(credit.unwrap_or_default(), wait))
                .or(credit);
        }
        Ok(sum.received > 0)
    })?;
    let within = |wait: StepWait, least_ns: u64| {
        ensure!(wait.entered == 1 && wait.any_ns == wait.steps_ns, "{wait:?}");
        ensure!(
            (least_ns..longest).contains(&wait.steps_ns),
            "{wait:?} of {longest} ns"
        );
        Ok(())
    };
    println!("version {version}: the caller {longest} ns; the agent {sum:?} {credit:?}");
    ensure!((sum.sent, sum.received) == (1, 1), "{sum:?}");
    within(sum.send_gpu, 3_000_000)?;
    within(sum.send_wire, 2_000_000)?;
    ensure!(credit.is_some() == (version >= 4), "{credit:?}");
    credit.map_or(Ok(()), |wait| within(wait, 3_000_000))?;
    held(&mut plugins, &mut caller, key)?;
    plugins.gone(key);
    ensure!(
        !plugins.serves(key.pid) && caller.ask("mask 0")? == "0",
        "it goes on without a reader"
    );
    Ok(())
}

/// A step that never ends fills window after window, and is entered once.
fn held(plugins: &mut NcclProfiler, caller: &mut Caller, key: ProcessKey) -> Result<()> {
    let before = monotonic_ns();
    caller.ask("hold")?;
    let mut windows = Vec::new();
    poll_until(plugins, |given| {
        windows.extend(
            told(given, key)?
                .into_iter()
                .filter(|one| one.window.end_ns() > before),
        );
        Ok(windows.len() >= 3)
    })?;
    let entered: u64 = windows.iter().map(|one| one.waits.receive_wire.entered).sum();
    ensure!(entered == 1, "entered {entered} times");
    for pair in windows.windows(2) {
        ensure!(
            pair[0].window.end_ns() == pair[1].window.start_ns(),
            "a hole between windows"
        );
    }
    let whole = &windows[1];
    ensure!(
        whole.waits.receive_wire.steps_ns == whole.window.len_ns(),
        "{:?}",
        whole.waits
    );
    ensure!(
        whole.waits.receive_wire.any_ns == whole.window.len_ns(),
        "{:?}",
        whole.waits
    );
    Ok(())
}

fn add(left: StepWait, right: StepWait) -> StepWait {
    StepWait {
        steps_ns: left.steps_ns + right.steps_ns,
        any_ns: left.any_ns + right.any_ns,
        entered: left.entered + right.entered,
    }
}
