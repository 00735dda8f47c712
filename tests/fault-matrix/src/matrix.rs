//! The variants that are played: twelve faults, five controls, compounds.

use crate::variant::{Dose, Fault, GPUS, Injected, NODES, RANKS, Variant, drawn};

/// Steps of a job whose fault is there from the start, or begins after a third.
const STEPS: usize = 60;
/// First faulty step where the fault begins mid-run.
const ONSET: usize = 24;

/// The single faults and controls with the places that a seed draws.
fn singles(seed: u64) -> Vec<(&'static str, Fault)> {
    let node = |defined| drawn(seed, defined, NODES);
    let rank = |defined| drawn(seed, defined, RANKS);
    vec![
        ("1 slow NIC", Fault::SlowNic { node: node(2) }),
        ("2 half PCIe", Fault::HalfPcie { rank: rank(GPUS + 3) }),
        ("3 thermal", Fault::Thermal { rank: rank(5) }),
        ("4 loader", Fault::Loader),
        ("5 launch bound", Fault::LaunchBound),
        ("6 co-tenant", Fault::CoTenant { rank: rank(13) }),
        ("7 checkpoint", Fault::Checkpoint),
        ("8 GC pause", Fault::GcPause),
        ("9 NVLink down", Fault::NvlinkDown { node: node(3) }),
        ("10 cold storage", Fault::ColdStorage),
        ("11 CPU quota", Fault::CpuQuota { node: node(1) }),
        (
            "12 stage imbalance",
            Fault::Stage {
                interleaved: seed % 2 == 1,
            },
        ),
        ("C1 wrong algorithm", Fault::WrongAlgorithm),
        ("C2 uneven sequences", Fault::UnevenSequences),
        ("C3 hidden slow communication", Fault::HiddenSlowComm),
        ("C4 power cap on all", Fault::PowerCapAll),
        ("C5 profiler attach", Fault::ProfilerAttach),
    ]
}

/// Faults beyond the twelve, by the same rules.
fn further(seed: u64) -> Vec<(&'static str, Fault)> {
    let (node, rank) = (drawn(seed, 1, NODES), drawn(seed, 22, RANKS));
    vec![
        ("13 power cap on one", Fault::PowerCap { rank }),
        ("14 device fault", Fault::Xid { rank }),
        ("15 exposed copies", Fault::Copies),
        ("16 congested fabric", Fault::Fabric),
        ("17 line negotiated down", Fault::LineDown { node }),
    ]
}

/// What a job is, not what happens to it: at one dose, from the start.
const NATURES: [(&str, Fault); 3] = [
    ("18 low tensor activity", Fault::LowTensor),
    ("19 bound by memory", Fault::MemoryBound),
    ("C6 decode bound by memory", Fault::Decode),
];

/// Every variant for the given seeds: each scenario at three doses, from the start and beginning mid-run.
#[must_use]
pub fn variants(seeds: core::ops::Range<u64>) -> Vec<Variant> {
    let mut variants = Vec::new();
    for seed in seeds {
        for dose in Dose::ALL {
            for (scenario, fault) in singles(seed).into_iter().chain(further(seed)) {
                for from in onsets(fault) {
                    variants.push(single(scenario, fault, dose, seed, from));
                }
            }
            variants.extend(compounds(seed, dose));
        }
        let natures = NATURES.iter();
        variants.extend(natures.map(|(scenario, fault)| single(scenario, *fault, Dose::Loud, seed, 0)));
        variants.push(Variant {
            scenario: "healthy",
            faults: Vec::new(),
            dose: Dose::Loud,
            steps: STEPS,
            seed,
        });
    }
    variants
}

fn onsets(fault: Fault) -> Vec<usize> {
    match fault {
        Fault::ProfilerAttach | Fault::Checkpoint => vec![0],
        _ => vec![0, ONSET],
    }
}

fn single(scenario: &'static str, fault: Fault, dose: Dose, seed: u64, from: usize) -> Variant {
    let steps = if fault == Fault::Checkpoint { 150 } else { STEPS };
    let until = if fault == Fault::ProfilerAttach { 1 } else { steps };
    Variant {
        scenario,
        faults: vec![Injected { fault, from, until }],
        dose,
        steps,
        seed,
    }
}

fn compounds(seed: u64, dose: Dose) -> Vec<Variant> {
    let node = |defined| drawn(seed, defined, NODES);
    let rank = |defined| drawn(seed, defined, RANKS);
    let whole = |fault| Injected {
        fault,
        from: 0,
        until: STEPS,
    };
    let both = |scenario, one: Injected, other: Injected, steps| Variant {
        scenario,
        faults: vec![one, other],
        dose,
        steps,
        seed,
    };
    let thermal = Fault::Thermal { rank: rank(5) };
    let cotenant = Fault::CoTenant { rank: rank(13) };
    let first = Injected {
        fault: cotenant,
        from: 0,
        until: STEPS,
    };
    let then = Injected {
        fault: Fault::GcPause,
        from: STEPS,
        until: 2 * STEPS,
    };
    let middle = Injected {
        fault: thermal,
        from: 150,
        until: 350,
    };
    vec![
        both(
            "3+1 thermal and slow NIC",
            whole(thermal),
            whole(Fault::SlowNic { node: node(2) }),
            STEPS,
        ),
        both(
            "4+10 loader and cold storage",
            whole(Fault::Loader),
            whole(Fault::ColdStorage),
            STEPS,
        ),
        both("6 then 8 co-tenant, then GC", first, then, 2 * STEPS),
        Variant {
            scenario: "3 from step 150 to 350",
            faults: vec![middle],
            dose,
            steps: 400,
            seed,
        },
    ]
}
