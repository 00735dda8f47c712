//! The collector as its own process, killed without warning.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use stallscope::store::Spool;

use crate::lab::{self, Authority};
use crate::spool::MemorySpool;

struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts `stallscope collect` and waits until it listens.
fn collect(authority: &Authority, store: &Path, listen: SocketAddr) -> (Process, SocketAddr) {
    let identity = authority.issue("collector");
    let mut child = Command::new(env!("CARGO_BIN_EXE_stallscope"))
        .args(["collect", "--listen", &listen.to_string()])
        .arg("--store")
        .arg(store)
        .arg("--ca")
        .arg(identity.ca)
        .arg("--cert")
        .arg(identity.cert)
        .arg("--key")
        .arg(identity.key)
        .env("NO_COLOR", "1")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let process = Process(child);
    let line = lines
        .by_ref()
        .map(Result::unwrap)
        .find(|line| line.contains("collector listens"));
    let line = line.expect("the collector ended before it listened");
    let address = line
        .split("address=")
        .nth(1)
        .unwrap()
        .split_whitespace()
        .next()
        .unwrap();
    let address = address.parse().unwrap();
    // Read on, so that the collector never waits for its own log.
    std::thread::spawn(move || lines.for_each(drop));
    (process, address)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_killed_again_and_again_has_every_message_once() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let store = dir.path().join("store");
    let (mut process, address) = collect(&authority, &store, "127.0.0.1:0".parse().unwrap());
    let spool = Arc::new(MemorySpool::new(usize::MAX));
    let target = lab::target(address, &authority.issue("n1"));
    let streaming = lab::agent(target.clone(), "n1", 1, Arc::clone(&spool));
    for _ in 0..3 {
        let before = spool.last_acked();
        for _ in 0..200 {
            for _ in 0..10 {
                spool.append("n1", 1);
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        lab::eventually("some of it is acknowledged", || spool.last_acked() > before).await;
        // SIGKILL, while batches are on their way.
        drop(process);
        for _ in 0..500 {
            spool.append("n1", 1);
        }
        (process, _) = collect(&authority, &store, address);
    }
    streaming.caught_up().await;
    let connections = streaming.status().counts.connections;
    assert!(connections >= 4, "{connections} connections");
    streaming.stop().await;

    // The agent restarts too: another boot, the same store.
    let first_boot_last = spool.last();
    let streaming = lab::agent(target, "n1", 2, Arc::clone(&spool));
    for _ in 0..100 {
        spool.append("n1", 2);
    }
    streaming.caught_up().await;
    streaming.stop().await;
    drop(process);

    let found = lab::stored(&store);
    assert!(
        found.values().all(|times| *times == 1),
        "something is stored twice"
    );
    assert_eq!(found.len() as u64, spool.last());
    assert!((1..=first_boot_last).all(|sequence| found.contains_key(&("n1".into(), 1, sequence))));
    assert!(
        (first_boot_last + 1..=spool.last()).all(|sequence| found.contains_key(&("n1".into(), 2, sequence)))
    );
}

#[test]
fn a_collector_that_cannot_start_says_why_and_exits_2() {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_stallscope"))
        .args([
            "collect",
            "--listen",
            "127.0.0.1:0",
            "--ca",
            "/nonexistent/ca.pem",
        ])
        .args([
            "--cert",
            "/nonexistent/c.pem",
            "--key",
            "/nonexistent/c.key",
            "--store",
        ])
        .arg(dir.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(
        text.contains("/nonexistent/ca.pem") && text.contains("agents keep their data"),
        "{text}"
    );
}
