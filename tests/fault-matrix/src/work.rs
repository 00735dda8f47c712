//! What one rank does in one step, in ns: the base job, and what each fault adds.

use crate::random::Random;
use crate::variant::{Dose, Fault, GPUS, RANKS, Variant, drawn};

/// One millisecond in ns.
pub const MS: u64 = 1_000_000;

/// Clock at which the device's peak holds, MHz: an H100 SXM.
pub const REFERENCE_MHZ: u64 = 1830;

/// One rank's own part of a step, ns unless named otherwise. What waits for others is not in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Before the first kernel, the GPU drained: waiting for a batch that workers compute.
    pub loader: u64,
    /// Waiting for a batch that workers read.
    pub storage: u64,
    /// Waiting for nothing known.
    pub unknown: u64,
    /// Collecting garbage.
    pub gc: u64,
    /// In the driver's allocator.
    pub alloc: u64,
    /// Wanting a CPU.
    pub sched: u64,
    /// Issuing the step's first work.
    pub start: u64,
    /// Attaching a profiler.
    pub attach: u64,
    /// The model's arithmetic at the peak.
    pub ideal: u64,
    /// What no GEMM reaches of the peak.
    pub platform: u64,
    /// The kernels' own inefficiency; below zero they beat the calibration.
    pub kernel: i64,
    /// Kernels slowed by communication beside them.
    pub overlap: u64,
    /// Kernels without tensor cores.
    pub nonmatmul: u64,
    /// Slowed by the clock.
    pub clock: u64,
    /// Slowed by another process.
    pub foreign: u64,
    /// Idle between kernels, the host issuing.
    pub launch: u64,
    /// Idle between kernels, the next one queued behind another stream.
    pub dep: u64,
    /// Exposed copies at the link's rate.
    pub copy: u64,
    /// What a slow link adds to them.
    pub pcie: u64,
    /// What slow links between the node's GPUs add to its collectives, before other nodes are met.
    pub nvlink: u64,
    /// Exposed communication at the reference rate, once everyone arrived.
    pub transfer: u64,
    /// What a slow network adds, on every rank.
    pub net: u64,
    /// Facts beside the time.
    pub facts: Facts,
}

/// What devices and kernel would tell of a step, beside the time it took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Facts {
    /// SM clock, MHz.
    pub mhz: u64,
    /// Held back by heat.
    pub thermal: bool,
    /// Held back by the power limit.
    pub power: bool,
    /// SM share of another process, ppm.
    pub foreign_ppm: u64,
    /// Throttled by the quota, ns.
    pub throttled: u64,
    /// Loaders on CPU, ppm of one thread.
    pub worker_cpu_ppm: u64,
    /// Loaders blocked on storage, ppm of one thread.
    pub worker_io_ppm: u64,
    /// Kernels launched.
    pub launches: u64,
    /// Launching thread on CPU after the step's first work, ns.
    pub issue: u64,
    /// Time of all collectives, hidden or not, ns.
    pub comm: u64,
    /// Lanes of the host link in use, of 16.
    pub lanes: u32,
    /// NVLinks down.
    pub nvlinks_down: u32,
    /// Critical faults reported.
    pub faults: u32,
    /// Memory activity in compute, ppm.
    pub dram_ppm: u64,
}

/// Share of the base step's host link in exposed copies of scenario 2's job, ns.
const COPIES_OF_PCIE_JOB: u64 = 80 * MS;

/// A rank's step of the base job: 1000 ms at 45 % of the peak.
fn base(random: &mut Random, noise: u64) -> Work {
    // 794.5 of 989.4 TFLOP/s is the best any GEMM reaches here.
    let ideal = ideal(None);
    let platform = ideal * (9894 - 7945) / 7945;
    Work {
        unknown: 5 * MS,
        alloc: 10 * MS,
        sched: 10 * MS,
        start: random.around(45 * MS, 60),
        ideal,
        platform,
        kernel: i64::try_from(100 * MS).unwrap_or(0) - i64::try_from(platform).unwrap_or(0),
        overlap: 20 * MS,
        // The jitter of compute: the last of 32 ranks is about 20 ms later than the mean.
        nonmatmul: (130 - 21 * noise) * MS + random.below(42 * noise * MS),
        launch: 15 * MS,
        dep: 40 * MS,
        copy: 5 * MS,
        transfer: 150 * MS,
        facts: Facts {
            mhz: REFERENCE_MHZ,
            thermal: false,
            power: false,
            foreign_ppm: 0,
            throttled: 0,
            worker_cpu_ppm: random.around(800_000, 80),
            worker_io_ppm: random.around(60_000, 200),
            launches: 2_400,
            issue: random.around(200 * MS, 80),
            comm: 300 * MS,
            lanes: 16,
            nvlinks_down: 0,
            faults: 0,
            dram_ppm: 420_000,
        },
        ..Work::default()
    }
}

/// All ranks' work in one step.
#[must_use]
pub fn step(variant: &Variant, step: usize) -> Vec<Work> {
    let mut random = Random::new(variant.seed << 20 | step as u64);
    let victim = usize::try_from(random.below(RANKS as u64)).unwrap_or(0);
    (0..RANKS)
        .map(|rank| {
            let mut work = base(&mut random, variant.dose.noise());
            for injected in &variant.faults {
                prepare(&mut work, injected.fault, variant.dose);
                if injected.acts(step) {
                    hurt(
                        &mut work,
                        injected.fault,
                        variant.dose,
                        rank,
                        victim == rank,
                        &mut random,
                    );
                }
            }
            work
        })
        .collect()
}

/// What the scenario's job has at all times, healthy or not.
fn prepare(work: &mut Work, fault: Fault, dose: Dose) {
    if matches!(fault, Fault::HalfPcie { .. }) {
        work.copy = dose.of(COPIES_OF_PCIE_JOB).max(work.copy);
    }
    if matches!(fault, Fault::LowTensor | Fault::MemoryBound | Fault::Decode) {
        let lost = work.ideal - ideal(Some(fault));
        work.ideal -= lost;
        let platform = work.ideal * (9894 - 7945) / 7945;
        let less = work.platform - platform;
        work.platform = platform;
        if fault == Fault::LowTensor {
            work.kernel += i64::try_from(lost + less).unwrap_or(0);
        } else {
            work.nonmatmul += lost + less;
            work.facts.dram_ppm = 860_000;
        }
    }
}

/// The model's arithmetic of a step at the peak, ns.
#[must_use]
pub const fn ideal(fault: Option<Fault>) -> u64 {
    match fault {
        Some(Fault::LowTensor | Fault::MemoryBound | Fault::Decode) => 110 * MS,
        _ => 450 * MS,
    }
}

fn hurt(work: &mut Work, fault: Fault, dose: Dose, rank: usize, victim: bool, random: &mut Random) {
    let ms = |loud: u64| dose.of(loud * MS);
    match fault {
        Fault::SlowNic { .. } => {
            work.net += ms(300);
            work.facts.comm += ms(300);
        }
        Fault::HalfPcie { rank: hit } if hit == rank => {
            work.pcie += dose.of(COPIES_OF_PCIE_JOB);
            work.facts.lanes = 8;
        }
        Fault::Thermal { rank: hit } if hit == rank => slow_clock(work, ms(190), true),
        Fault::Loader => {
            work.loader += random.around(ms(200), 30);
            work.facts.worker_cpu_ppm = 7_600_000;
        }
        Fault::LaunchBound => {
            work.launch += random.around(ms(400), 10);
            work.facts.issue += ms(450);
            work.facts.launches *= 10;
        }
        Fault::CoTenant { rank: hit } if hit == rank => {
            work.foreign += ms(150);
            let compute = 700 * MS;
            work.facts.foreign_ppm = ms(150) * 1_000_000 / (compute + ms(150));
        }
        Fault::GcPause if victim => work.gc += ms(300),
        Fault::NvlinkDown { node } if rank / GPUS == node => {
            work.nvlink += ms(90);
            work.facts.nvlinks_down = u32::try_from(dose.of(18)).unwrap_or(1);
        }
        Fault::ColdStorage => {
            work.storage += random.around(ms(150), 50);
            // Eight workers: while they wait for storage they do not compute.
            work.facts.worker_io_ppm = 3_400_000;
            work.facts.worker_cpu_ppm = if work.loader > 0 { 4_500_000 } else { 400_000 };
        }
        Fault::CpuQuota { node } if rank / GPUS == node => {
            work.sched += random.around(ms(180), 20);
            work.facts.throttled += ms(190);
        }
        Fault::Stage { interleaved } if of_stage(rank, interleaved) => work.nonmatmul += ms(200),
        Fault::PowerCap { rank: hit } if hit == rank => slow_clock(work, ms(190), false),
        Fault::Xid { rank: hit } if hit == rank => {
            work.kernel += i64::try_from(ms(150)).unwrap_or(0);
            work.facts.faults = 1;
        }
        Fault::Copies => work.copy += ms(150),
        Fault::Fabric | Fault::LineDown { .. } => {
            work.net += ms(300);
            work.facts.comm += ms(300);
        }
        Fault::WrongAlgorithm => {
            work.net += ms(120);
            work.facts.comm += ms(240);
        }
        Fault::UnevenSequences => work.nonmatmul += random.below(ms(160)),
        Fault::HiddenSlowComm => work.facts.comm += ms(100),
        Fault::PowerCapAll => slow_clock(work, ms(30), false),
        Fault::ProfilerAttach => work.attach += ms(4_000),
        _ => {}
    }
}

/// Whether a rank belongs to the pipeline stage with more work: the last of four.
#[must_use]
pub const fn of_stage(rank: usize, interleaved: bool) -> bool {
    if interleaved {
        rank % 4 == 3
    } else {
        rank / GPUS == 3
    }
}

/// Tensor work of 570 ms takes `more` at a lower clock.
fn slow_clock(work: &mut Work, more: u64, thermal: bool) {
    let scaling = 570 * MS;
    work.clock += more;
    work.facts.mhz = REFERENCE_MHZ * scaling / (scaling + more);
    (work.facts.thermal, work.facts.power) = (thermal, !thermal);
}

/// The checkpoint's length before a step, ns; 0 without one.
#[must_use]
pub fn checkpoint(variant: &Variant, step: usize) -> u64 {
    let writes = variant
        .faults
        .iter()
        .any(|injected| injected.fault == Fault::Checkpoint && injected.acts(step) && step % 50 == 49);
    if writes { variant.dose.of(12_000 * MS) } else { 0 }
}

impl Work {
    /// From the start of the step until the GPU has its first kernel.
    #[must_use]
    pub const fn gap(&self) -> u64 {
        self.loader
            + self.storage
            + self.unknown
            + self.gc
            + self.alloc
            + self.attach
            + self.sched
            + self.start
    }

    /// Time in compute kernels.
    #[must_use]
    pub fn compute(&self) -> u64 {
        let fixed = self.ideal + self.platform + self.overlap + self.nonmatmul + self.clock + self.foreign;
        fixed.saturating_add_signed(self.kernel)
    }

    /// From the start of the step until the rank has arrived at what all ranks do together.
    #[must_use]
    pub fn arrival(&self) -> u64 {
        self.gap() + self.compute() + self.launch + self.dep + self.copy + self.pcie + self.nvlink
    }
}

/// A rank's place in tables: node and GPU.
#[must_use]
pub const fn node_of(rank: usize) -> usize {
    rank / GPUS
}

/// Seeds of noise that does not belong to a step.
#[must_use]
pub fn noise_of(variant: &Variant, rank: usize) -> u64 {
    (variant.seed << 32) ^ (drawn(variant.seed, 0, 1 << 20) as u64) << 8 ^ rank as u64
}
