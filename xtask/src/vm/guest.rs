//! Asking a guest to do things.

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use stallscope_vm::{Hello, Job, Outcome, Program, Reply, Request};

use crate::lab::interrupt;

/// How much longer than the guest's own deadline the host waits for a reply.
const SLACK: Duration = Duration::from_secs(15);

/// How long to wait before looking whether somebody interrupted.
const LOOK: Duration = Duration::from_millis(200);

/// Who waits for which reply.
type Waiting = Arc<Mutex<HashMap<u64, Sender<Result<Outcome, String>>>>>;

/// The program in a machine that does what it is told.
#[derive(Debug)]
pub(super) struct Guest {
    name: &'static str,
    writer: Mutex<UnixStream>,
    hello: Mutex<Receiver<Hello>>,
    waiting: Waiting,
    last: AtomicU64,
}

/// A program that runs in a guest.
#[derive(Debug)]
pub(super) struct Running<'a> {
    guest: &'a Guest,
    what: String,
    pid: u32,
}

impl Guest {
    /// Speaks to the guest behind `stream`, which may not be up yet.
    pub(super) fn new(name: &'static str, stream: UnixStream) -> Result<Self> {
        let reader = BufReader::new(stream.try_clone()?);
        let waiting = Waiting::default();
        let (hellos, hello) = channel();
        let replies = Arc::clone(&waiting);
        thread::spawn(move || receive(reader, &hellos, &replies));
        Ok(Self {
            name,
            writer: Mutex::new(stream),
            hello: Mutex::new(hello),
            waiting,
            last: AtomicU64::new(0),
        })
    }

    /// The guest's first word, if it comes in time.
    pub(super) fn hello(&self, at_most: Duration) -> Option<Hello> {
        let hello = self.hello.lock().unwrap_or_else(PoisonError::into_inner);
        hello.recv_timeout(at_most).ok()
    }

    /// Runs a program to its end and hands back how it ended and what it said.
    pub(super) fn run(&self, program: Program, at_most_s: u64) -> Result<Outcome> {
        self.ask(Job::Run { program, at_most_s }, at_most_s)
    }

    /// Runs a program that must succeed and hands back its standard output.
    pub(super) fn output(&self, words: &[&str], at_most_s: u64) -> Result<String> {
        let outcome = self.run(program(words), at_most_s)?;
        ensure!(
            outcome.code == Some(0),
            "on {}, {} ended with {:?}:\n{}{}",
            self.name,
            words.join(" "),
            outcome.code,
            outcome.stdout,
            outcome.stderr
        );
        Ok(outcome.stdout)
    }

    /// Runs a line of shell that must succeed and hands back its standard output.
    pub(super) fn shell(&self, line: &str, at_most_s: u64) -> Result<String> {
        self.output(&["sh", "-ec", line], at_most_s)
    }

    /// Starts a program; its output goes to `log` in the shared folder.
    pub(super) fn start(&self, program: Program, log: &str) -> Result<Running<'_>> {
        let what = program.words.join(" ");
        let log = log.to_owned();
        let outcome = self.ask(Job::Start { program, log }, 10)?;
        Ok(Running {
            guest: self,
            what,
            pid: outcome.pid,
        })
    }

    /// A program that was started, by its id.
    pub(super) fn started(&self, pid: u32, what: &str) -> Running<'_> {
        Running {
            guest: self,
            what: what.to_owned(),
            pid,
        }
    }

    fn ask(&self, job: Job, at_most_s: u64) -> Result<Outcome> {
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let (sender, receiver) = channel();
        self.lock_waiting().insert(id, sender);
        let mut line = serde_json::to_string(&Request { id, job })?;
        line.push('\n');
        self.writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(line.as_bytes())
            .with_context(|| format!("machine {} is gone", self.name))?;
        let deadline = Instant::now() + Duration::from_secs(at_most_s) + SLACK;
        loop {
            interrupt::check()?;
            match receiver.recv_timeout(LOOK) {
                Ok(Ok(outcome)) => return Ok(outcome),
                Ok(Err(why)) => bail!("on {}, {why}", self.name),
                Err(RecvTimeoutError::Disconnected) => bail!("machine {} ended", self.name),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    self.lock_waiting().remove(&id);
                    bail!("machine {} does not answer", self.name);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    fn lock_waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Sender<Result<Outcome, String>>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Running<'_> {
    /// Its id in the guest.
    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for its own end, which must be a good one.
    pub(super) fn ended(self, at_most_s: u64) -> Result<()> {
        self.finish(false, at_most_s)
    }

    /// Asks it to stop, which must end well.
    pub(super) fn stopped(self, at_most_s: u64) -> Result<()> {
        self.finish(true, at_most_s)
    }

    fn finish(self, terminate: bool, at_most_s: u64) -> Result<()> {
        let pid = self.pid;
        let outcome = self
            .guest
            .ask(
                Job::Finish {
                    pid,
                    terminate,
                    at_most_s,
                },
                at_most_s,
            )
            .with_context(|| self.what.clone())?;
        ensure!(
            outcome.code == Some(0),
            "on {}, {} ended with {:?}",
            self.guest.name,
            self.what,
            outcome.code
        );
        Ok(())
    }
}

/// A program by its words.
pub(super) fn program(words: &[&str]) -> Program {
    Program {
        words: words.iter().map(|word| (*word).to_owned()).collect(),
        variables: Vec::new(),
    }
}

/// Hands replies to who waits for them, until the guest is gone: then nobody needs to wait longer.
fn receive(reader: BufReader<UnixStream>, hellos: &Sender<Hello>, waiting: &Waiting) {
    for line in reader.lines() {
        let Ok(line) = line else { break };
        if let Ok(hello) = serde_json::from_str::<Hello>(&line) {
            // Nobody asks twice.
            let _ = hellos.send(hello);
        } else if let Ok(reply) = serde_json::from_str::<Reply>(&line) {
            let waiter = waiting
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&reply.id);
            if let Some(waiter) = waiter {
                // Who gave up waiting needs no reply.
                let _ = waiter.send(reply.result);
            }
        }
    }
    waiting.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// A guest that answers each request by `answer`, and ends after `requests`.
    fn guest(requests: usize, answer: fn(u64) -> String) -> Guest {
        let (ours, theirs) = UnixStream::pair().unwrap();
        thread::spawn(move || {
            let mut writer = theirs.try_clone().unwrap();
            for line in BufReader::new(theirs).lines().take(requests) {
                let request: Request = serde_json::from_str(&line.unwrap()).unwrap();
                writeln!(writer, "{}", answer(request.id)).unwrap();
            }
        });
        Guest::new("test", ours).unwrap()
    }

    #[test]
    fn a_bad_end_is_an_error_with_all_that_was_said() {
        let guest = guest(1, |id| {
            format!(
                r#"{{"id":{id},"result":{{"Ok":{{"pid":4,"code":3,"stdout":"half","stderr":"no such device"}}}}}}"#
            )
        });
        let error = guest.output(&["rdma", "link"], 1).unwrap_err().to_string();
        for word in ["rdma link", "3", "half", "no such device"] {
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_guest_that_ends_is_noticed_at_once() {
        let guest = guest(1, |_| "garbage".into());
        let started = Instant::now();
        let error = guest.output(&["true"], 600).unwrap_err().to_string();
        assert!(error.contains("ended"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(60));
    }
}
