//! CPU time of helpers that give no records.
//!
//! A data loader that computes on a core of its own never leaves it, and one that sleeps never wakes: the scheduler's
//! records tell neither. Their CPU time does. It is read only from threads that have been silent for a while, and
//! seldom from those that sleep.

use std::collections::BTreeMap;
use std::path::PathBuf;

use stallscope_attribution::time::Window;

use super::proc_fs::read_text;
use crate::observation::{Fact, Observation, ProcessKey, Thread};

/// A thread without records for so long is silent, ns.
const SILENT_NS: u64 = 400_000_000;
/// Between two reads of a silent thread that computes, ns.
const BUSY_NS: u64 = 500_000_000;
/// Between two reads of a silent thread that does not, ns.
const IDLE_NS: u64 = 2_000_000_000;
/// The unit of `/proc/PID/stat` times: `USER_HZ` is 100 on every architecture that has GPUs.
const TICK_NS: u64 = 10_000_000;
const MOST_THREADS: usize = 4_096;

#[derive(Debug, Clone, Copy)]
struct Watched {
    heard_ns: u64,
    read: Option<Read>,
    due_ns: u64,
}

#[derive(Debug, Clone, Copy)]
struct Read {
    at_ns: u64,
    cpu_ns: u64,
}

/// Reads CPU times of silent helpers.
#[derive(Debug)]
pub struct CpuTimeReader {
    proc_root: PathBuf,
    threads: BTreeMap<Thread, Watched>,
}

impl CpuTimeReader {
    /// A reader over `proc_root` (`/proc`).
    #[must_use]
    pub fn new(proc_root: impl Into<PathBuf>) -> Self {
        Self {
            proc_root: proc_root.into(),
            threads: BTreeMap::new(),
        }
    }

    /// Watches a helper's main thread; its others are watched once [`CpuTimeReader::heard`] of.
    pub fn watch(&mut self, process: ProcessKey, now_ns: u64) {
        self.add(
            Thread {
                process,
                tid: process.pid,
            },
            now_ns,
        );
    }

    /// A record told what the thread did up to `at_ns`. Threads of processes that are not watched are left alone.
    pub fn heard(&mut self, thread: Thread, at_ns: u64) {
        if let Some(watched) = self.threads.get_mut(&thread) {
            watched.heard_ns = watched.heard_ns.max(at_ns);
            watched.read = None;
        } else if self.threads.contains_key(&Thread {
            process: thread.process,
            tid: thread.process.pid,
        }) {
            self.add(thread, at_ns);
        }
    }

    /// The process is gone.
    pub fn forget(&mut self, process: ProcessKey) {
        self.threads.retain(|thread, _| thread.process != process);
    }

    /// Reads what is due: one fact per silent thread, for the time between two reads without a record.
    pub fn poll(&mut self, now_ns: u64) -> Vec<Observation> {
        let mut observations = Vec::new();
        let root = &self.proc_root;
        self.threads.retain(|thread, watched| {
            if now_ns < watched.due_ns || now_ns.saturating_sub(watched.heard_ns) < SILENT_NS {
                return true;
            }
            let path = root.join(format!("{}/task/{}/stat", thread.process.pid, thread.tid));
            let Some(cpu_ns) = read_text(&path).and_then(|stat| cpu_ns(&stat)) else {
                // The main thread stays, so that new threads of the process are heard of.
                watched.due_ns = now_ns + IDLE_NS;
                return thread.tid == thread.process.pid;
            };
            let before = watched.read.replace(Read {
                at_ns: now_ns,
                cpu_ns,
            });
            let since = before.and_then(|before| {
                Some((
                    Window::new(before.at_ns, now_ns)?,
                    cpu_ns.saturating_sub(before.cpu_ns),
                ))
            });
            let idle = since.is_some_and(|(_, cpu_ns)| cpu_ns == 0);
            watched.due_ns = now_ns + if idle { IDLE_NS } else { BUSY_NS };
            if let Some((window, cpu_ns)) = since {
                let fact = Fact::ThreadCpu {
                    thread: *thread,
                    cpu_ns,
                };
                observations.push(Observation { window, fact });
            }
            true
        });
        observations
    }

    fn add(&mut self, thread: Thread, now_ns: u64) {
        if self.threads.len() < MOST_THREADS {
            self.threads.entry(thread).or_insert(Watched {
                heard_ns: now_ns,
                read: None,
                due_ns: now_ns,
            });
        }
    }
}

/// User and system time of a `stat` line: fields 14 and 15. The name before them may hold anything.
fn cpu_ns(stat: &str) -> Option<u64> {
    let fields = &stat[stat.rfind(')')? + 1..];
    let mut fields = fields.split_ascii_whitespace().skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    user.checked_add(system)?.checked_mul(TICK_NS)
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: u64 = 1_000_000_000;

    fn stat(dir: &tempfile::TempDir, ticks: u64) {
        let task = dir.path().join("7/task/7");
        std::fs::create_dir_all(&task).expect("a tree");
        let line = format!("7 (a) b) R 1 7 7 0 -1 0 1 2 3 4 {ticks} 1 0 0 20 0 1 0 55 0 0");
        std::fs::write(task.join("stat"), line).expect("a file");
    }

    #[test]
    fn only_silent_threads_are_read_and_give_their_cpu_time() {
        let dir = tempfile::tempdir().expect("a directory");
        let process = ProcessKey {
            pid: 7,
            start_ticks: 55,
        };
        let thread = Thread { process, tid: 7 };
        let mut reader = CpuTimeReader::new(dir.path());
        stat(&dir, 100);
        reader.watch(process, S);
        assert_eq!(reader.poll(S + 1), [], "not silent yet");
        assert_eq!(reader.poll(2 * S), [], "the first read tells nothing");
        stat(&dir, 148);
        let expected = Observation {
            window: Window::new(2 * S, 2 * S + S / 2).expect("a window"),
            fact: Fact::ThreadCpu {
                thread,
                cpu_ns: 480_000_000,
            },
        };
        assert_eq!(reader.poll(2 * S + S / 2), [expected]);
        reader.heard(thread, 3 * S);
        assert_eq!(reader.poll(3 * S + 1), []);
        assert_eq!(reader.poll(4 * S), [], "a record lies between the two reads");
        assert_eq!(reader.poll(5 * S).len(), 1);
        assert_eq!(reader.poll(6 * S), [], "one that sleeps is read seldom");
        reader.forget(process);
        assert_eq!(reader.poll(20 * S), []);
    }

    #[test]
    fn a_thread_that_is_gone_gives_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let process = ProcessKey {
            pid: 7,
            start_ticks: 55,
        };
        let mut reader = CpuTimeReader::new(dir.path());
        reader.watch(process, 0);
        reader.heard(Thread { process, tid: 8 }, 0);
        reader.heard(
            Thread {
                process: ProcessKey {
                    pid: 9,
                    start_ticks: 1,
                },
                tid: 9,
            },
            0,
        );
        assert_eq!(reader.threads.len(), 2, "an unwatched process is left alone");
        assert_eq!(reader.poll(S), []);
        assert_eq!(reader.threads.len(), 1, "only the main thread is kept");
        assert_eq!(cpu_ns("7 (x) R"), None);
        assert_eq!(cpu_ns("nothing"), None);
    }
}
