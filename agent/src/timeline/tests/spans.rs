//! Time that is in no step, and what is missing.

use stallscope_attribution::facts::{GpuSubject, Span, SpanKind};
use stallscope_attribution::leaf::Leaf;
use stallscope_attribution::time::Window;

use super::{assert_covered, process_fed, run, spans, steps};
use crate::observation::{CopyDirection, Fact, FileOp, ProcessFacts, ProcessKey, ProcessRole, SyncTarget};
use crate::timeline::synthetic::{COMPUTE, MAIN, MS, PROCESS, Script, process, window};
use crate::timeline::{Cut, CutKind, Event, Process, Timeline};

#[test]
fn calls_that_break_the_pattern_become_a_span() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 1_000 * MS;
    let mut edges = Vec::new();
    for round in 0..60 {
        if round == 40 {
            script.all_reduce(3);
            script.all_reduce(3);
            script.sync(SyncTarget::Context, 200 * MS);
            edges.push(script.now_ns);
        }
        script.step(10 * MS, 5, 100 * MS);
        edges.push(script.now_ns);
    }
    let events = run(&script.log);
    assert_covered(&events, 1_000 * MS, script.end_ns());
    let other: Vec<&Span> = spans(&events)
        .into_iter()
        .filter(|span| span.kind == SpanKind::Other)
        .collect();
    assert_eq!(other.len(), 1);
    assert_eq!(other[0].window, window(edges[39], edges[40]));
    assert_eq!(steps(&events).len(), 39 + 20);
}

#[test]
fn a_checkpoint_between_steps_is_seen_as_one() {
    let mut script = Script::new(1_000 * MS);
    let mut at = (0, 0);
    for round in 0..50 {
        if round == 40 {
            at.0 = script.now_ns;
            for _ in 0..8 {
                script.copy(64 << 20, CopyDirection::ToHost, None, 20 * MS);
            }
            for _ in 0..10 {
                script.file(MAIN, FileOp::Write, 32 << 20, 30 * MS);
            }
            script.file(MAIN, FileOp::Flush, 0, 700 * MS);
            at.1 = script.now_ns;
        }
        script.step(10 * MS, 5, 100 * MS);
    }
    let fed = process_fed(&script.log);
    let found: Vec<Window> = fed
        .checkpoints
        .within(window(0, u64::MAX))
        .map(|span| span.window)
        .collect();
    assert_eq!(found, [window(at.0, at.1)]);
    let events = run(&script.log);
    let longest = steps(&events)
        .into_iter()
        .max_by_key(|step| step.window.len_ns())
        .unwrap()
        .clone();
    assert_eq!(
        longest.window.start_ns(),
        at.0,
        "the pattern holds, so it is a step"
    );
    assert!(longest.budget.leaf_ns(Leaf::IdleCkpt) >= 900 * MS.cast_signed());
    assert_covered(&events, 1_000 * MS, script.end_ns());
}

#[test]
fn time_an_earlier_agent_did_not_see_is_named() {
    let mut script = Script::new(5_000 * MS);
    script.launches(COMPUTE, 1, MS);
    script.now_ns += 2_000 * MS;
    script.sync(SyncTarget::Context, MS);
    let mut timeline = Timeline::new("node-a");
    let earlier = GpuSubject {
        job: "made-up".to_owned(),
        node: "node-a".to_owned(),
        gpu: 1,
        pci: String::new(),
        device: String::new(),
        rank: 3,
        world: 8,
        pid: PROCESS.pid,
    };
    timeline.resume_from(vec![(earlier.clone(), 2_000 * MS), (earlier, 3_000 * MS)]);
    let mut events = Vec::new();
    script
        .log
        .iter()
        .cloned()
        .for_each(|observation| timeline.push(observation));
    timeline.finish(&mut events);
    let first = spans(&events)[0];
    assert_eq!(
        (first.kind, first.window),
        (SpanKind::Unobserved, window(3_000 * MS, 5_000 * MS))
    );
    assert_eq!(first.budget.leaf_ns(Leaf::IdleUnknown), 2_000 * MS.cast_signed());
    let named = |event: &Event| matches!(event, Event::Gap(gap) if gap.what.contains("rank 3"));
    assert_eq!(events.iter().filter(|event| named(event)).count(), 1);
    assert_covered(&events, 3_000 * MS, script.end_ns());
}

/// What one of two ranks of a job leaves behind that ends `gap_ms` before the other.
fn gaps_of_endings(gap_ms: u64) -> Vec<String> {
    let mut script = Script::new(1_000 * MS);
    let other = ProcessKey {
        pid: 101,
        start_ticks: 7,
    };
    let facts = ProcessFacts {
        rank: Some(2),
        gpu: Some(0),
        local_rank: Some(0),
        ..process(other, ProcessRole::Gpu)
    };
    script.fact(0, Fact::Process(Box::new(facts)));
    for _ in 0..40 {
        script.step(10 * MS, 5, 100 * MS);
    }
    script.fact(0, Fact::ProcessGone(other));
    script.now_ns += gap_ms * MS;
    script.fact(0, Fact::ProcessGone(PROCESS));
    script.now_ns += 10_000 * MS;
    script.fact(0, Fact::RealtimeOffset { ns: 1_000 });
    let events = run(&script.log);
    let text = |event: &Event| match event {
        Event::Gap(gap) => Some(gap.what.clone()),
        _ => None,
    };
    events.iter().filter_map(text).collect()
}

#[test]
fn a_rank_that_ends_alone_is_named_and_ranks_that_end_together_are_not() {
    let alone = gaps_of_endings(5_000);
    assert_eq!(
        alone,
        ["rank 2 (process 101, GPU 0) ended while 1 of the job's processes on the node went on"]
    );
    assert_eq!(gaps_of_endings(300), Vec::<String>::new());
}

#[test]
fn lost_records_are_named_and_counted() {
    let mut script = Script::new(1_000 * MS);
    for round in 0..40 {
        if round == 30 {
            script.fact(
                0,
                Fact::Lost {
                    ring: "cuda",
                    count: 12,
                },
            );
        }
        script.step(10 * MS, 5, 100 * MS);
    }
    let events = run(&script.log);
    assert!(
        events
            .iter()
            .any(|event| matches!(event, Event::Gap(gap) if gap.count == 12))
    );
    assert_eq!(
        steps(&events)
            .iter()
            .map(|step| step.signals.lost_records)
            .sum::<u64>(),
        12
    );
}

#[test]
fn a_clock_that_jumps_does_not_hang() {
    let mut script = Script::new(1_000 * MS);
    script.step(10 * MS, 5, 100 * MS);
    script.now_ns = u64::MAX - 1_000_000 * MS;
    script.launches(COMPUTE, 1, MS);
    let events = run(&script.log);
    assert_covered(&events, 1_000 * MS, script.end_ns());
}

#[test]
fn cuts_are_contiguous_when_a_pattern_comes_late() {
    let mut fed = Process::new(process(PROCESS, ProcessRole::Gpu), 0);
    fed.advance(40_000 * MS);
    fed.finish(40_000 * MS);
    let mut cuts: Vec<Cut> = Vec::new();
    while let Some(cut) = fed.next_pending() {
        cuts.push(cut);
    }
    assert!(
        cuts.iter().all(|cut| cut.kind == CutKind::Between),
        "nothing was submitted"
    );
    assert!(
        cuts.windows(2)
            .all(|pair| pair[0].window.end_ns() == pair[1].window.start_ns())
    );
    assert_eq!(cuts.last().unwrap().window.end_ns(), 40_000 * MS);
}
