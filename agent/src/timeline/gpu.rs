//! GPU readings joined to a window by overlap.

use std::collections::VecDeque;
use std::sync::Arc;

use stallscope_attribution::facts::{Activity, ClockFacts, ForeignLoad, LinkFacts, PPM};
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use crate::observation::GpuReading;

/// Readings kept per GPU: at 100 ms, seven minutes.
const MOST_READINGS: usize = 4_096;
/// A reading counts for the ratio of pure compute when the GPU was busier than this.
const BUSY_PPM: u32 = 500_000;
/// The ratio's percentile that stands for pure compute.
const COMPUTE_PERCENTILE: u64 = 95;
/// Bins of the ratio's histogram, 0.1 % each.
const RATIO_BINS: usize = 1_001;
/// The histogram is halved beyond this many readings, so that it follows the job.
const RATIO_LIMIT: u32 = 8_192;
/// Faults kept per GPU.
const MOST_FAULTS: usize = 1_024;
/// What the driver tells seldom (shares of processes, temperature) holds for this long, ns.
const HOLDS_NS: u64 = 1_500_000_000;

/// `clocksEventReason` bits of NVML: software and hardware thermal slowdown.
const THERMAL_BITS: u64 = 0x20 | 0x40;
/// Software power cap and power brake.
const POWER_BITS: u64 = 0x04 | 0x80;

#[derive(Debug)]
struct Sample {
    window: Window,
    activity: Reading<Activity>,
    sm_mhz: Reading<u32>,
    thermal_ns: Option<u64>,
    power_ns: Option<u64>,
    energy_mj: Option<u64>,
    temperature_c: u32,
    process_sm_ppm: Reading<Shares>,
    /// As last told; counts only in the sample that told them.
    links: Reading<LinkFacts>,
}

/// SM share of each process, ppm.
type Shares = Arc<[(u32, u32)]>;

/// Readings of one GPU.
#[derive(Debug, Default)]
pub(super) struct GpuCounters {
    samples: VecDeque<Sample>,
    /// The last that was told of what is told seldom, and when.
    shares: Option<(u64, Shares)>,
    temperature: Option<(u64, u32)>,
    links: Option<(u64, LinkFacts)>,
    /// Faults by time, and their codes.
    faults: VecDeque<(u64, u32)>,
}

/// SM share of busy time in readings with pure compute: a high percentile over the job's readings.
#[derive(Debug)]
pub(super) struct ComputeRatio {
    bins: Vec<u32>,
    readings: u32,
}

impl Default for ComputeRatio {
    fn default() -> Self {
        Self {
            bins: vec![0; RATIO_BINS],
            readings: 0,
        }
    }
}

impl ComputeRatio {
    /// Takes a reading of the job's GPU into account.
    pub(super) fn add(&mut self, reading: &GpuReading) {
        let (Some(busy_ppm), Some(sm_ppm)) = (reading.busy_ppm.value(), reading.sm_ppm.value()) else {
            return;
        };
        if *busy_ppm <= BUSY_PPM {
            return;
        }
        let ratio = u64::from(*sm_ppm) * (RATIO_BINS as u64 - 1) / u64::from(*busy_ppm);
        let bin = usize::try_from(ratio).unwrap_or(usize::MAX).min(RATIO_BINS - 1);
        self.bins[bin] += 1;
        self.readings += 1;
        if self.readings > RATIO_LIMIT {
            for bin in &mut self.bins {
                *bin /= 2;
            }
            self.readings = self.bins.iter().sum();
        }
    }

    /// The percentile, parts per million; 0 before the first reading.
    pub(super) fn ppm(&self) -> u32 {
        let wanted = (u64::from(self.readings) * COMPUTE_PERCENTILE).div_ceil(100);
        let mut seen = 0;
        for (ratio, count) in self.bins.iter().enumerate() {
            seen += u64::from(*count);
            if wanted > 0 && seen >= wanted {
                return u32::try_from(ratio * 1_000).unwrap_or(u32::MAX);
            }
        }
        0
    }
}

impl GpuCounters {
    /// Takes a reading in.
    pub(super) fn add(&mut self, window: Window, reading: &GpuReading) {
        if self.samples.len() == MOST_READINGS {
            self.samples.pop_front();
        }
        let now_ns = window.end_ns();
        if let Reading::Value(shares) = &reading.process_sm_ppm {
            self.shares = Some((now_ns, shares.as_slice().into()));
        }
        if let Reading::Value(temperature_c) = &reading.temperature_c {
            self.temperature = Some((now_ns, *temperature_c));
        }
        let process_sm_ppm = match (&reading.process_sm_ppm, held(self.shares.as_ref(), now_ns)) {
            (Reading::Value(_) | Reading::NotMeasured, Some(shares)) => Reading::Value(Arc::clone(shares)),
            (other, _) => other.clone().map(|shares| shares.as_slice().into()),
        };
        let links = self.links_of(&reading.links, now_ns);
        let reasons = reading.clock_reasons.value().copied();
        let by_bits =
            |bits: u64| reasons.map(|reasons| if reasons & bits == 0 { 0 } else { window.len_ns() });
        self.samples.push_back(Sample {
            window,
            activity: activity_of(reading),
            sm_mhz: reading.sm_mhz.clone(),
            thermal_ns: reading
                .thermal_ns
                .value()
                .copied()
                .or_else(|| by_bits(THERMAL_BITS)),
            power_ns: reading
                .power_limit_ns
                .value()
                .copied()
                .or_else(|| by_bits(POWER_BITS)),
            energy_mj: reading.energy_mj.value().copied(),
            temperature_c: held(self.temperature.as_ref(), now_ns).copied().unwrap_or(0),
            process_sm_ppm,
            links,
        });
    }

    /// The driver reported a fault.
    pub(super) fn fault(&mut self, at_ns: u64, code: u32) {
        if self.faults.len() == MOST_FAULTS {
            self.faults.pop_front();
        }
        self.faults.push_back((at_ns, code));
    }

    /// What is told once a second holds until it is told again, but for what was counted. The generation is known under
    /// load only, and stays what it was there.
    fn links_of(&mut self, told: &Reading<LinkFacts>, now_ns: u64) -> Reading<LinkFacts> {
        let before = held(self.links.as_ref(), now_ns).copied();
        let mut now = match (told, before) {
            (Reading::Value(told), _) => *told,
            (Reading::NotMeasured, Some(before)) => LinkFacts {
                pcie_replays: 0,
                nvlink_errors: 0,
                ..before
            },
            (other, _) => return other.clone(),
        };
        if let Some(before) = before.filter(|_| now.pcie_generation == 0) {
            now.pcie_generation = before.pcie_generation;
        }
        let at_ns = if told.value().is_some() {
            now_ns
        } else {
            self.links.map_or(now_ns, |(at_ns, _)| at_ns)
        };
        self.links = Some((at_ns, now));
        Reading::Value(now)
    }

    /// Forgets readings that ended before `before_ns`.
    pub(super) fn prune(&mut self, before_ns: u64) {
        while self
            .samples
            .front()
            .is_some_and(|sample| sample.window.end_ns() <= before_ns)
        {
            self.samples.pop_front();
        }
    }

    /// Mean activity over the window, weighted by overlap.
    pub(super) fn activity(&self, window: Window, compute_sm_ppm: u32) -> Reading<Activity> {
        Activity::mean(
            self.overlapping(window)
                .map(|(ns, sample)| (ns, &sample.activity)),
        )
        .map(|activity| Activity {
            compute_sm_ppm,
            ..activity
        })
    }

    /// Clocks over the window. The mean clock is weighted by busy time where that is known.
    ///
    /// Throttled time comes from the driver's counters, else from the reasons at the end of each reading; power is
    /// energy over the time of the readings that touch the window. What the device does not tell stays 0 beside a
    /// measured clock.
    pub(super) fn clock(&self, window: Window) -> Reading<ClockFacts> {
        let (mut weight, mut mhz_weighted) = (0_u128, 0_u128);
        let (mut thermal_ns, mut power_ns) = (0, 0);
        let (mut energy_mj, mut energy_window_ns) = (0_u128, 0_u128);
        let mut temperature_c = 0;
        let mut why_not = Reading::NotMeasured;
        for (ns, sample) in self.overlapping(window) {
            match &sample.sm_mhz {
                Reading::Value(mhz) => {
                    let busy_ppm = sample
                        .activity
                        .value()
                        .map_or(PPM, |activity| u64::from(activity.busy_ppm).max(1));
                    let share = u128::from(ns) * u128::from(busy_ppm);
                    weight += share;
                    mhz_weighted += share * u128::from(*mhz);
                }
                other => why_not = other.clone(),
            }
            thermal_ns += apportion(sample.thermal_ns, ns, sample.window);
            power_ns += apportion(sample.power_ns, ns, sample.window);
            temperature_c = temperature_c.max(sample.temperature_c);
            if let Some(mj) = sample.energy_mj {
                energy_mj += u128::from(mj);
                energy_window_ns += u128::from(sample.window.len_ns());
            }
        }
        if weight == 0 {
            return why_not.map(|_| ClockFacts::default());
        }
        Reading::Value(ClockFacts {
            sm_mhz: to_u32(mhz_weighted / weight),
            thermal_ns,
            power_ns,
            temperature_c,
            power_mw: to_u32(
                (energy_mj * 1_000_000_000)
                    .checked_div(energy_window_ns)
                    .unwrap_or(0),
            ),
        })
    }

    /// Links over the window: the least lanes and the lowest generation under load, and what was counted in it.
    pub(super) fn links(&self, window: Window) -> Reading<LinkFacts> {
        let mut found: Option<LinkFacts> = None;
        let mut why_not = Reading::NotMeasured;
        for (_, sample) in self.overlapping(window) {
            let now = match &sample.links {
                Reading::Value(links) => *links,
                other => {
                    why_not = other.clone();
                    continue;
                }
            };
            let ends_inside = sample.window.end_ns() <= window.end_ns();
            let counted = |count: u64| if ends_inside { count } else { 0 };
            let before = found.unwrap_or(LinkFacts {
                pcie_replays: 0,
                nvlink_errors: 0,
                ..now
            });
            let generations = [before.pcie_generation, now.pcie_generation];
            let known = generations.into_iter().filter(|generation| *generation > 0);
            found = Some(LinkFacts {
                pcie_lanes: before.pcie_lanes.min(now.pcie_lanes),
                pcie_generation: known.min().unwrap_or(0),
                pcie_replays: before.pcie_replays.saturating_add(counted(now.pcie_replays)),
                nvlink_errors: before.nvlink_errors.saturating_add(counted(now.nvlink_errors)),
                nvlinks_down: before.nvlinks_down.max(now.nvlinks_down),
                ..now
            });
        }
        let mut faults = self
            .faults
            .iter()
            .filter(|(at_ns, _)| (window.start_ns()..window.end_ns()).contains(at_ns));
        let count = faults.clone().count();
        let last = faults.next_back().map_or(0, |(_, code)| *code);
        match found {
            None if count == 0 => why_not,
            links => Reading::Value(LinkFacts {
                faults: to_u32(count as u128),
                fault_code: last,
                ..links.unwrap_or_default()
            }),
        }
    }

    /// Load of processes for which `ours` is false, over the window.
    pub(super) fn foreign(&self, window: Window, ours: impl Fn(u32) -> bool) -> Reading<ForeignLoad> {
        let mut total_ns = 0_u128;
        let mut others: Vec<(u32, u128)> = Vec::new();
        let mut why_not = Reading::NotMeasured;
        for (ns, sample) in self.overlapping(window) {
            match &sample.process_sm_ppm {
                Reading::Value(shares) => {
                    total_ns += u128::from(ns);
                    for (pid, ppm) in shares.iter().filter(|(pid, _)| !ours(*pid)) {
                        let share = u128::from(ns) * u128::from(*ppm);
                        match others.iter_mut().find(|(other, _)| other == pid) {
                            Some((_, sum)) => *sum += share,
                            None => others.push((*pid, share)),
                        }
                    }
                }
                other => why_not = other.clone().map(|_| ()),
            }
        }
        if total_ns == 0 {
            return why_not.map(|()| ForeignLoad::default());
        }
        let sum: u128 = others.iter().map(|(_, share)| share).sum();
        let largest = others.iter().max_by_key(|(pid, share)| (*share, u32::MAX - *pid));
        Reading::Value(ForeignLoad {
            processes: to_u32(others.len() as u128),
            largest_pid: largest.map_or(0, |(pid, _)| *pid),
            sm_ppm: to_u32(sum / total_ns),
        })
    }

    /// Readings come in order of their ends, and those of one GPU do not overlap by more than a read.
    fn overlapping(&self, window: Window) -> impl Iterator<Item = (u64, &Sample)> {
        let first = self
            .samples
            .partition_point(|sample| sample.window.end_ns() <= window.start_ns());
        self.samples
            .range(first..)
            .take_while(move |sample| sample.window.start_ns() < window.end_ns())
            .filter_map(move |sample| Some((sample.window.intersect(window)?.len_ns(), sample)))
    }
}

/// The last value, if it still holds.
fn held<T>(last: Option<&(u64, T)>, now_ns: u64) -> Option<&T> {
    last.filter(|(at_ns, _)| now_ns.saturating_sub(*at_ns) <= HOLDS_NS)
        .map(|(_, value)| value)
}

fn to_u32(value: u128) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn apportion(total: Option<u64>, part_ns: u64, whole: Window) -> u64 {
    let scaled = u128::from(total.unwrap_or(0)) * u128::from(part_ns);
    u64::try_from(scaled / u128::from(whole.len_ns().max(1))).unwrap_or(u64::MAX)
}

/// Activity of one reading; the first counter that has no value says why there is none.
fn activity_of(reading: &GpuReading) -> Reading<Activity> {
    let counters = [
        &reading.busy_ppm,
        &reading.sm_ppm,
        &reading.occupancy_ppm,
        &reading.tensor_ppm,
        &reading.dram_ppm,
    ];
    let mut values = [0; 5];
    for (value, counter) in values.iter_mut().zip(counters) {
        match counter {
            Reading::Value(ppm) => *value = *ppm,
            other => return other.clone().map(|_| Activity::default()),
        }
    }
    let [busy_ppm, sm_ppm, occupancy_ppm, tensor_ppm, dram_ppm] = values;
    Reading::Value(Activity {
        busy_ppm,
        sm_ppm,
        occupancy_ppm,
        tensor_ppm,
        dram_ppm,
        compute_sm_ppm: 0,
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::timeline::synthetic::reading;

    const MS: u64 = 1_000_000;

    fn window(start_ms: u64, end_ms: u64) -> Window {
        Window::new(start_ms * MS, end_ms * MS).unwrap()
    }

    /// Readings of 100 ms each, from 0, by what each tells of links.
    fn counters(told: &[Reading<LinkFacts>]) -> GpuCounters {
        let mut counters = GpuCounters::default();
        for (index, links) in (0..).zip(told) {
            let links = links.clone();
            counters.add(
                window(index * 100, (index + 1) * 100),
                &GpuReading { links, ..reading(0) },
            );
        }
        counters
    }

    fn links(lanes: u32, generation: u32, replays: u64) -> LinkFacts {
        LinkFacts {
            pcie_lanes: lanes,
            pcie_lanes_max: 16,
            pcie_generation: generation,
            pcie_generation_max: 5,
            pcie_replays: replays,
            ..LinkFacts::default()
        }
    }

    #[test]
    fn links_hold_until_told_again_and_counts_are_counted_once() {
        let told = |links| Reading::Value(links);
        let counters = counters(&[
            told(links(16, 5, 0)),
            Reading::NotMeasured,
            told(links(8, 0, 7)),
            Reading::NotMeasured,
        ]);
        assert_eq!(counters.links(window(100, 200)), told(links(16, 5, 0)), "held");
        // Idle when it was told: the generation stays what it was under load.
        assert_eq!(counters.links(window(200, 400)), told(links(8, 5, 7)));
        assert_eq!(counters.links(window(300, 400)), told(links(8, 5, 0)));
        assert_eq!(counters.links(window(0, 400)), told(links(8, 5, 7)));
        assert_eq!(counters.links(window(500, 600)), Reading::NotMeasured);
    }

    #[test]
    fn faults_belong_to_the_window_they_happened_in() {
        let mut counters = counters(&[Reading::Unsupported, Reading::Unsupported]);
        assert_eq!(counters.links(window(0, 200)), Reading::Unsupported);
        counters.fault(50 * MS, 48);
        counters.fault(60 * MS, 79);
        let expected = LinkFacts {
            faults: 2,
            fault_code: 79,
            ..LinkFacts::default()
        };
        assert_eq!(counters.links(window(0, 100)), Reading::Value(expected));
        assert_eq!(counters.links(window(100, 200)), Reading::Unsupported);
        for at_ns in 0..5_000 {
            counters.fault(at_ns, 79);
        }
        assert!(counters.faults.len() <= MOST_FAULTS);
    }
}
