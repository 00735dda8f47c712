//! Analyses built by hand for the tests of this crate.

use stallscope_attribution::budget::Budget;
use stallscope_attribution::cause::{Cause, Confidence, Place};
use stallscope_attribution::facts::{Activity, GpuSubject, LeafInterval, RecordGap, StepMethod};
use stallscope_attribution::job::{
    Blame, Evidence, GpuSummary, JobAnalysis, Recovers, RuledOut, Tier, Verdict, WorkAccount,
};
use stallscope_attribution::leaf::Leaf;
use stallscope_attribution::links::{
    Distance, Finding, FindingCost, GpuPath, LinkReport, PathPort, Severity, Side, Unseen,
};
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use crate::document::Document;

/// 2026-11-22 00:58:25 UTC.
const START_NS: u64 = 1_795_309_105_000_000_000;
const SECOND_NS: u64 = 1_000_000_000;

/// One of four GPUs on two nodes; `leaves` in ms, the rest of `total_ms` goes to `compute.kernel`.
pub(crate) fn gpu(rank: u32, total_ms: i64, leaves: &[(Leaf, i64)], unmeasured: &[Leaf]) -> GpuSummary {
    let mut ns = [0_i64; Leaf::COUNT];
    for (leaf, ms) in leaves {
        ns[leaf.index()] += ms * 1_000_000;
    }
    // An odd remainder, so that nothing divides evenly by luck.
    let window_ns = total_ms * 1_000_000 + i64::from(rank) * 7 + 3;
    ns[Leaf::ComputeKernel.index()] += window_ns - ns.iter().sum::<i64>();
    let measured = Leaf::ALL.iter().filter(|leaf| !unmeasured.contains(leaf));
    let bits = measured.fold(0_u32, |bits, leaf| bits | 1 << leaf.index());
    let transfer = ns[Leaf::CommTransfer.index()];
    let intervals = vec![LeafInterval {
        leaf: Leaf::CommTransfer,
        low_ns: transfer - transfer / 10,
        high_ns: transfer + transfer / 5,
    }];
    let window_ns = u64::try_from(window_ns).expect("a positive window");
    GpuSummary {
        subject: GpuSubject {
            job: "llama-70b".to_owned(),
            node: format!("node{}", rank / 2),
            gpu: rank % 2,
            pci: format!("0000:{:02x}:00.0", 0x17 + 0x24 * (rank % 2)),
            device: "NVIDIA H100 80GB HBM3".to_owned(),
            rank,
            world: 4,
            pid: 4000 + rank,
        },
        total: Budget::from_leaves(window_ns, ns, bits, intervals).expect("leaves sum by construction"),
        method: StepMethod::CollectivePeriod,
        steps: 50,
        period_calls: 12,
        median_step_ns: window_ns / 50,
        activity: Reading::Value(Activity {
            busy_ppm: 981_000 - rank * 1_000,
            sm_ppm: 612_400,
            occupancy_ppm: 402_000,
            tensor_ppm: 398_100,
            dram_ppm: 287_500,
            compute_sm_ppm: 900_000,
        }),
    }
}

fn analysis(gpus: Vec<GpuSummary>, verdicts: Vec<Verdict>) -> JobAnalysis {
    JobAnalysis {
        job: "llama-70b".to_owned(),
        kind: "pretrain".to_owned(),
        observed: Window::new(START_NS, START_NS + 60 * SECOND_NS),
        tier: Tier::ProbesAndCounters,
        gpus,
        blame: Vec::new(),
        verdicts,
        gaps: Vec::new(),
        mfu_ppm: Some(378_151),
        mfu_declared: true,
        work: WorkAccount::default(),
        links: LinkReport::default(),
    }
}

fn verdict(cause: Cause, place: Place, cost_ms: u64, share_ppm: u32) -> Verdict {
    Verdict {
        cause,
        place,
        cost_ns: cost_ms * 1_000_000,
        share_ppm,
        confidence: Confidence::High,
        evidence: Vec::new(),
        ruled_out: Vec::new(),
        confirm: String::new(),
        recovers: Recovers::default(),
        onset_ns: None,
    }
}

fn evidence(what: &str, value: &str, expected: &str) -> Evidence {
    Evidence {
        what: what.to_owned(),
        value: value.to_owned(),
        expected: expected.to_owned(),
    }
}

/// One GPU runs hot and three wait for it: fault 3 of the loss budget, fifty steps of 1190 ms.
pub(crate) fn thermal_straggler() -> JobAnalysis {
    let base = [
        (Leaf::Ideal, 22_500),
        (Leaf::ComputeContention, 1_000),
        (Leaf::ComputeNonmatmul, 6_500),
        (Leaf::CommTransfer, 7_500),
        (Leaf::MemoryCopy, 250),
        (Leaf::IdleLaunch, 3_000),
        (Leaf::IdleDep, 2_000),
        (Leaf::IdleCpuSync, 1_000),
        (Leaf::IdleUnknown, 250),
    ];
    let missing = [
        Leaf::ComputeRecompute,
        Leaf::ComputePlatform,
        Leaf::IdleGc,
        Leaf::IdleCompile,
    ];
    let rank = |rank: u32, moved: Leaf, extra_ms: i64| {
        gpu(
            rank,
            59_500,
            &[&base[..], &[(moved, extra_ms), (Leaf::CommSkew, 1_000)]].concat(),
            &missing,
        )
    };
    let gpus = vec![
        rank(0, Leaf::CommSkew, 9_500),
        rank(1, Leaf::CommSkew, 9_500),
        rank(2, Leaf::ComputeClock, 9_500),
        rank(3, Leaf::CommSkew, 9_500),
    ];
    let culprit = Place {
        node: Some("node1".to_owned()),
        gpu: Some(0),
        pci: Some("0000:17:00.0".to_owned()),
        rank: Some(2),
        ..Place::default()
    };
    let mut thermal = verdict(Cause::DeviceThermal, culprit.clone(), 38_000, 159_664);
    thermal.evidence = vec![
        evidence("SM clock while busy on node1 GPU 0", "1372 MHz", "1830 MHz"),
        evidence("time throttled by heat", "58.9 s of 59.5 s", "0 s"),
        evidence("temperature", "91 C", "below 83 C"),
        evidence(
            "ranks that waited for rank 2",
            "3 of 3, in 50 of 50 steps",
            "no fixed last rank",
        ),
    ];
    thermal.ruled_out = vec![
        RuledOut {
            cause: Cause::NetworkNic,
            why: "no port had a backlog and comm.net is 0 on every rank".to_owned(),
        },
        RuledOut {
            cause: Cause::DeviceContention,
            why: "no other process was on the GPU".to_owned(),
        },
    ];
    thermal.confirm =
        "run `nvidia-smi -q -d TEMPERATURE,PERFORMANCE -i 0` on node1 and look for HW Thermal Slowdown: Active"
            .to_owned();
    thermal.recovers = Recovers {
        gpu_ns: 38_000_000_000,
        low_gpu_ns: 34_200_000_000,
        high_gpu_ns: 39_900_000_000,
        mfu_centipoints: Some(719),
    };
    thermal.onset_ns = Some(START_NS + 400_000_000);
    let mut analysis = analysis(gpus, vec![thermal]);
    analysis.blame = vec![
        Blame {
            place: culprit,
            leaf: Leaf::ComputeClock,
            cause: Cause::DeviceThermal,
            cost_ns: 28_500_000_000,
        },
        Blame {
            place: Place::default(),
            leaf: Leaf::CommSkew,
            cause: Cause::Unknown,
            cost_ns: 4_000_000_000,
        },
    ];
    analysis
}

/// A job in good health.
pub(crate) fn healthy() -> JobAnalysis {
    let leaves = [
        (Leaf::Ideal, 28_000),
        (Leaf::ComputeNonmatmul, 6_000),
        (Leaf::ComputeClock, -900),
        (Leaf::CommTransfer, 4_000),
        (Leaf::IdleLaunch, 1_200),
    ];
    let gpus = (0..4).map(|rank| gpu(rank, 50_000, &leaves, &[])).collect();
    let mut none = verdict(Cause::None, Place::default(), 0, 0);
    none.confidence = Confidence::Medium;
    none.evidence = vec![evidence(
        "largest avoidable leaf",
        "idle.launch, 2.4 %",
        "below 5 %",
    )];
    none.confirm = "compare the next hour with this one; a change of more than 2 points is news".to_owned();
    let mut analysis = analysis(gpus, vec![none]);
    analysis.mfu_ppm = Some(560_000);
    analysis
}

/// Idle time without evidence, model FLOPs not declared, device counters unsupported.
pub(crate) fn unexplained() -> JobAnalysis {
    let leaves = [(Leaf::CommProto, 3_000), (Leaf::IdleUnknown, 21_000)];
    let missing: Vec<Leaf> = Leaf::ALL
        .iter()
        .copied()
        .filter(|leaf| leaf.class().residual() != *leaf && *leaf != Leaf::IdleLaunch)
        .collect();
    let mut gpus: Vec<GpuSummary> = (0..2).map(|rank| gpu(rank, 60_000, &leaves, &missing)).collect();
    for gpu in &mut gpus {
        gpu.activity = Reading::Unsupported;
        gpu.method = StepMethod::FixedWindow;
        gpu.period_calls = 0;
    }
    let mut unknown = verdict(Cause::Unknown, Place::default(), 42_000, 350_000);
    unknown.confidence = Confidence::Low;
    unknown.evidence = vec![evidence("idle.unknown", "35.0 %", "below 10 %")];
    unknown.confirm =
        "run `stallscope doctor` on node0: probes that could not attach are named there".to_owned();
    unknown.recovers = Recovers {
        gpu_ns: 42_000_000_000,
        low_gpu_ns: 42_000_000_000,
        high_gpu_ns: 42_000_000_000,
        mfu_centipoints: None,
    };
    let mut analysis = analysis(gpus, vec![unknown]);
    analysis.kind = "unknown".to_owned();
    analysis.tier = Tier::Probes;
    analysis.mfu_ppm = None;
    analysis.mfu_declared = false;
    analysis
}

/// The straggler, seen through a record with holes.
pub(crate) fn with_gaps() -> JobAnalysis {
    let gap = |node: &str, window, what: &str, count| RecordGap {
        node: node.to_owned(),
        window,
        what: what.to_owned(),
        count,
    };
    let mut analysis = thermal_straggler();
    analysis.mfu_declared = false;
    analysis.gaps = vec![
        gap(
            "node0",
            Window::new(START_NS + 5 * SECOND_NS, START_NS + 9 * SECOND_NS),
            "the agent was restarted",
            3,
        ),
        gap(
            "node1",
            None,
            "kernel records lost in ring sched: the reader fell behind",
            1_204,
        ),
    ];
    analysis
}

/// Names that no operator would choose.
pub(crate) const HOSTILE: &str = "<script>alert('\u{1b}[31m\u{202e}&\"`</script>";

/// Everything that comes from outside is hostile.
pub(crate) fn hostile(text: &str) -> JobAnalysis {
    let text = || text.to_owned();
    let mut analysis = with_gaps();
    analysis.job = text();
    analysis.kind = text();
    for gpu in &mut analysis.gpus {
        gpu.subject.node = text();
        gpu.subject.device = text();
        gpu.subject.pci = text();
    }
    analysis.gpus[0].activity = Reading::Failed(text());
    for gap in &mut analysis.gaps {
        gap.node = text();
        gap.what = text();
    }
    let place = Place {
        node: Some(text()),
        pci: Some(text()),
        nic_port: Some(text()),
        link: Some(text()),
        ..Place::default()
    };
    for blame in &mut analysis.blame {
        blame.place = place.clone();
    }
    for verdict in &mut analysis.verdicts {
        verdict.place = place.clone();
        verdict.confirm = text();
        for evidence in &mut verdict.evidence {
            *evidence = Evidence {
                what: text(),
                value: text(),
                expected: text(),
            };
        }
        for ruled_out in &mut verdict.ruled_out {
            ruled_out.why = text();
        }
    }
    analysis
}

/// One finding, one path, one thing not seen.
pub(crate) fn link_report() -> LinkReport {
    let pci = || "0000:18:00.0".to_owned();
    LinkReport {
        paths: vec![GpuPath {
            node: "node1".to_owned(),
            job: "llama-70b".to_owned(),
            rank: Some(5),
            gpu: Some(3),
            pci: "0000:17:00.0".to_owned(),
            ports: vec![PathPort {
                port: "mlx5_1:1".to_owned(),
                pci: pci(),
                netdev: "eth2".to_owned(),
                distance: Distance::Switch,
                is_used: Reading::Value(true),
                peers: vec!["node0 mlx5_1:1".to_owned()],
            }],
        }],
        findings: vec![Finding {
            cause: Cause::NetworkPcie,
            place: Place {
                node: Some("node1".to_owned()),
                pci: Some(pci()),
                ..Place::default()
            },
            side: Side::Device,
            severity: Severity::Degraded,
            summary: "the link of mlx5_1 has 8 lanes".to_owned(),
            evidence: vec![Evidence {
                what: "lanes".to_owned(),
                value: "8".to_owned(),
                expected: "16".to_owned(),
            }],
            ruled_out: Vec::new(),
            window: Window::new(START_NS, START_NS + SECOND_NS).expect("a window"),
            carries_ppm: None,
            cost: FindingCost::NotMeasured,
        }],
        unseen: vec![Unseen {
            node: "node1".to_owned(),
            what: "mlx5_0:1: its rate was not measured".to_owned(),
        }],
    }
}

/// What devices told of a node whose jobs took no step.
pub(crate) fn links_alone() -> Document {
    Document::of_links(&link_report()).expect("a document")
}
