//! Is a GPU fit to run a job? Rules, version 1.
//!
//! Unfit: it cannot be read, or reports nothing any more. Degraded: it is held back by heat or power, runs below its
//! reference clock under load, or is shared with a process that is no part of its job. Each reason carries its values.

use serde::{Deserialize, Serialize};
use stallscope_attribution::reading::Reading;

use crate::runtime::status::{Condition, GpuStatus, Status};

/// Share of time held back above which a GPU is degraded, percent.
const HELD_BACK_PERCENT: u64 = 20;
/// Share of the reference clock below which a busy GPU is degraded, percent.
const CLOCK_PERCENT: u64 = 85;
/// Activity above which the clock means something, ppm.
const UNDER_LOAD_PPM: u32 = 500_000;
/// SM share above which a foreign process is a co-tenant and no leftover monitoring tool, ppm.
const FOREIGN_PPM: u32 = 10_000;
/// Readings in a row that fail before a GPU counts as lost.
const FAILED_READINGS: u32 = 3;
/// A GPU silent for so long counts as lost, ns. Ten times the slowest loop that reads it.
const SILENT_NS: u64 = 10_000_000_000;

/// How fit a node or a GPU is; the order is that of severity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fitness {
    /// Runs as it should.
    Fit,
    /// Runs, but slower than it should.
    Degraded,
    /// Should get no job.
    Unfit,
}

impl Fitness {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fit => "fit",
            Self::Degraded => "degraded",
            Self::Unfit => "unfit",
        }
    }
}

/// The answer to a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Check {
    /// The worst of the GPUs asked about.
    pub fitness: Fitness,
    /// Node name.
    #[serde(default)]
    pub node: String,
    /// Why, with values; for a fit node what was looked at.
    pub reasons: Vec<String>,
}

/// Checks one GPU, or all. `now_ns` is `CLOCK_MONOTONIC`. `None` while the agent is still opening the driver: a node must
/// not lose its jobs because somebody asked early.
#[must_use]
pub fn check(status: &Status, gpu: Option<u32>, now_ns: u64) -> Option<Check> {
    let nvml = status.health.iter().find(|health| health.part == "nvml");
    let starts = nvml.is_none_or(|health| health.condition == Condition::Starting);
    (!starts || !status.gpus.is_empty()).then(|| judge(status, gpu, now_ns))
}

fn judge(status: &Status, gpu: Option<u32>, now_ns: u64) -> Check {
    let asked: Vec<(u32, &GpuStatus)> = match gpu {
        Some(index) => status
            .gpus
            .get(&index)
            .map(|state| (index, state))
            .into_iter()
            .collect(),
        None => status.gpus.iter().map(|(index, state)| (*index, state)).collect(),
    };
    let mut findings: Vec<(Fitness, String)> = Vec::new();
    if asked.is_empty() {
        findings.push((Fitness::Unfit, nothing_read(status, gpu)));
    }
    for (index, state) in &asked {
        findings.extend(lost(*index, state, now_ns));
        findings.extend(held_back(*index, state));
        findings.extend(slow_clock(status, *index, state));
        findings.extend(co_tenant(status, *index, state));
    }
    let fitness = findings
        .iter()
        .map(|(fitness, _)| *fitness)
        .max()
        .unwrap_or(Fitness::Fit);
    let mut reasons: Vec<String> = findings
        .into_iter()
        .filter(|(found, _)| *found == fitness)
        .map(|(_, reason)| reason)
        .collect();
    if fitness == Fitness::Fit {
        reasons = asked
            .iter()
            .map(|(index, state)| healthy(*index, state))
            .collect();
    }
    Check {
        fitness,
        node: status.node.clone(),
        reasons,
    }
}

fn nothing_read(status: &Status, gpu: Option<u32>) -> String {
    let nvml = status.health.iter().find(|health| health.part == "nvml");
    let why = match nvml.map(|health| &health.condition) {
        Some(Condition::Missing(why) | Condition::Degraded(why)) => why.as_str(),
        Some(Condition::Off) => "reading GPUs is switched off",
        Some(Condition::Works | Condition::Starting) | None => "the driver lists none",
    };
    match gpu {
        Some(index) => {
            let known: Vec<String> = status.gpus.keys().map(u32::to_string).collect();
            let known = if known.is_empty() {
                why.to_owned()
            } else {
                format!("known are {}", known.join(", "))
            };
            format!("GPU {index} is not read: {known}")
        }
        None => format!("no GPU is read: {why}"),
    }
}

fn lost(index: u32, state: &GpuStatus, now_ns: u64) -> Option<(Fitness, String)> {
    let silent_ns = now_ns.saturating_sub(state.read_ns);
    if state.failures >= FAILED_READINGS {
        let failures = state.failures;
        return Some((
            Fitness::Unfit,
            format!("GPU {index}: the last {failures} readings of its counters failed"),
        ));
    }
    let seconds = silent_ns / 1_000_000_000;
    (silent_ns > SILENT_NS).then(|| {
        (
            Fitness::Unfit,
            format!("GPU {index}: the driver has not answered for {seconds} s"),
        )
    })
}

fn held_back(index: u32, state: &GpuStatus) -> Vec<(Fitness, String)> {
    let window_ns = state.recent_window_ns;
    let held = [
        ("heat", state.recent_thermal_ns),
        ("its power limit", state.recent_power_limit_ns),
    ];
    let mut findings = Vec::new();
    for (by, ns) in held {
        let Some(percent) = (ns.saturating_mul(100)).checked_div(window_ns) else {
            continue;
        };
        // A power limit that leaves the clock where it belongs costs nothing: that is how busy GPUs run.
        if percent <= HELD_BACK_PERCENT
            || (by != "heat" && !is_clock_low(state, state.reading.sm_max_mhz.value().copied()))
        {
            continue;
        }
        let over = window_ns / 1_000_000_000;
        let temperature = state
            .reading
            .temperature_c
            .value()
            .map(|c| format!(", {c} C"))
            .unwrap_or_default();
        let clock = state
            .reading
            .sm_mhz
            .value()
            .map(|mhz| format!(", {mhz} MHz"))
            .unwrap_or_default();
        findings.push((
            Fitness::Degraded,
            format!(
                "GPU {index}: held back by {by} for {} % of the last {over} s{clock}{temperature}",
                percent.min(100)
            ),
        ));
    }
    findings
}

fn is_clock_low(state: &GpuStatus, reference_mhz: Option<u32>) -> bool {
    match (&state.reading.sm_mhz, reference_mhz) {
        (Reading::Value(mhz), Some(reference)) => {
            u64::from(*mhz) * 100 < u64::from(reference) * CLOCK_PERCENT
        }
        _ => false,
    }
}

fn slow_clock(status: &Status, index: u32, state: &GpuStatus) -> Option<(Fitness, String)> {
    let busy = *state.reading.busy_ppm.value()?;
    // The maximum is above what a GPU reaches under load, so only a known reference counts here.
    let reference = status
        .recent
        .on_gpu(index)
        .find_map(|(_, step)| step?.signals.reference_sm_mhz)?;
    let mhz = *state.reading.sm_mhz.value()?;
    (busy >= UNDER_LOAD_PPM && is_clock_low(state, Some(reference))).then(|| {
        let percent = u64::from(mhz) * 100 / u64::from(reference.max(1));
        let busy = busy / 10_000;
        let reason = format!(
            "GPU {index}: {mhz} MHz is {percent} % of the reference {reference} MHz while {busy} % busy"
        );
        (Fitness::Degraded, reason)
    })
}

/// A process on a GPU of a traced job that does not belong to it. Without a traced job nobody is foreign.
fn co_tenant(status: &Status, index: u32, state: &GpuStatus) -> Option<(Fitness, String)> {
    let own: Vec<u32> = status
        .recent
        .on_gpu(index)
        .map(|(subject, _)| subject.pid)
        .collect();
    if own.is_empty() {
        return None;
    }
    let shares = state.reading.process_sm_ppm.value()?;
    let foreign: Vec<&(u32, u32)> = shares
        .iter()
        .filter(|(pid, ppm)| !own.contains(pid) && *ppm >= FOREIGN_PPM)
        .collect();
    let (pid, _) = foreign.iter().max_by_key(|(_, ppm)| *ppm)?;
    // Someone who shares the GPU with no living rank of the job is its successor, not a co-tenant.
    let is_shared = shares.iter().any(|(pid, ppm)| own.contains(pid) && *ppm > 0);
    let percent = foreign.iter().map(|(_, ppm)| u64::from(*ppm)).sum::<u64>() / 10_000;
    is_shared.then(|| {
        (
            Fitness::Degraded,
            format!("GPU {index}: process {pid}, no part of the job, uses {percent} % of its SM time"),
        )
    })
}

fn healthy(index: u32, state: &GpuStatus) -> String {
    let mut parts = vec![format!("GPU {index}")];
    if let Some(mhz) = state.reading.sm_mhz.value() {
        parts.push(format!("{mhz} MHz"));
    }
    if let Some(celsius) = state.reading.temperature_c.value() {
        parts.push(format!("{celsius} C"));
    }
    parts.push(match &state.reading.busy_ppm {
        Reading::Value(ppm) => format!("{} % busy", ppm / 10_000),
        Reading::NotMeasured | Reading::Unsupported | Reading::Failed(_) => {
            "activity not measured".to_owned()
        }
    });
    parts.join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::observation::GpuReading;
    use crate::runtime::status::Health;
    use stallscope_attribution::budget::Budget;
    use stallscope_attribution::facts::{GpuStep, GpuSubject, StepMethod, StepSignals};
    use stallscope_attribution::leaf::Leaf;
    use stallscope_attribution::time::Window;

    const NOW_NS: u64 = 100_000_000_000;
    const RANK_PID: u32 = 4000;

    fn gpu(edit: impl FnOnce(&mut GpuStatus)) -> GpuStatus {
        let mut state = GpuStatus {
            reading: GpuReading {
                gpu: 0,
                pci: "0000:17:00.0".to_owned(),
                device: "NVIDIA H100".to_owned(),
                pci_device_id: 0,
                busy_ppm: Reading::Value(970_000),
                sm_ppm: Reading::Unsupported,
                occupancy_ppm: Reading::Unsupported,
                tensor_ppm: Reading::Unsupported,
                dram_ppm: Reading::Unsupported,
                pcie_rx_bytes_per_s: Reading::Unsupported,
                pcie_tx_bytes_per_s: Reading::Unsupported,
                sm_mhz: Reading::Value(1830),
                sm_max_mhz: Reading::Value(1980),
                clock_reasons: Reading::Value(0),
                thermal_ns: Reading::Value(0),
                power_limit_ns: Reading::Value(0),
                energy_mj: Reading::Unsupported,
                temperature_c: Reading::Value(61),
                memory_used_bytes: Reading::Unsupported,
                process_sm_ppm: Reading::Value(vec![(RANK_PID, 900_000)]),
                processes: Reading::NotMeasured,
                links: Reading::NotMeasured,
            },
            read_ns: NOW_NS - 100_000_000,
            recent_thermal_ns: 0,
            recent_power_limit_ns: 0,
            recent_window_ns: 10_000_000_000,
            failures: 0,
            readings: 100,
        };
        edit(&mut state);
        state
    }

    fn status(gpus: Vec<GpuStatus>) -> Status {
        let mut status = Status {
            node: "node1".to_owned(),
            ..Status::default()
        };
        for (index, state) in (0..).zip(gpus) {
            status.gpus.insert(index, state);
        }
        let subject = GpuSubject {
            job: "llama".to_owned(),
            node: "node1".to_owned(),
            gpu: 0,
            pci: String::new(),
            device: String::new(),
            rank: 2,
            world: 4,
            pid: RANK_PID,
        };
        let mut leaves = [0; Leaf::COUNT];
        leaves[Leaf::IdleUnknown.index()] = 1000;
        let step = GpuStep {
            index: 0,
            window: Window::new(0, 1000).expect("a window"),
            realtime_offset_ns: 0,
            method: StepMethod::CollectivePeriod,
            period_calls: 4,
            budget: Budget::from_leaves(1000, leaves, 0, Vec::new()).expect("a budget"),
            signals: StepSignals {
                reference_sm_mhz: Some(1830),
                ..StepSignals::default()
            },
        };
        status.recent.push_step(&subject, step);
        status
    }

    fn one(edit: impl FnOnce(&mut GpuStatus)) -> (Fitness, String) {
        let check = judge(&status(vec![gpu(edit)]), None, NOW_NS);
        (check.fitness, check.reasons.join("; "))
    }

    #[test]
    fn a_busy_gpu_at_its_clock_is_fit_and_says_what_was_seen() {
        assert_eq!(
            one(|_| ()),
            (Fitness::Fit, "GPU 0 1830 MHz 61 C 97 % busy".to_owned())
        );
    }

    #[test]
    fn heat_degrades_above_a_fifth_of_the_time() {
        let (fitness, why) = one(|gpu| {
            gpu.recent_thermal_ns = 9_300_000_000;
            gpu.reading.temperature_c = Reading::Value(91);
        });
        assert_eq!(fitness, Fitness::Degraded);
        assert_eq!(
            why,
            "GPU 0: held back by heat for 93 % of the last 10 s, 1830 MHz, 91 C"
        );
        assert_eq!(one(|gpu| gpu.recent_thermal_ns = 1_900_000_000).0, Fitness::Fit);
    }

    #[test]
    fn a_power_limit_degrades_only_when_the_clock_shows_it() {
        assert_eq!(
            one(|gpu| gpu.recent_power_limit_ns = 10_000_000_000).0,
            Fitness::Fit
        );
        let (fitness, why) = one(|gpu| {
            gpu.recent_power_limit_ns = 10_000_000_000;
            gpu.reading.sm_mhz = Reading::Value(1200);
            gpu.reading.busy_ppm = Reading::Unsupported;
        });
        assert_eq!(fitness, Fitness::Degraded);
        assert!(why.contains("its power limit for 100 %"), "{why}");
    }

    #[test]
    fn a_low_clock_counts_under_load_only() {
        let (fitness, why) = one(|gpu| gpu.reading.sm_mhz = Reading::Value(1372));
        assert_eq!(fitness, Fitness::Degraded);
        assert_eq!(
            why,
            "GPU 0: 1372 MHz is 74 % of the reference 1830 MHz while 97 % busy"
        );
        let idle = one(|gpu| {
            gpu.reading.sm_mhz = Reading::Value(345);
            gpu.reading.busy_ppm = Reading::Value(0);
        });
        assert_eq!(idle.0, Fitness::Fit);
    }

    #[test]
    fn a_co_tenant_degrades_and_a_successor_does_not() {
        let with = |shares: Vec<(u32, u32)>| one(|gpu| gpu.reading.process_sm_ppm = Reading::Value(shares));
        let (fitness, why) = with(vec![(RANK_PID, 700_000), (777, 250_000)]);
        assert_eq!(fitness, Fitness::Degraded);
        assert_eq!(
            why,
            "GPU 0: process 777, no part of the job, uses 25 % of its SM time"
        );
        assert_eq!(with(vec![(777, 950_000)]).0, Fitness::Fit);
        assert_eq!(with(vec![(RANK_PID, 700_000), (777, 100)]).0, Fitness::Fit);
    }

    #[test]
    fn a_gpu_that_does_not_answer_is_unfit() {
        assert_eq!(one(|gpu| gpu.failures = 3).0, Fitness::Unfit);
        let (fitness, why) = one(|gpu| gpu.read_ns = NOW_NS - 42_000_000_000);
        assert_eq!(
            (fitness, why.as_str()),
            (Fitness::Unfit, "GPU 0: the driver has not answered for 42 s")
        );
    }

    #[test]
    fn the_worst_gpu_decides_and_only_its_reasons_are_given() {
        let hot = gpu(|gpu| gpu.recent_thermal_ns = 9_000_000_000);
        let silent = gpu(|gpu| gpu.failures = 9);
        let status = status(vec![hot, gpu(|_| ()), silent]);
        let all = judge(&status, None, NOW_NS);
        assert_eq!((all.fitness, all.reasons.len()), (Fitness::Unfit, 1));
        assert_eq!(judge(&status, Some(0), NOW_NS).fitness, Fitness::Degraded);
        assert_eq!(judge(&status, Some(1), NOW_NS).fitness, Fitness::Fit);
        let missing = judge(&status, Some(7), NOW_NS);
        assert_eq!(missing.reasons, ["GPU 7 is not read: known are 0, 1, 2"]);
    }

    #[test]
    fn a_node_without_gpus_is_unfit_and_says_why() {
        let mut status = Status::default();
        let why = "libnvidia-ml.so.1 not found: install the driver";
        status.health.push(Health {
            part: "nvml",
            condition: Condition::Missing(why.to_owned()),
        });
        let check = judge(&status, None, NOW_NS);
        assert_eq!(check.fitness, Fitness::Unfit);
        assert_eq!(check.reasons, [format!("no GPU is read: {why}")]);
    }

    #[test]
    fn a_node_that_is_asked_before_it_is_read_gets_no_verdict() {
        let mut status = Status::default();
        assert_eq!(check(&status, None, NOW_NS), None);
        status.set_health("nvml", Condition::Starting);
        assert_eq!(check(&status, None, NOW_NS), None);
        status.set_health("nvml", Condition::Works);
        let listed_none = check(&status, None, NOW_NS);
        assert_eq!(listed_none.map(|check| check.fitness), Some(Fitness::Unfit));
    }
}
