use std::collections::BTreeMap;

use stallscope_attribution::activity::{Pattern, pattern};
use stallscope_attribution::cause::Cause;
use stallscope_attribution::facts::StepMethod;
use stallscope_attribution::job::{FlopsSource, JobAnalysis, Tier};
use stallscope_attribution::leaf::{Class, Leaf};
use stallscope_report::document::Document;

use super::{explain, trace};

const RESNET_0: &str = "kineto-resnet50/workers-0.pt.trace.json.gz";
const RESNET_4: &str = "kineto-resnet50/workers-4.pt.trace.json.gz";
const RESOLVER: &str = "hta/df_index_resolver.json.gz";
const CONTROL: &str = "hta/control.json.gz";
const NS_RESOLUTION: &str = "hta/ns_resolution.json.gz";
const MI300: &str = "mi300/resnet_act_checkpoint.json.gz";

/// Total and the four classes to the ns, steps, and no event lost.
fn sweep(name: &str, [total, classes @ ..]: [i64; 5], steps: u64) -> JobAnalysis {
    let analysis = explain(&[name]);
    assert_eq!(analysis.tier, Tier::Activity);
    let [gpu] = analysis.gpus.as_slice() else {
        panic!("{name} has one GPU");
    };
    assert_eq!(i64::try_from(gpu.total.window_ns()), Ok(total), "{name}");
    assert_eq!(
        Class::ALL.map(|class| gpu.total.class_ns(class)),
        classes,
        "{name}"
    );
    assert_eq!(gpu.steps, steps, "{name}");
    assert!(
        !analysis.gaps.iter().any(|gap| gap.what.contains("left out")),
        "{:?}",
        analysis.gaps
    );
    Document::from(&analysis).check().expect("a sound document");
    analysis
}

fn leaf(analysis: &JobAnalysis, leaf: Leaf) -> i64 {
    analysis.gpus.iter().map(|gpu| gpu.total.leaf_ns(leaf)).sum()
}

/// The same model on the same GPU, with loaders in the training process and in four others.
#[test]
fn the_loader_pair() {
    let alone = sweep(
        RESNET_0,
        [996_477_000, 591_532_000, 0, 12_026_000, 392_919_000],
        6,
    );
    let beside = sweep(
        RESNET_4,
        [801_550_000, 594_868_000, 0, 19_545_000, 187_137_000],
        6,
    );
    let data = leaf(&alone, Leaf::IdleDataCpu);
    assert!(data * 2 > alone.gpus[0].total.class_ns(Class::Idle), "{data}");
    assert_eq!(alone.verdicts[0].cause, Cause::DataLoader);
    assert!(leaf(&beside, Leaf::IdleDataCpu) * 2 <= data);
    assert!(
        beside
            .verdicts
            .iter()
            .all(|verdict| verdict.cause != Cause::DataLoader)
    );
}

#[test]
fn one_rank_of_two_with_slow_launches() {
    let row = [1_732_965_000, 620_516_000, 357_343_000, 22_754_000, 732_352_000];
    let analysis = sweep(RESOLVER, row, 5);
    assert_eq!(analysis.verdicts[0].cause, Cause::HostLaunch);
    assert!(analysis.blame.is_empty());
    assert!(analysis.gaps.iter().any(|gap| gap.what.contains("1 of 2 ranks")));
}

#[test]
fn one_rank_of_eight() {
    let analysis = sweep(
        CONTROL,
        [464_594_000, 281_336_000, 87_921_000, 19_330_000, 76_007_000],
        6,
    );
    assert_eq!(leaf(&analysis, Leaf::ComputeRecompute), 0);
    // Every product's shape is in the trace, and their kernels' names tell that the tensor units multiply.
    let efficiency = analysis.work.efficiency.expect("an efficiency");
    assert_eq!(efficiency.source, FlopsSource::OperatorShapes);
    assert!(
        efficiency.peak.starts_with("156.0 TFLOP/s tf32"),
        "{}",
        efficiency.peak
    );
}

#[test]
fn times_with_nanoseconds() {
    let row = [480_029_179, 468_153_602, 0, 4_300_839, 7_574_738];
    let analysis = sweep(NS_RESOLUTION, row, 5);
    assert_eq!(analysis.verdicts[0].cause, Cause::None);
}

#[test]
fn an_amd_gpu() {
    let row = [86_567_708, 25_739_303, 55_625_224, 2_637_529, 2_565_652];
    let analysis = sweep(MI300, row, 3);
    // gpu_timeline.csv beside the trace: 4.12223779296875 ms of the work whose launch it knows are recomputation.
    assert_eq!(leaf(&analysis, Leaf::ComputeRecompute), 4_122_223);
    assert!(analysis.gpus[0].total.is_measured(Leaf::ComputeRecompute));
    assert_eq!(analysis.gpus[0].subject.device, "AMD Instinct MI300X");
    // Exposed communication of one rank of eight may be transfer or waiting: no cause is named.
    assert_eq!(analysis.verdicts[0].cause, Cause::Unknown);
}

/// Every rank of one step: who was last, what it cost the others, and that it was not the network.
#[test]
fn eight_ranks_of_a_recommender() {
    let names: Vec<String> = (0..8)
        .map(|rank| format!("dlrm-8-ranks/worker{rank}.json.gz"))
        .collect();
    let analysis = explain(&names.iter().map(String::as_str).collect::<Vec<_>>());
    let mut blamed: BTreeMap<Option<u32>, u64> = BTreeMap::new();
    for blame in &analysis.blame {
        *blamed.entry(blame.place.rank).or_default() += blame.cost_ns;
    }
    let expected = [(Some(4), 5_009_000), (Some(5), 6_282_000), (Some(7), 35_552_000)];
    assert_eq!(blamed, BTreeMap::from(expected));
    assert_eq!(blamed.values().sum::<u64>(), 46_843_000);
    assert_eq!(leaf(&analysis, Leaf::CommSkew), 45_316_000, "the exposed part");
    // What binds comes first: the rank that the others wait for, before what all of them lose on their own.
    assert_eq!(analysis.verdicts[0].place.rank, Some(7));
    assert!(leaf(&analysis, Leaf::CommProto) * 10 < leaf(&analysis, Leaf::CommSkew));
    let network = |cause: Cause| cause.name().starts_with("network.");
    assert!(analysis.verdicts.iter().all(|verdict| !network(verdict.cause)));
    assert!(
        analysis.verdicts[0]
            .ruled_out
            .iter()
            .any(|out| network(out.cause))
    );
    Document::from(&analysis).check().expect("a sound document");
}

/// The steps of a trace without its marks.
fn steps(name: &str) -> (Pattern, Vec<u64>) {
    let mut trace = trace(name);
    let mut records = trace.records.devices.remove(0).records;
    records.sort_by_key(|record| record.window);
    let found = pattern(&records).expect("a pattern");
    // Tenths of a millisecond, rounded.
    let lengths = found
        .edges
        .windows(2)
        .map(|edge| (edge[1] - edge[0] + 50_000) / 100_000);
    let lengths = lengths.collect();
    (found, lengths)
}

#[test]
fn steps_are_found_without_marks() {
    let cases: [(&str, StepMethod, u32, &[u64]); 4] = [
        (
            RESOLVER,
            StepMethod::CollectivePeriod,
            404,
            &[3584, 3543, 3455, 3344],
        ),
        (
            RESNET_0,
            StepMethod::LaunchPeriod,
            1462,
            &[1762, 1787, 1750, 1807, 1681],
        ),
        (
            RESNET_4,
            StepMethod::LaunchPeriod,
            1478,
            &[1388, 1240, 1280, 1289, 1611],
        ),
        (
            NS_RESOLUTION,
            StepMethod::LaunchPeriod,
            870,
            &[957, 956, 957, 954],
        ),
    ];
    for (name, method, calls, lengths) in cases {
        let (found, measured) = steps(name);
        assert_eq!((found.method, found.calls), (method, calls), "{name}");
        assert_eq!(measured, lengths, "{name}");
    }
    let (found, lengths) = steps(CONTROL);
    assert_eq!((found.method, found.calls), (StepMethod::CollectivePeriod, 10));
    assert!(
        lengths.iter().all(|tenths| (750..=815).contains(tenths)),
        "{lengths:?}"
    );
}
