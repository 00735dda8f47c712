//! Children inside network namespaces; needs root.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use xtask::lab::leftovers;
use xtask::lab::process::{Child, Namespace, inside};
use xtask::lab::virtual_nodes::Ready;

/// Whether this run may do privileged things; says so when not.
fn privileged(test: &str) -> bool {
    let privileged = std::env::var_os("STALLSCOPE_PRIVILEGED").is_some();
    if !privileged {
        println!("skipped: {test}: STALLSCOPE_PRIVILEGED is not set");
    }
    privileged
}

#[test]
fn a_child_sees_its_own_network_and_the_machines_mounts() -> Result<()> {
    if !privileged("a_child_sees_its_own_network_and_the_machines_mounts") {
        return Ok(());
    }
    let name = format!("stallscope-test-{}", std::process::id());
    ensure!(
        Command::new("ip")
            .args(["netns", "add", &name])
            .status()?
            .success(),
        "no namespace"
    );
    let namespace = Namespace::open(&name)?;
    let ready: Ready = serde_json::from_value(serde_json::json!({
        "nodes": [{"name": "n0", "netns": name, "cgroup": "/stallscope-test-absent", "nvml_library": "/l", "ip": "10.0.0.2"}],
        "collector": {"ip": "10.0.0.1"}
    }))?;
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("log");
    let script = "readlink /proc/self/ns/net; ip -o link | wc -l; ls /sys/kernel/tracing/events | head -1";
    let mut child = Child::start(
        "child",
        inside(Some(&namespace), Path::new("sh")).args(["-c", script]),
        &log,
        false,
    )?;
    let status = child.wait(Duration::from_secs(5))?;
    let left = leftovers::remove(&ready);
    let text = std::fs::read_to_string(&log)?;
    ensure!(status.success(), "the child ended with {status}: {text}");
    let mut lines = text.lines();
    let own = std::fs::read_link("/proc/self/ns/net")?;
    ensure!(
        lines.next() != own.to_str(),
        "the child is in this process's namespace"
    );
    ensure!(
        lines.next() == Some("1"),
        "a fresh namespace has the loopback alone: {text}"
    );
    ensure!(lines.next().is_some(), "tracefs is hidden from the child");
    ensure!(
        left == [format!("network namespace {name} (removed)")],
        "leftovers: {left:?}"
    );
    Ok(())
}

#[test]
fn a_child_dies_with_the_thread_that_started_it() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("log");
    let starter = std::thread::spawn(move || {
        let child = Child::start("child", inside(None, Path::new("sleep")).arg("60"), &log, false)?;
        wait_for_program(child.pid(), "sleep")?;
        Ok::<_, anyhow::Error>(child)
    });
    let mut child = starter.join().ok().context("the thread panicked")??;
    let status = child.wait(Duration::from_secs(5))?;
    ensure!(!status.success(), "sleep ended by itself");
    Ok(())
}

/// The wish to die with the parent is made before the program starts, and counts from then on.
fn wait_for_program(pid: u32, name: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    while std::fs::read_to_string(format!("/proc/{pid}/comm"))?.trim() != name {
        ensure!(Instant::now() < deadline, "{name} did not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
