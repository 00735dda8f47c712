//! Reading: rings, counters folded in the kernel, idle launch runs, losses.

use std::collections::HashMap as StdHashMap;
use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError, PerCpuArray, PerCpuHashMap, RingBuf};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::time::{ClockId, clock_gettime};
use stallscope_attribution::time::Window;
use stallscope_records::abi::FileOp;
use stallscope_records::fold::{BlockFold, FileFold, OPEN_RUNS, Run};
use stallscope_records::verbs::QpGone;
use stallscope_records::{Field as _, Head, Kind, Ring};

use super::object::{LoadError, take_map};
use super::verbs::{PairGrowth, Queues, Watched};

/// How often the kernel's counters are read.
const FOLD_INTERVAL_NS: u64 = 1_000_000_000;
/// How often open launch runs are looked at.
const RUN_INTERVAL_NS: u64 = 250_000_000;
/// Records taken from one ring before the others get their turn.
const BATCH: usize = 65_536;

/// Something read from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RawEvent<'a> {
    /// A record of a ring.
    Record {
        /// Which ring.
        ring: Ring,
        /// The record.
        bytes: &'a [u8],
    },
    /// A launch run that ended by its gap while its thread did nothing more: it will come again as a record when the thread does
    /// something, and the decoder knows it then.
    IdleRun {
        /// Process.
        tgid: u32,
        /// Thread.
        tid: u32,
        /// The run.
        run: Run,
    },
    /// Short file calls of a process in the window.
    Files {
        /// Between the two reads.
        window: Window,
        /// Process.
        tgid: u32,
        /// Which calls.
        op: FileOp,
        /// How many.
        fold: FileFold,
    },
    /// Completed block requests of a process in the window.
    Block {
        /// Between the two reads.
        window: Window,
        /// Process.
        tgid: u32,
        /// How many.
        fold: BlockFold,
    },
    /// What a process posted to a queue pair in the window, or that the queue pair changed.
    QueuePair {
        /// Between the two reads.
        window: Window,
        /// Process.
        tgid: u32,
        /// What.
        pair: &'a PairGrowth,
    },
    /// Records that found their ring full in the window.
    Lost {
        /// Between the two reads.
        window: Window,
        /// Which ring.
        ring: Ring,
        /// How many.
        count: u64,
    },
}

/// Why nothing can be read.
#[derive(Debug, thiserror::Error)]
pub enum DrainError {
    /// Waiting failed.
    #[error("the rings cannot be waited for: {0}")]
    Poll(#[from] io::Error),
}

/// The reading side of the loaded programs.
pub struct Reader {
    rings: Vec<(Ring, RingBuf<MapData>)>,
    drops: PerCpuArray<MapData, u64>,
    runs: HashMap<MapData, u64, RunSlots>,
    files: PerCpuHashMap<MapData, [u32; 2], [u64; 4]>,
    blocks: PerCpuHashMap<MapData, u32, [u64; 3]>,
    queues: Queues,
    lost: [u64; Ring::ALL.len()],
    last_files: StdHashMap<[u32; 2], [u64; 4]>,
    last_blocks: StdHashMap<u32, [u64; 3]>,
    /// Processes that ended since the counters were read.
    gone: Vec<u32>,
    launch_gap_ns: u64,
    last_fold_ns: u64,
    last_runs_ns: u64,
    #[cfg(feature = "bpf-log")]
    log: super::kernel_log::KernelLog,
}

/// The open runs of one thread as the kernel's map holds them: first, last, stream, and both counts in one word.
type RunSlots = [[u64; 4]; OPEN_RUNS];

const _: () = assert!(size_of::<RunSlots>() == size_of::<stallscope_records::fold::Runs>());

/// What one call of [`Reader::drain`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drained {
    /// Records read.
    pub records: usize,
}

impl Reader {
    pub(super) fn new(ebpf: &mut Ebpf, launch_gap_ns: u64, watched: Watched) -> Result<Self, LoadError> {
        let rings = vec![
            (Ring::Procs, take_map(ebpf, "RING_PROCS")?),
            (Ring::Nccl, take_map(ebpf, "RING_NCCL")?),
            (Ring::Cuda, take_map(ebpf, "RING_CUDA")?),
            (Ring::Sched, take_map(ebpf, "RING_SCHED")?),
            (Ring::Block, take_map(ebpf, "RING_BLOCK")?),
            (Ring::Verbs, take_map(ebpf, "RING_VERBS")?),
        ];
        let now = monotonic_ns();
        Ok(Self {
            rings,
            drops: take_map(ebpf, "DROPS")?,
            runs: take_map(ebpf, "CUDA_RUNS")?,
            files: take_map(ebpf, "FILE_FOLDS")?,
            blocks: take_map(ebpf, "BLOCK_FOLDS")?,
            queues: Queues::new(take_map(ebpf, "VERBS_QPS")?, watched, now),
            lost: [0; Ring::ALL.len()],
            last_files: StdHashMap::new(),
            last_blocks: StdHashMap::new(),
            gone: Vec::new(),
            launch_gap_ns,
            last_fold_ns: now,
            last_runs_ns: now,
            #[cfg(feature = "bpf-log")]
            log: super::kernel_log::KernelLog::new(ebpf),
        })
    }

    /// Waits until many records are there, at most `timeout`, then gives everything there is.
    ///
    /// # Errors
    /// Waiting failed; what is there can still be read by a call with no timeout.
    pub fn drain(
        &mut self,
        timeout: Duration,
        out: &mut dyn FnMut(RawEvent<'_>),
    ) -> Result<Drained, DrainError> {
        if !timeout.is_zero() {
            self.wait(timeout)?;
        }
        #[cfg(feature = "bpf-log")]
        self.log.pass_on();
        let mut records = 0;
        for (ring, buffer) in &mut self.rings {
            for _ in 0..BATCH {
                let Some(item) = buffer.next() else {
                    break;
                };
                if *ring == Ring::Procs
                    && let Some(head) = Head::read(&item)
                    && head.kind == Kind::Exit as u16
                {
                    self.gone.push(head.tgid);
                    self.queues.process_gone(head.tgid);
                }
                if *ring == Ring::Verbs
                    && let Some(gone) = QpGone::read(&item)
                    && gone.head.kind == Kind::QpGone as u16
                {
                    self.queues.gone(&gone, out);
                    continue;
                }
                out(RawEvent::Record {
                    ring: *ring,
                    bytes: &item,
                });
                records += 1;
            }
        }
        let now = monotonic_ns();
        if now.saturating_sub(self.last_runs_ns) >= RUN_INTERVAL_NS {
            self.idle_runs(now, out);
            self.last_runs_ns = now;
        }
        if now.saturating_sub(self.last_fold_ns) >= FOLD_INTERVAL_NS
            && let Some(window) = Window::new(self.last_fold_ns, now)
        {
            self.folds(window, out);
            self.losses(window, out);
            self.last_fold_ns = now;
        }
        self.queues.poll(now, out);
        Ok(Drained { records })
    }

    /// Records lost in the kernel so far, by ring.
    pub fn lost(&self) -> impl Iterator<Item = (Ring, u64)> {
        Ring::ALL.iter().map(|ring| (*ring, self.dropped(*ring)))
    }

    fn wait(&self, timeout: Duration) -> Result<(), DrainError> {
        let mut fds: Vec<_> = self
            .rings
            .iter()
            .map(|(_, buffer)| PollFd::from_borrowed_fd(buffer.as_fd(), PollFlags::IN))
            .collect();
        let timeout = Timespec::try_from(timeout).map_err(|error| io::Error::other(error.to_string()))?;
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(DrainError::Poll(error.into())),
        }
    }

    fn dropped(&self, ring: Ring) -> u64 {
        self.drops
            .get(&(ring as u32), 0)
            .map_or(0, |counts| counts.iter().sum())
    }

    fn losses(&mut self, window: Window, out: &mut dyn FnMut(RawEvent<'_>)) {
        for ring in Ring::ALL {
            let total = self.dropped(ring);
            let last = std::mem::replace(&mut self.lost[ring as usize], total);
            if total > last {
                out(RawEvent::Lost {
                    window,
                    ring,
                    count: total - last,
                });
            }
        }
    }

    /// A run whose gap is over is never extended again, so it can be told before its thread does.
    fn idle_runs(&mut self, now: u64, out: &mut dyn FnMut(RawEvent<'_>)) {
        for (key, slots) in self.runs.iter().filter_map(Result::ok) {
            for [first_ns, last_ns, stream, counts] in slots {
                if first_ns != 0 && now.saturating_sub(last_ns) > self.launch_gap_ns {
                    let [kernels, graphs] = halves(counts);
                    let run = Run {
                        first_ns,
                        last_ns,
                        stream,
                        kernels,
                        graphs,
                    };
                    out(RawEvent::IdleRun {
                        tgid: (key >> 32) as u32,
                        tid: key as u32,
                        run,
                    });
                }
            }
        }
    }

    fn folds(&mut self, window: Window, out: &mut dyn FnMut(RawEvent<'_>)) {
        let files = totals(self.files.iter());
        for (key, total) in &files {
            let [tgid, op] = *key;
            let Some([calls, bytes, total_ns, blocked_ns]) = growth(total, self.last_files.get(key)) else {
                continue;
            };
            let op = match op {
                op if op == FileOp::Read as u32 => FileOp::Read,
                op if op == FileOp::Write as u32 => FileOp::Write,
                _ => FileOp::Flush,
            };
            let fold = FileFold {
                calls,
                bytes,
                total_ns,
                blocked_ns,
            };
            out(RawEvent::Files {
                window,
                tgid,
                op,
                fold,
            });
        }
        let blocks = totals(self.blocks.iter());
        for (tgid, total) in &blocks {
            if let Some([requests, bytes, latency_ns]) = growth(total, self.last_blocks.get(tgid)) {
                let fold = BlockFold {
                    requests,
                    bytes,
                    latency_ns,
                };
                out(RawEvent::Block {
                    window,
                    tgid: *tgid,
                    fold,
                });
            }
        }
        self.last_files = files;
        self.last_blocks = blocks;
        self.forget_gone();
    }

    /// Takes the counters of dead processes out of the kernel's maps, after their last growth was told.
    fn forget_gone(&mut self) {
        for tgid in self.gone.drain(..) {
            for op in [FileOp::Read, FileOp::Write, FileOp::Flush] {
                let key = [tgid, op as u32];
                if self.last_files.remove(&key).is_some() {
                    let _ = self.files.remove(&key);
                }
            }
            if self.last_blocks.remove(&tgid).is_some() {
                let _ = self.blocks.remove(&tgid);
            }
        }
    }
}

/// Sums the values of all CPUs.
fn totals<K: Eq + std::hash::Hash, const N: usize>(
    entries: impl Iterator<Item = Result<(K, aya::maps::PerCpuValues<[u64; N]>), MapError>>,
) -> StdHashMap<K, [u64; N]> {
    let sum = |values: aya::maps::PerCpuValues<[u64; N]>| {
        values.iter().fold([0u64; N], |mut sum, value| {
            for (sum, value) in sum.iter_mut().zip(value) {
                *sum = sum.saturating_add(*value);
            }
            sum
        })
    };
    entries
        .filter_map(Result::ok)
        .map(|(key, values)| (key, sum(values)))
        .collect()
}

/// What was added since the last read; `None` when nothing was. Counters that went back belong to a new process.
fn growth<const N: usize>(total: &[u64; N], last: Option<&[u64; N]>) -> Option<[u64; N]> {
    let mut growth = *total;
    if let Some(last) = last
        && total[0] >= last[0]
    {
        for (growth, last) in growth.iter_mut().zip(last) {
            *growth = growth.saturating_sub(*last);
        }
    }
    (growth[0] != 0).then_some(growth)
}

fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    seconds
        .saturating_mul(1_000_000_000)
        .saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
}

/// The two 32-bit fields that share a word of a map value, in the order of their offsets.
fn halves(word: u64) -> [u32; 2] {
    let bytes = word.to_ne_bytes();
    let half = |at: usize| u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    [half(0), half(4)]
}
