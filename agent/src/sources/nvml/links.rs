//! A GPU's link to its host and to other GPUs.

use nvml_wrapper::Device;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::structs::device::FieldId;
use nvml_wrapper::sys_exports::field_id;
use stallscope_attribution::facts::LinkFacts;
use stallscope_attribution::reading::Reading;

use super::convert::{counter, reading};
use super::watch::GpuShared;

/// Links to other GPUs that a device may have.
const MOST_NVLINKS: u32 = 18;
/// How often they are looked at, ns.
const NVLINKS_NS: u64 = 5_000_000_000;
/// A GPU drops the generation of its link when it is idle: above this it is not.
const BUSY_PPM: u32 = 100_000;

/// Errors of all links to other GPUs that were recovered from: packets sent again, links trained anew.
const NVLINK_ERRORS: [u32; 2] = [
    field_id::NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL,
    field_id::NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL,
];

/// What was read last.
#[derive(Debug, Default)]
pub(super) struct Links {
    replays: Option<u64>,
    nvlink_errors: [Option<u64>; NVLINK_ERRORS.len()],
    /// Links to other GPUs that were up at some time, by bit.
    seen_up: u32,
    nvlinks: u32,
    nvlinks_down: u32,
    due_ns: u64,
}

impl Links {
    /// Reads the links. Growth is since the last call.
    pub(super) fn read(
        &mut self,
        shared: &GpuShared,
        device: &Device<'_>,
        busy_ppm: &Reading<u32>,
        now_ns: u64,
    ) -> Reading<LinkFacts> {
        let host = || -> Result<[u32; 4], NvmlError> {
            Ok([
                shared.call("nvmlDeviceGetCurrPcieLinkWidth", || {
                    device.current_pcie_link_width()
                })?,
                shared.call("nvmlDeviceGetMaxPcieLinkWidth", || device.max_pcie_link_width())?,
                shared.call("nvmlDeviceGetCurrPcieLinkGeneration", || {
                    device.current_pcie_link_gen()
                })?,
                shared.call("nvmlDeviceGetMaxPcieLinkGeneration", || {
                    device.max_pcie_link_gen()
                })?,
            ])
        };
        let [pcie_lanes, pcie_lanes_max, generation, pcie_generation_max] = match host() {
            Ok(host) => host,
            Err(error) => return reading(Err(error)),
        };
        if now_ns >= self.due_ns {
            self.due_ns = now_ns.saturating_add(NVLINKS_NS);
            let states = nvlink_states(shared, device);
            (self.nvlinks, self.nvlinks_down) = judge(&states, &mut self.seen_up);
        }
        let replays = shared
            .call("nvmlDeviceGetPcieReplayCounter", || device.pcie_replay_counter())
            .ok()
            .map(u64::from);
        let is_busy = busy_ppm.value().is_some_and(|&ppm| ppm > BUSY_PPM);
        Reading::Value(LinkFacts {
            pcie_lanes,
            pcie_lanes_max,
            pcie_generation: if is_busy { generation } else { 0 },
            pcie_generation_max,
            pcie_replays: grown(&mut self.replays, replays),
            nvlinks: self.nvlinks,
            nvlinks_down: self.nvlinks_down,
            nvlink_errors: self.nvlink_errors(shared, device),
            faults: 0,
            fault_code: 0,
        })
    }

    fn nvlink_errors(&mut self, shared: &GpuShared, device: &Device<'_>) -> u64 {
        if self.nvlinks == 0 {
            return 0;
        }
        let fields = NVLINK_ERRORS.map(FieldId);
        let values = shared.call("nvmlDeviceGetFieldValues", || device.field_values_for(&fields));
        let mut values = values.unwrap_or_default().into_iter();
        let mut grew = 0_u64;
        for before in &mut self.nvlink_errors {
            let value = values
                .next()
                .and_then(Result::ok)
                .and_then(|sample| sample.value.ok());
            let now = value.map(counter).and_then(|count| count.value().copied());
            grew = grew.saturating_add(grown(before, now));
        }
        grew
    }
}

/// How far a counter went since its last value; one that was reset begins anew.
fn grown(before: &mut Option<u64>, now: Option<u64>) -> u64 {
    let Some(now) = now else { return 0 };
    before.replace(now).map_or(0, |before| now.saturating_sub(before))
}

/// Whether each link is up; `None` for one that the device does not have.
fn nvlink_states(shared: &GpuShared, device: &Device<'_>) -> Vec<Option<bool>> {
    let mut states = Vec::new();
    for link in 0..MOST_NVLINKS {
        let state = shared.call("nvmlDeviceGetNvLinkState", || {
            device.link_wrapper_for(link).is_active()
        });
        match state {
            Ok(is_up) => states.push(Some(is_up)),
            // The device has no links at all, or none after this.
            Err(NvmlError::NotSupported | NvmlError::FailedToLoadSymbol(_)) => break,
            Err(_) => states.push(None),
        }
    }
    states
}

/// Links that should be up, and of them those that are down. A link that is not wired is never up, and says so as one that
/// is down; so one should be up that has been, and all should where nearly all are.
fn judge(states: &[Option<bool>], seen_up: &mut u32) -> (u32, u32) {
    let mut up = 0_u32;
    let mut all = 0_u32;
    for (index, state) in states.iter().enumerate() {
        let bit = 1_u32
            .checked_shl(u32::try_from(index).unwrap_or(u32::MAX))
            .unwrap_or(0);
        if state.is_some() {
            all |= bit;
        }
        if *state == Some(true) {
            up |= bit;
        }
    }
    *seen_up |= up;
    let mut wanted = *seen_up;
    if up.count_ones() * 4 >= all.count_ones() * 3 {
        wanted |= all;
    }
    (wanted.count_ones(), (wanted & !up).count_ones())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn states(text: &str) -> Vec<Option<bool>> {
        let state = |char| match char {
            'u' => Some(true),
            'd' => Some(false),
            _ => None,
        };
        text.chars().map(state).collect()
    }

    #[test]
    fn a_link_that_should_be_up_is_told_from_one_that_is_not_wired() {
        let over = |texts: &[&str]| {
            let mut seen = 0;
            texts.iter().map(|text| judge(&states(text), &mut seen)).last()
        };
        assert_eq!(over(&["uuuuuuuuuuuuuuuuuu"]), Some((18, 0)));
        assert_eq!(
            over(&["uuuuuuuuuuuuuuuuud"]),
            Some((18, 1)),
            "down since before the agent began"
        );
        assert_eq!(over(&["dddddddddddd"]), Some((0, 0)), "no bridge is plugged in");
        assert_eq!(over(&["uuuudddddddd"]), Some((4, 0)), "one bridge");
        assert_eq!(over(&["uuuudddddddd", "uudddddddddd"]), Some((4, 2)));
        assert_eq!(over(&["uuuu", "dddd"]), Some((4, 4)));
        assert_eq!(over(&[""]), Some((0, 0)));
        assert_eq!(over(&["uu--"]), Some((2, 0)));
    }

    #[test]
    fn growth_begins_with_the_second_value() {
        let mut last = None;
        assert_eq!(
            [Some(5), Some(9), None, Some(9), Some(1)].map(|now| grown(&mut last, now)),
            [0, 4, 0, 0, 0]
        );
    }
}
