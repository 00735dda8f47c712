//! The state of one virtual GPU, a file `gpu<N>` in the node's folder.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use crate::activity::{Activity, BUCKET_NS, CLIENTS, Totals};
use crate::clock::now_ns;
use crate::map::{Shareable, Shared};
use crate::power::{MAX_MHZ, REFERENCE_MHZ};
use crate::{PPM, VNODE_ENV};

/// Device and vendor of an H100 SXM5 80GB in NVML's order.
pub const PCI_DEVICE_ID: u32 = 0x2330_10DE;
/// Board memory, bytes.
pub const MEMORY_BYTES: u64 = 85_520_809_984;
/// Streaming multiprocessors.
pub const SM_COUNT: u32 = 132;
/// Rate of a copy over PCIe 5 x16 from pinned memory, bytes/s per direction.
pub const PCIE_BYTES_PER_S: u64 = 55_000_000_000;
/// Lanes of the device and of its slot.
pub const PCIE_LANES: u32 = 16;

/// Clock-event reason bits, as NVML numbers them.
pub mod reason {
    /// Nothing runs.
    pub const IDLE: u64 = 0x1;
    /// The software power cap holds the clock down.
    pub const SW_POWER_CAP: u64 = 0x4;
    /// The hardware slowed the clock down.
    pub const HW_SLOWDOWN: u64 = 0x8;
    /// The driver keeps the temperature below its limit.
    pub const SW_THERMAL: u64 = 0x20;
    /// The hardware keeps the temperature below its limit.
    pub const HW_THERMAL: u64 = 0x40;
}

/// A process on the GPU.
#[repr(C)]
#[derive(Debug)]
pub struct Client {
    /// Process id; 0 when the slot is free.
    pub pid: AtomicU32,
    spare: AtomicU32,
    /// Device memory held, bytes.
    pub memory_bytes: AtomicU64,
    /// Share of the GPU its kernels take from everyone else's, ppm, until `claimed_until_ns`.
    pub claim_ppm: AtomicU64,
    /// When its last such kernel ends.
    pub claimed_until_ns: AtomicU64,
}

/// Time a clock-event reason has held.
#[repr(C)]
#[derive(Debug)]
pub struct HeldBack {
    settled_ns: AtomicU64,
    since_ns: AtomicU64,
}

impl HeldBack {
    /// Starts or stops the count. Only the owner of the GPU calls this.
    pub fn set(&self, on: bool, now_ns: u64) {
        let since = self.since_ns.load(SeqCst);
        if on && since == 0 {
            self.since_ns.store(now_ns, SeqCst);
        } else if !on && since != 0 {
            self.since_ns.store(0, SeqCst);
            self.settled_ns.fetch_add(now_ns.saturating_sub(since), SeqCst);
        }
    }

    /// Nanoseconds held back up to `now_ns`.
    #[must_use]
    pub fn total_ns(&self, now_ns: u64) -> u64 {
        let since = self.since_ns.load(SeqCst);
        let running = if since == 0 {
            0
        } else {
            now_ns.saturating_sub(since)
        };
        self.settled_ns.load(SeqCst) + running
    }
}

/// Sums up to a moment that the ring may forget, kept by the GPU's owner.
#[repr(C)]
#[derive(Debug)]
struct Settled {
    /// Odd while the values change.
    version: AtomicU64,
    until_ns: AtomicU64,
    energy_uj: AtomicU64,
    to_device_bytes: AtomicU64,
    to_host_bytes: AtomicU64,
}

/// Everything about one GPU that several processes share.
#[repr(C)]
#[derive(Debug)]
pub struct Gpu {
    magic: AtomicU64,
    /// Index on the node.
    pub index: AtomicU32,
    /// PCI bus number.
    pub bus: AtomicU32,
    uuid: [AtomicU8; 64],
    /// SM clock now, MHz.
    pub sm_mhz: AtomicU32,
    /// Temperature, degrees Celsius.
    pub temperature_c: AtomicU32,
    /// Lanes of its PCIe link that were trained.
    pub pcie_lanes: AtomicU32,
    /// Clock-event reasons now; `reason::IDLE` is added by readers.
    pub reasons: AtomicU64,
    /// Held back by the driver's thermal control.
    pub sw_thermal: HeldBack,
    /// Held back by the hardware's thermal control.
    pub hw_thermal: HeldBack,
    /// Held back by the power cap.
    pub power_cap: HeldBack,
    settled: Settled,
    /// Processes.
    pub clients: [Client; CLIENTS],
    /// What it did.
    pub activity: Activity,
}

// SAFETY: `repr(C)` and atomics throughout.
unsafe impl Shareable for Gpu {}

const MAGIC: u64 = 0x3155_5047_4c41_5556;

impl Gpu {
    /// Path of GPU `index` in a node's folder.
    #[must_use]
    pub fn path(node: &Path, index: u32) -> PathBuf {
        node.join(format!("gpu{index}"))
    }

    /// Creates a cool, idle GPU at its reference clock.
    ///
    /// # Errors
    /// When its file cannot be made.
    pub fn create(node: &Path, index: u32, uuid: &str) -> io::Result<Shared<Self>> {
        let gpu = Shared::<Self>::create(&Self::path(node, index))?;
        gpu.index.store(index, Relaxed);
        gpu.bus.store(0x1b + index * 0x22, Relaxed);
        for (to, from) in gpu.uuid.iter().zip(uuid.bytes().take(63)) {
            to.store(from, Relaxed);
        }
        gpu.sm_mhz.store(REFERENCE_MHZ, Relaxed);
        gpu.temperature_c.store(58, Relaxed);
        gpu.pcie_lanes.store(PCIE_LANES, Relaxed);
        gpu.settled.until_ns.store(whole_buckets(now_ns()), Relaxed);
        gpu.magic.store(MAGIC, SeqCst);
        Ok(gpu)
    }

    /// Opens GPU `index` of the node named by the environment.
    ///
    /// # Errors
    /// When the environment names no node, or the node has no such GPU.
    pub fn open(index: u32) -> io::Result<Shared<Self>> {
        let node =
            std::env::var_os(VNODE_ENV).ok_or_else(|| io::Error::other("STALLSCOPE_VNODE is not set"))?;
        Self::open_in(Path::new(&node), index)
    }

    /// Opens GPU `index` in a node's folder.
    ///
    /// # Errors
    /// When the node has no such GPU.
    pub fn open_in(node: &Path, index: u32) -> io::Result<Shared<Self>> {
        let gpu = Shared::<Self>::open(&Self::path(node, index))?;
        if gpu.magic.load(SeqCst) != MAGIC {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "not the state of a virtual GPU",
            ));
        }
        Ok(gpu)
    }

    /// Number of GPUs of the node named by the environment.
    #[must_use]
    pub fn count() -> u32 {
        let Some(node) = std::env::var_os(VNODE_ENV) else {
            return 0;
        };
        (0..)
            .take_while(|index| Self::path(Path::new(&node), *index).exists())
            .count() as u32
    }

    /// UUID in NVML's form.
    #[must_use]
    pub fn uuid(&self) -> String {
        self.uuid
            .iter()
            .map(|byte| byte.load(Relaxed))
            .take_while(|byte| *byte != 0)
            .map(char::from)
            .collect()
    }

    /// PCI address as the kernel writes it, `0000:1b:00.0`.
    #[must_use]
    pub fn pci_address(&self) -> String {
        format!("0000:{:02x}:00.0", self.bus.load(Relaxed))
    }

    /// Takes a slot of the client table for `pid`; slots of dead processes are reused.
    pub fn register(&self, pid: u32) -> Option<usize> {
        if let Some(slot) = self
            .clients
            .iter()
            .position(|client| client.pid.load(SeqCst) == pid)
        {
            return Some(slot);
        }
        self.clients.iter().position(|client| {
            let holder = client.pid.load(SeqCst);
            if holder != 0 && alive(holder) {
                return false;
            }
            let taken = client.pid.compare_exchange(holder, pid, SeqCst, SeqCst).is_ok();
            if taken {
                client.memory_bytes.store(0, SeqCst);
                client.claim_ppm.store(0, SeqCst);
                client.claimed_until_ns.store(0, SeqCst);
            }
            taken
        })
    }

    /// Gives a slot back.
    pub fn unregister(&self, slot: usize) {
        if let Some(client) = self.clients.get(slot) {
            client.claimed_until_ns.store(0, SeqCst);
            client.memory_bytes.store(0, SeqCst);
            client.pid.store(0, SeqCst);
        }
    }

    /// Share of the GPU that processes other than `slot` hold at `at_ns`, ppm, at most 90 %.
    #[must_use]
    pub fn foreign_ppm(&self, slot: usize, at_ns: u64) -> u64 {
        let held = self.clients.iter().enumerate().filter(|(other, client)| {
            *other != slot && client.pid.load(Relaxed) != 0 && client.claimed_until_ns.load(Relaxed) > at_ns
        });
        held.map(|(_, client)| client.claim_ppm.load(Relaxed))
            .sum::<u64>()
            .min(PPM * 9 / 10)
    }

    /// Live processes: slot and process id.
    #[must_use]
    pub fn processes(&self) -> Vec<(usize, u32)> {
        let pids = self
            .clients
            .iter()
            .map(|client| client.pid.load(SeqCst))
            .enumerate();
        pids.filter(|(_, pid)| *pid != 0 && alive(*pid)).collect()
    }

    /// Device memory in use, bytes.
    #[must_use]
    pub fn memory_used_bytes(&self) -> u64 {
        self.processes()
            .iter()
            .map(|(slot, _)| self.clients[*slot].memory_bytes.load(Relaxed))
            .sum()
    }

    /// Highest SM clock, MHz.
    #[must_use]
    pub fn max_mhz(&self) -> u32 {
        MAX_MHZ
    }

    /// Moves sums out of the ring before it forgets them. Only the owner of the GPU calls this, at least every ten
    /// seconds.
    pub fn settle(&self, now_ns: u64) {
        let settled = &self.settled;
        let until = settled.until_ns.load(SeqCst);
        // Leave the last 50 ms: a collective's activity may still be added there.
        let to = whole_buckets(now_ns.saturating_sub(50_000_000));
        if to <= until {
            return;
        }
        let totals = self.activity.integrate(until, to);
        settled.version.fetch_add(1, SeqCst);
        settled.energy_uj.fetch_add(totals.energy_uj, SeqCst);
        settled.to_device_bytes.fetch_add(totals.to_device_bytes, SeqCst);
        settled.to_host_bytes.fetch_add(totals.to_host_bytes, SeqCst);
        settled.until_ns.store(to, SeqCst);
        settled.version.fetch_add(1, SeqCst);
    }

    /// Sums since the GPU was made: energy and bytes are meaningful, shares are not.
    #[must_use]
    pub fn since_boot(&self, now_ns: u64) -> Totals {
        let settled = &self.settled;
        loop {
            let version = settled.version.load(SeqCst);
            let (until, energy) = (settled.until_ns.load(SeqCst), settled.energy_uj.load(SeqCst));
            let bytes = (
                settled.to_device_bytes.load(SeqCst),
                settled.to_host_bytes.load(SeqCst),
            );
            if version % 2 == 1 || settled.version.load(SeqCst) != version {
                std::thread::yield_now();
                continue;
            }
            let mut totals = self.activity.integrate(until, now_ns.max(until));
            totals.energy_uj += energy;
            totals.to_device_bytes += bytes.0;
            totals.to_host_bytes += bytes.1;
            return totals;
        }
    }
}

/// The last bucket edge, so that no bucket is shared out by time and rounded.
fn whole_buckets(at_ns: u64) -> u64 {
    at_ns / BUCKET_NS * BUCKET_NS
}

fn alive(pid: u32) -> bool {
    let Ok(pid) = i32::try_from(pid) else { return false };
    // SAFETY: signal 0 only asks whether the process exists.
    unsafe { libc::kill(pid, 0) == 0 || *libc::__errno_location() == libc::EPERM }
}
