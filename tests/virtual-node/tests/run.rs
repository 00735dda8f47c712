//! Whole runs of the virtual nodes. They need root.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

mod built;

fn privileged(test: &str) -> bool {
    let privileged = std::env::var_os("STALLSCOPE_PRIVILEGED").is_some();
    if !privileged {
        println!("skipped: {test}: it needs root, and STALLSCOPE_PRIVILEGED is not set");
    }
    privileged
}

/// Starts a run; its standard input stays open as long as the child lives.
fn start(dir: &Path, scenario: &str) -> Result<Child> {
    let libraries = built::folder()?;
    let file = dir.join("scenario.toml");
    std::fs::write(&file, scenario)?;
    let mut command = Command::new(built::vnode());
    command
        .arg("run")
        .arg("--scenario")
        .arg(file)
        .arg("--dir")
        .arg(dir.join("run"))
        .arg("--libraries")
        .arg(libraries);
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("failed to start vnode")
}

/// Events up to and including one of the given name.
fn events_until(child: &mut Child, last: &str) -> Result<Vec<Value>> {
    let mut lines = BufReader::new(child.stdout.take().context("no output")?).lines();
    let mut events = Vec::new();
    for line in &mut lines {
        let event: Value = serde_json::from_str(&line?)?;
        let found = event["event"] == last;
        events.push(event);
        if found {
            // The rest is read in the background so that the run is never blocked by a full pipe.
            std::thread::spawn(move || lines.for_each(drop));
            return Ok(events);
        }
    }
    bail!("the run ended without {last}: {events:?}")
}

/// What a run leaves on the host under its id.
fn leftovers(id: u32) -> Vec<String> {
    let name = format!("ss-{id:x}-");
    let mut found: Vec<String> = Vec::new();
    for folder in [
        "/run/netns",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/unified",
        "/sys/fs/cgroup/cpu",
        "/sys/fs/cgroup/blkio",
        "/run/stallscope-vnode",
    ] {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
        found.extend(names.filter(|entry| {
            entry.starts_with(&name)
                || *entry == format!("stallscope-vnode-{id:x}")
                || *entry == format!("{id:x}.json")
        }));
    }
    found
}

fn mounted(dir: &Path) -> Result<bool> {
    Ok(std::fs::read_to_string("/proc/mounts")?.contains(&dir.display().to_string()))
}

fn wait_clean(id: u32, dir: &Path) -> Result<()> {
    let begun = Instant::now();
    while !leftovers(id).is_empty() || mounted(dir)? {
        ensure!(
            begun.elapsed() < Duration::from_secs(15),
            "left behind: {:?}",
            leftovers(id)
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

#[test]
fn a_control_run_ends_with_a_truth_that_adds_up() -> Result<()> {
    if !privileged("a_control_run_ends_with_a_truth_that_adds_up") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut child = start(dir.path(), "[job]\nduration_s = 4\nstep_ms = 200")?;
    let events = events_until(&mut child, "done")?;
    ensure!(child.wait()?.success());
    let ready = &events[0];
    ensure!(
        ready["event"] == "ready" && ready["nodes"].as_array().map(Vec::len) == Some(2),
        "{ready}"
    );
    let truth: Value = serde_json::from_slice(&std::fs::read(dir.path().join("run/truth.json"))?)?;
    // On a machine that others keep busy the truth is that the host was starved.
    let starved = truth["starved_share"].as_f64().context("no share")?;
    let cause = if starved >= 0.12 { "host.cpu" } else { "none" };
    ensure!(truth["cause"] == cause, "{truth}");
    ensure!(truth["steps"].as_u64() > Some(5), "{truth}");
    for rank in truth["per_rank"].as_array().context("no ranks")? {
        let sum: i64 = rank["leaves"]
            .as_object()
            .context("no leaves")?
            .values()
            .filter_map(Value::as_i64)
            .sum();
        ensure!(Some(sum) == rank["window_ns"].as_i64(), "{rank}");
    }
    let sums = |key: &str| -> i64 {
        truth[key]
            .as_object()
            .into_iter()
            .flatten()
            .filter_map(|(_, ns)| ns.as_i64())
            .sum()
    };
    let windows = 4 * truth["per_rank"][0]["window_ns"].as_i64().context("no window")?;
    ensure!(sums("leaves") == windows);
    wait_clean(child.id(), dir.path())
}

#[test]
fn a_fault_is_told_with_its_place() -> Result<()> {
    if !privileged("a_fault_is_told_with_its_place") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let fault = "[[fault]]\nname = \"thermal\"\nonset_s = 3\ndose = 50\nnode = 1\ngpu = 1";
    let mut child = start(
        dir.path(),
        &format!("[job]\nduration_s = 8\nstep_ms = 200\n{fault}"),
    )?;
    events_until(&mut child, "done")?;
    ensure!(child.wait()?.success());
    let truth: Value = serde_json::from_slice(&std::fs::read(dir.path().join("run/truth.json"))?)?;
    ensure!(truth["cause"] == "device.thermal", "{truth}");
    ensure!(
        truth["where"] == serde_json::json!({"node": "node1", "gpu": 1, "rank": 3}),
        "{truth}"
    );
    // On a machine that others keep busy, whoever got no CPU is waited for most.
    let starved = truth["starved_share"].as_f64().context("no share")?;
    ensure!(starved >= 0.05 || truth["culprits"][0]["rank"] == 3, "{truth}");
    wait_clean(child.id(), dir.path())
}

#[test]
fn the_end_of_input_takes_everything_down() -> Result<()> {
    if !privileged("the_end_of_input_takes_everything_down") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut child = start(dir.path(), "")?;
    events_until(&mut child, "started")?;
    ensure!(!leftovers(child.id()).is_empty() && mounted(dir.path())?);
    drop(child.stdin.take());
    ensure!(!child.wait()?.success(), "a run that was cut short is no success");
    wait_clean(child.id(), dir.path())
}

#[test]
fn a_killed_runs_leftovers_are_cleaned_by_the_next() -> Result<()> {
    if !privileged("a_killed_runs_leftovers_are_cleaned_by_the_next") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut child = start(dir.path(), "")?;
    events_until(&mut child, "started")?;
    child.kill()?;
    child.wait()?;
    ensure!(!leftovers(child.id()).is_empty(), "nothing was left to clean");
    ensure!(Command::new(built::vnode()).arg("clean").status()?.success());
    wait_clean(child.id(), dir.path())
}
