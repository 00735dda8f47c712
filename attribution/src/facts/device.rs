//! What the driver tells of one GPU over a window.

use super::PPM;
use crate::reading::Reading;

/// Activity of the whole GPU averaged over a window, in parts per million. From GPM or its like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Activity {
    /// Time in which any kernel was resident.
    pub busy_ppm: u32,
    /// Share of SMs with a resident warp.
    pub sm_ppm: u32,
    /// Resident warps over the maximum.
    pub occupancy_ppm: u32,
    /// Tensor pipe activity.
    pub tensor_ppm: u32,
    /// Device memory activity.
    pub dram_ppm: u32,
    /// Highest ratio of `sm_ppm` to `busy_ppm` seen in any short window of this job: SM share of pure compute.
    pub compute_sm_ppm: u32,
}

impl Activity {
    /// The mean of readings weighted by the length of their windows in ns. Windows without a value are left out;
    /// with no value at all the first reading says why.
    #[must_use]
    pub fn mean<'a>(readings: impl IntoIterator<Item = (u64, &'a Reading<Self>)>) -> Reading<Self> {
        let mut weight_ns = 0_u128;
        let mut sums = [0_u128; 5];
        let mut compute_sm_ppm = 0;
        let mut without = None;
        for (window_ns, reading) in readings {
            let Reading::Value(value) = reading else {
                without.get_or_insert(reading);
                continue;
            };
            let ns = u128::from(window_ns);
            weight_ns += ns;
            let parts = [
                value.busy_ppm,
                value.sm_ppm,
                value.occupancy_ppm,
                value.tensor_ppm,
                value.dram_ppm,
            ];
            for (sum, ppm) in sums.iter_mut().zip(parts) {
                *sum += u128::from(ppm) * ns;
            }
            compute_sm_ppm = compute_sm_ppm.max(value.compute_sm_ppm);
        }
        if weight_ns == 0 {
            return without.cloned().unwrap_or_default();
        }
        let mean = |sum: u128| u32::try_from((sum + weight_ns / 2) / weight_ns).unwrap_or(u32::MAX);
        let [busy_ppm, sm_ppm, occupancy_ppm, tensor_ppm, dram_ppm] = sums.map(mean);
        Reading::Value(Self {
            busy_ppm,
            sm_ppm,
            occupancy_ppm,
            tensor_ppm,
            dram_ppm,
            compute_sm_ppm,
        })
    }
}

/// Clocks and the reasons for them, over a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ClockFacts {
    /// Mean SM clock while busy, MHz.
    pub sm_mhz: u32,
    /// Time held back by heat (hardware or software), ns.
    pub thermal_ns: u64,
    /// Time held back by a power limit (cap or brake), ns.
    pub power_ns: u64,
    /// Highest temperature seen, degrees Celsius.
    pub temperature_c: u32,
    /// Mean power, milliwatts.
    pub power_mw: u32,
}

/// Other processes on the same GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ForeignLoad {
    /// How many.
    pub processes: u32,
    /// Process id of the largest, 0 when none.
    pub largest_pid: u32,
    /// Their share of SM time, parts per million.
    pub sm_ppm: u32,
}

/// The GPU's links and faults, as the driver tells them, over a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkFacts {
    /// Lanes of the host's link in use under load; 0 when unknown.
    pub pcie_lanes: u32,
    /// Lanes that device and slot both have; 0 when unknown.
    pub pcie_lanes_max: u32,
    /// PCIe generation of the host's link under load; 0 when unknown.
    pub pcie_generation: u32,
    /// PCIe generation that device and slot both have; 0 when unknown.
    pub pcie_generation_max: u32,
    /// Packets sent again on the host's link.
    pub pcie_replays: u64,
    /// Links to other GPUs that should be up; 0 when there are none.
    pub nvlinks: u32,
    /// Of them, down.
    pub nvlinks_down: u32,
    /// Errors on the links to other GPUs that had to be recovered from.
    pub nvlink_errors: u64,
    /// Critical faults the driver reported (XIDs, uncorrectable memory errors).
    pub faults: u32,
    /// Code of the last of them; 0 when none.
    pub fault_code: u32,
}

impl LinkFacts {
    /// What the host's link moves of what it could, parts per million; [`PPM`] when unknown.
    ///
    /// A lane moves 0.985 GB/s in generation 3 and twice that in each further one.
    #[must_use]
    pub fn pcie_ppm(&self) -> u64 {
        let known = [
            self.pcie_lanes,
            self.pcie_lanes_max,
            self.pcie_generation,
            self.pcie_generation_max,
        ];
        if known.contains(&0) {
            return PPM;
        }
        let rate = |lanes: u32, generation: u32| u64::from(lanes.min(64)) << generation.min(16);
        let now = rate(self.pcie_lanes, self.pcie_generation);
        let best = rate(self.pcie_lanes_max, self.pcie_generation_max);
        (now * PPM / best.max(1)).min(PPM)
    }

    /// What the host's link moves now, bytes/s in one direction; 0 when unknown.
    #[must_use]
    pub fn pcie_bytes_per_s(&self) -> u64 {
        // Generation 3 moves 0.985 GB/s a lane.
        let lanes = u64::from(self.pcie_lanes.min(64)) << self.pcie_generation.min(16);
        if self.pcie_generation == 0 {
            0
        } else {
            lanes * 985_000_000 / 8
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mean_activity_weights_by_time_and_never_invents_a_zero() {
        let value = |busy_ppm| {
            Reading::Value(Activity {
                busy_ppm,
                ..Activity::default()
            })
        };
        let readings = [
            (100, value(1_000_000)),
            (300, value(200_000)),
            (9_999, Reading::Unsupported),
        ];
        let mean = Activity::mean(readings.iter().map(|(ns, reading)| (*ns, reading)));
        assert_eq!(mean.map(|activity| activity.busy_ppm), Reading::Value(400_000));

        let none = [(100, Reading::Unsupported), (100, Reading::NotMeasured)];
        assert_eq!(
            Activity::mean(none.iter().map(|(ns, reading)| (*ns, reading))),
            Reading::Unsupported
        );
        assert_eq!(Activity::mean([]), Reading::NotMeasured);
    }
}
