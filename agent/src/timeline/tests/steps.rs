//! Where steps begin and end.

use stallscope_attribution::facts::{SpanKind, StepMethod};
use stallscope_attribution::leaf::Class;
use stallscope_attribution::time::Window;

use super::{assert_covered, run, spans, steps};
use crate::observation::{CopyDirection, Fact, SyncTarget};
use crate::timeline::synthetic::{COMM, COMPUTE, COPY, MS, Script, job, window};
use crate::timeline::{FIXED_NS, Timeline};

/// Steps with equal buckets: the calls alone have period one, the drains tell.
#[test]
fn steps_lie_between_drains() {
    let mut script = Script::new(1_000 * MS);
    script.communicator(77);
    script.now_ns += 1_000 * MS;
    let mut edges = Vec::new();
    for _ in 0..40 {
        script.step(10 * MS, 5, 100 * MS);
        edges.push(script.now_ns);
    }
    let events = run(&script.log);
    let steps = steps(&events);
    let expected: Vec<Window> = edges.windows(2).map(|pair| window(pair[0], pair[1])).collect();
    let found: Vec<Window> = steps.iter().map(|step| step.window).collect();
    assert_eq!(found, expected);
    for (index, step) in steps.iter().enumerate() {
        assert_eq!(step.index, index as u64);
        assert_eq!(
            (step.method, step.period_calls),
            (StepMethod::CollectivePeriod, 5)
        );
        assert_eq!(step.signals.collectives, 5);
        assert_eq!(step.signals.launches, 200 + 5 * 50 + 20);
        assert_eq!(step.signals.comm_bytes, 5 << 21);
        assert_eq!(step.realtime_offset_ns, 1_000);
        assert!(
            step.budget.class_ns(Class::Idle) >= 10 * MS.cast_signed(),
            "the wait is idle time"
        );
    }
    assert_eq!(spans(&events).first().unwrap().kind, SpanKind::Startup);
    assert_covered(&events, 1_000 * MS, script.end_ns());
}

/// The loss is waited for every fourth step only; the buckets are equal.
#[test]
fn a_wait_every_so_many_steps_does_not_make_steps_longer() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 1_000 * MS;
    let mut first_calls = Vec::new();
    for round in 0..80 {
        script.copy(1 << 20, CopyDirection::ToDevice, Some(COPY), 10_000);
        script.join(COPY, COMPUTE);
        script.launches(COMPUTE, 100, 25 * MS);
        for bucket in 0..4 {
            script.join(COMPUTE, COMM);
            if bucket == 0 {
                first_calls.push(script.now_ns);
            }
            script.all_reduce(1 << 20);
            script.launches(COMPUTE, 50, 10 * MS);
        }
        script.join(COMM, COMPUTE);
        if round % 4 == 3 {
            script.sync(SyncTarget::Stream(COMPUTE), 40 * MS);
        }
    }
    let events = run(&script.log);
    let found: Vec<Window> = steps(&events).iter().map(|step| step.window).collect();
    let expected: Vec<Window> = first_calls
        .windows(2)
        .map(|pair| window(pair[0], pair[1]))
        .collect();
    assert_eq!(found, expected);
    assert!(steps(&events).iter().all(|step| step.period_calls == 4));
    assert_covered(&events, 1_000 * MS, script.end_ns());
}

#[test]
fn without_drains_a_step_begins_with_the_pattern() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 1_000 * MS;
    let mut starts = Vec::new();
    for _ in 0..60 {
        script.now_ns += 30 * MS;
        starts.push(script.now_ns);
        for count in [10, 20, 30] {
            script.all_reduce(count);
            script.launches(COMPUTE, 10, 5 * MS);
        }
    }
    let events = run(&script.log);
    let found: Vec<u64> = steps(&events).iter().map(|step| step.window.start_ns()).collect();
    let expected: Vec<u64> = starts[..starts.len() - 1].to_vec();
    assert_eq!(found, expected, "the longest pause is before the first call");
    assert_covered(&events, 1_000 * MS, script.end_ns());
}

#[test]
fn a_job_without_collectives_has_the_period_of_its_launches() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 1_000 * MS;
    let mut edges = Vec::new();
    for _ in 0..40 {
        for kernels in [100, 20] {
            script.launches(COMPUTE, kernels, 50 * MS);
            script.sync(SyncTarget::Stream(COMPUTE), 20 * MS);
            script.now_ns += MS;
        }
        edges.push(script.now_ns - MS);
    }
    let events = run(&script.log);
    let steps = steps(&events);
    assert!(steps.len() >= 36, "{} steps", steps.len());
    for step in &steps {
        assert_eq!(
            (step.method, step.window.len_ns()),
            (StepMethod::LaunchPeriod, 142 * MS + 2_000)
        );
        assert_eq!(step.signals.launches, 120);
    }
    assert_covered(&events, 1_000 * MS, script.end_ns());
}

#[test]
fn without_any_period_windows_are_fixed() {
    let mut script = Script::new(1_000 * MS);
    for round in 0..3_000_u32 {
        script.launches(COMPUTE, 1 + round * round % 97, 10 * MS);
    }
    let events = run(&script.log);
    let steps = steps(&events);
    assert!(steps.len() >= 18, "{} steps in 30 s", steps.len());
    assert!(steps.iter().all(|step| step.method == StepMethod::FixedWindow));
    assert!(steps.iter().all(|step| step.window.len_ns() == FIXED_NS));
    assert_covered(&events, 1_000 * MS, script.end_ns());
}

/// Also prints how many observations a second the timeline takes on one core (`--release -- --nocapture`).
#[test]
fn a_long_history_is_cut_into_every_step() {
    const STEPS: u32 = 2_000;
    let script = job(&[10; STEPS as usize], 4, 30);
    let log = &script.log;
    let mut timeline = Timeline::new("node-a");
    let mut events = Vec::new();
    let started = crate::sources::clock::monotonic_ns();
    for batch in log.chunks(500) {
        batch
            .iter()
            .for_each(|observation| timeline.push(observation.clone()));
        timeline.advance(&mut events);
    }
    timeline.finish(&mut events);
    let took_ns = crate::sources::clock::monotonic_ns() - started;
    println!(
        "{} observations, {} per second",
        log.len(),
        log.len() as u64 * 1_000_000_000 / took_ns.max(1)
    );
    let found = steps(&events);
    let first_ns = found.first().expect("steps").window.start_ns();
    assert!(
        found
            .windows(2)
            .all(|pair| pair[0].window.end_ns() == pair[1].window.start_ns()),
        "once the pattern is known no step is lost"
    );
    let drains = log.iter().filter(|observation| {
        matches!(observation.fact, Fact::Sync { .. }) && observation.window.end_ns() > first_ns
    });
    assert_eq!(found.len(), drains.count(), "a step between any two drains");
}
