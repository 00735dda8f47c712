//! Checkpoints, recognised by what they do: a burst of copies to the host, then large writes and flushes.
//!
//! Writes and flushes by threads of the training process that follow each other closely form a cluster; a cluster
//! with [`LEAST_BYTES`] or [`LEAST_NS`] is a checkpoint. Small quick writes (logs) are not looked at. It begins with
//! the burst of copies to the host that leads to it, if there was one, and ends with the last write or flush.

use std::collections::VecDeque;

use stallscope_attribution::time::Window;

/// Bytes that make a cluster of writes a checkpoint.
pub(super) const LEAST_BYTES: u64 = 4 << 20;
/// Time in writes and flushes that makes a cluster a checkpoint, ns.
pub(super) const LEAST_NS: u64 = 100_000_000;

/// Writes closer than this belong together, ns.
const JOIN_NS: u64 = 250_000_000;
/// A write below both is a log line.
const SMALL_BYTES: u64 = 64 << 10;
const SMALL_NS: u64 = 10_000_000;
/// Copies to the host of at least this many bytes can lead to a checkpoint.
const BURST_BYTES: u64 = 1 << 20;
/// How long before the first write the burst may end, ns.
const BURST_LEAD_NS: u64 = 1_000_000_000;
const MOST_CLUSTERS: usize = 64;

#[derive(Debug, Clone, Copy)]
struct Cluster {
    start_ns: u64,
    end_ns: u64,
    bytes: u64,
    busy_ns: u64,
    /// All by the launching thread?
    tid: Option<u32>,
}

/// A recognised checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CheckpointSpan {
    /// From the burst to the last flush.
    pub(super) window: Window,
    /// The only thread that wrote; `None` if there were several.
    pub(super) tid: Option<u32>,
}

/// Recognition for one process.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    clusters: VecDeque<Cluster>,
    /// The last chain of copies to the host: begin, end, bytes.
    burst: Option<(u64, u64, u64)>,
}

impl Checkpoints {
    /// A copy to the host.
    pub(super) fn copied_to_host(&mut self, bytes: u64, call: Window) {
        self.burst = match self.burst {
            Some((start_ns, end_ns, sum)) if call.start_ns() <= end_ns.saturating_add(JOIN_NS) => Some((
                start_ns.min(call.start_ns()),
                end_ns.max(call.end_ns()),
                sum.saturating_add(bytes),
            )),
            _ => Some((call.start_ns(), call.end_ns(), bytes)),
        };
    }

    /// A write or flush by a thread of the process.
    pub(super) fn wrote(&mut self, tid: u32, bytes: u64, call: Window) {
        if bytes < SMALL_BYTES && call.len_ns() < SMALL_NS {
            return;
        }
        if let Some(last) = self.clusters.back_mut()
            && call.start_ns() <= last.end_ns.saturating_add(JOIN_NS)
        {
            last.start_ns = last.start_ns.min(call.start_ns());
            last.end_ns = last.end_ns.max(call.end_ns());
            last.bytes = last.bytes.saturating_add(bytes);
            last.busy_ns = last.busy_ns.saturating_add(call.len_ns());
            last.tid = last.tid.filter(|only| *only == tid);
            return;
        }
        let start_ns = match self.burst {
            Some((start_ns, end_ns, sum))
                if sum >= BURST_BYTES && end_ns.saturating_add(BURST_LEAD_NS) >= call.start_ns() =>
            {
                start_ns.min(call.start_ns())
            }
            _ => call.start_ns(),
        };
        if self.clusters.len() == MOST_CLUSTERS {
            self.clusters.pop_front();
        }
        self.clusters.push_back(Cluster {
            start_ns,
            end_ns: call.end_ns(),
            bytes,
            busy_ns: call.len_ns(),
            tid: Some(tid),
        });
    }

    /// Checkpoints within the window, clipped to it.
    pub(super) fn within(&self, window: Window) -> impl Iterator<Item = CheckpointSpan> + '_ {
        self.clusters.iter().filter_map(move |cluster| {
            if cluster.bytes < LEAST_BYTES && cluster.busy_ns < LEAST_NS {
                return None;
            }
            let window = Window::new(cluster.start_ns, cluster.end_ns)?.intersect(window)?;
            Some(CheckpointSpan {
                window,
                tid: cluster.tid,
            })
        })
    }

    /// Forgets what ended before `before_ns`.
    pub(super) fn prune(&mut self, before_ns: u64) {
        while self
            .clusters
            .front()
            .is_some_and(|cluster| cluster.end_ns.saturating_add(JOIN_NS) <= before_ns)
        {
            self.clusters.pop_front();
        }
    }
}
