//! Data-loader workers: processes that read real files and spend real processor time, one batch per request.

use std::fs::File;
use std::io::{Read, Write, stdin, stdout};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, bail};
use rustix::fs::{Advice, fadvise};
use test_cgroups::Tree;
use virtual_node_state::PPM;
use virtual_node_state::clock::{burn, now_ns, thread_cpu_ns};
use virtual_node_state::control::Control;
use virtual_node_state::map::Shared;

use crate::plan::Plan;

/// What a worker says about a batch; the batch itself would lie in shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) begin_ns: u64,
    pub(crate) end_ns: u64,
    /// Processor time outside reads.
    pub(crate) cpu_ns: u64,
    /// Time blocked in reads.
    pub(crate) io_ns: u64,
    /// Time the whole process group was throttled meanwhile.
    pub(crate) throttled_ns: u64,
}

const BATCH_BYTES: usize = 40;

impl Batch {
    /// What the batch's time went to: computing or wanting a processor, blocked in reads, and all of it; the rest is
    /// the quota's.
    pub(crate) fn account(self) -> [u64; 3] {
        let all = self.end_ns - self.begin_ns;
        let starved = all.saturating_sub(self.cpu_ns + self.io_ns);
        [
            self.cpu_ns + starved - starved.min(self.throttled_ns),
            self.io_ns,
            all,
        ]
    }

    fn encode(self) -> [u8; BATCH_BYTES] {
        let mut bytes = [0; BATCH_BYTES];
        let words = [
            self.begin_ns,
            self.end_ns,
            self.cpu_ns,
            self.io_ns,
            self.throttled_ns,
        ];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    fn decode(bytes: [u8; BATCH_BYTES]) -> Self {
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().unwrap_or_default());
        Self {
            begin_ns: word(0),
            end_ns: word(1),
            cpu_ns: word(2),
            io_ns: word(3),
            throttled_ns: word(4),
        }
    }
}

struct Worker {
    process: Child,
    requests: ChildStdin,
    batches: ChildStdout,
}

/// The workers of one rank, asked in turn.
pub(crate) struct Loaders {
    workers: Vec<Worker>,
    turn: usize,
}

impl Loaders {
    pub(crate) fn start(dir: &Path, rank: u32, workers: u32, prefetch: u32) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let start = |index: u32| {
            let mut process = Command::new(&program)
                .args([
                    "loader",
                    "--rank",
                    &rank.to_string(),
                    "--worker",
                    &index.to_string(),
                    "--of",
                    &workers.to_string(),
                ])
                .arg("--dir")
                .arg(dir)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("failed to start a data loader")?;
            let (Some(mut requests), Some(batches)) = (process.stdin.take(), process.stdout.take()) else {
                bail!("a data loader has no pipes");
            };
            requests.write_all(&vec![1; prefetch as usize])?;
            Ok(Worker {
                process,
                requests,
                batches,
            })
        };
        Ok(Self {
            workers: (0..workers).map(start).collect::<anyhow::Result<_>>()?,
            turn: 0,
        })
    }

    /// The next batch; blocks in `read` until its worker has it, then asks for another.
    pub(crate) fn next(&mut self) -> anyhow::Result<Batch> {
        let count = self.workers.len();
        let worker = &mut self.workers[self.turn % count];
        self.turn += 1;
        let mut bytes = [0; BATCH_BYTES];
        worker
            .batches
            .read_exact(&mut bytes)
            .context("a data loader died")?;
        worker.requests.write_all(&[1]).context("a data loader died")?;
        Ok(Batch::decode(bytes))
    }
}

impl Drop for Loaders {
    fn drop(&mut self) {
        for mut worker in self.workers.drain(..) {
            // Its requests end, so it leaves by itself; a batch in the works may make it late, hence the kill.
            drop(worker.requests);
            let _gone = worker.process.kill();
            let _reaped = worker.process.wait();
        }
    }
}

/// A worker process: serves requests on stdin until it ends.
pub(crate) fn run(dir: &Path, rank: u32, worker: u64, workers: u64) -> anyhow::Result<()> {
    crate::topology::die_with_parent()?;
    let plan = Plan::read(dir)?;
    let control = Shared::<Control>::open(&plan.control()).context("failed to map the job's control file")?;
    let knobs = &control.ranks[rank as usize];
    let decode_ns = (plan.scenario.job.decode_ms * 1e6) as u64;
    let (groups, group) = (Tree::find()?, plan.rank_cgroup(rank));
    // A group that cannot be read is gone, and so is the run.
    let throttled_ns = || groups.throttled_ns(&group).unwrap_or(0);
    let (mut requests, mut batches) = (stdin().lock(), stdout().lock());
    let mut request = [0; 1];
    let mut index = worker;
    while requests.read(&mut request)? == 1 {
        let (begin_ns, throttled_before) = (now_ns(), throttled_ns());
        let cpu_before = thread_cpu_ns();
        let cold = knobs.cold_reads.load(Relaxed) != 0;
        let (io_ns, read_cpu_ns) = read_sample(&plan.sample(rank, index), cold)?;
        if cold {
            knobs.read_ns.store(io_ns + read_cpu_ns, Relaxed);
        }
        burn(decode_ns * knobs.decode_ppm.load(Relaxed) / PPM);
        let cpu_ns = (thread_cpu_ns() - cpu_before).saturating_sub(read_cpu_ns);
        let throttled_ns = throttled_ns().saturating_sub(throttled_before);
        let batch = Batch {
            begin_ns,
            end_ns: now_ns(),
            cpu_ns,
            io_ns,
            throttled_ns,
        };
        batches.write_all(&batch.encode())?;
        batches.flush()?;
        index += workers;
    }
    Ok(())
}

/// Reads a file to its end; time blocked and processor time used.
fn read_sample(path: &Path, cold: bool) -> anyhow::Result<(u64, u64)> {
    let (begin, cpu) = (now_ns(), thread_cpu_ns());
    let mut file = File::open(path).with_context(|| format!("failed to open {}", path.display()))?;
    if cold {
        fadvise(file.as_fd(), 0, None, Advice::DontNeed)
            .context("failed to drop a dataset file from the page cache")?;
    }
    let mut buffer = vec![0; 256 << 10];
    while file
        .read(&mut buffer)
        .with_context(|| format!("failed to read {}", path.display()))?
        > 0
    {}
    let used = thread_cpu_ns() - cpu;
    Ok(((now_ns() - begin).saturating_sub(used), used))
}
