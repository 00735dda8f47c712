//! The bars that the truth table must clear. `cargo xtask truth` plays more seeds than this test has time for.

use stallscope_fault_matrix::matrix::variants;
use stallscope_fault_matrix::score::{Score, score, score_traced};
use stallscope_fault_matrix::table::{markdown, summary};
use stallscope_fault_matrix::traced;
use stallscope_fault_matrix::variant::{Dose, Variant};

/// Jobs of 400 steps are left to the table.
const MOST_STEPS: usize = 200;

fn scores() -> Vec<Score> {
    let mut played: Vec<Variant> = variants(3..4);
    // Quiet faults begin mid-run here, the others are there from the start; the table has both of each.
    let from_start = |variant: &Variant| variant.faults.iter().all(|injected| injected.from == 0);
    played.retain(|variant| variant.steps <= MOST_STEPS);
    played.retain(|variant| {
        let both = variant.steps == 60 && !variant.is_compound();
        !both || from_start(variant) != (variant.dose == Dose::Quiet)
    });
    let half = played.len().div_ceil(2);
    std::thread::scope(|scope| {
        let workers: Vec<_> = played
            .chunks(half)
            .map(|part| scope.spawn(|| part.iter().map(score).collect::<Vec<_>>()))
            .collect();
        workers
            .into_iter()
            .flat_map(|worker| worker.join().expect("no variant panics"))
            .collect()
    })
}

#[test]
fn the_verdicts_clear_the_bars() {
    let scores = scores();
    let heard = summary(scores.iter().filter(|score| score.variant.dose != Dose::Masked));
    let masked = summary(scores.iter().filter(|score| score.variant.dose == Dose::Masked));
    let table = || markdown(&scores);
    assert!(heard.faults > 35, "{}", heard.faults);
    assert!(
        heard.place_right * 100 >= heard.faults * 95,
        "right cause and place too seldom:\n{}",
        table()
    );
    assert_eq!(
        heard.false_in_controls + masked.false_in_controls,
        0,
        "a control was accused:\n{}",
        table()
    );
    assert_eq!(
        masked.false_in_faults,
        0,
        "a false culprit at the masked dose:\n{}",
        table()
    );
    assert!(
        heard.leaf_mean <= 2.0 && masked.leaf_mean <= 2.0,
        "leaves too far off:\n{}",
        table()
    );
}

#[test]
fn the_verdicts_on_traces_clear_the_bars() {
    let scores: Vec<Score> = traced::variants(1..2).iter().map(score_traced).collect();
    let of = |wanted: &[Dose]| summary(scores.iter().filter(|score| wanted.contains(&score.variant.dose)));
    let table = || markdown(&scores);
    let loud = of(&[Dose::Loud, Dose::Noisy]);
    assert_eq!(loud.faults, 22);
    assert!(
        loud.place_right * 100 >= loud.faults * 95,
        "right cause and place too seldom:\n{}",
        table()
    );
    // A trace is judged without a healthy one beside it; steps that hardly vary show a third of a fault all the same.
    let quiet = of(&[Dose::Quiet]);
    assert!(
        quiet.place_right * 100 >= quiet.faults * 90,
        "too much was missed:\n{}",
        table()
    );
    let all = of(&Dose::ALL);
    assert_eq!(
        all.false_in_controls + all.false_in_faults,
        0,
        "somebody was accused falsely:\n{}",
        table()
    );
    // Records tell when everything ran: only the ends of collectives scatter, by microseconds.
    assert!(all.leaf_worst <= 0.05, "leaves too far off:\n{}", table());
}
