#![expect(clippy::unwrap_used, reason = "tests")]

use stallscope_records::waits::Clock;

use super::hooks::SYMBOLS;
use super::*;
use crate::sources::probes::nccl::NcclVersion;
use crate::sources::probes::symbols::{FirstInstruction, Symbol, Symbols};

fn symbols(names: &[&'static str]) -> Symbols {
    let found = names.iter().zip(1..).map(|(name, at)| {
        let symbol = Symbol {
            file_offset: at,
            first: FirstInstruction::SingleStepped,
        };
        (*name, symbol)
    });
    Symbols::of(found)
}

#[test]
fn each_generation_of_hooks_is_found_with_its_arguments() {
    let [state, stop, states, stops] = SYMBOLS;
    let version = |minor, patch| Some(NcclVersion::new(2, minor, patch));
    let new = WaitHooks::find(version(32, 3), &symbols(&[state, stop])).unwrap();
    assert_eq!((new.state_at, new.stop_at, new.state_argument), (1, 2, 3));
    assert!(new.tells_credit && new.hit_ns >= 900);
    let middle = WaitHooks::find(version(25, 1), &symbols(&[state, stop])).unwrap();
    assert!(!middle.tells_credit);
    let first = WaitHooks::find(version(23, 4), &symbols(&[states, stops])).unwrap();
    assert_eq!((first.state_argument, first.tells_credit), (4, false));
    // A version that could not be read may have hooks, but nobody promises what they tell.
    assert!(
        !WaitHooks::find(None, &symbols(&[state, stop]))
            .unwrap()
            .tells_credit
    );
}

#[test]
fn what_is_seen_in_their_place_is_named() {
    let old = WaitHooks::find(Some(NcclVersion::new(2, 21, 5)), &symbols(&[])).unwrap_err();
    assert!(old.to_string().contains("2.21.5"), "{old}");
    assert!(old.to_string().contains("public calls"), "{old}");
    for half in [&SYMBOLS[..1], &SYMBOLS[1..2], &[]] {
        let none = WaitHooks::find(Some(NcclVersion::new(2, 27, 5)), &symbols(half)).unwrap_err();
        assert!(none.to_string().contains("public calls"), "{none}");
    }
}

/// One thread: a step waits for the GPU from 100 to 300, a second from 200 on; both reads fall while it still does.
#[test]
fn steps_under_way_count_up_to_the_moment_of_reading() {
    let mut waits = Waits {
        epoch: 3,
        ..Waits::NONE
    };
    waits.clocks[0] = Clock {
        present: 1,
        changed_ns: 300,
        steps_ns: 300,
        any_ns: 200,
        entered: 2,
    };
    let first = now(waits, 3, 1_000);
    let second = now(waits, 3, 1_500);
    let grown = growth(&first, &second, true);
    let expected = StepWait {
        steps_ns: 500,
        any_ns: 500,
        entered: 0,
    };
    assert_eq!(
        (grown.send_gpu, grown.send_credit),
        (expected, Some(StepWait::default()))
    );
    let since_ever = growth(&Waits::NONE, &first, false);
    assert_eq!(
        (since_ever.send_gpu.steps_ns, since_ever.send_gpu.any_ns),
        (1_000, 900)
    );
    assert_eq!(since_ever.send_credit, None);
    // In another epoch nobody knows whether it still waits.
    assert_eq!(growth(&first, &now(waits, 4, 2_000), true).send_gpu.steps_ns, 0);
}
