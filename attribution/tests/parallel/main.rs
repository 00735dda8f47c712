//! Blame in jobs of tensor, pipeline, data and expert parallelism: whoever is slow, everybody waits for somebody else.

mod clocks;
mod simulate;

use std::collections::BTreeMap;

use simulate::{GPUS, Played, Shape, play, traces, waited_ns};
use stallscope_attribution::activity::analyse;
use stallscope_attribution::cause::Cause;
use stallscope_attribution::job::JobAnalysis;

/// 64 ranks on eight nodes: tensor 4, pipeline 4, data and experts 4.
fn shape() -> Shape {
    Shape {
        tensor: 4,
        pipeline: 4,
        data: 4,
        micro_batches: 4,
        steps: 4,
        world: true,
        compute_ns: 400_000,
    }
}

fn healthy(_rank: usize, _step: usize) -> u64 {
    1000
}

fn explain(shape: &Shape, played: &Played) -> JobAnalysis {
    analyse(traces(shape, played, |_, at_ns| at_ns))
}

/// Waiting by the rank it was moved to; `None` is nobody's.
fn blamed(analysis: &JobAnalysis) -> BTreeMap<Option<u32>, u64> {
    let mut blamed = BTreeMap::new();
    for blame in &analysis.blame {
        *blamed.entry(blame.place.rank).or_default() += blame.cost_ns;
    }
    blamed
}

/// Of some ranks.
fn of(blamed: &BTreeMap<Option<u32>, u64>, is: impl Fn(usize) -> bool) -> u64 {
    let theirs = blamed
        .iter()
        .filter(|(rank, _)| rank.is_some_and(|rank| is(rank as usize)));
    theirs.map(|(_, ns)| *ns).sum()
}

/// Plays a job with slow ranks and without; what the slow ones are blamed for beyond that must be what everybody waits
/// longer, within a tenth.
fn costs_what_it_adds(
    slow: impl Fn(usize) -> bool + Copy,
    pace: impl Fn(usize, usize) -> u64,
) -> JobAnalysis {
    let shape = shape();
    let (before, after) = (play(&shape, healthy), play(&shape, pace));
    let (well, ill) = (explain(&shape, &before), explain(&shape, &after));
    for (played, analysis) in [(&before, &well), (&after, &ill)] {
        let moved: u64 = analysis.blame.iter().map(|blame| blame.cost_ns).sum();
        assert_eq!(moved, waited_ns(played), "every nanosecond is moved once");
    }
    let added = waited_ns(&after) - waited_ns(&before);
    let moved = of(&blamed(&ill), slow) - of(&blamed(&well), slow);
    assert!(
        moved * 10 > added * 9 && moved * 10 < added * 12,
        "{moved} of {added}"
    );
    ill
}

#[test]
fn one_slow_rank_is_found_through_its_peers() {
    // Tensor rank 2 of replica 1 in stage 2.
    let slow = 2 * 16 + 4 + 2;
    let pace = |rank, _| if rank == slow { 2_500 } else { 1_000 };
    let analysis = costs_what_it_adds(|rank| rank == slow, pace);
    let verdict = &analysis.verdicts[0];
    assert_eq!(verdict.place.rank, Some(38));
    assert_eq!(verdict.cause, Cause::KernelClock, "all of its kernels are slower");
    let habit = verdict
        .evidence
        .iter()
        .find(|seen| seen.what.starts_with("steps in which"));
    assert!(habit.is_some(), "{:?}", verdict.evidence);
}

#[test]
fn a_stage_with_more_work_is_an_imbalance_of_the_job() {
    let analysis = costs_what_it_adds(
        |rank| rank / 16 == 2,
        |rank, _| if rank / 16 == 2 { 3_000 } else { 1_000 },
    );
    let verdict = &analysis.verdicts[0];
    assert_eq!(verdict.cause, Cause::JobImbalance);
    assert_eq!((verdict.place.rank, verdict.place.node.clone()), (None, None));
    let stage = verdict
        .evidence
        .iter()
        .find(|seen| seen.what.contains("one pipeline stage"));
    assert!(
        stage.is_some_and(|seen| seen.what.contains("ranks 32, 33")),
        "{:?}",
        verdict.evidence
    );
}

#[test]
fn a_slow_node_is_a_place_of_its_own() {
    let node = 3;
    let analysis = costs_what_it_adds(
        |rank| rank / GPUS == node,
        |rank, _| if rank / GPUS == node { 2_500 } else { 1_000 },
    );
    let verdict = &analysis.verdicts[0];
    assert_eq!(
        verdict.place.node.as_deref(),
        Some("node3"),
        "{:?}",
        verdict.evidence
    );
    assert_eq!(verdict.place.rank, None);
    assert_eq!(verdict.cause, Cause::KernelClock);
}

#[test]
fn another_slow_rank_in_each_step_is_nobodys_hardware() {
    let shape = Shape { steps: 6, ..shape() };
    let pace = |rank, step| if rank == step * 11 % 64 { 3_000 } else { 1_000 };
    let analysis = explain(&shape, &play(&shape, pace));
    let verdict = &analysis.verdicts[0];
    assert_eq!(verdict.place.rank, None);
    assert_eq!(verdict.cause, Cause::JobImbalance);
}

#[test]
fn ranks_may_be_given_in_any_order() {
    let shape = shape();
    let played = play(&shape, |rank, _| if rank == 9 { 2_500 } else { 1_000 });
    let forth = traces(&shape, &played, |_, at_ns| at_ns);
    let mut back = forth.clone();
    back.ranks.reverse();
    back.ranks.swap(3, 40);
    let (forth, back) = (analyse(forth), analyse(back));
    assert_eq!(forth.blame, back.blame);
    assert_eq!(forth.verdicts, back.verdicts);
}
