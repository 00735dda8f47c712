//! Generated jobs with one fault each: the right cause, the right place, no false culprit.

use crate::generator::{Fault, LEAN, Scenario, make};
use stallscope_attribution::cause::Cause;
use stallscope_attribution::facts::JobFacts;
use stallscope_attribution::job::{JobAnalysis, Verdict, analyse};
use stallscope_attribution::leaf::Leaf;

const SEEDS: core::ops::Range<u64> = 1..6;

struct Expected {
    cause: Cause,
    node: Option<String>,
    rank: Option<u32>,
}

fn expected(scenario: &Scenario) -> Expected {
    let rank = |cause, rank: usize| Expected {
        cause,
        node: Some(format!("node-{}", rank / scenario.gpus)),
        rank: u32::try_from(rank).ok(),
    };
    let job = |cause| Expected {
        cause,
        node: None,
        rank: None,
    };
    match scenario.fault {
        Fault::None | Fault::PowerCapAll | Fault::UnevenData => job(Cause::None),
        Fault::LoaderCpu => job(Cause::DataLoader),
        Fault::Storage => job(Cause::DataStorage),
        Fault::Launch => job(Cause::HostLaunch),
        Fault::CpuQuota { rank: hit } => rank(Cause::HostCpu, hit),
        Fault::SlowLink { node } => Expected {
            cause: Cause::NetworkNic,
            node: Some(format!("node-{node}")),
            rank: None,
        },
        Fault::Thermal { rank: hit } => rank(Cause::DeviceThermal, hit),
        Fault::CoTenant { rank: hit } => rank(Cause::DeviceContention, hit),
        Fault::Checkpoint | Fault::CheckpointByFirst => job(Cause::JobCheckpoint),
        Fault::MovingGc => job(Cause::HostGc),
        Fault::Imbalance { rank: hit } => rank(Cause::JobImbalance, hit),
        Fault::NodeCpu { node } => Expected {
            cause: Cause::HostCpu,
            node: Some(format!("node-{node}")),
            rank: None,
        },
    }
}

fn is(verdict: &Verdict, expected: &Expected) -> bool {
    verdict.cause == expected.cause
        && verdict.place.node == expected.node
        && verdict.place.rank == expected.rank
}

fn shown(analysis: &JobAnalysis) -> String {
    let verdicts: Vec<String> = analysis
        .verdicts
        .iter()
        .map(|verdict| {
            let place = (&verdict.place.node, verdict.place.rank);
            format!(
                "{} {place:?} {} ppm onset {:?}",
                verdict.cause.name(),
                verdict.share_ppm,
                verdict.onset_ns
            )
        })
        .collect();
    verdicts.join("; ")
}

/// The first verdict is right and no other one accuses anything.
fn right(scenario: &Scenario) -> Result<(), String> {
    let made = make(scenario);
    let analysis = analyse(&made.facts);
    let expected = expected(scenario);
    if analysis.verdicts.len() == 1 && is(&analysis.verdicts[0], &expected) {
        return Ok(());
    }
    Err(format!(
        "{scenario:?} (costs {} ppm): {}",
        made.cost_ppm,
        shown(&analysis)
    ))
}

/// Right, or nothing said.
fn not_wrong(scenario: &Scenario) -> Result<(), String> {
    let made = make(scenario);
    let analysis = analyse(&made.facts);
    let expected = expected(scenario);
    if analysis
        .verdicts
        .iter()
        .all(|verdict| verdict.cause == Cause::None || is(verdict, &expected))
    {
        return Ok(());
    }
    Err(format!(
        "{scenario:?} (costs {} ppm): {}",
        made.cost_ppm,
        shown(&analysis)
    ))
}

const FAULTS: [Fault; 12] = [
    Fault::LoaderCpu,
    Fault::Storage,
    Fault::Launch,
    Fault::CpuQuota { rank: 2 },
    Fault::SlowLink { node: 1 },
    Fault::Thermal { rank: 1 },
    Fault::CoTenant { rank: 3 },
    Fault::Checkpoint,
    Fault::CheckpointByFirst,
    Fault::MovingGc,
    Fault::Imbalance { rank: 0 },
    Fault::NodeCpu { node: 0 },
];

const CONTROLS: [Fault; 3] = [Fault::None, Fault::PowerCapAll, Fault::UnevenData];

/// Runs every combination and reports all that fail.
fn all(scenarios: impl Iterator<Item = Scenario>, check: fn(&Scenario) -> Result<(), String>) {
    let mut count = 0;
    let failed: Vec<String> = scenarios
        .inspect(|_| count += 1)
        .filter_map(|scenario| check(&scenario).err())
        .collect();
    assert!(
        failed.is_empty(),
        "{} of {count} wrong:\n{}",
        failed.len(),
        failed.join("\n")
    );
    assert!(count > 0);
}

fn each(faults: &[Fault], change: impl Fn(&mut Scenario)) -> impl Iterator<Item = Scenario> {
    faults
        .iter()
        .flat_map(move |fault| {
            SEEDS.map(|seed| Scenario {
                seed,
                ..Scenario::new(*fault)
            })
        })
        .map(move |mut scenario| {
            change(&mut scenario);
            scenario
        })
}

#[test]
fn loud_faults_that_begin_mid_run_are_named() {
    all(each(&FAULTS, |_| {}), right);
}

#[test]
fn loud_faults_from_the_start_are_named() {
    all(
        each(&FAULTS, |scenario| scenario.active = (0, scenario.steps)),
        right,
    );
}

#[test]
fn loud_faults_that_end_again_are_named() {
    all(
        each(&FAULTS, |scenario| {
            (scenario.steps, scenario.active) = (150, (40, 95))
        }),
        right,
    );
}

#[test]
fn a_fault_of_the_last_steps_is_not_diluted() {
    all(
        each(&FAULTS[..7], |scenario| {
            (scenario.steps, scenario.active) = (260, (235, 260))
        }),
        right,
    );
}

#[test]
fn loud_faults_of_a_larger_job_are_named() {
    let large = |scenario: &mut Scenario| (scenario.nodes, scenario.gpus, scenario.steps) = (4, 8, 70);
    all(each(&FAULTS, large).filter(|scenario| scenario.seed == 1), right);
}

#[test]
fn loud_faults_are_named_on_a_noisy_host() {
    all(
        each(&FAULTS[..11], |scenario| scenario.host_noise_us = 8000),
        right,
    );
}

#[test]
fn loud_faults_of_a_lean_job_are_named() {
    all(each(&FAULTS, |scenario| scenario.shape = LEAN), right);
    all(
        each(&FAULTS, |scenario| {
            (scenario.shape, scenario.active.0) = (LEAN, 0)
        }),
        right,
    );
    all(each(&CONTROLS, |scenario| scenario.shape = LEAN), right);
}

#[test]
fn two_faults_at_once_are_both_named() {
    for (fault, beside) in [
        (Fault::Thermal { rank: 1 }, Fault::SlowLink { node: 1 }),
        (Fault::CoTenant { rank: 3 }, Fault::LoaderCpu),
        (Fault::Thermal { rank: 2 }, Fault::Checkpoint),
        (Fault::CpuQuota { rank: 0 }, Fault::SlowLink { node: 1 }),
    ] {
        for seed in SEEDS {
            let scenario = Scenario {
                beside,
                seed,
                ..Scenario::new(fault)
            };
            let analysis = analyse(&make(&scenario).facts);
            let wanted = [fault, beside].map(|fault| expected(&Scenario { fault, ..scenario }));
            for wanted in &wanted {
                assert!(
                    analysis.verdicts.iter().any(|verdict| is(verdict, wanted)),
                    "{scenario:?}: {}",
                    shown(&analysis)
                );
            }
            assert_eq!(analysis.verdicts.len(), 2, "{scenario:?}: {}", shown(&analysis));
        }
    }
}

#[test]
fn quiet_faults_are_named_or_not_but_never_wrongly() {
    all(each(&FAULTS, |scenario| scenario.dose = 33), not_wrong);
}

#[test]
fn masked_faults_accuse_nobody_else() {
    all(each(&FAULTS, |scenario| scenario.dose = 10), not_wrong);
}

#[test]
fn controls_accuse_nobody() {
    all(each(&CONTROLS, |_| {}), right);
    all(each(&CONTROLS, |scenario| scenario.host_noise_us = 8000), right);
    all(
        each(&CONTROLS, |scenario| scenario.active = (0, scenario.steps)),
        right,
    );
}

#[test]
fn onset_is_told_to_within_a_few_steps() {
    for scenario in each(&FAULTS[..7], |_| {}) {
        let made = make(&scenario);
        let verdict = &analyse(&made.facts).verdicts[0];
        let step = &made.facts.gpus[0].steps[scenario.active.0];
        let began = step
            .window
            .start_ns()
            .saturating_add_signed(step.realtime_offset_ns);
        let onset = verdict
            .onset_ns
            .unwrap_or_else(|| panic!("{scenario:?}: no onset"));
        assert!(
            onset.abs_diff(began) < 2_000_000_000,
            "{scenario:?}: off by {} ns",
            onset.abs_diff(began)
        );
    }
}

#[test]
fn a_verdict_is_out_within_ten_seconds_of_the_onset() {
    // 25 steps of about 0.5 s, minus what alignment and the network's windows need.
    all(
        each(&FAULTS[..7], |scenario| {
            (scenario.steps, scenario.active) = (48, (30, 48))
        }),
        right,
    );
}

#[test]
fn costs_are_of_the_right_size() {
    for scenario in each(&FAULTS[..7], |scenario| scenario.active = (0, scenario.steps)) {
        let made = make(&scenario);
        let share = u64::from(analyse(&made.facts).verdicts[0].share_ppm);
        let off = share.abs_diff(made.cost_ppm);
        assert!(
            off < made.cost_ppm / 3,
            "{scenario:?}: {share} ppm, truth {} ppm",
            made.cost_ppm
        );
    }
}

#[test]
fn the_waterfall_is_near_the_truth() {
    let analysis = analyse(&make(&Scenario::new(Fault::None)).facts);
    for gpu in &analysis.gpus {
        let share = |leaf| gpu.total.leaf_ns(leaf) * 1000 / i64::try_from(gpu.total.window_ns()).unwrap_or(1);
        // 270 of about 345 ms compute, 50 exposed communication, 8 waiting for data, 10 launching.
        let comm =
            share(Leaf::CommProto) + share(Leaf::CommTransfer) + share(Leaf::CommSkew) + share(Leaf::CommNet);
        assert!((110..200).contains(&comm), "exposed communication {comm} of 1000");
        assert!(
            (10..40).contains(&share(Leaf::IdleDataCpu)),
            "{}",
            share(Leaf::IdleDataCpu)
        );
        assert!(
            (20..60).contains(&share(Leaf::IdleLaunch)),
            "{}",
            share(Leaf::IdleLaunch)
        );
        assert!(share(Leaf::CommSkew) < 60, "{}", share(Leaf::CommSkew));
    }
    let mfu = analysis.mfu_ppm.unwrap_or(0);
    assert!((340_000..400_000).contains(&mfu), "{mfu}");
    assert!(analysis.mfu_declared);
}

/// A sentence for a payer: what one device did not tell is not ruled out for the job.
#[test]
fn what_was_not_measured_is_not_ruled_out() {
    let clocks_are_cleared = |facts: &JobFacts| {
        let verdict = analyse(facts).verdicts.remove(0);
        assert_eq!(verdict.cause, Cause::DataLoader);
        let claim = "not below its reference";
        verdict.ruled_out.iter().any(|out| out.why.contains(claim))
    };
    let mut facts = make(&Scenario::new(Fault::LoaderCpu)).facts;
    assert!(clocks_are_cleared(&facts));
    for step in &mut facts.gpus[1].steps {
        step.signals.reference_sm_mhz = None;
    }
    assert!(!clocks_are_cleared(&facts));
}
