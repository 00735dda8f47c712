#![expect(clippy::unwrap_used, reason = "tests")]

mod verdicts;

use proptest::prelude::*;

use super::*;
use crate::budget::Budget;
use crate::cause::Cause;
use crate::job::JobAnalysis;
use crate::leaf::{Class, Leaf};

fn window(start: u64, end: u64) -> Window {
    Window::new(start, end).unwrap()
}

fn record(start: u64, end: u64, work: Work, launch: Option<u64>) -> Record {
    Record {
        window: window(start, end),
        work,
        stream: 7,
        launch: launch.map(|at_ns| Launch { at_ns, thread: 1 }),
        bytes: None,
        token: 1,
        shaped: true,
        pipe: None,
        pageable: false,
        collective: (work == COMM).then(Collective::default_message),
    }
}

impl Collective {
    fn default_message() -> Self {
        Self {
            group: 0,
            ranks: 0,
            message: 1,
            peer: None,
            bus_bytes: None,
        }
    }
}

const GEMM: Work = Work::Kernel(KernelClass::Gemm);
const COMM: Work = Work::Kernel(KernelClass::Communication);

fn rank(rank: u32, world: u32, records: Vec<Record>, host: Vec<HostRange>) -> RankTrace {
    RankTrace {
        devices: vec![Device {
            subject: GpuSubject {
                job: "job".into(),
                node: "node".into(),
                gpu: rank,
                pci: String::new(),
                device: String::new(),
                rank,
                world,
                pid: 0,
            },
            records,
        }],
        host,
        repeated: Vec::new(),
        math: Vec::new(),
        marks: Vec::new(),
        main_thread: Some(1),
        realtime_offset_ns: None,
        gaps: Vec::new(),
    }
}

fn explain(ranks: Vec<RankTrace>) -> JobAnalysis {
    analyse(TraceJob {
        job: "job".into(),
        kind: "unknown".into(),
        declared: Declared::default(),
        ranks,
    })
}

fn doing(start: u64, end: u64, doing: Doing) -> HostRange {
    HostRange {
        window: window(start, end),
        thread: 1,
        doing,
    }
}

fn only(budget: &Budget, expected: &[(Leaf, i64)]) {
    for leaf in Leaf::ALL {
        let want = expected
            .iter()
            .find(|(other, _)| other == leaf)
            .map_or(0, |(_, ns)| *ns);
        assert_eq!(budget.leaf_ns(*leaf), want, "{}", leaf.name());
    }
}

#[test]
fn compute_hides_communication_hides_copies() {
    let records = vec![
        record(0, 100, GEMM, None),
        record(50, 200, COMM, None),
        record(150, 300, Work::OnDevice, None),
    ];
    let analysis = explain(vec![rank(0, 2, records, Vec::new())]);
    only(
        &analysis.gpus[0].total,
        &[
            (Leaf::ComputeKernel, 100),
            (Leaf::CommProto, 100),
            (Leaf::MemoryCopy, 100),
        ],
    );
}

#[test]
fn a_gap_is_the_hosts_until_the_launch_and_latency_after_it() {
    let records = vec![
        record(0, 1_000, GEMM, Some(0)),
        record(9_000, 9_500, GEMM, Some(8_000)),
    ];
    let host = vec![
        doing(500, 2_000, Doing::Gc),
        doing(1_500, 5_000, Doing::Data),
        doing(0, 10_000, Doing::Issue),
    ];
    let analysis = explain(vec![rank(0, 1, records, host)]);
    only(
        &analysis.gpus[0].total,
        &[
            (Leaf::ComputeKernel, 1_500),
            (Leaf::IdleGc, 1_000),
            (Leaf::IdleDataCpu, 3_000),
            (Leaf::IdleLaunch, 4_000),
        ],
    );
}

#[test]
fn work_queued_in_time_waited_for_a_stream_or_for_the_launch_to_arrive() {
    let records = vec![
        record(0, 100_000, GEMM, Some(0)),
        record(110_000, 200_000, GEMM, Some(50_000)),
        record(300_000, 400_000, GEMM, Some(60_000)),
    ];
    let analysis = explain(vec![rank(0, 1, records, Vec::new())]);
    let total = &analysis.gpus[0].total;
    assert_eq!(
        (total.leaf_ns(Leaf::IdleLaunch), total.leaf_ns(Leaf::IdleDep)),
        (10_000, 100_000)
    );
}

#[test]
fn launching_after_a_drain_is_the_price_of_the_synchronisation() {
    let records = vec![
        record(0, 1_000, GEMM, Some(0)),
        record(9_000, 9_500, GEMM, Some(8_000)),
    ];
    let host = vec![doing(500, 2_000, Doing::Sync), doing(2_000, 10_000, Doing::Issue)];
    let analysis = explain(vec![rank(0, 1, records, host)]);
    let total = &analysis.gpus[0].total;
    assert_eq!(
        (total.leaf_ns(Leaf::IdleCpuSync), total.leaf_ns(Leaf::IdleLaunch)),
        (7_000, 1_000)
    );
}

#[test]
fn kernels_issued_again_are_recomputation() {
    let records = vec![
        record(0, 1_000, GEMM, Some(10)),
        record(1_000, 1_700, GEMM, Some(20)),
    ];
    let mut trace = rank(0, 1, records, Vec::new());
    let issued = |thread, start, end| Issued {
        thread,
        window: window(start, end),
    };
    trace.repeated = vec![issued(1, 15, 25), issued(2, 5, 15)];
    let analysis = explain(vec![trace]);
    only(
        &analysis.gpus[0].total,
        &[(Leaf::ComputeKernel, 1_000), (Leaf::ComputeRecompute, 700)],
    );
}

/// Five runs of one kernel by itself, and two beside a collective: one 400 longer, one 100 shorter.
fn beside_a_collective(shaped: bool) -> JobAnalysis {
    let mut records: Vec<Record> = (0..5)
        .map(|at| record(at * 1_000, at * 1_000 + 500, GEMM, Some(0)))
        .collect();
    records.push(record(5_000, 5_900, GEMM, Some(0)));
    records.push(record(6_000, 6_400, GEMM, Some(0)));
    records.push(record(5_000, 6_400, COMM, Some(0)));
    for record in &mut records {
        record.shaped = shaped;
    }
    explain(vec![rank(0, 1, records, Vec::new())])
}

#[test]
fn running_longer_beside_a_collective_is_contention() {
    let total = &beside_a_collective(true).gpus[0].total;
    assert_eq!(total.leaf_ns(Leaf::ComputeContention), 300);
    assert!(total.is_measured(Leaf::ComputeContention));
    assert_eq!(total.class_ns(Class::Compute), 5 * 500 + 900 + 400);
}

#[test]
fn without_shapes_contention_is_not_measured() {
    let analysis = beside_a_collective(false);
    assert!(!analysis.gpus[0].total.is_measured(Leaf::ComputeContention));
    assert!(
        analysis
            .work
            .notes
            .iter()
            .any(|note| note.contains("compute.contention: 100 %"))
    );
}

/// Two ranks, four collectives of one size; the last takes 600 where the best takes 100, after 50 of waiting.
fn slow_collective(bus_bytes: Option<u64>, declared: Declared) -> JobAnalysis {
    let collective = Collective {
        bus_bytes,
        ..Collective::default_message()
    };
    let lengths = [100, 110, 120, 600];
    let traces = (0..2).map(|at| {
        let records = (0_u64..).zip(lengths).map(|(number, length)| {
            let start = number * 10_000;
            let own = start + 50 * u64::from(at);
            Record {
                collective: Some(collective),
                ..record(own, start + 50 + length, COMM, Some(0))
            }
        });
        rank(at, 2, records.collect(), Vec::new())
    });
    analyse(TraceJob {
        job: "job".into(),
        kind: "unknown".into(),
        declared,
        ranks: traces.collect(),
    })
}

#[test]
fn collectives_are_measured_against_the_best_of_their_size() {
    let analysis = slow_collective(Some(1_000), Declared::default());
    for gpu in &analysis.gpus {
        let leaves = [Leaf::CommTransfer, Leaf::CommNet, Leaf::CommProto].map(|leaf| gpu.total.leaf_ns(leaf));
        assert_eq!(leaves, [400, 530, 0]);
        assert!(gpu.total.is_measured(Leaf::CommNet));
    }
    assert!(
        analysis
            .work
            .notes
            .iter()
            .any(|note| note.contains("as the best collective"))
    );
}

#[test]
fn collectives_are_measured_against_the_bandwidth_given() {
    let declared = Declared {
        bus_bytes_per_s: Some(20_000_000_000),
        ..Declared::default()
    };
    let analysis = slow_collective(Some(1_000), declared);
    let total = &analysis.gpus[0].total;
    assert_eq!(
        [total.leaf_ns(Leaf::CommTransfer), total.leaf_ns(Leaf::CommNet)],
        [200, 730]
    );
    let analysis = slow_collective(None, Declared::default());
    assert!(
        !analysis.gpus[0].total.is_measured(Leaf::CommTransfer),
        "no size, no reference"
    );
    assert_eq!(analysis.gpus[0].total.leaf_ns(Leaf::CommProto), 930);
}

/// Two steps of 1,000 on an H100 that need a tenth of the peak each.
fn declared_math(flops: u64) -> JobAnalysis {
    let records = vec![
        record(0, 1_000, GEMM, Some(10)),
        record(1_000, 2_000, GEMM, Some(20)),
    ];
    let mut trace = rank(0, 1, records, Vec::new());
    trace.devices[0].subject.device = "NVIDIA H100 80GB HBM3".into();
    trace.marks = vec![window(10, 20), window(20, 30)];
    analyse(TraceJob {
        job: "job".into(),
        kind: "unknown".into(),
        declared: Declared {
            model_flops_per_step: Some(flops),
            hardware_flops_per_step: Some(flops / 3 * 4),
            ..Declared::default()
        },
        ranks: vec![trace],
    })
}

#[test]
fn declared_flops_split_compute_and_give_an_mfu() {
    // 989.4 TFLOP/s for 100 ns.
    let analysis = declared_math(98_940_000);
    assert_eq!((analysis.mfu_ppm, analysis.mfu_declared), (Some(100_000), true));
    let total = &analysis.gpus[0].total;
    // Repeated work reaches 794.5 of 989.4 at best: 2 * 133 * (989.4 / 794.5 - 1).
    let leaves = [Leaf::Ideal, Leaf::ComputePlatform, Leaf::ComputeKernel].map(|leaf| total.leaf_ns(leaf));
    assert_eq!(leaves, [200, 65, 1_735]);
    assert_eq!(analysis.work.efficiency.unwrap().hfu_ppm, Some(133_000));
}

#[test]
fn more_math_than_the_peak_allows_still_sums() {
    let analysis = declared_math(98_940_000_000);
    let total = &analysis.gpus[0].total;
    assert_eq!(total.leaf_ns(Leaf::Ideal), 2_000);
    assert_eq!(total.window_ns(), 2_000);
}

#[test]
fn shapes_tell_the_arithmetic_of_the_kernels_they_launched() {
    let mut records = vec![
        record(0, 1_000, GEMM, Some(10)),
        record(1_000, 1_250, GEMM, Some(20)),
    ];
    records[0].pipe = Some(Pipe::Tensor);
    let mut trace = rank(0, 1, records, Vec::new());
    trace.devices[0].subject.device = "NVIDIA A100-SXM4-80GB".into();
    // 156 TFLOP/s for 100 ns; the other kernel's operator has no shapes.
    trace.math = vec![MathOp {
        thread: 1,
        window: window(5, 15),
        flops: 15_600_000,
        precision: crate::peaks::Precision::Fp32,
    }];
    let analysis = explain(vec![trace]);
    let total = &analysis.gpus[0].total;
    assert_eq!(total.leaf_ns(Leaf::Ideal), 125);
    let bounds: Vec<_> = total
        .intervals()
        .iter()
        .map(|of| (of.leaf, of.low_ns, of.high_ns))
        .collect();
    assert_eq!(bounds[0], (Leaf::Ideal, 100, 150));
    assert_eq!((analysis.mfu_ppm, analysis.mfu_declared), (Some(100_000), false));
}

#[test]
fn idle_time_nobody_explains_is_unknown() {
    let records = vec![
        record(0, 10, GEMM, None),
        record(9_000_010, 9_000_020, GEMM, None),
    ];
    let analysis = explain(vec![rank(0, 1, records, Vec::new())]);
    assert_eq!(analysis.gpus[0].total.leaf_ns(Leaf::IdleUnknown), 9_000_000);
    assert_eq!(analysis.verdicts[0].cause, Cause::Unknown);
}

fn late(start: u64, last: u64) -> Vec<Record> {
    vec![
        record(0, start, GEMM, Some(0)),
        record(start, last + 1_000, COMM, Some(0)),
        record(last + 1_000, last + 2_000, GEMM, Some(0)),
    ]
}

#[test]
fn waiting_moves_to_the_last_rank_and_what_it_did() {
    let ranks = [3_000, 5_000, 9_000].map(|start| late(start, 9_000));
    let traces = (0..)
        .zip(ranks)
        .map(|(at, records)| rank(at, 3, records, Vec::new()))
        .collect();
    let analysis = explain(traces);
    let skew: i64 = analysis
        .gpus
        .iter()
        .map(|gpu| gpu.total.leaf_ns(Leaf::CommSkew))
        .sum();
    assert_eq!(skew, 10_000);
    let blamed: Vec<_> = analysis
        .blame
        .iter()
        .map(|b| (b.place.rank, b.leaf, b.cost_ns))
        .collect();
    assert_eq!(blamed, [(Some(2), Leaf::ComputeKernel, 10_000)]);
    assert_eq!(analysis.verdicts[0].cause, Cause::JobImbalance);
    assert_eq!(analysis.verdicts[0].place.rank, Some(2));
    assert_eq!(analysis.verdicts[0].ruled_out[0].cause, Cause::NetworkFabric);
}

#[test]
fn what_kept_a_rank_before_its_first_work_is_known_from_its_host() {
    let early = vec![
        record(1_000, 10_000, COMM, Some(900)),
        record(10_000, 11_000, GEMM, Some(900)),
    ];
    let late = vec![
        record(9_000, 10_000, COMM, Some(8_000)),
        record(10_000, 11_000, GEMM, Some(8_000)),
    ];
    let host = vec![doing(0, 6_000, Doing::Data), doing(6_000, 8_500, Doing::Issue)];
    let analysis = explain(vec![rank(0, 2, early, Vec::new()), rank(1, 2, late, host)]);
    let blamed: Vec<_> = analysis
        .blame
        .iter()
        .map(|b| (b.place.rank, b.leaf, b.cost_ns))
        .collect();
    assert_eq!(
        blamed,
        [
            (Some(1), Leaf::IdleDataCpu, 5_000),
            (Some(1), Leaf::IdleLaunch, 3_000)
        ]
    );
    // The late rank's own budget begins with its first record.
    assert_eq!(analysis.gpus[1].total.window_ns(), 2_000);
}

#[test]
fn without_all_ranks_nobody_is_blamed_and_that_is_said() {
    let traces = vec![
        rank(0, 3, late(3_000, 9_000), Vec::new()),
        rank(1, 3, late(9_000, 9_000), Vec::new()),
    ];
    let analysis = explain(traces);
    assert!(analysis.blame.is_empty());
    assert!(!analysis.gpus[0].total.is_measured(Leaf::CommSkew));
    assert!(
        analysis.gaps.iter().any(|gap| gap.what.contains("2 of 3 ranks")),
        "{:?}",
        analysis.gaps
    );
}

#[test]
fn clocks_that_differ_are_aligned_by_the_ends_of_collectives() {
    let shift = |records: Vec<Record>, by: u64| {
        let moved = records.into_iter().map(|record| Record {
            window: window(record.window.start_ns() + by, record.window.end_ns() + by),
            launch: None,
            ..record
        });
        moved.collect()
    };
    let minute = 60_000_000_000;
    let traces = vec![
        rank(0, 2, late(300_000, 900_000), Vec::new()),
        rank(1, 2, shift(late(900_000, 900_000), minute), Vec::new()),
    ];
    let analysis = explain(traces);
    let blamed: Vec<_> = analysis
        .blame
        .iter()
        .map(|b| (b.place.rank, b.leaf, b.cost_ns))
        .collect();
    assert_eq!(blamed, [(Some(1), Leaf::ComputeKernel, 600_000)]);
}

#[test]
fn collectives_of_different_runs_are_not_matched() {
    let mut other = late(9_000, 9_000);
    other.push(record(20_000, 21_000, COMM, Some(0)));
    let analysis = explain(vec![
        rank(0, 2, late(3_000, 9_000), Vec::new()),
        rank(1, 2, other, Vec::new()),
    ]);
    assert!(analysis.blame.is_empty());
    assert!(
        analysis
            .gaps
            .iter()
            .any(|gap| gap.what.contains("cannot be matched")),
        "{:?}",
        analysis.gaps
    );
}

#[test]
fn marked_steps_begin_where_their_first_work_runs() {
    let records = vec![
        record(100, 200, GEMM, Some(50)),
        record(300, 400, GEMM, Some(150)),
        record(400, 700, GEMM, Some(210)),
    ];
    let mut trace = rank(0, 1, records, Vec::new());
    trace.marks = vec![window(140, 200), window(200, 300)];
    let analysis = explain(vec![trace]);
    assert_eq!(
        (analysis.gpus[0].steps, analysis.gpus[0].median_step_ns),
        (2, 300)
    );
}

#[test]
fn no_records_are_an_empty_answer() {
    let analysis = explain(vec![rank(0, 1, Vec::new(), Vec::new())]);
    assert_eq!(analysis.gpus[0].total.window_ns(), 0);
    assert_eq!(explain(Vec::new()).gpus.len(), 0);
}

fn any_work() -> impl Strategy<Value = Work> {
    prop_oneof![
        Just(GEMM),
        Just(COMM),
        Just(Work::Kernel(KernelClass::Unknown)),
        Just(Work::Kernel(KernelClass::Elementwise)),
        Just(Work::ToDevice),
        Just(Work::ToHost),
        Just(Work::OnDevice),
    ]
}

fn any_records() -> impl Strategy<Value = Vec<Record>> {
    let one = (
        0_u64..5_000,
        0_u64..400,
        any_work(),
        proptest::option::of(0_u64..5_000),
    );
    proptest::collection::vec(one, 1..40).prop_map(|records| {
        let records = records.into_iter();
        records
            .map(|(at, length, work, launch)| record(at, at + length, work, launch))
            .collect()
    })
}

fn any_host() -> impl Strategy<Value = Vec<HostRange>> {
    const ALL: [Doing; 7] = [
        Doing::Checkpoint,
        Doing::Gc,
        Doing::Compile,
        Doing::Alloc,
        Doing::Sync,
        Doing::Data,
        Doing::Issue,
    ];
    let one = (0_u64..5_000, 0_u64..900, 0_usize..7, 0_u32..3);
    proptest::collection::vec(one, 0..30).prop_map(|ranges| {
        let ranges = ranges.into_iter().map(|(at, length, doing, thread)| HostRange {
            window: window(at, at + length),
            thread,
            doing: ALL[doing],
        });
        ranges.collect()
    })
}

proptest! {
    #[test]
    fn every_nanosecond_has_one_leaf(records in any_records(), host in any_host()) {
        let start = records.iter().map(|r| r.window.start_ns()).min().unwrap();
        let end = records.iter().map(|r| r.window.end_ns()).max().unwrap();
        let analysis = explain(vec![rank(0, 1, records.clone(), host)]);
        let total = &analysis.gpus[0].total;
        prop_assert_eq!(total.window_ns(), end - start);
        let mut swept = [0_i64; 4];
        for at in start..end {
            let class = records
                .iter()
                .filter(|r| r.window.start_ns() <= at && at < r.window.end_ns())
                .map(|r| match r.work {
                    COMM => 1,
                    Work::Kernel(_) => 0,
                    _ => 2,
                })
                .min();
            swept[class.unwrap_or(3)] += 1;
        }
        prop_assert_eq!(Class::ALL.map(|class| total.class_ns(class)), swept);
    }

    #[test]
    fn moving_waits_conserves_them(
        starts in proptest::collection::vec(proptest::collection::vec(0_u64..1_000, 3), 1..6),
        host in any_host(),
    ) {
        let mut ranks: [Vec<Record>; 3] = Default::default();
        for (at, starts) in (0_u64..).zip(&starts) {
            let base = at * 2_000;
            let last = starts.iter().max().unwrap();
            for (records, start) in ranks.iter_mut().zip(starts) {
                records.push(record(base + start, base + last + 100, COMM, Some(base)));
            }
        }
        let waited: u64 = starts.iter().flat_map(|starts| {
            let last = *starts.iter().max().unwrap();
            starts.iter().map(move |start| last - start)
        }).sum();
        let traces = (0..).zip(ranks).map(|(at, records)| rank(at, 3, records, host.clone())).collect();
        let analysis = explain(traces);
        prop_assert_eq!(analysis.blame.iter().map(|blame| blame.cost_ns).sum::<u64>(), waited);
        // Nothing else runs, so all of it is exposed.
        let skew: i64 = analysis.gpus.iter().map(|gpu| gpu.total.leaf_ns(Leaf::CommSkew)).sum();
        prop_assert_eq!(skew, i64::try_from(waited).unwrap());
    }

    #[test]
    fn ranks_may_be_given_in_any_order(a in any_records(), b in any_records()) {
        let forth = explain(vec![rank(0, 2, a.clone(), Vec::new()), rank(1, 2, b.clone(), Vec::new())]);
        let back = explain(vec![rank(1, 2, b, Vec::new()), rank(0, 2, a, Vec::new())]);
        prop_assert_eq!(forth.gpus, back.gpus);
        prop_assert_eq!(forth.verdicts, back.verdicts);
    }
}
