//! Nodes whose clocks are minutes apart and drift.

use super::simulate::{GPUS, Shape, play, traces};
use super::{blamed, shape};
use stallscope_attribution::activity::analyse;

const MINUTE: u64 = 60_000_000_000;

/// Each node's clock: minutes apart, drifting by up to 50 ppm either way.
fn clock(rank: usize, at_ns: u64) -> u64 {
    let node = rank / GPUS;
    let drift_ppm = [0_i64, 50, -50, 20, -35, 41, -7, 50][node % 8];
    let drifted = i64::try_from(at_ns).expect("small") / 1000 * drift_ppm / 1000;
    (at_ns + (node as u64 * 7 % 8) * MINUTE).saturating_add_signed(drifted)
}

/// A job of half a minute: clocks drift apart by a millisecond.
fn long() -> Shape {
    Shape {
        compute_ns: 80_000_000,
        ..shape()
    }
}

/// Waiting that one rank is blamed for, on one clock and on eight.
fn both(shape: &Shape, slow: usize) -> (u64, u64) {
    let played = play(shape, |rank, _| if rank == slow { 2_500 } else { 1_000 });
    let one = analyse(traces(shape, &played, |_, at_ns| at_ns));
    let eight = analyse(traces(shape, &played, clock));
    let note = eight
        .work
        .notes
        .iter()
        .find(|note| note.contains("clocks were aligned"));
    assert!(
        note.is_some_and(|note| note.contains("8 clocks")),
        "{:?}",
        eight.work.notes
    );
    assert!(eight.gaps.is_empty(), "{:?}", eight.gaps);
    let alignment = eight.work.clocks.expect("clocks were aligned");
    assert_eq!(alignment.clocks, 8);
    assert!(
        alignment.error_ns < 1_000,
        "ends that agree leave what a drift in ppb rounds to: {alignment:?}"
    );
    let rank = u32::try_from(slow).ok();
    assert_eq!(eight.verdicts[0].place.rank, rank);
    (blamed(&one)[&rank], blamed(&eight)[&rank])
}

fn is_near(a: u64, b: u64) -> bool {
    a.abs_diff(b) * 50 < a
}

#[test]
fn the_ends_of_collectives_make_one_clock_of_many() {
    let (one, eight) = both(&long(), 38);
    assert!(is_near(one, eight), "{one} and {eight}");
}

#[test]
fn nodes_without_a_world_wide_collective_are_reached_through_others() {
    let shape = Shape {
        world: false,
        ..long()
    };
    let (one, eight) = both(&shape, 38);
    assert!(is_near(one, eight), "{one} and {eight}");
}

#[test]
fn waiting_shorter_than_the_error_of_the_clocks_is_nobodys() {
    // Two nodes whose ends scatter by 20 us, in a job whose ranks come within 4 us of each other.
    let shape = Shape {
        tensor: 1,
        pipeline: 1,
        data: 16,
        micro_batches: 20,
        compute_ns: 50_000,
        ..shape()
    };
    let played = play(&shape, |_, _| 1_000);
    let scattered = |rank: usize, at_ns: u64| {
        // Up and down by an eighth, so that no time goes back.
        let phase = at_ns / 8 % 40_000;
        let scatter = if rank < GPUS { 0 } else { phase.min(40_000 - phase) };
        at_ns + MINUTE * (rank / GPUS) as u64 + scatter
    };
    let analysis = analyse(traces(&shape, &played, scattered));
    let between: u64 = analysis.blame.iter().map(|blame| blame.cost_ns).sum();
    let total: u64 = analysis.gpus.iter().map(|gpu| gpu.total.window_ns()).sum();
    assert!(
        between * 20 < total,
        "{between} of {total}: {:?}",
        analysis.work.notes
    );
    let alignment = analysis.work.clocks.expect("clocks were aligned");
    assert!(
        (2_000..=20_000).contains(&alignment.error_ns),
        "ends scatter by up to 20 us: {alignment:?}"
    );
}
