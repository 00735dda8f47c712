//! What holds for every job: sums, conservation, and indifference to order.
#![expect(clippy::unwrap_used, reason = "tests")]

use crate::generator::{Fault, Scenario, make};
use proptest::prelude::*;
use stallscope_attribution::budget::Budget;
use stallscope_attribution::cause::Cause;
use stallscope_attribution::facts::{
    Activity, ClockFacts, FlowFacts, ForeignLoad, GpuHistory, GpuStep, GpuSubject, JobFacts, PortFacts, Span,
    SpanKind, StepMethod, StepSignals,
};
use stallscope_attribution::job::{JobAnalysis, Tier, analyse};
use stallscope_attribution::leaf::{Class, Leaf};
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

fn check(facts: &JobFacts, analysis: &JobAnalysis) {
    assert_eq!(analysis.gpus.len(), facts.gpus.len());
    let mut given: Vec<u64> = facts
        .gpus
        .iter()
        .map(|gpu| {
            let steps = gpu.steps.iter().map(|step| step.budget.window_ns());
            steps
                .chain(gpu.spans.iter().map(|span| span.budget.window_ns()))
                .sum()
        })
        .collect();
    let mut totals: Vec<u64> = analysis.gpus.iter().map(|gpu| gpu.total.window_ns()).collect();
    given.sort_unstable();
    totals.sort_unstable();
    assert_eq!(given, totals, "a GPU's total is its steps and spans");
    for gpu in &analysis.gpus {
        let sum: i64 = gpu.total.leaves().iter().sum();
        assert_eq!(sum, i64::try_from(gpu.total.window_ns()).unwrap());
        for leaf in Leaf::ALL {
            assert!(
                gpu.total.leaf_ns(*leaf) >= 0 || leaf.may_be_negative(),
                "{}",
                leaf.name()
            );
        }
        for interval in gpu.total.intervals() {
            let ns = gpu.total.leaf_ns(interval.leaf);
            assert!(
                interval.low_ns <= ns && ns <= interval.high_ns,
                "{interval:?} {ns}"
            );
        }
    }
    let waited: i64 = analysis
        .gpus
        .iter()
        .map(|gpu| gpu.total.leaf_ns(Leaf::CommSkew))
        .sum();
    let blamed: u64 = analysis.blame.iter().map(|blame| blame.cost_ns).sum();
    assert_eq!(
        u64::try_from(waited).unwrap(),
        blamed,
        "moving waiting loses nothing"
    );
    // Re-splitting moves time within communication only.
    for class in Class::ALL {
        let before: i64 = facts
            .gpus
            .iter()
            .flat_map(|gpu| {
                let steps = gpu.steps.iter().map(|step| step.budget.class_ns(class));
                steps
                    .chain(gpu.spans.iter().map(move |span| span.budget.class_ns(class)))
                    .collect::<Vec<_>>()
            })
            .sum();
        assert_eq!(
            before,
            analysis
                .gpus
                .iter()
                .map(|gpu| gpu.total.class_ns(class))
                .sum::<i64>()
        );
    }
    assert!(!analysis.verdicts.is_empty());
    for verdict in &analysis.verdicts {
        assert!(!verdict.confirm.is_empty());
        assert!(verdict.recovers.low_gpu_ns <= verdict.recovers.high_gpu_ns);
        if verdict.cause == Cause::None {
            assert_eq!((verdict.cost_ns, analysis.verdicts.len()), (0, 1));
        } else {
            assert!(!verdict.evidence.is_empty());
            assert!(verdict.cost_ns <= totals.iter().sum());
        }
    }
}

const FAULTS: [Fault; 10] = [
    Fault::None,
    Fault::LoaderCpu,
    Fault::Launch,
    Fault::CpuQuota { rank: 2 },
    Fault::SlowLink { node: 1 },
    Fault::Thermal { rank: 1 },
    Fault::CoTenant { rank: 3 },
    Fault::Checkpoint,
    Fault::CheckpointByFirst,
    Fault::MovingGc,
];

#[test]
fn generated_jobs_keep_every_sum() {
    for fault in FAULTS {
        let made = make(&Scenario::new(fault));
        check(&made.facts, &analyse(&made.facts));
    }
}

#[test]
fn the_order_of_ranks_and_windows_does_not_matter() {
    for fault in FAULTS {
        let facts = make(&Scenario::new(fault)).facts;
        let mut shuffled = facts.clone();
        shuffled.gpus.reverse();
        shuffled.gpus.swap(0, 2);
        shuffled.ports.reverse();
        shuffled.gpus[1].steps.reverse();
        assert_eq!(analyse(&facts), analyse(&shuffled));
    }
}

#[test]
fn renaming_ranks_renames_the_report() {
    let facts = make(&Scenario::new(Fault::Thermal { rank: 1 })).facts;
    let mut renamed = facts.clone();
    for gpu in &mut renamed.gpus {
        gpu.subject.rank = (gpu.subject.rank + 3) % 4;
    }
    let (before, after) = (analyse(&facts), analyse(&renamed));
    assert_eq!(before.verdicts[0].place.rank, Some(1));
    assert_eq!(after.verdicts[0].place.rank, Some(0));
    assert_eq!(before.verdicts[0].cost_ns, after.verdicts[0].cost_ns);
    for gpu in &before.gpus {
        let same = after
            .gpus
            .iter()
            .find(|other| other.subject.pid == gpu.subject.pid)
            .unwrap();
        assert_eq!(same.total, gpu.total);
    }
}

#[test]
fn an_idle_gpu_adds_idle_time_only() {
    let facts = make(&Scenario::new(Fault::Thermal { rank: 1 })).facts;
    let mut more = facts.clone();
    let window = more.gpus[0].steps[0].window;
    let mut subject = more.gpus[0].subject.clone();
    (subject.rank, subject.gpu, subject.pid) = (9, 7, 77);
    let budget = Budget::unobserved(window.len_ns());
    let span = Span {
        kind: SpanKind::Unobserved,
        window,
        realtime_offset_ns: 0,
        budget,
    };
    more.gpus.push(GpuHistory {
        subject,
        steps: Vec::new(),
        spans: vec![span],
    });
    let (before, after) = (analyse(&facts), analyse(&more));
    let leaf = |analysis: &JobAnalysis, leaf| -> i64 {
        analysis.gpus.iter().map(|gpu| gpu.total.leaf_ns(leaf)).sum()
    };
    for each in Leaf::ALL {
        let added = leaf(&after, *each) - leaf(&before, *each);
        let expected = if *each == Leaf::IdleUnknown {
            i64::try_from(window.len_ns()).unwrap()
        } else {
            0
        };
        assert_eq!(added, expected, "{}", each.name());
    }
    assert_eq!(before.verdicts[0].cause, after.verdicts[0].cause);
    assert_eq!(before.verdicts[0].place, after.verdicts[0].place);
}

#[test]
fn a_job_of_nothing_has_an_answer() {
    let facts = JobFacts {
        job: "j".into(),
        ..JobFacts::default()
    };
    let analysis = analyse(&facts);
    check(&facts, &analysis);
    assert_eq!(
        (analysis.verdicts[0].cause, analysis.mfu_ppm, analysis.observed),
        (Cause::None, None, None)
    );
    assert_eq!(analysis.tier, Tier::Probes);
}

#[test]
fn missing_steps_are_named_and_the_rest_still_speaks() {
    let mut facts = make(&Scenario::new(Fault::Thermal { rank: 1 })).facts;
    facts.gpus[2].steps.drain(40..60);
    // Records that begin or end a step apart are whole.
    facts.gpus[0].steps.remove(0);
    facts.gpus[1].steps.pop();
    facts.gpus.pop();
    let analysis = analyse(&facts);
    check(&facts, &analysis);
    let gap = |text: &str| {
        analysis
            .gaps
            .iter()
            .find(|gap| gap.what.contains(text))
            .map(|gap| gap.count)
    };
    assert_eq!(gap("rank 2"), Some(20));
    assert_eq!((gap("rank 0"), gap("rank 1")), (None, None));
    assert_eq!(gap("3 of 4"), Some(1));
    assert_eq!(analysis.verdicts[0].cause, Cause::DeviceThermal);
    assert_eq!(analysis.verdicts[0].place.rank, Some(1));
}

/// Thirty steps of a second of some ranks, each with its compute, idle time that nothing explains, and communication.
fn steps_of(ranks: &[(u64, u64)]) -> JobFacts {
    const MS: i64 = 1_000_000;
    let history = |(rank, (compute, unexplained)): (u32, &(u64, u64))| {
        let (compute, unexplained) = (compute.cast_signed(), unexplained.cast_signed());
        let mut leaves = [0_i64; Leaf::COUNT];
        leaves[Leaf::ComputeKernel.index()] = compute * MS;
        leaves[Leaf::IdleUnknown.index()] = unexplained * MS;
        leaves[Leaf::CommProto.index()] = (1_000 - compute - unexplained) * MS;
        let second = 1_000 * MS.unsigned_abs();
        let measured = ((1 << Leaf::COUNT) - 1) & !(1 << Leaf::CommSkew.index());
        let step = |index: u64| GpuStep {
            index,
            window: Window::new(index * second, (index + 1) * second).unwrap(),
            realtime_offset_ns: 0,
            method: StepMethod::CollectivePeriod,
            period_calls: 1,
            budget: Budget::from_leaves(second, leaves, measured, Vec::new()).unwrap(),
            signals: StepSignals::default(),
        };
        GpuHistory {
            subject: GpuSubject {
                job: "j".into(),
                node: format!("n{rank}"),
                gpu: 0,
                pci: String::new(),
                device: String::new(),
                rank,
                world: u32::try_from(ranks.len()).unwrap(),
                pid: rank,
            },
            steps: (1..31).map(step).collect(),
            spans: Vec::new(),
        }
    };
    JobFacts {
        job: "j".into(),
        kind: "pretrain".into(),
        gpus: (0..).zip(ranks).map(history).collect(),
        ..JobFacts::default()
    }
}

/// Ranks with blame, and the leaf of their own that has most of it.
fn blamed(ranks: &[(u64, u64)]) -> Vec<(u32, Leaf)> {
    let facts = steps_of(ranks);
    let analysis = analyse(&facts);
    check(&facts, &analysis);
    let mut found: Vec<(u32, Leaf)> = Vec::new();
    for blame in &analysis.blame {
        let rank = blame.place.rank.unwrap();
        if found.iter().all(|(other, _)| *other != rank) {
            found.push((rank, blame.leaf));
        }
    }
    found.sort_by_key(|(rank, _)| *rank);
    found
}

#[test]
fn idle_time_for_no_reason_seen_is_no_guilt_beside_a_busy_rank() {
    // Rank 0 computes all the time; rank 1 waits for it by a call that nobody saw.
    assert_eq!(
        blamed(&[(990, 0), (400, 580), (400, 0), (400, 0)]),
        [(0, Leaf::ComputeKernel)]
    );
}

#[test]
fn idle_time_for_no_reason_seen_is_guilt_where_nobody_else_was_late() {
    assert_eq!(
        blamed(&[(400, 590), (400, 0), (400, 0), (400, 0)]),
        [(0, Leaf::IdleUnknown)]
    );
    // Rank 0 computes longer than the others, but waited too: somebody held it up.
    assert_eq!(
        blamed(&[(850, 0), (400, 590), (400, 0), (400, 0)]),
        [(0, Leaf::ComputeKernel), (1, Leaf::IdleUnknown)]
    );
}

#[test]
fn windows_of_a_fixed_length_are_nothing_to_compare_steps_with() {
    const SECOND: u64 = 1_000_000_000;
    let mut facts = steps_of(&[(700, 0), (700, 0)]);
    for gpu in &mut facts.gpus {
        let mut at = SECOND;
        for (index, step) in gpu.steps.iter_mut().enumerate() {
            // Until the steps are found, windows of a second; the steps last five.
            let times = if index < 12 { 1 } else { 5 };
            if times == 1 {
                step.method = StepMethod::FixedWindow;
            }
            let leaves = step.budget.leaves().map(|ns| ns * times);
            let length = times.cast_unsigned() * SECOND;
            let measured = ((1 << Leaf::COUNT) - 1) & !(1 << Leaf::CommSkew.index());
            step.budget = Budget::from_leaves(length, leaves, measured, Vec::new()).unwrap();
            step.window = Window::new(at, at + length).unwrap();
            at += length;
        }
    }
    let analysis = analyse(&facts);
    let compared = analysis
        .verdicts
        .iter()
        .flat_map(|verdict| &verdict.evidence)
        .any(|row| row.what == "median step" && row.expected == "1000.0 ms");
    assert!(!compared, "{:?}", analysis.verdicts);
    assert!(
        analysis
            .verdicts
            .iter()
            .all(|verdict| verdict.cause != Cause::Unknown),
        "steps that were not found before are not slower steps: {:?}",
        analysis.verdicts
    );
}

#[test]
fn a_single_gpu_has_no_one_to_wait_for() {
    let scenario = Scenario {
        nodes: 1,
        gpus: 1,
        ..Scenario::new(Fault::LoaderCpu)
    };
    let facts = make(&scenario).facts;
    let analysis = analyse(&facts);
    check(&facts, &analysis);
    assert!(analysis.blame.is_empty());
    assert_eq!(analysis.verdicts[0].cause, Cause::DataLoader);
}

#[test]
fn every_verdict_says_what_it_rests_on() {
    for fault in FAULTS {
        let analysis = analyse(&make(&Scenario::new(fault)).facts);
        let verdict = &analysis.verdicts[0];
        assert!(
            verdict.evidence.len() >= if fault == Fault::None { 1 } else { 3 },
            "{fault:?}: {verdict:#?}"
        );
        if !matches!(fault, Fault::None | Fault::Checkpoint | Fault::CheckpointByFirst) {
            assert!(verdict.ruled_out.len() >= 2, "{fault:?}: {verdict:#?}");
            assert!(verdict.recovers.mfu_centipoints.unwrap() > 0);
        }
        assert!(
            verdict
                .ruled_out
                .iter()
                .all(|ruled| ruled.cause != verdict.cause && !ruled.why.is_empty())
        );
    }
}

fn any_reading<T: core::fmt::Debug + Clone>(
    value: impl Strategy<Value = T>,
) -> impl Strategy<Value = Reading<T>> {
    proptest::option::of(value).prop_map(|value| value.map_or(Reading::NotMeasured, Reading::Value))
}

prop_compose! {
    fn any_budget()(
        parts in proptest::collection::vec(0_i64..1_000_000_000, Leaf::COUNT),
        gain in 0_i64..1_000_000,
        measured: u32,
    ) -> Budget {
        let mut leaves = [0; Leaf::COUNT];
        leaves.copy_from_slice(&parts);
        leaves[Leaf::ComputeClock.index()] -= gain.min(leaves.iter().sum());
        Budget::from_leaves(leaves.iter().sum::<i64>().unsigned_abs(), leaves, measured & ((1 << Leaf::COUNT) - 1), Vec::new()).unwrap()
    }
}

prop_compose! {
    fn any_signals()(
        counts in proptest::collection::vec(0_u64..2_000_000_000, 8),
        throttled in any_reading(any::<u64>()),
        activity in any_reading(Just(Activity { busy_ppm: 900_000, sm_ppm: 800_000, ..Activity::default() })),
        clock in any_reading((any::<u32>(), any::<u64>(), any::<u64>())),
        reference_sm_mhz in proptest::option::of(any::<u32>()),
        foreign in any_reading((any::<u32>(), any::<u32>(), any::<u32>())),
    ) -> StepSignals {
        StepSignals {
            host_on_cpu_ns: counts[0],
            host_runnable_ns: counts[1],
            host_sync_ns: counts[2],
            quota_throttled_ns: throttled,
            worker_cpu_ns: counts[3],
            worker_io_ns: counts[4],
            launches: counts[5],
            comm_bytes: counts[6],
            collectives: 1,
            first_collective_ns: None,
            last_collective_ns: None,
            activity,
            clock: clock.map(|(sm_mhz, thermal_ns, power_ns)| ClockFacts { sm_mhz, thermal_ns, power_ns, ..ClockFacts::default() }),
            reference_sm_mhz,
            foreign: foreign.map(|(processes, largest_pid, sm_ppm)| ForeignLoad { processes, largest_pid, sm_ppm }),
            links: Reading::NotMeasured,
            lost_records: counts[7],
        }
    }
}

prop_compose! {
    /// A rank whose steps and spans follow each other, with holes.
    fn any_history(rank: u32)(
        pieces in proptest::collection::vec((any_budget(), any_signals(), 0_u64..50_000_000, 0_u8..5), 0..25),
        offset in -1_000_i64..1_000,
        node in 0_u8..3,
    ) -> GpuHistory {
        let subject = GpuSubject {
            job: "j".into(), node: format!("n{node}"), gpu: rank, pci: String::new(), device: String::new(),
            rank, world: 6, pid: rank,
        };
        let (mut steps, mut spans) = (Vec::new(), Vec::new());
        let mut at = 1_000_000;
        for (index, (budget, signals, hole, kind)) in pieces.into_iter().enumerate() {
            let window = Window::new(at, at + budget.window_ns()).unwrap();
            at = window.end_ns() + hole;
            if kind == 0 {
                spans.push(Span { kind: SpanKind::Checkpoint, window, realtime_offset_ns: offset, budget });
            } else {
                steps.push(GpuStep {
                    index: index as u64, window, realtime_offset_ns: offset, method: StepMethod::CollectivePeriod,
                    period_calls: 3, budget, signals,
                });
            }
        }
        GpuHistory { subject, steps, spans }
    }
}

prop_compose! {
    fn any_port()(
        node in 0_u8..3,
        start in 0_u64..10_000_000_000,
        length in 0_u64..3_000_000_000,
        line in any_reading(any::<u64>()),
        backlog in any_reading(any::<u64>()),
        overlimits in any_reading(any::<u64>()),
        flow in (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>()),
    ) -> PortFacts {
        PortFacts {
            node: format!("n{node}"),
            port: "eth0".into(),
            window: Window::new(start, start + length).unwrap(),
            realtime_offset_ns: 0,
            line_bytes_per_s: line,
            sent_bytes: flow.0,
            received_bytes: flow.1,
            backlog_bytes: backlog,
            queue_overlimits: overlimits,
            flows: vec![FlowFacts {
                pid: 1, local: String::new(), peer: String::new(), acked_bytes: flow.0, busy_ns: flow.1,
                receiver_limited_ns: flow.2, unsent_bytes: flow.3, retransmits: flow.0, rtt_us: 1, min_rtt_us: 1, ..FlowFacts::default()
            }],
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, max_shrink_iters: 200, ..ProptestConfig::with_cases(400) })]

    /// Whatever was recorded, however contradictory: an answer, and every sum exact.
    #[test]
    fn any_record_has_an_answer_that_sums(
        gpus in (0_u32..5).prop_flat_map(|count| (0..count).map(any_history).collect::<Vec<_>>()),
        ports in proptest::collection::vec(any_port(), 0..6),
    ) {
        let facts = JobFacts { job: "j".into(), kind: "other".into(), gpus, ports, hardware: Vec::new(), gaps: Vec::new() };
        check(&facts, &analyse(&facts));
    }

    /// Cutting a rank's time into steps elsewhere moves no time between leaves.
    #[test]
    fn merging_budgets_conserves_every_leaf(parts in proptest::collection::vec(any_budget(), 1..12), cut in 0_usize..12) {
        let cut = cut.min(parts.len());
        let halves = [Budget::sum(&parts[..cut]), Budget::sum(&parts[cut..])];
        let (whole, merged) = (Budget::sum(&parts), Budget::sum(&halves));
        prop_assert_eq!(whole.leaves(), merged.leaves());
        prop_assert_eq!(whole.window_ns(), merged.window_ns());
        prop_assert_eq!(whole.leaves().iter().sum::<i64>(), i64::try_from(whole.window_ns()).unwrap());
    }
}
