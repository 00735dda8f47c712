//! A synchronous data-parallel job made from its causes, independent of the code under test.
//!
//! Each rank's GPU is a list of segments (idle, compute, communication) in microseconds; collectives end together
//! on all ranks, so whoever is late makes the others communicate longer. Device averages are taken on a 100 ms grid
//! with a phase of its own per GPU and blur over step edges, as real ones do. The truth is what was put in.
#![expect(clippy::unwrap_used, reason = "tests")]

mod observed;

use stallscope_attribution::facts::JobFacts;

use observed::{history, port_windows};

/// SplitMix64.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x1234_5678)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `0..below`.
    pub(crate) fn below(&mut self, below: u64) -> u64 {
        if below == 0 { 0 } else { self.next() % below }
    }

    /// `value` with up to `permille` of itself more or less.
    fn around(&mut self, value: u64, permille: u64) -> u64 {
        let spread = value * permille / 1000;
        value - spread + self.below(2 * spread + 1)
    }

    /// Mostly small, now and then four times the mean: a busy host's delays.
    fn delay(&mut self, mean: u64) -> u64 {
        let short = self.below(mean + 1);
        if self.below(10) == 0 {
            short + 4 * mean
        } else {
            short
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fault {
    None,
    LoaderCpu,
    Storage,
    Launch,
    CpuQuota {
        rank: usize,
    },
    SlowLink {
        node: usize,
    },
    Thermal {
        rank: usize,
    },
    CoTenant {
        rank: usize,
    },
    /// Every rank writes.
    Checkpoint,
    /// Rank 0 writes, the others wait in their next collective.
    CheckpointByFirst,
    MovingGc,
    Imbalance {
        rank: usize,
    },
    /// The whole node's launch threads are starved.
    NodeCpu {
        node: usize,
    },
    /// All clocks at 0.95.
    PowerCapAll,
    /// Another rank has more work in every step.
    UnevenData,
}

/// A job to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scenario {
    pub(crate) nodes: usize,
    pub(crate) gpus: usize,
    pub(crate) steps: usize,
    /// First and last faulty step.
    pub(crate) active: (usize, usize),
    pub(crate) fault: Fault,
    /// A second fault at the same time.
    pub(crate) beside: Fault,
    /// Dose in percent of the loud one.
    pub(crate) dose: u64,
    pub(crate) seed: u64,
    /// Mean of the host's random delays, us.
    pub(crate) host_noise_us: u64,
    /// The job without the fault.
    pub(crate) shape: Shape,
}

/// An undisturbed step, us.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) wait_us: u64,
    pub(crate) start_us: u64,
    pub(crate) compute_us: u64,
    pub(crate) comm_us: u64,
    pub(crate) issue_us: u64,
    pub(crate) launches: u64,
    /// SM share of a collective's kernel, ppm.
    pub(crate) comm_sm_ppm: u64,
    pub(crate) worker_cpu_ppm: u64,
}

/// Three quarters compute, a seventh exposed communication.
pub(crate) const USUAL: Shape = Shape {
    wait_us: 8_000,
    start_us: 10_000,
    compute_us: 270_000,
    comm_us: 50_000,
    issue_us: 70_000,
    launches: 1200,
    comm_sm_ppm: 160_000,
    worker_cpu_ppm: 600_000,
};

/// Hardly anything but compute; few and long kernels.
pub(crate) const LEAN: Shape = Shape {
    wait_us: 600,
    start_us: 2_500,
    compute_us: 330_000,
    comm_us: 8_000,
    issue_us: 5_000,
    launches: 190,
    comm_sm_ppm: 121_212,
    worker_cpu_ppm: 90_000,
};

impl Scenario {
    pub(crate) fn new(fault: Fault) -> Self {
        Self {
            nodes: 2,
            gpus: 2,
            steps: 100,
            active: (30, 100),
            fault,
            beside: Fault::None,
            dose: 100,
            seed: 1,
            host_noise_us: 3000,
            shape: USUAL,
        }
    }
}

#[derive(Debug, Clone, Copy)]
struct Segment {
    end_us: u64,
    busy: bool,
    sm_ppm: u64,
    tensor_ppm: u64,
}

/// What one rank does in one step before the others matter, us.
#[derive(Debug, Clone, Copy, Default)]
struct Plan {
    wait_us: u64,
    gc_us: u64,
    runnable_us: u64,
    start_us: u64,
    compute_us: u64,
    /// Idle time spread over compute.
    starved_us: u64,
    /// Of the launching thread's time beside compute: on CPU and runnable; the rest is in sync.
    issue_us: u64,
    issue_runnable_us: u64,
    launches: u64,
    worker_cpu_ppm: u64,
    worker_io_ppm: u64,
    throttled_us: u64,
    mhz: u32,
    thermal: bool,
    power: bool,
    foreign_ppm: u64,
}

struct Rank {
    now_us: u64,
    segments: Vec<Segment>,
    steps: Vec<(Plan, StepTimes)>,
    /// Checkpoint before the step of that index: start and end.
    spans: Vec<(usize, u64, u64)>,
}

#[derive(Debug, Clone, Copy)]
struct StepTimes {
    start_us: u64,
    end_us: u64,
}

/// What was made.
pub(crate) struct Made {
    pub(crate) facts: JobFacts,
    /// Share of GPU time the fault costs while it is active, ppm.
    pub(crate) cost_ppm: u64,
}

/// Makes the job.
pub(crate) fn make(scenario: &Scenario) -> Made {
    let count = scenario.nodes * scenario.gpus;
    let mut random = Random::new(scenario.seed);
    let mut ranks: Vec<Rank> = (0..count)
        .map(|_| Rank {
            now_us: 0,
            segments: Vec::new(),
            steps: Vec::new(),
            spans: Vec::new(),
        })
        .collect();
    let mut ports = Vec::new();
    let (mut healthy_us, mut actual_us) = (0, 0);
    for step in 0..scenario.steps {
        let on = step >= scenario.active.0 && step < scenario.active.1;
        let faults = if on {
            [scenario.fault, scenario.beside]
        } else {
            [Fault::None; 2]
        };
        let began = ranks[0].now_us;
        faults
            .iter()
            .for_each(|fault| checkpoint(scenario, *fault, step, &mut ranks));
        let victim = usize::try_from(random.below(count as u64)).unwrap();
        let plans: Vec<(Plan, Plan)> = (0..count)
            .map(|rank| {
                let base = base(&mut random, scenario);
                let hurt = faults.iter().fold(base, |plan, fault| {
                    hurt(plan, *fault, scenario, rank, victim, &mut random)
                });
                (base, hurt)
            })
            .collect();
        let mut comm_us = random.around(scenario.shape.comm_us, 80);
        let normal_comm_us = comm_us;
        comm_us += faults
            .iter()
            .map(|fault| match fault {
                Fault::SlowLink { .. } => 3_000,
                // Starved communication threads and full CPUs slow everyone's collectives.
                Fault::CpuQuota { .. } => 600,
                Fault::LoaderCpu | Fault::Launch => 300,
                _ => 0,
            })
            .sum::<u64>()
            * scenario.dose
            / 2;
        let ready = |plan: &Plan| {
            plan.wait_us + plan.gc_us + plan.runnable_us + plan.start_us + plan.compute_us + plan.starved_us
        };
        let starts: Vec<u64> = ranks.iter().map(|rank| rank.now_us).collect();
        let last = plans
            .iter()
            .zip(&starts)
            .map(|((_, plan), start)| start + ready(plan))
            .max()
            .unwrap();
        let end = last + comm_us;
        if on {
            healthy_us += plans.iter().map(|(base, _)| ready(base)).max().unwrap() + normal_comm_us;
            actual_us += end - began;
        }
        ports.extend(port_windows(scenario, &faults, began, end, comm_us));
        for (rank, (_, plan)) in ranks.iter_mut().zip(plans) {
            run(rank, plan, end, &scenario.shape);
        }
    }
    let facts = JobFacts {
        job: "train".into(),
        kind: "pretrain".into(),
        gpus: ranks
            .iter()
            .enumerate()
            .map(|(at, rank)| history(scenario, at, rank))
            .collect(),
        ports,
        hardware: Vec::new(),
        gaps: Vec::new(),
    };
    let lost_us = actual_us.saturating_sub(healthy_us);
    let cost_ppm = (lost_us * 1_000_000).checked_div(actual_us).unwrap_or(0);
    Made { facts, cost_ppm }
}

fn base(random: &mut Random, scenario: &Scenario) -> Plan {
    let (shape, noise_us) = (scenario.shape, scenario.host_noise_us);
    Plan {
        wait_us: random.around(shape.wait_us, 300),
        runnable_us: random.delay(noise_us),
        start_us: random.around(shape.start_us, 200),
        compute_us: random.around(shape.compute_us, 15),
        issue_us: random.around(shape.issue_us, 100),
        issue_runnable_us: random.delay(noise_us),
        launches: shape.launches,
        worker_cpu_ppm: random.around(shape.worker_cpu_ppm, 100),
        worker_io_ppm: random.around(60_000, 300),
        mhz: 1830,
        ..Plan::default()
    }
}

/// The plan with the fault in it; `victim` is the rank drawn for faults that move.
fn hurt(
    plan: Plan,
    fault: Fault,
    scenario: &Scenario,
    rank: usize,
    victim: usize,
    random: &mut Random,
) -> Plan {
    let dose = |us: u64| us * scenario.dose / 100;
    let mut plan = plan;
    match fault {
        Fault::LoaderCpu => {
            plan.wait_us += random.around(dose(150_000), 100);
            // Workers that burn every core delay the launching threads too.
            plan.runnable_us += random.delay(dose(12_000));
            plan.issue_runnable_us += random.delay(dose(20_000));
            plan.worker_cpu_ppm = 1_900_000;
        }
        Fault::Storage => {
            plan.wait_us += random.around(dose(140_000), 150);
            plan.worker_io_ppm += 1_500_000;
            plan.worker_cpu_ppm = 350_000;
        }
        Fault::Launch => {
            plan.starved_us += random.around(dose(180_000), 80);
            plan.issue_us += dose(150_000);
            plan.issue_runnable_us += random.around(dose(90_000), 200);
            plan.launches *= 8;
        }
        Fault::CpuQuota { rank: hit } if hit == rank => {
            plan.wait_us += dose(60_000);
            plan.runnable_us += random.around(dose(60_000), 300);
            plan.starved_us += dose(70_000);
            plan.issue_runnable_us += dose(80_000);
            plan.throttled_us = dose(260_000);
        }
        Fault::Thermal { rank: hit } if hit == rank => {
            let share = 1000 - 350 * scenario.dose / 100;
            plan.compute_us = plan.compute_us * 1000 / share;
            plan.mhz = u32::try_from(1830 * share / 1000).unwrap();
            plan.thermal = true;
        }
        Fault::CoTenant { rank: hit } if hit == rank => {
            plan.foreign_ppm = 350_000 * scenario.dose / 100;
            plan.compute_us = plan.compute_us * 1_000_000 / (1_000_000 - plan.foreign_ppm);
        }
        Fault::MovingGc if victim == rank => plan.gc_us += dose(110_000),
        Fault::Imbalance { rank: hit } if hit == rank => plan.compute_us += dose(120_000),
        Fault::NodeCpu { node } if rank / scenario.gpus == node => {
            plan.runnable_us += random.around(dose(120_000), 200);
        }
        Fault::PowerCapAll => {
            plan.mhz = 1738;
            plan.compute_us = plan.compute_us * 100 / 95;
            plan.power = true;
        }
        Fault::UnevenData if victim == rank => plan.compute_us += dose(40_000),
        _ => {}
    }
    plan
}

fn checkpoint(scenario: &Scenario, fault: Fault, step: usize, ranks: &mut [Rank]) {
    let writers = match fault {
        Fault::Checkpoint => ranks.len(),
        Fault::CheckpointByFirst => 1,
        _ => return,
    };
    if step % 12 != 5 {
        return;
    }
    let length_us = 1_600_000 * scenario.dose / 100;
    for rank in &mut ranks[..writers] {
        rank.spans.push((step, rank.now_us, rank.now_us + length_us));
        rank.now_us += length_us;
        rank.segments.push(Segment {
            end_us: rank.now_us,
            busy: false,
            sm_ppm: 0,
            tensor_ppm: 0,
        });
    }
}

fn run(rank: &mut Rank, plan: Plan, end_us: u64, shape: &Shape) {
    let start_us = rank.now_us;
    let foreign = plan.foreign_ppm;
    let mut push = |length_us: u64, busy: bool, sm_ppm: u64, tensor_ppm: u64| {
        rank.now_us += length_us;
        rank.segments.push(Segment {
            end_us: rank.now_us,
            busy: busy || foreign > 0,
            // A neighbour takes its share of wide kernels and comes on top of narrow ones.
            sm_ppm: if sm_ppm > 500_000 {
                sm_ppm * (1_000_000 - foreign) / 1_000_000
            } else {
                sm_ppm
            } + foreign,
            tensor_ppm,
        });
        rank.now_us
    };
    let mut now_us = push(
        plan.wait_us + plan.gc_us + plan.runnable_us + plan.start_us,
        false,
        0,
        0,
    );
    // Compute in ten pieces, the second half with collectives beside it; starvation between them.
    let slower = |ppm: u64| ppm * shape.compute_us / plan.compute_us.max(1);
    for piece in 0..10 {
        push(
            plan.compute_us / 10,
            true,
            if piece < 5 { 930_000 } else { 960_000 },
            slower(620_000),
        );
        now_us = push(plan.starved_us / 10, false, 0, 0);
    }
    push(end_us.saturating_sub(now_us), true, shape.comm_sm_ppm, 0);
    rank.now_us = end_us;
    rank.steps.push((plan, StepTimes { start_us, end_us }));
}
