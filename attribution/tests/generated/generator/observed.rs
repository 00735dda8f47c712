//! What an agent would have seen of a made job: host states, counters on a grid, network windows.

use stallscope_attribution::budget::{assess, assess_span};
use stallscope_attribution::facts::{
    Activity, ClockFacts, CollectiveFact, Copies, DeviceProfile, FlowFacts, ForeignLoad, GpuHistory,
    GpuSubject, HostState, PortFacts, SpanKind, StateInterval, StepEvidence, StepMethod, WorkerLoad,
};
use stallscope_attribution::peaks;
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use super::{Fault, Plan, Random, Rank, Scenario, StepTimes};

const US: u64 = 1000;
/// Length of a device sample.
const SAMPLE_US: u64 = 100_000;
/// Nodes' monotonic clocks differ; only the realtime offset joins them.
const BOOT_NS: u64 = 5_000_000_000;

fn window(start_us: u64, end_us: u64) -> Window {
    Window::new(BOOT_NS + start_us * US, BOOT_NS + end_us * US).unwrap()
}

pub(super) fn port_windows(
    scenario: &Scenario,
    faults: &[Fault],
    start_us: u64,
    end_us: u64,
    comm_us: u64,
) -> Vec<PortFacts> {
    let nodes = if scenario.nodes > 1 { scenario.nodes } else { 0 };
    let length = end_us - start_us;
    (0..nodes)
        .map(|node| {
            let slow = faults.contains(&Fault::SlowLink { node });
            PortFacts {
                node: format!("node-{node}"),
                port: format!("eth{node}"),
                window: window(start_us, end_us),
                realtime_offset_ns: offset(node),
                line_bytes_per_s: Reading::Value(2_500_000_000),
                sent_bytes: 100_000_000,
                received_bytes: 100_000_000,
                backlog_bytes: if slow {
                    Reading::Value(180_000)
                } else {
                    Reading::Value(0)
                },
                queue_overlimits: if slow {
                    Reading::Value(900)
                } else {
                    Reading::Value(0)
                },
                flows: vec![FlowFacts {
                    pid: 100,
                    local: format!("10.0.0.{node}:1"),
                    peer: "10.0.0.9:2".into(),
                    acked_bytes: 100_000_000,
                    busy_ns: if slow { comm_us * US } else { length * US / 12 },
                    receiver_limited_ns: 0,
                    unsent_bytes: if slow { 400_000 } else { 0 },
                    retransmits: 0,
                    rtt_us: if slow { 20_000 } else { 300 },
                    min_rtt_us: 100,
                    ..FlowFacts::default()
                }],
            }
        })
        .collect()
}

fn offset(node: usize) -> i64 {
    1_700_000_000_000_000_000 + i64::try_from(node).unwrap() * 37_000
}

fn profile() -> DeviceProfile {
    // 130 ms at the peak.
    DeviceProfile {
        model_flops_per_step: Some(128_622_000_000_000),
        ..peaks::profile(0x2330_10de, "")
    }
}

pub(super) fn history(scenario: &Scenario, at: usize, rank: &Rank) -> GpuHistory {
    let node = at / scenario.gpus;
    let subject = GpuSubject {
        job: "train".into(),
        node: format!("node-{node}"),
        gpu: u32::try_from(at % scenario.gpus).unwrap(),
        pci: format!("0000:{:02x}:00.0", 0x1b + at),
        device: "NVIDIA H100 80GB HBM3".into(),
        rank: u32::try_from(at).unwrap(),
        world: u32::try_from(scenario.nodes * scenario.gpus).unwrap(),
        pid: 1000 + u32::try_from(at).unwrap(),
    };
    let samples = samples(rank, at as u64 * 23_000 % SAMPLE_US, scenario.seed + at as u64);
    let highest = samples
        .iter()
        .filter(|(_, sums)| sums[0] > 300_000)
        .map(|(_, sums)| sums[1] * 1_000_000 / sums[0])
        .max();
    let highest = highest.unwrap_or(0);
    let evidence = |index: usize, start_us: u64, end_us: u64| StepEvidence {
        subject: subject.clone(),
        index: index as u64,
        window: window(start_us, end_us),
        realtime_offset_ns: offset(node),
        method: StepMethod::CollectivePeriod,
        drained: Vec::new(),
        host: Vec::new(),
        workers: Vec::new(),
        quota_throttled_ns: Reading::Value(0),
        launches: 0,
        copies: Copies::default(),
        collectives: Vec::new(),
        activity: Reading::Value(average(&samples, start_us, end_us, highest)),
        clock: Reading::NotMeasured,
        foreign: Reading::Value(ForeignLoad::default()),
        links: Reading::NotMeasured,
        lost_records: 0,
    };
    let steps = rank.steps.iter().enumerate().map(|(index, (plan, times))| {
        let evidence = step_evidence(evidence(index, times.start_us, times.end_us), plan, *times);
        assess(&evidence, &profile())
    });
    let spans = rank.spans.iter().map(|(index, start, end)| {
        let mut evidence = evidence(*index, *start, *end);
        evidence.drained = vec![window(*start, *end)];
        evidence.host = vec![StateInterval {
            window: window(*start, *end),
            state: HostState::Checkpoint,
        }];
        assess_span(&evidence, &profile(), SpanKind::Checkpoint)
    });
    GpuHistory {
        steps: steps.collect(),
        spans: spans.collect(),
        subject,
    }
}

fn step_evidence(mut evidence: StepEvidence, plan: &Plan, times: StepTimes) -> StepEvidence {
    let mut at = times.start_us;
    let mut host = Vec::new();
    let mut state = |state: HostState, length_us: u64| {
        host.push(StateInterval {
            window: window(at, at + length_us),
            state,
        });
        at += length_us;
        at
    };
    state(HostState::Waiting, plan.wait_us);
    state(HostState::Gc, plan.gc_us);
    state(HostState::Runnable, plan.runnable_us);
    let gap_end = state(HostState::OnCpu, plan.start_us);
    // Issuing is preempted in the middle.
    state(HostState::OnCpu, plan.issue_us / 2);
    state(HostState::Runnable, plan.issue_runnable_us);
    let issued = state(HostState::OnCpu, plan.issue_us / 2);
    state(HostState::Sync, times.end_us.saturating_sub(issued));
    let length_ns = (times.end_us - times.start_us) * US;
    let share = |ppm: u64| length_ns / 1000 * ppm / 1000;
    evidence.drained = vec![window(times.start_us, gap_end.min(times.end_us))];
    evidence.host = host;
    evidence.workers = vec![WorkerLoad {
        window: window(times.start_us, times.end_us),
        cpu_ns: share(plan.worker_cpu_ppm),
        io_ns: share(plan.worker_io_ppm),
    }];
    evidence.quota_throttled_ns = Reading::Value(plan.throttled_us * US);
    evidence.launches = plan.launches;
    evidence.copies = Copies {
        to_device_bytes: 8_000_000,
        count: 1,
        ..Copies::default()
    };
    evidence.collectives = (0..8)
        .map(|call| CollectiveFact {
            comm: 7,
            sequence: evidence.index * 8 + call,
            function: "all_reduce",
            bytes: 8_000_000,
            ranks: evidence.subject.world,
            call: window(gap_end, gap_end + 10),
        })
        .collect();
    evidence.clock = Reading::Value(ClockFacts {
        sm_mhz: plan.mhz,
        thermal_ns: if plan.thermal { length_ns } else { 0 },
        power_ns: if plan.power { length_ns } else { 0 },
        temperature_c: if plan.thermal { 88 } else { 61 },
        power_mw: 500_000,
    });
    if plan.foreign_ppm > 0 {
        let sm_ppm = u32::try_from(plan.foreign_ppm).unwrap();
        evidence.foreign = Reading::Value(ForeignLoad {
            processes: 1,
            largest_pid: 4242,
            sm_ppm,
        });
    }
    evidence
}

/// Busy, SM and tensor averages of each sample, ppm, with the sample's start.
fn samples(rank: &Rank, phase_us: u64, seed: u64) -> Vec<(u64, [u64; 3])> {
    let mut random = Random::new(seed ^ 0xabcd);
    let end = rank.now_us;
    let mut out = Vec::new();
    let (mut segment, mut segment_start, mut at) = (0, 0, 0);
    let mut stop = phase_us.max(1);
    while at < end {
        let mut sums = [0_u64; 3];
        let start = at;
        while at < stop.min(end) && segment < rank.segments.len() {
            let now = rank.segments[segment];
            let until = now.end_us.min(stop);
            let us = until.saturating_sub(at.max(segment_start));
            sums[0] += if now.busy { us * 1_000_000 } else { 0 };
            sums[1] += us * now.sm_ppm;
            sums[2] += us * now.tensor_ppm;
            at = until.max(at);
            if now.end_us <= stop {
                segment += 1;
                segment_start = now.end_us;
            }
        }
        let length = (stop.min(end) - start).max(1);
        out.push((
            start,
            sums.map(|sum| random.around(sum / length, 8).min(1_000_000)),
        ));
        at = stop;
        stop += SAMPLE_US;
    }
    out
}

fn average(samples: &[(u64, [u64; 3])], start_us: u64, end_us: u64, highest: u64) -> Activity {
    let mut sums = [0_u64; 3];
    let mut weight = 0;
    let first = samples
        .partition_point(|(start, _)| *start <= start_us)
        .saturating_sub(1);
    for (at, (start, values)) in samples
        .iter()
        .enumerate()
        .skip(first)
        .take_while(|(_, (start, _))| *start < end_us)
    {
        let stop = samples.get(at + 1).map_or(start + SAMPLE_US, |(next, _)| *next);
        let shared = stop.min(end_us).saturating_sub((*start).max(start_us));
        weight += shared;
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum += shared * value;
        }
    }
    let [busy, sm, tensor] = sums.map(|sum| u32::try_from(sum / weight.max(1)).unwrap());
    Activity {
        busy_ppm: busy,
        sm_ppm: sm,
        occupancy_ppm: sm / 3,
        tensor_ppm: tensor,
        dram_ppm: sm / 2,
        compute_sm_ppm: u32::try_from(highest.min(1_000_000)).unwrap(),
    }
}
