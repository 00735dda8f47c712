//! The budget of one GPU in one step.
#![expect(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use stallscope_attribution::budget::{assess, assess_span};
use stallscope_attribution::facts::{
    Activity, ClockFacts, CollectiveFact, Copies, DeviceProfile, ForeignLoad, GpuSubject, HostState,
    LinkFacts, SpanKind, StateInterval, StepEvidence, StepMethod, WorkerLoad,
};
use stallscope_attribution::leaf::{Class, Leaf};
use stallscope_attribution::peaks;
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

const MS: u64 = 1_000_000;

fn ms(start: u64, end: u64) -> Window {
    Window::new(start * MS, end * MS).unwrap()
}

fn state(state: HostState, start: u64, end: u64) -> StateInterval {
    StateInterval {
        window: ms(start, end),
        state,
    }
}

fn empty(window: Window) -> StepEvidence {
    StepEvidence {
        subject: GpuSubject {
            job: "j".into(),
            node: "n".into(),
            gpu: 0,
            pci: String::new(),
            device: String::new(),
            rank: 0,
            world: 1,
            pid: 1,
        },
        index: 0,
        window,
        realtime_offset_ns: 0,
        method: StepMethod::CollectivePeriod,
        drained: Vec::new(),
        host: Vec::new(),
        workers: Vec::new(),
        quota_throttled_ns: Reading::NotMeasured,
        launches: 0,
        copies: Copies::default(),
        collectives: Vec::new(),
        activity: Reading::NotMeasured,
        clock: Reading::NotMeasured,
        foreign: Reading::NotMeasured,
        links: Reading::NotMeasured,
        lost_records: 0,
    }
}

/// A step of 400 ms: 40 ms gap, 300 ms of compute, 60 ms of exposed communication, on an H100 at its reference clock.
fn step() -> StepEvidence {
    let s_c = 950_000_u64;
    let s_x = 20 * 1_000_000 / 132;
    let sm = (300 * s_c * 97 / 100 + 60 * s_x) / 400;
    StepEvidence {
        drained: vec![ms(0, 40)],
        host: vec![
            state(HostState::Waiting, 0, 30),
            state(HostState::OnCpu, 30, 100),
            state(HostState::Sync, 100, 400),
        ],
        workers: vec![WorkerLoad {
            window: ms(0, 400),
            cpu_ns: 300 * MS,
            io_ns: 100 * MS,
        }],
        launches: 1000,
        collectives: vec![CollectiveFact {
            comm: 1,
            sequence: 0,
            function: "all_reduce",
            bytes: 1 << 26,
            ranks: 4,
            call: ms(90, 91),
        }],
        activity: Reading::Value(Activity {
            busy_ppm: 900_000,
            sm_ppm: u32::try_from(sm).unwrap(),
            occupancy_ppm: 300_000,
            tensor_ppm: 450_000,
            dram_ppm: 300_000,
            compute_sm_ppm: 950_000,
        }),
        clock: Reading::Value(ClockFacts {
            sm_mhz: 1830,
            ..ClockFacts::default()
        }),
        foreign: Reading::Value(ForeignLoad::default()),
        ..empty(ms(0, 400))
    }
}

fn h100() -> DeviceProfile {
    // 150 ms at 989.4 TFLOP/s.
    DeviceProfile {
        model_flops_per_step: Some(148_410_000_000_000),
        ..peaks::profile(0x2330_10de, "")
    }
}

fn leaf_ms(evidence: &StepEvidence, profile: &DeviceProfile, leaf: Leaf) -> i64 {
    let step = assess(evidence, profile);
    (step.budget.leaf_ns(leaf) + 500_000) / 1_000_000
}

fn about(seen: i64, expected: i64) {
    assert!(
        (seen - expected).abs() <= 2,
        "{seen} ms, expected about {expected} ms"
    );
}

#[test]
fn a_healthy_step_splits_as_it_was_made() {
    let budget = assess(&step(), &h100()).budget;
    let class_ms = |class| budget.class_ns(class) / 1_000_000;
    about(class_ms(Class::Compute), 300);
    about(class_ms(Class::Comm), 60);
    about(class_ms(Class::Idle), 40);
    assert_eq!(budget.leaf_ns(Leaf::Ideal), 150_000_000);
    about(leaf_ms(&step(), &h100(), Leaf::ComputePlatform), 37);
    assert_eq!(budget.leaf_ns(Leaf::ComputeClock), 0);
    assert_eq!(budget.leaf_ns(Leaf::ComputeContention), 0);
    assert!(budget.is_measured(Leaf::ComputeContention) && !budget.is_measured(Leaf::ComputeNonmatmul));
    assert!(!budget.is_measured(Leaf::CommSkew) && !budget.is_measured(Leaf::CommTransfer));
    assert!(
        budget
            .intervals()
            .iter()
            .all(|interval| interval.leaf != Leaf::Ideal),
        "declared FLOPs are exact"
    );
    let comm = budget
        .intervals()
        .iter()
        .find(|interval| interval.leaf == Leaf::CommProto)
        .unwrap();
    assert!(comm.low_ns < 60_000_000 && comm.high_ns > 60_000_000, "{comm:?}");
}

#[test]
fn a_gap_is_split_exactly_by_what_the_host_did() {
    let budget = assess(&step(), &h100()).budget;
    // 30 ms of waiting, loaders three quarters on CPU; 10 ms on CPU; nothing idle inside the busy span.
    assert_eq!(budget.leaf_ns(Leaf::IdleDataCpu), 22_500_000);
    assert_eq!(budget.leaf_ns(Leaf::IdleDataStorage), 7_500_000);
    assert_eq!(budget.leaf_ns(Leaf::IdleLaunch), 10_000_000);
    assert_eq!(budget.leaf_ns(Leaf::IdleUnknown), 0);
}

#[test]
fn waiting_while_no_loader_works_is_not_blamed_on_data() {
    let mut evidence = step();
    evidence.workers[0].cpu_ns = 5 * MS;
    evidence.workers[0].io_ns = 0;
    assert_eq!(leaf_ms(&evidence, &h100(), Leaf::IdleDataCpu), 0);
    assert_eq!(leaf_ms(&evidence, &h100(), Leaf::IdleUnknown), 30);
}

#[test]
fn a_throttled_group_waits_for_a_cpu_not_for_its_loaders() {
    let mut evidence = step();
    evidence.quota_throttled_ns = Reading::Value(20 * MS);
    assert_eq!(leaf_ms(&evidence, &h100(), Leaf::IdleCpuSched), 20);
    assert_eq!(leaf_ms(&evidence, &h100(), Leaf::IdleDataCpu), 3);
}

#[test]
fn each_state_of_the_host_has_its_leaf() {
    for (doing, leaf) in [
        (HostState::Checkpoint, Leaf::IdleCkpt),
        (HostState::Gc, Leaf::IdleGc),
        (HostState::Compile, Leaf::IdleCompile),
        (HostState::Alloc, Leaf::IdleAlloc),
        (HostState::Sync, Leaf::IdleCpuSync),
        (HostState::CommCall, Leaf::IdleUnknown),
        (HostState::FileRead, Leaf::IdleDataStorage),
        (HostState::Runnable, Leaf::IdleCpuSched),
        (HostState::OnCpu, Leaf::IdleLaunch),
    ] {
        let mut evidence = step();
        evidence.host = vec![state(doing, 0, 40), state(HostState::Sync, 40, 400)];
        assert_eq!(leaf_ms(&evidence, &h100(), leaf), 40, "{doing:?}");
    }
}

#[test]
fn relaunching_after_a_second_drain_is_the_synchronisations_fault() {
    let mut evidence = step();
    evidence.drained.push(ms(200, 220));
    evidence.host = vec![
        state(HostState::OnCpu, 0, 60),
        state(HostState::Sync, 60, 200),
        state(HostState::OnCpu, 200, 240),
    ];
    assert_eq!(leaf_ms(&evidence, &h100(), Leaf::IdleCpuSync), 20);
    assert_eq!(leaf_ms(&evidence, &h100(), Leaf::IdleLaunch), 40);
}

#[test]
fn idle_time_between_launches_is_launch_bound_when_the_host_never_waits() {
    let mut evidence = step();
    evidence.host = vec![state(HostState::OnCpu, 0, 380), state(HostState::Sync, 380, 400)];
    if let Reading::Value(activity) = &mut evidence.activity {
        activity.busy_ppm = 500_000;
        activity.sm_ppm = 450_000;
    }
    // 40 ms drained and 160 ms more of idle time, less what samples across the edges may bring in.
    about(leaf_ms(&evidence, &h100(), Leaf::IdleLaunch), 195);
}

#[test]
fn a_lower_clock_takes_its_share_of_compute() {
    let mut evidence = step();
    evidence.clock = Reading::Value(ClockFacts {
        sm_mhz: 1373,
        thermal_ns: 400 * MS,
        ..ClockFacts::default()
    });
    let clock = leaf_ms(&evidence, &h100(), Leaf::ComputeClock);
    assert!(
        (68..=75).contains(&clock),
        "{clock} ms of 300 ms at three quarters of the clock"
    );
    evidence.clock = Reading::Value(ClockFacts {
        sm_mhz: 1980,
        ..ClockFacts::default()
    });
    let gain = leaf_ms(&evidence, &h100(), Leaf::ComputeClock);
    assert!(
        (-25..=-20).contains(&gain),
        "a clock above the reference is a gain, printed as such: {gain} ms"
    );
}

#[test]
fn another_process_takes_its_share_of_compute() {
    let mut evidence = step();
    evidence.foreign = Reading::Value(ForeignLoad {
        processes: 1,
        largest_pid: 7,
        sm_ppm: 350_000,
    });
    if let Reading::Value(activity) = &mut evidence.activity {
        // It takes 35 % of our compute's SMs, and runs on in our communication and our gap: 300 ms at
        // 92 x 0.65 + 35 %, 60 ms at 15 + 35 %, 40 ms at 35 %.
        activity.busy_ppm = 1_000_000;
        activity.sm_ppm = (300 * 948_975 + 60 * 501_515 + 40 * 350_000) / 400;
    }
    let budget = assess(&evidence, &h100()).budget;
    about(budget.class_ns(Class::Comm) / 1_000_000, 60);
    assert_eq!(leaf_ms(&evidence, &h100(), Leaf::ComputeContention), 105);
}

#[test]
fn without_collectives_there_is_no_communication() {
    let mut evidence = step();
    evidence.collectives.clear();
    assert_eq!(assess(&evidence, &h100()).budget.class_ns(Class::Comm), 0);
}

#[test]
fn an_unknown_device_and_no_flops_leave_ideal_to_tensor_activity() {
    let budget = assess(&step(), &DeviceProfile::default()).budget;
    assert_eq!(budget.leaf_ns(Leaf::Ideal), 180_000_000);
    assert!(
        budget
            .intervals()
            .iter()
            .any(|interval| interval.leaf == Leaf::Ideal),
        "flagged by its interval"
    );
    assert!(!budget.is_measured(Leaf::ComputePlatform) && !budget.is_measured(Leaf::ComputeClock));
}

#[test]
fn a_transfer_reference_names_the_unavoidable_part() {
    let profile = DeviceProfile {
        comm_bytes_per_s: Some(10_000_000_000),
        ..h100()
    };
    // 64 MiB x 1.5 at 10 GB/s.
    assert_eq!(leaf_ms(&step(), &profile, Leaf::CommTransfer), 10);
    about(leaf_ms(&step(), &profile, Leaf::CommProto), 50);
}

#[test]
fn nothing_seen_is_nothing_known() {
    let budget = assess(&empty(ms(0, 400)), &h100()).budget;
    assert_eq!(budget.leaf_ns(Leaf::IdleUnknown), 400_000_000);
    assert_eq!(budget.measured_bits(), 0);
}

#[test]
fn a_span_holds_no_model_arithmetic() {
    let mut evidence = step();
    evidence.host = vec![state(HostState::Checkpoint, 0, 400)];
    evidence.drained = vec![ms(0, 400)];
    evidence.activity = Reading::Value(Activity::default());
    let span = assess_span(&evidence, &h100(), SpanKind::Checkpoint);
    assert_eq!(span.budget.leaf_ns(Leaf::IdleCkpt), 400_000_000);
    assert_eq!(span.budget.leaf_ns(Leaf::Ideal), 0);
    let unseen = assess_span(&evidence, &h100(), SpanKind::Unobserved);
    assert_eq!(unseen.budget.leaf_ns(Leaf::IdleUnknown), 400_000_000);
}

#[test]
fn the_signals_carry_what_verdicts_need() {
    let signals = assess(&step(), &h100()).signals;
    assert_eq!(
        (signals.host_on_cpu_ns, signals.host_sync_ns),
        (70 * MS, 300 * MS)
    );
    assert_eq!(
        (signals.worker_cpu_ns, signals.worker_io_ns),
        (300 * MS, 100 * MS)
    );
    assert_eq!(
        (signals.first_collective_ns, signals.collectives),
        (Some(90 * MS), 1)
    );
    assert_eq!(
        (signals.comm_bytes, signals.reference_sm_mhz),
        (1 << 26, Some(1830))
    );
}

fn any_state() -> impl Strategy<Value = HostState> {
    prop_oneof![
        Just(HostState::Checkpoint),
        Just(HostState::Gc),
        Just(HostState::Alloc),
        Just(HostState::Sync),
        Just(HostState::CommCall),
        Just(HostState::FileRead),
        Just(HostState::Waiting),
        Just(HostState::Runnable),
        Just(HostState::OnCpu),
    ]
}

fn any_window() -> impl Strategy<Value = Window> {
    (0_u64..3000, 0_u64..900).prop_map(|(start, length)| Window::new(start, start + length).unwrap())
}

fn reading<T: core::fmt::Debug + Clone>(
    value: impl Strategy<Value = T>,
) -> impl Strategy<Value = Reading<T>> {
    proptest::option::of(value).prop_map(|value| value.map_or(Reading::Unsupported, Reading::Value))
}

prop_compose! {
    fn any_activity()(
        busy_ppm: u32, sm_ppm in 0_u32..1_200_000, tensor_ppm in 0_u32..1_500_000, compute_sm_ppm in 0_u32..1_100_000,
        busy_small in proptest::bool::ANY,
    ) -> Activity {
        let busy_ppm = if busy_small { busy_ppm % 1_000_001 } else { busy_ppm };
        Activity { busy_ppm, sm_ppm, tensor_ppm, compute_sm_ppm, ..Activity::default() }
    }
}

prop_compose! {
    fn any_evidence()(
        length in 0_u64..4000,
        drained in proptest::collection::vec(any_window(), 0..4),
        host in proptest::collection::vec((any_window(), any_state()), 0..12),
        workers in proptest::collection::vec((any_window(), 0_u64..5000, 0_u64..5000), 0..4),
        throttled in reading(any::<u64>()),
        launches in 0_u64..5,
        bytes in proptest::option::of(any::<u64>()),
        copied in 0_u64..1_000_000,
        activity in reading(any_activity()),
        clock in reading(any::<u32>()),
        foreign in reading((0_u32..3, any::<u32>())),
        lanes in reading((0_u32..20, 0_u32..20)),
    ) -> StepEvidence {
        let mut evidence = empty(Window::new(500, 500 + length).unwrap());
        evidence.drained = drained;
        evidence.host = host.into_iter().map(|(window, state)| StateInterval { window, state }).collect();
        evidence.workers =
            workers.into_iter().map(|(window, cpu_ns, io_ns)| WorkerLoad { window, cpu_ns, io_ns }).collect();
        evidence.quota_throttled_ns = throttled;
        evidence.launches = launches;
        evidence.collectives = bytes.into_iter().map(|bytes| CollectiveFact {
            comm: 1, sequence: 0, function: "all_reduce", bytes, ranks: 0, call: Window::instant(600),
        }).collect();
        evidence.copies = Copies { to_device_bytes: copied, count: 1, ..Copies::default() };
        evidence.activity = activity;
        evidence.clock = clock.map(|sm_mhz| ClockFacts { sm_mhz, ..ClockFacts::default() });
        evidence.foreign =
            foreign.map(|(processes, sm_ppm)| ForeignLoad { processes, largest_pid: 1, sm_ppm });
        evidence.links = lanes.map(|(pcie_lanes, pcie_lanes_max)| LinkFacts {
            pcie_lanes, pcie_lanes_max, pcie_generation: 4, pcie_generation_max: 5, ..LinkFacts::default()
        });
        evidence
    }
}

prop_compose! {
    fn any_profile()(
        peak in proptest::option::of(any::<u64>()),
        reachable in proptest::option::of(any::<u64>()),
        mhz in proptest::option::of(any::<u32>()),
        sms in proptest::option::of(0_u32..200),
        link in proptest::option::of(any::<u64>()),
        flops in proptest::option::of(any::<u64>()),
        comm in proptest::option::of(any::<u64>()),
    ) -> DeviceProfile {
        DeviceProfile {
            peak_flops_per_s: peak,
            reachable_flops_per_s: reachable,
            reference_sm_mhz: mhz,
            sm_count: sms,
            host_link_bytes_per_s: link,
            model_flops_per_step: flops,
            comm_bytes_per_s: comm,
        }
    }
}

#[test]
fn copies_over_half_a_link_take_twice_their_time() {
    // 60 ms of copies at the best rate beside 40 ms of idle time inside the busy span.
    let mut evidence = step();
    evidence.copies = Copies {
        to_device_bytes: 60 * 63_000_000,
        count: 1,
        ..Copies::default()
    };
    if let Reading::Value(activity) = &mut evidence.activity {
        activity.busy_ppm = 500_000;
        activity.sm_ppm = activity.sm_ppm * 5 / 9;
    }
    let profile = DeviceProfile {
        host_link_bytes_per_s: Some(63_000_000_000),
        ..h100()
    };
    let links = |lanes| {
        Reading::Value(LinkFacts {
            pcie_lanes: lanes,
            pcie_lanes_max: 16,
            pcie_generation: 5,
            pcie_generation_max: 5,
            ..LinkFacts::default()
        })
    };
    evidence.links = links(16);
    about(leaf_ms(&evidence, &profile, Leaf::MemoryCopy), 60);
    about(leaf_ms(&evidence, &profile, Leaf::MemoryPcie), 0);
    evidence.links = links(8);
    about(leaf_ms(&evidence, &profile, Leaf::MemoryCopy), 60);
    about(leaf_ms(&evidence, &profile, Leaf::MemoryPcie), 60);
    evidence.links = Reading::Unsupported;
    assert!(!assess(&evidence, &profile).budget.is_measured(Leaf::MemoryPcie));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the evidence says, even against itself, the budget is made by the honest path and sums.
    #[test]
    fn every_budget_sums_to_its_window(evidence in any_evidence(), profile in any_profile()) {
        let budget = assess(&evidence, &profile).budget;
        prop_assert_eq!(budget.window_ns(), evidence.window.len_ns());
        let sum: i64 = budget.leaves().iter().sum();
        prop_assert_eq!(sum, i64::try_from(budget.window_ns()).unwrap());
        for leaf in Leaf::ALL {
            prop_assert!(budget.leaf_ns(*leaf) >= 0 || leaf.may_be_negative());
        }
        for interval in budget.intervals() {
            let ns = budget.leaf_ns(interval.leaf);
            prop_assert!(interval.low_ns <= ns && ns <= interval.high_ns, "{:?} {}", interval, ns);
        }
        // The fallback of a contradiction is a window in which nothing is known: it must not be taken here.
        let seen = evidence.activity.value().is_some() && !evidence.window.is_empty();
        prop_assert!(!seen || budget.measured_bits() != 0);
    }

    /// The same step k times as long has every leaf k times as long, within rounding.
    #[test]
    fn scaling_all_times_scales_every_leaf(evidence in any_evidence(), k in 2_u64..50) {
        let mut evidence = evidence;
        if let Reading::Value(clock) = &mut evidence.clock {
            // Beyond what hardware has, the clock's ratio blows up the rounding of a nanosecond.
            clock.sm_mhz %= 4000;
        }
        let profile = DeviceProfile { model_flops_per_step: None, ..h100() };
        let scale = |window: Window| Window::new(window.start_ns() * k, window.end_ns() * k).unwrap();
        let mut long = evidence.clone();
        long.window = scale(long.window);
        long.drained.iter_mut().for_each(|gap| *gap = scale(*gap));
        long.host.iter_mut().for_each(|interval| interval.window = scale(interval.window));
        for load in &mut long.workers {
            load.window = scale(load.window);
            load.cpu_ns *= k;
            load.io_ns *= k;
        }
        long.quota_throttled_ns = long.quota_throttled_ns.map(|ns| ns.saturating_mul(k));
        long.copies.to_device_bytes = 0;
        let mut short = evidence;
        short.copies.to_device_bytes = 0;
        let (short, long) = (assess(&short, &profile).budget, assess(&long, &profile).budget);
        for leaf in Leaf::ALL {
            let off = (short.leaf_ns(*leaf) * i64::try_from(k).unwrap() - long.leaf_ns(*leaf)).abs();
            prop_assert!(off <= 24 * i64::try_from(k).unwrap(), "{} off by {}", leaf.name(), off);
        }
    }
}
