//! The generated jobs are those of the scenarios' definition.

use stallscope_attribution::leaf::Leaf;
use stallscope_fault_matrix::job::play;
use stallscope_fault_matrix::matrix::variants;
use stallscope_fault_matrix::truth;
use stallscope_fault_matrix::variant::{Dose, RANKS, Variant};

/// Scenario, length of a loud step in ms, and the share of the model's arithmetic in hundredths of a percent.
const DEFINED: [(&str, u64, u64); 13] = [
    ("healthy", 1000, 4500),
    ("1 slow NIC", 1300, 3462),
    ("2 half PCIe", 1155, 3896),
    ("3 thermal", 1190, 3782),
    ("4 loader", 1200, 3750),
    ("5 launch bound", 1400, 3214),
    ("6 co-tenant", 1150, 3913),
    ("8 GC pause", 1300, 3462),
    ("9 NVLink down", 1090, 4128),
    ("10 cold storage", 1150, 3913),
    ("11 CPU quota", 1180, 3814),
    ("12 stage imbalance", 1200, 3750),
    ("C1 wrong algorithm", 1120, 4018),
];

fn loud(scenario: &str) -> Variant {
    let wanted = |variant: &Variant| {
        let from_start = variant.faults.iter().all(|injected| injected.from == 0);
        variant.scenario == scenario && variant.dose == Dose::Loud && from_start
    };
    variants(0..1)
        .into_iter()
        .find(wanted)
        .expect("a variant of that name")
}

#[test]
fn steps_have_the_length_and_the_utilisation_of_the_definition() {
    for (scenario, step_ms, mfu) in DEFINED {
        let variant = loud(scenario);
        let job = play(&variant);
        let truth = truth::of(&variant, &job);
        let ms = truth.total_ns / (RANKS * variant.steps) as u64 / 1_000_000;
        // Jitter: the last of 32 ranks makes the step, and a fault on one rank adds all of its own to it.
        assert!(
            ms.abs_diff(step_ms) <= 25,
            "{scenario}: {ms} ms, defined {step_ms}"
        );
        let ideal = u64::try_from(truth.leaves["ideal"]).expect("positive");
        let seen = ideal * 10_000 / truth.total_ns;
        assert!(seen.abs_diff(mfu) <= 100, "{scenario}: {seen}, defined {mfu}");
    }
}

#[test]
fn checkpoints_take_a_fifth_of_the_time() {
    let variant = loud("7 checkpoint");
    let truth = truth::of(&variant, &play(&variant));
    let checkpoints = u64::try_from(truth.leaves["idle.ckpt"]).expect("positive");
    // 12 s in every 62 s.
    let share = checkpoints * 10_000 / truth.total_ns;
    assert!(share.abs_diff(1935) <= 40, "{share}");
}

#[test]
fn every_nanosecond_has_a_leaf_that_exists() {
    for name in truth::leaf_names() {
        assert!(Leaf::from_name(name).is_some(), "{name}");
    }
    for variant in variants(0..1)
        .into_iter()
        .filter(|variant| variant.dose == Dose::Loud)
    {
        let truth = truth::of(&variant, &play(&variant));
        let sum: i64 = truth.leaves.values().sum();
        assert_eq!(u64::try_from(sum), Ok(truth.total_ns), "{}", variant.name());
    }
}
