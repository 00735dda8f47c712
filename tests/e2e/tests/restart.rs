//! Killing and restarting collector, agent or job leaves a correct report with its gaps named.

use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use stallscope_e2e::{eventually, privileged, programs};
use test_cgroups::Tree;
use xtask::demo;
use xtask::judge;
use xtask::lab::cluster::{Cluster, Watch};
use xtask::lab::observe::{Run, observe, run_folder};
use xtask::progress::Progress;

/// Steps during which something is away, while the fault is on.
const COLLECTOR_AWAY: Range<u64> = 50..60;
const AGENT_AWAY: Range<u64> = 66..80;
/// Steps during which an agent is frozen, and the one at which the job is killed.
const FROZEN: Range<u64> = 20..30;
const JOB_ENDS: u64 = 75;

/// Steps at the two ends of a run that may be cut off.
const CUT_OFF: u64 = 8;

/// How long agents may take to find a collector again and to hand over what they kept.
const CATCH_UP: Duration = Duration::from_secs(30);

/// A run that was disturbed, with its cluster still there.
struct Disturbed {
    run: Run,
    cluster: Cluster,
    _deleted_at_the_end: Option<tempfile::TempDir>,
}

/// The thermal scenario's folder, to be deleted after all, and the scenario, about to begin.
fn thermal() -> Result<(Option<tempfile::TempDir>, Cluster)> {
    let (paths, programs) = programs()?;
    let (dir, deleted_at_the_end) = run_folder(false)?;
    let scenario = demo::scenario(&paths, "thermal");
    let cluster = Cluster::start(&paths, &programs, &scenario, &dir, Watch::All)?;
    Ok((deleted_at_the_end, cluster))
}

/// Runs the thermal scenario and disturbs it at every step the job reports.
fn run_disturbed(disturb: impl FnMut(&mut Cluster, u64) -> Result<()>) -> Result<Disturbed> {
    let (_deleted_at_the_end, mut cluster) = thermal()?;
    let run = observe(&mut cluster, &mut Progress::start(), disturb)?;
    Ok(Disturbed {
        run,
        cluster,
        _deleted_at_the_end,
    })
}

fn is_right(run: &Run) -> Result<()> {
    let judged = judge::judge(&run.truth, &run.report);
    ensure!(
        judged.top_cause_right,
        "wrong verdict: {}",
        run.report["jobs"][0]["verdicts"]
    );
    sums_hold(&run.report)
}

/// Every budget of the report sums to its time.
fn sums_hold(report: &Value) -> Result<()> {
    let gpus = report["jobs"][0]["gpus"]
        .as_array()
        .context("a report without GPUs")?;
    ensure!(!gpus.is_empty(), "a report without GPUs");
    for gpu in gpus {
        let budget = gpu["budget"].as_object().context("a GPU without a budget")?;
        let sum: i64 = budget.values().filter_map(Value::as_i64).sum();
        ensure!(
            Some(sum) == gpu["total_ns"].as_i64(),
            "the leaves of rank {} sum to {sum}",
            gpu["rank"]
        );
    }
    Ok(())
}

fn gaps(report: &Value) -> Vec<String> {
    let gaps = report["jobs"][0]["gaps"].as_array().cloned().unwrap_or_default();
    gaps.iter()
        .map(|gap| format!("{} {}", gap["node"], gap["what"]))
        .collect()
}

/// Steps that the report covers, of the rank that has the fewest and is not on the node `but`.
fn fewest_steps(report: &Value, but: &str) -> u64 {
    let gpus = report["jobs"][0]["gpus"].as_array().cloned().unwrap_or_default();
    gpus.iter()
        .filter(|gpu| gpu["node"].as_str() != Some(but))
        .filter_map(|gpu| gpu["steps"]["count"].as_u64())
        .min()
        .unwrap_or(0)
}

/// Both in one run, one after the other: a run takes most of a minute.
#[test]
fn a_killed_collector_loses_nothing_and_a_killed_agent_leaves_a_named_gap() -> Result<()> {
    if !privileged("a_killed_collector_loses_nothing_and_a_killed_agent_leaves_a_named_gap") {
        return Ok(());
    }
    let (mut last_step, mut node) = (0, String::new());
    let mut disturbed = run_disturbed(|cluster, step| {
        last_step = step;
        let is_down = cluster.collector_pid().is_none();
        if COLLECTOR_AWAY.contains(&step) && !is_down {
            cluster.kill_collector();
        } else if step >= COLLECTOR_AWAY.end && is_down {
            cluster.start_collector()?;
        }
        let agent = cluster.agents().last().context("no agents")?;
        let (index, is_running) = (cluster.agents().len() - 1, agent.pid().is_some());
        if AGENT_AWAY.contains(&step) && is_running {
            node.clone_from(&agent.node().name);
            cluster.kill_agent(index);
        } else if step >= AGENT_AWAY.end && !is_running {
            cluster.start_agent(index)?;
        }
        Ok(())
    })?;
    // The agents kept the steps of the outage; only the first and the last ones may be cut off.
    disturbed.run.report = eventually(CATCH_UP, || {
        disturbed.cluster.check_running()?;
        let report: Value = serde_json::from_str(&disturbed.cluster.report("json")?)?;
        let missing = last_step.saturating_sub(fewest_steps(&report, &node));
        ensure!(
            missing < CUT_OFF,
            "{missing} of {last_step} steps are missing; gaps {:?}",
            gaps(&report)
        );
        Ok(report)
    })?;
    is_right(&disturbed.run)?;
    let gaps = gaps(&disturbed.run.report);
    ensure!(
        !node.is_empty()
            && gaps
                .iter()
                .any(|gap| gap.contains(&node) && gap.contains("restarted")),
        "no gap names the restart on {node}: {gaps:?}"
    );
    Ok(())
}

/// First an agent is frozen for some seconds, as a starved node would freeze it; then the job is killed.
#[test]
fn a_frozen_agent_catches_up_and_a_killed_job_leaves_a_correct_report() -> Result<()> {
    if !privileged("a_frozen_agent_catches_up_and_a_killed_job_leaves_a_correct_report") {
        return Ok(());
    }
    let (_deleted_at_the_end, mut cluster) = thermal()?;
    let (mut frozen, mut killed) = (None, None);
    // The virtual nodes may end with an error when their job is killed; the report is what counts.
    let _ended = observe(&mut cluster, &mut Progress::start(), |cluster, step| {
        let agent = cluster.agents()[0].pid().and_then(|pid| i32::try_from(pid).ok());
        let agent = agent.and_then(Pid::from_raw).context("no agent")?;
        if FROZEN.contains(&step) && frozen.is_none() {
            frozen = Some(step);
            kill_process(agent, Signal::STOP)?;
        } else if step >= FROZEN.end {
            kill_process(agent, Signal::CONT)?;
        }
        if step >= JOB_ENDS && killed.is_none() {
            killed = Some(step);
            kill_processes_of(&cluster.agents()[0].node().cgroup)?;
        }
        Ok(())
    });
    ensure!(frozen.is_some(), "no agent was frozen");
    let last_step = killed.context("the job ended before it was killed")?;
    let report = eventually(CATCH_UP, || {
        cluster.check_running()?;
        let report: Value = serde_json::from_str(&cluster.report("json")?)?;
        sums_hold(&report)?;
        let (seen, gaps) = (fewest_steps(&report, ""), gaps(&report));
        ensure!(
            last_step.saturating_sub(seen) < CUT_OFF || !gaps.is_empty(),
            "{seen} of {last_step} steps and no gap"
        );
        Ok(report)
    })?;
    let first = judge::accusations(&report)
        .into_iter()
        .next()
        .context("no verdict")?;
    ensure!(first.cause == "device.thermal", "wrong verdict: {first:?}");
    Ok(())
}

/// Kills every process below a control group.
fn kill_processes_of(group: &str) -> Result<()> {
    ensure!(Tree::find()?.kill(group) > 0, "no process below {group}");
    Ok(())
}
