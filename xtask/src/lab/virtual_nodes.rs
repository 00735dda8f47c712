//! The virtual nodes and their job: `vnode run`, spoken to by lines of JSON.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, ChildStdout};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::interrupt;
use super::process::{Child, inside};

/// One line of `vnode run`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Namespaces, groups and libraries are there; the job waits or is about to start.
    Ready(Ready),
    /// The job runs.
    Started,
    /// The job reached a step.
    Progress {
        /// Steps done.
        step: u64,
        /// When, in `CLOCK_MONOTONIC` ns.
        at_ns: u64,
    },
    /// A fault was switched.
    Fault {
        /// Its name.
        name: String,
        /// Whether it is on now.
        on: bool,
        /// When, in `CLOCK_REALTIME` ns.
        at_unix_ns: u64,
    },
    /// The job is over and the truth is written.
    Done {
        /// The file with the truth.
        truth: PathBuf,
    },
    /// A line of a later version.
    #[serde(other)]
    Other,
}

/// What the virtual nodes offer.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Ready {
    /// The nodes of the job.
    pub nodes: Vec<Node>,
    /// Where a collector can be reached by all of them.
    pub collector: Management,
}

/// One virtual node.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Node {
    /// Its host name.
    pub name: String,
    /// Its network namespace.
    pub netns: String,
    /// The control group of its processes, as `/proc/PID/cgroup` shows it.
    pub cgroup: String,
    /// Its `libnvidia-ml.so.1`.
    pub nvml_library: PathBuf,
    /// Variables that its libraries read.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Its address.
    pub ip: std::net::IpAddr,
}

/// Where the collector runs.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Management {
    /// Network namespace; `None` for the machine's own.
    #[serde(default)]
    pub netns: Option<String>,
    /// Address.
    pub ip: std::net::IpAddr,
}

/// A running `vnode run`.
#[derive(Debug)]
pub struct VirtualNodes {
    child: Child,
    events: Receiver<Event>,
    /// Closing it tears everything down.
    stdin: Option<ChildStdin>,
}

impl VirtualNodes {
    /// Starts a scenario; its files go to `dir`.
    ///
    /// # Errors
    /// The program cannot be started.
    pub fn start(vnode: &Path, scenario: &Path, dir: &Path, log: &Path) -> Result<Self> {
        let mut command = inside(None, vnode);
        command
            .arg("run")
            .arg("--scenario")
            .arg(scenario)
            .arg("--dir")
            .arg(dir);
        let mut child = Child::start("vnode", &mut command, log, true)?;
        let (stdin, stdout) = child.take_pipes().context("the virtual nodes have no pipes")?;
        Ok(Self {
            child,
            events: read_events(stdout),
            stdin: Some(stdin),
        })
    }

    /// The next event within `at_most`, or `None`.
    ///
    /// # Errors
    /// The virtual nodes ended, or a signal came.
    pub fn next_event(&mut self, at_most: Duration) -> Result<Option<Event>> {
        let deadline = Instant::now() + at_most;
        loop {
            interrupt::check()?;
            let slice = deadline
                .saturating_duration_since(Instant::now())
                .min(Duration::from_millis(100));
            match self.events.recv_timeout(slice) {
                Ok(event) => return Ok(Some(event)),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => {
                    let status = self.child.wait(Duration::from_secs(5))?;
                    bail!(
                        "the virtual nodes ended with {status}; their log ends:\n{}",
                        self.child.log_tail()
                    );
                }
            }
        }
    }

    /// Waits for the nodes to be there.
    ///
    /// # Errors
    /// They are not there in time.
    pub fn ready(&mut self, at_most: Duration) -> Result<Ready> {
        let deadline = Instant::now() + at_most;
        while let Some(event) = self.next_event(deadline.saturating_duration_since(Instant::now()))? {
            if let Event::Ready(ready) = event {
                return Ok(ready);
            }
        }
        bail!(
            "the virtual nodes were not ready within {at_most:?}; their log ends:\n{}",
            self.child.log_tail()
        )
    }

    /// The process id of `vnode run`.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Ends the job and takes the nodes down, giving them the time that takes.
    pub fn stop(&mut self) {
        self.stdin = None;
        if self.child.wait(Duration::from_secs(10)).is_err() {
            self.child.stop();
        }
    }
}

impl Drop for VirtualNodes {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Lines as events. A full queue makes the writer wait, which is what a pipe does too.
fn read_events(stdout: ChildStdout) -> Receiver<Event> {
    let (sender, receiver) = sync_channel(1024);
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            match serde_json::from_str(&line) {
                Ok(event) => {
                    if sender.send(event).is_err() {
                        return;
                    }
                }
                Err(error) => eprintln!("vnode printed a line that is no event ({error}): {line}"),
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn events_are_read_as_the_contract_writes_them() {
        let read = |line: &str| serde_json::from_str::<Event>(line).unwrap();
        assert_eq!(read(r#"{"event":"started"}"#), Event::Started);
        assert_eq!(
            read(r#"{"event":"progress","step":3,"at_ns":17}"#),
            Event::Progress { step: 3, at_ns: 17 }
        );
        assert_eq!(
            read(r#"{"event":"fault","name":"thermal","on":true,"at_unix_ns":5}"#),
            Event::Fault {
                name: "thermal".into(),
                on: true,
                at_unix_ns: 5
            }
        );
        assert_eq!(read(r#"{"event":"later","x":1}"#), Event::Other);
        let ready = read(
            r#"{"event":"ready","nodes":[{"name":"n0","netns":"s-n0","cgroup":"/g","nvml_library":"/l","env":{"A":"b"},
                "ip":"10.0.0.2"}],"collector":{"netns":"s-m","ip":"10.0.0.1"}}"#,
        );
        assert!(matches!(ready, Event::Ready(ready) if ready.nodes[0].env["A"] == "b"));
    }

    #[test]
    fn an_early_end_is_an_error_with_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut nodes = VirtualNodes::start(
            Path::new("/bin/false"),
            Path::new("s.toml"),
            dir.path(),
            &dir.path().join("vnode.log"),
        )
        .unwrap();
        let error = nodes.ready(Duration::from_secs(5)).unwrap_err().to_string();
        assert!(error.contains("ended with exit status: 1"), "{error}");
    }
}
