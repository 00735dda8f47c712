//! The device's counters: averages over 100 ms that know no step edges and come late.

use stallscope_attribution::facts::Activity;
use stallscope_attribution::reading::Reading;

use crate::job::{Job, Played};
use crate::random::Random;
use crate::variant::Variant;
use crate::work::{MS, noise_of};

/// Length of a sample, ns.
const SAMPLE: u64 = 100 * MS;
/// SM share of a collective's kernel, ppm: 20 of 132.
const COMM_SM: u64 = 151_515;
/// SM share of compute, ppm.
const COMPUTE_SM: u64 = 940_000;

/// Sums of `busy`, `sm`, `tensor` and `dram`: ppm times ns.
type Sums = [u128; 4];

/// The samples of one GPU.
#[derive(Debug)]
pub(super) struct Counters {
    /// Start of the first sample on the job's clock, as the device tells it: late.
    first: u64,
    samples: Vec<[u64; 4]>,
    /// Ratio of SM share to busy share in pure compute, ppm.
    highest: u64,
}

/// A stretch of the GPU doing one thing.
#[derive(Debug, Clone, Copy)]
struct Stretch {
    ns: u64,
    levels: [u64; 4],
}

impl Counters {
    pub(super) fn of(variant: &Variant, job: &Job, rank: usize) -> Self {
        let mut random = Random::new(noise_of(variant, rank) ^ 0x6709);
        let lag = random.below(40 * MS);
        let mut grid = Grid::new(random.below(SAMPLE) + 1);
        let mut pauses = job.pauses.iter().peekable();
        for (index, step) in job.steps.iter().enumerate() {
            if let Some(pause) = pauses.next_if(|pause| pause.before == index) {
                grid.add(Stretch {
                    ns: pause.end - pause.start,
                    levels: [0; 4],
                });
            }
            stretches(&step[rank], |stretch| grid.add(stretch));
        }
        let samples: Vec<[u64; 4]> = grid
            .samples
            .iter()
            .map(|levels| levels.map(|level| random.around(level, 8).min(1_000_000)))
            .collect();
        let mut ratios: Vec<u64> = samples
            .iter()
            .filter(|levels| levels[0] > 500_000)
            .map(|levels| levels[1] * 1_000_000 / levels[0])
            .collect();
        ratios.sort_unstable();
        let highest = ratios.get(ratios.len() * 95 / 100).copied().unwrap_or(0);
        Self {
            first: lag,
            samples,
            highest,
        }
    }

    /// The mean over a stretch of the job, by overlap.
    pub(super) fn activity(&self, start: u64, end: u64) -> Reading<Activity> {
        let mut sums: Sums = [0; 4];
        let mut weight = 0_u128;
        let from = start.saturating_sub(self.first) / SAMPLE;
        for (at, levels) in self
            .samples
            .iter()
            .enumerate()
            .skip(usize::try_from(from).unwrap_or(0))
        {
            let sample = self.first + at as u64 * SAMPLE;
            if sample >= end {
                break;
            }
            let shared = (sample + SAMPLE).min(end).saturating_sub(sample.max(start));
            weight += u128::from(shared);
            for (sum, level) in sums.iter_mut().zip(levels) {
                *sum += u128::from(shared) * u128::from(*level);
            }
        }
        if weight == 0 {
            return Reading::NotMeasured;
        }
        let [busy_ppm, sm_ppm, tensor_ppm, dram_ppm] =
            sums.map(|sum| u32::try_from(sum / weight).unwrap_or(0));
        Reading::Value(Activity {
            busy_ppm,
            sm_ppm,
            occupancy_ppm: sm_ppm / 3,
            tensor_ppm,
            dram_ppm,
            compute_sm_ppm: u32::try_from(self.highest.min(1_000_000)).unwrap_or(0),
        })
    }
}

/// Folds stretches into samples.
struct Grid {
    left: u64,
    length: u64,
    sums: Sums,
    samples: Vec<[u64; 4]>,
}

impl Grid {
    /// The first sample is cut short: the grid has its own phase.
    fn new(first: u64) -> Self {
        Self {
            left: first,
            length: first,
            sums: [0; 4],
            samples: Vec::new(),
        }
    }

    fn add(&mut self, mut stretch: Stretch) {
        while stretch.ns > 0 {
            let part = stretch.ns.min(self.left);
            for (sum, level) in self.sums.iter_mut().zip(stretch.levels) {
                *sum += u128::from(part) * u128::from(level);
            }
            (self.left, stretch.ns) = (self.left - part, stretch.ns - part);
            if self.left == 0 {
                let length = u128::from(self.length);
                self.samples
                    .push(self.sums.map(|sum| u64::try_from(sum / length).unwrap_or(0)));
                (self.left, self.length, self.sums) = (SAMPLE, SAMPLE, [0; 4]);
            }
        }
    }
}

/// What the GPU did in a step, in order.
fn stretches(played: &Played, mut emit: impl FnMut(Stretch)) {
    const PIECES: u64 = 10;
    let work = &played.work;
    let foreign = work.facts.foreign_ppm;
    // Another process keeps the device busy, takes its share of wide kernels and comes on top of narrow ones.
    let mut push = |ns: u64, busy: bool, sm: u64, tensor: u64, dram: u64| {
        let own = if sm > 500_000 {
            sm * (1_000_000 - foreign) / 1_000_000
        } else {
            sm
        };
        let busy = if busy || foreign > 0 { 1_000_000 } else { 0 };
        emit(Stretch {
            ns,
            levels: [busy, (own + foreign).min(1_000_000), tensor, dram],
        });
    };
    push(work.gap(), false, 0, 0, 0);
    let compute = work.compute();
    let tensor = u128::from(work.ideal) * 1_000_000 / u128::from(compute.max(1));
    let tensor = u64::try_from(tensor).unwrap_or(0);
    let idle = work.launch + work.dep;
    let part = |whole: u64, piece: u64| whole * (piece + 1) / PIECES - whole * piece / PIECES;
    for piece in 0..PIECES {
        push(
            part(compute, piece),
            true,
            COMPUTE_SM,
            tensor,
            work.facts.dram_ppm,
        );
        push(part(idle, piece), false, 0, 0, 0);
    }
    // Copy engines do not count as activity.
    push(work.copy + work.pcie, false, 0, 0, 100_000);
    let comm = played.end - played.start - (work.arrival() - work.nvlink);
    push(comm, true, COMM_SM, 0, 60_000);
}
