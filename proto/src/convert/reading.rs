//! Readings: value, not measured, unsupported and failed stay apart on the wire.

use stallscope_attribution::facts::{Activity, ClockFacts, ForeignLoad, LinkFacts, PciLink};
use stallscope_attribution::reading::Reading;

use super::WireError;
use crate::v1;

/// A reading and the message that carries it; an absent message is "not measured".
macro_rules! reading_message {
    ($message:ident, $state:ident, $value:ty) => {
        pub(super) mod $state {
            use super::*;
            use crate::v1::$state::State;

            pub(in crate::convert) fn to_wire(reading: &Reading<$value>) -> Option<v1::$message> {
                let state = match reading {
                    Reading::NotMeasured => return None,
                    Reading::Value(value) => State::Value((*value).into()),
                    Reading::Unsupported => State::Unsupported(v1::Unsupported {}),
                    Reading::Failed(why) => State::Failed(why.clone()),
                };
                Some(v1::$message { state: Some(state) })
            }

            pub(in crate::convert) fn from_wire(
                field: &'static str,
                wire: Option<v1::$message>,
            ) -> Result<Reading<$value>, WireError> {
                let Some(wire) = wire else {
                    return Ok(Reading::NotMeasured);
                };
                match wire.state {
                    Some(State::Value(value)) => Ok(Reading::Value(value.into())),
                    Some(State::Unsupported(_)) => Ok(Reading::Unsupported),
                    Some(State::Failed(why)) => Ok(Reading::Failed(why)),
                    None => Err(WireError::Unknown { field, value: 0 }),
                }
            }
        }
    };
}

reading_message!(UintReading, uint_reading, u64);
reading_message!(ActivityReading, activity_reading, Activity);
reading_message!(ClockReading, clock_reading, ClockFacts);
reading_message!(ForeignReading, foreign_reading, ForeignLoad);
reading_message!(LinkReading, link_reading, LinkFacts);
reading_message!(PciLinkReading, pci_link_reading, PciLink);

impl v1::LinkReading {
    /// The message of a reading; none when nobody tried.
    #[must_use]
    pub fn of(reading: &Reading<LinkFacts>) -> Option<Self> {
        link_reading::to_wire(reading)
    }

    /// The reading in the message of a field.
    ///
    /// # Errors
    /// When the message is no reading.
    pub fn into_reading(field: &'static str, wire: Option<Self>) -> Result<Reading<LinkFacts>, WireError> {
        link_reading::from_wire(field, wire)
    }
}

impl From<Activity> for v1::Activity {
    fn from(activity: Activity) -> Self {
        let Activity {
            busy_ppm,
            sm_ppm,
            occupancy_ppm,
            tensor_ppm,
            dram_ppm,
            compute_sm_ppm,
        } = activity;
        Self {
            busy_ppm,
            sm_ppm,
            occupancy_ppm,
            tensor_ppm,
            dram_ppm,
            compute_sm_ppm,
        }
    }
}

impl From<v1::Activity> for Activity {
    fn from(wire: v1::Activity) -> Self {
        let v1::Activity {
            busy_ppm,
            sm_ppm,
            occupancy_ppm,
            tensor_ppm,
            dram_ppm,
            compute_sm_ppm,
        } = wire;
        Self {
            busy_ppm,
            sm_ppm,
            occupancy_ppm,
            tensor_ppm,
            dram_ppm,
            compute_sm_ppm,
        }
    }
}

impl From<ClockFacts> for v1::ClockFacts {
    fn from(clock: ClockFacts) -> Self {
        let ClockFacts {
            sm_mhz,
            thermal_ns,
            power_ns,
            temperature_c,
            power_mw,
        } = clock;
        Self {
            sm_mhz,
            thermal_ns,
            power_ns,
            temperature_c,
            power_mw,
        }
    }
}

impl From<v1::ClockFacts> for ClockFacts {
    fn from(wire: v1::ClockFacts) -> Self {
        let v1::ClockFacts {
            sm_mhz,
            thermal_ns,
            power_ns,
            temperature_c,
            power_mw,
        } = wire;
        Self {
            sm_mhz,
            thermal_ns,
            power_ns,
            temperature_c,
            power_mw,
        }
    }
}

impl From<ForeignLoad> for v1::ForeignLoad {
    fn from(load: ForeignLoad) -> Self {
        let ForeignLoad {
            processes,
            largest_pid,
            sm_ppm,
        } = load;
        Self {
            processes,
            largest_pid,
            sm_ppm,
        }
    }
}

impl From<v1::ForeignLoad> for ForeignLoad {
    fn from(wire: v1::ForeignLoad) -> Self {
        let v1::ForeignLoad {
            processes,
            largest_pid,
            sm_ppm,
        } = wire;
        Self {
            processes,
            largest_pid,
            sm_ppm,
        }
    }
}

impl From<LinkFacts> for v1::LinkFacts {
    fn from(links: LinkFacts) -> Self {
        let LinkFacts {
            pcie_lanes,
            pcie_lanes_max,
            pcie_generation,
            pcie_generation_max,
            pcie_replays,
            nvlinks,
            nvlinks_down,
            nvlink_errors,
            faults,
            fault_code,
        } = links;
        Self {
            pcie_lanes,
            pcie_lanes_max,
            pcie_generation,
            pcie_generation_max,
            pcie_replays,
            nvlinks,
            nvlinks_down,
            nvlink_errors,
            faults,
            fault_code,
        }
    }
}

impl From<v1::LinkFacts> for LinkFacts {
    fn from(wire: v1::LinkFacts) -> Self {
        let v1::LinkFacts {
            pcie_lanes,
            pcie_lanes_max,
            pcie_generation,
            pcie_generation_max,
            pcie_replays,
            nvlinks,
            nvlinks_down,
            nvlink_errors,
            faults,
            fault_code,
        } = wire;
        Self {
            pcie_lanes,
            pcie_lanes_max,
            pcie_generation,
            pcie_generation_max,
            pcie_replays,
            nvlinks,
            nvlinks_down,
            nvlink_errors,
            faults,
            fault_code,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_survive_the_wire_and_a_missing_reading_stays_missing() {
        let links = LinkFacts {
            pcie_lanes: 8,
            pcie_lanes_max: 16,
            pcie_generation: 4,
            pcie_generation_max: 5,
            pcie_replays: 77,
            nvlinks: 18,
            nvlinks_down: 2,
            nvlink_errors: 1 << 40,
            faults: 1,
            fault_code: 79,
        };
        for reading in [Reading::Value(links), Reading::Unsupported, Reading::NotMeasured] {
            let back = link_reading::from_wire("links", link_reading::to_wire(&reading));
            assert_eq!(back.ok(), Some(reading));
        }
    }
}
