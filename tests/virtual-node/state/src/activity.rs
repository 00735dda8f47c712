//! What the GPU did, millisecond by millisecond, over the last sixteen seconds.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use crate::PPM;
use crate::power::IDLE_MW;

/// Length of a bucket, ns.
pub const BUCKET_NS: u64 = 1_000_000;
/// Buckets in the ring; the ring forgets after this many milliseconds.
pub const BUCKETS: usize = 16_384;
/// Processes told apart on one GPU.
pub const CLIENTS: usize = 8;

/// A bucket is split into this many slots to find the union of overlapping kernels.
const SLOTS: u64 = 128;

#[repr(C)]
#[derive(Debug)]
struct Bucket {
    /// Twice (millisecond index + 1); odd while the bucket is being cleared for a new millisecond.
    tag: AtomicU64,
    busy: [AtomicU64; 2],
    sm_ns: AtomicU32,
    occupancy_ns: AtomicU32,
    tensor_ns: AtomicU32,
    dram_ns: AtomicU32,
    energy_uj: AtomicU32,
    to_device_bytes: AtomicU32,
    to_host_bytes: AtomicU32,
    spare: AtomicU32,
    client_sm_ns: [AtomicU32; CLIENTS],
}

/// Ring of buckets; any process may add, any may read.
#[repr(C)]
#[derive(Debug)]
pub struct Activity {
    ring: [Bucket; BUCKETS],
}

/// What something on the GPU uses while it runs; shares in ppm of the whole GPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct Load {
    /// A kernel is resident (copies alone leave the GPU's engines idle).
    pub resident: bool,
    /// SMs in use.
    pub sm_ppm: u64,
    /// Warp slots in use.
    pub occupancy_ppm: u64,
    /// Tensor pipe.
    pub tensor_ppm: u64,
    /// Device memory.
    pub dram_ppm: u64,
    /// Power above idle, milliwatts.
    pub power_mw: u64,
    /// Bytes moved to the device in the whole interval.
    pub to_device_bytes: u64,
    /// Bytes moved to the host in the whole interval.
    pub to_host_bytes: u64,
    /// Slot of the process in the client table.
    pub client: usize,
}

/// Sums over a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Length of the window, ns.
    pub window_ns: u64,
    /// Time with a resident kernel, ns.
    pub busy_ns: u64,
    /// SM share times time, ns.
    pub sm_ns: u64,
    /// Occupancy times time, ns.
    pub occupancy_ns: u64,
    /// Tensor activity times time, ns.
    pub tensor_ns: u64,
    /// Memory activity times time, ns.
    pub dram_ns: u64,
    /// Energy, idle draw included, microjoules.
    pub energy_uj: u64,
    /// Bytes to the device.
    pub to_device_bytes: u64,
    /// Bytes to the host.
    pub to_host_bytes: u64,
    /// SM share times time by client, ns.
    pub client_sm_ns: [u64; CLIENTS],
}

impl Bucket {
    /// Makes the bucket stand for `millisecond`; false when it already stands for a later one.
    fn claim(&self, millisecond: u64) -> bool {
        let want = (millisecond + 1) * 2;
        for _ in 0..10_000 {
            let tag = self.tag.load(SeqCst);
            if tag == want {
                return true;
            }
            if tag & !1 > want {
                return false;
            }
            if tag & 1 == 1 {
                std::thread::yield_now();
                continue;
            }
            if self.tag.compare_exchange(tag, want | 1, SeqCst, SeqCst).is_ok() {
                self.clear();
                self.tag.store(want, SeqCst);
                return true;
            }
        }
        // Whoever was clearing the bucket died: take over.
        self.clear();
        self.tag.store(want, SeqCst);
        true
    }

    fn clear(&self) {
        for word in &self.busy {
            word.store(0, Relaxed);
        }
        let sums = [
            &self.sm_ns,
            &self.occupancy_ns,
            &self.tensor_ns,
            &self.dram_ns,
            &self.energy_uj,
        ];
        for word in sums
            .into_iter()
            .chain([&self.to_device_bytes, &self.to_host_bytes])
            .chain(&self.client_sm_ns)
        {
            word.store(0, Relaxed);
        }
    }

    fn add(&self, from: u64, to: u64, load: &Load, bytes: (u64, u64)) {
        let ns = to - from;
        let add = |word: &AtomicU32, amount: u64| {
            if amount > 0 {
                word.fetch_add(u32::try_from(amount).unwrap_or(u32::MAX), Relaxed);
            }
        };
        if load.resident {
            let mask = slots_below(to) & !slots_below(from);
            self.busy[0].fetch_or(mask as u64, Relaxed);
            self.busy[1].fetch_or((mask >> 64) as u64, Relaxed);
        }
        add(&self.sm_ns, load.sm_ppm * ns / PPM);
        add(&self.occupancy_ns, load.occupancy_ppm * ns / PPM);
        add(&self.tensor_ns, load.tensor_ppm * ns / PPM);
        add(&self.dram_ns, load.dram_ppm * ns / PPM);
        add(&self.energy_uj, load.power_mw * ns / PPM);
        add(&self.to_device_bytes, bytes.0);
        add(&self.to_host_bytes, bytes.1);
        if let Some(client) = self.client_sm_ns.get(load.client) {
            add(client, load.sm_ppm * ns / PPM);
        }
    }

    fn busy_ns(&self) -> u64 {
        let set: u32 = self.busy.iter().map(|word| word.load(Relaxed).count_ones()).sum();
        u64::from(set) * BUCKET_NS / SLOTS
    }
}

/// Mask of the slots whose middle lies before `at_ns` of the bucket.
fn slots_below(at_ns: u64) -> u128 {
    let count = ((at_ns * 2 * SLOTS + BUCKET_NS) / (2 * BUCKET_NS)).min(SLOTS);
    if count == SLOTS {
        u128::MAX
    } else {
        (1 << count) - 1
    }
}

impl Activity {
    fn bucket(&self, millisecond: u64) -> &Bucket {
        &self.ring[usize::try_from(millisecond % BUCKETS as u64).unwrap_or(0)]
    }

    /// Adds an interval of activity. It may lie in the near future: readers look no further than now.
    pub fn add(&self, start_ns: u64, end_ns: u64, load: &Load) {
        let start_ns = start_ns.max(end_ns.saturating_sub((BUCKETS as u64 / 2) * BUCKET_NS));
        let whole = end_ns.saturating_sub(start_ns);
        if whole == 0 {
            return;
        }
        let part =
            |bytes: u64, done: u64| u64::try_from(u128::from(bytes) * u128::from(done) / u128::from(whole));
        let (mut at, mut given) = (start_ns, (0, 0));
        while at < end_ns {
            let millisecond = at / BUCKET_NS;
            let stop = ((millisecond + 1) * BUCKET_NS).min(end_ns);
            let due = (
                part(load.to_device_bytes, stop - start_ns).unwrap_or(0),
                part(load.to_host_bytes, stop - start_ns).unwrap_or(0),
            );
            let bucket = self.bucket(millisecond);
            if bucket.claim(millisecond) {
                let base = millisecond * BUCKET_NS;
                bucket.add(at - base, stop - base, load, (due.0 - given.0, due.1 - given.1));
            }
            (at, given) = (stop, due);
        }
    }

    /// Sums activity over a window; what the ring has forgotten counts as idle.
    #[must_use]
    pub fn integrate(&self, from_ns: u64, to_ns: u64) -> Totals {
        let mut totals = Totals {
            window_ns: to_ns.saturating_sub(from_ns),
            ..Totals::default()
        };
        let oldest = to_ns.saturating_sub((BUCKETS as u64 - 64) * BUCKET_NS);
        let mut at = from_ns.max(oldest);
        while at < to_ns {
            let millisecond = at / BUCKET_NS;
            let stop = ((millisecond + 1) * BUCKET_NS).min(to_ns);
            let bucket = self.bucket(millisecond);
            if bucket.tag.load(SeqCst) == (millisecond + 1) * 2 {
                totals.take(bucket, stop - at);
            }
            at = stop;
        }
        totals.energy_uj += totals.window_ns * IDLE_MW / PPM;
        totals
    }
}

impl Totals {
    fn take(&mut self, bucket: &Bucket, ns: u64) {
        let share = |word: u64| word * ns / BUCKET_NS;
        let level = |word: &AtomicU32| share(u64::from(word.load(Relaxed)).min(BUCKET_NS));
        let amount = |word: &AtomicU32| share(u64::from(word.load(Relaxed)));
        self.busy_ns += share(bucket.busy_ns());
        self.sm_ns += level(&bucket.sm_ns);
        self.occupancy_ns += level(&bucket.occupancy_ns);
        self.tensor_ns += level(&bucket.tensor_ns);
        self.dram_ns += level(&bucket.dram_ns);
        self.energy_uj += amount(&bucket.energy_uj);
        self.to_device_bytes += amount(&bucket.to_device_bytes);
        self.to_host_bytes += amount(&bucket.to_host_bytes);
        for (total, word) in self.client_sm_ns.iter_mut().zip(&bucket.client_sm_ns) {
            *total += level(word);
        }
    }

    /// `part` of the window in ppm.
    #[must_use]
    pub fn ppm(&self, part_ns: u64) -> u64 {
        (part_ns * PPM).checked_div(self.window_ns).unwrap_or(0).min(PPM)
    }

    /// Mean power over the window, milliwatts.
    #[must_use]
    pub fn mean_mw(&self) -> u64 {
        (self.energy_uj * PPM)
            .checked_div(self.window_ns)
            .unwrap_or(IDLE_MW)
    }
}
