#![expect(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use stallscope_attribution::facts::{HostState, SpanKind, StepMethod};
use stallscope_attribution::leaf::{Class, Leaf};
use stallscope_attribution::reading::Reading;

use super::process::{Cut, CutKind};
use super::synthetic::{
    COMM, COMPUTE, COPY, HELPER, LOADER, MAIN, MS, PROCESS, Script, process, reading, window,
};
use super::*;
use crate::observation::{CopyDirection, FileOp, OffCpuReason, SyncTarget};

fn run(log: &[Observation]) -> Vec<Event> {
    let mut timeline = Timeline::new("node-a");
    let mut events = Vec::new();
    for observation in log {
        timeline.push(observation.clone());
        timeline.advance(&mut events);
    }
    timeline.finish(&mut events);
    events
}

fn steps(events: &[Event]) -> Vec<&GpuStep> {
    let mut steps = Vec::new();
    for event in events {
        if let Event::Step { step, .. } = event {
            steps.push(&**step);
        }
    }
    steps
}

fn spans(events: &[Event]) -> Vec<&Span> {
    let mut spans = Vec::new();
    for event in events {
        if let Event::Span { span, .. } = event {
            spans.push(&**span);
        }
    }
    spans
}

/// Windows of steps and spans, in the order of events.
fn windows(events: &[Event]) -> Vec<Window> {
    let window = |event: &Event| match event {
        Event::Step { step, .. } => Some(step.window),
        Event::Span { span, .. } => Some(span.window),
        _ => None,
    };
    events.iter().filter_map(window).collect()
}

fn assert_covered(events: &[Event], from_ns: u64, to_ns: u64) {
    let mut at_ns = from_ns;
    for window in windows(events) {
        assert_eq!(window.start_ns(), at_ns, "a hole or an overlap");
        assert!(!window.is_empty());
        at_ns = window.end_ns();
    }
    assert_eq!(at_ns, to_ns);
}

/// A process fed directly, for what it knows before it is assessed.
fn process_fed(log: &[Observation]) -> Process {
    let mut fed = Process::new(process(PROCESS, ProcessRole::Gpu), log[0].window.start_ns());
    let mut sorted = log.to_vec();
    sorted.sort_by_key(|observation| (observation.window.end_ns(), observation.window.start_ns()));
    for observation in &sorted {
        match process_of(&observation.fact) {
            Some(PROCESS) => fed.observe(observation.window, &observation.fact),
            Some(HELPER) => fed.observe_helper(observation.window, &observation.fact),
            _ => {}
        }
    }
    fed
}

#[test]
fn the_gpu_is_drained_from_the_sync_to_the_next_submission() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    let mut expected = Vec::new();
    for wait_ms in [5, 9, 7] {
        expected.push(script.step(wait_ms * MS, 4, 40 * MS));
    }
    let fed = process_fed(&script.log);
    let all = window(0, script.now_ns);
    // Nothing proves the first wait drained: no synchronisation came before it.
    assert_eq!(fed.order.drained_within(all), expected[1..]);
}

#[test]
fn an_outstanding_stream_keeps_the_gpu_from_being_drained() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(COMPUTE, 1, MS);
    script.launches(COMM, 1, MS);
    script.sync(SyncTarget::Stream(COMPUTE), MS);
    script.now_ns += 5 * MS;
    let all = window(0, script.now_ns + 100 * MS);
    assert_eq!(process_fed(&script.log).order.drained_within(all), []);
    script.sync(SyncTarget::Stream(COMM), MS);
    let drained_ns = script.now_ns;
    assert_eq!(
        process_fed(&script.log).order.drained_within(all),
        [window(drained_ns, all.end_ns())]
    );
}

#[test]
fn a_failed_sync_drains_nothing() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(COMPUTE, 1, MS);
    script.fact(
        MS,
        Fact::Sync {
            thread: MAIN,
            target: SyncTarget::Context,
            result: 700,
        },
    );
    assert_eq!(
        process_fed(&script.log).order.drained_within(window(0, u64::MAX)),
        []
    );
}

#[test]
fn an_event_covers_what_was_submitted_before_it_was_recorded() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(COMPUTE, 1, MS);
    script.fact(
        1_000,
        Fact::EventRecord {
            thread: MAIN,
            event: 5,
            stream: COMPUTE,
        },
    );
    script.launches(COMPUTE, 1, MS);
    script.sync(SyncTarget::Event(5), MS);
    assert_eq!(
        process_fed(&script.log).order.drained_within(window(0, u64::MAX)),
        [],
        "a later launch is left"
    );
    script.fact(
        1_000,
        Fact::EventRecord {
            thread: MAIN,
            event: 5,
            stream: COMPUTE,
        },
    );
    script.sync(SyncTarget::Event(5), MS);
    let drained = window(script.now_ns, u64::MAX);
    assert_eq!(
        process_fed(&script.log).order.drained_within(window(0, u64::MAX)),
        [drained]
    );
}

#[test]
fn a_submission_told_late_takes_drained_time_back() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(COMPUTE, 1, MS);
    script.sync(SyncTarget::Context, MS);
    let drained_ns = script.now_ns;
    // Another thread's run, folded from before the synchronisation to after it.
    let other = Thread {
        process: PROCESS,
        tid: 101,
    };
    script.log.push(Observation {
        window: window(drained_ns - MS / 2, drained_ns + 3 * MS),
        fact: Fact::LaunchRun {
            thread: other,
            stream: COPY,
            kernels: 9,
            graphs: 0,
        },
    });
    assert_eq!(
        process_fed(&script.log).order.drained_within(window(0, u64::MAX)),
        []
    );
}

#[test]
fn a_synchronous_copy_to_the_host_drains_the_default_stream() {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 2_000 * MS;
    script.launches(0, 10, MS);
    script.copy(4, CopyDirection::ToHost, None, 3 * MS);
    let drained_ns = script.now_ns - 1_000;
    script.now_ns += 2 * MS;
    let next_ns = script.now_ns;
    script.launches(0, 10, MS);
    let fed = process_fed(&script.log);
    assert_eq!(
        fed.order.drained_within(window(0, u64::MAX)),
        [window(drained_ns, next_ns)]
    );
    assert_eq!(fed.marks.counts_within(window(0, u64::MAX)).1.blocked_ns, 3 * MS);
}

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
fn names_fit_the_wire() {
    assert_eq!(subject::name("a\nb").as_deref(), Some("a b"));
    assert_eq!(subject::name(" \u{7} "), None);
    assert_eq!(
        subject::name(&"\u{e9}".repeat(2_000)).map(|name| name.len()),
        Some(1_024)
    );
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
fn host_states_follow_the_records() {
    let mut script = Script::new(1_000 * MS);
    script.launches(COMPUTE, 1, MS);
    let base = script.now_ns;
    script.off_cpu(
        MAIN,
        OffCpuReason::Sleep,
        2 * MS,
        window(base + 10 * MS, base + 20 * MS),
    );
    script.off_cpu(
        MAIN,
        OffCpuReason::Preempted,
        5 * MS,
        window(base + 30 * MS, base + 35 * MS),
    );
    script.off_cpu(
        MAIN,
        OffCpuReason::Disk,
        0,
        window(base + 40 * MS, base + 44 * MS),
    );
    let fed = process_fed(&script.log);
    let total = |state: HostState| -> u64 {
        let states = fed.host.states_within(window(base, base + 100 * MS));
        states
            .iter()
            .filter(|part| part.state == state)
            .map(|part| part.window.len_ns())
            .sum()
    };
    assert_eq!(total(HostState::Waiting), 8 * MS);
    assert_eq!(total(HostState::Runnable), 7 * MS);
    assert_eq!(total(HostState::FileRead), 4 * MS);
    assert_eq!(
        total(HostState::OnCpu),
        25 * MS,
        "after the last record nothing is known"
    );
}

#[test]
fn a_loader_counts_by_what_it_does() {
    let mut script = Script::new(1_000 * MS);
    let base = 1_000 * MS;
    script.off_cpu(LOADER, OffCpuReason::Sleep, 0, window(base, base + 100 * MS));
    script.off_cpu(
        LOADER,
        OffCpuReason::Disk,
        10 * MS,
        window(base + 150 * MS, base + 200 * MS),
    );
    script.off_cpu(
        LOADER,
        OffCpuReason::Sleep,
        0,
        window(base + 230 * MS, base + 400 * MS),
    );
    let fed = process_fed(&script.log);
    let load = fed.workers.within(window(base, base + 400 * MS), &[]);
    assert_eq!(
        load.iter().map(|slice| slice.cpu_ns).sum::<u64>(),
        (50 + 10 + 30) * MS
    );
    assert_eq!(load.iter().map(|slice| slice.io_ns).sum::<u64>(), 40 * MS);
    assert_eq!(load.first().unwrap().window.start_ns(), base);
    assert!(
        load.windows(2)
            .all(|pair| pair[0].window.end_ns() == pair[1].window.start_ns())
    );
    assert_eq!(load.last().unwrap().window.end_ns(), base + 400 * MS);
    let asleep = fed.workers.within(window(base, base + 100 * MS), &[]);
    assert!(asleep.iter().all(|slice| slice.cpu_ns == 0 && slice.io_ns == 0));
}

/// A loader on a core of its own gives no scheduler records.
#[test]
fn a_silent_loader_counts_by_its_cpu_time() {
    let mut script = Script::new(1_000 * MS);
    let base = 1_000 * MS;
    script.off_cpu(LOADER, OffCpuReason::Sleep, 0, window(base, base + 100 * MS));
    let mut cpu = |from_ms: u64, to_ms: u64, cpu_ms: u64| {
        let window = window(base + from_ms * MS, base + to_ms * MS);
        let fact = Fact::ThreadCpu {
            thread: LOADER,
            cpu_ns: cpu_ms * MS,
        };
        script.log.push(Observation { window, fact });
    };
    cpu(500, 1_000, 490);
    cpu(1_000, 1_500, 500);
    cpu(1_500, 2_000, 0);
    let load = process_fed(&script.log)
        .workers
        .within(window(base, base + 2_000 * MS), &[]);
    assert_eq!(load.iter().map(|slice| slice.cpu_ns).sum::<u64>(), 1_000 * MS);
    assert_eq!(load.iter().map(|slice| slice.io_ns).sum::<u64>(), 0);
}

#[test]
fn a_record_of_a_sleep_that_goes_on_counts_once() {
    let mut script = Script::new(1_000 * MS);
    let base = 1_000 * MS;
    script.off_cpu(LOADER, OffCpuReason::Disk, 0, window(base, base + 100 * MS));
    script.off_cpu(LOADER, OffCpuReason::Disk, 0, window(base, base + 300 * MS));
    let load = process_fed(&script.log)
        .workers
        .within(window(base, base + 400 * MS), &[]);
    assert_eq!(load.iter().map(|slice| slice.io_ns).sum::<u64>(), 300 * MS);
    assert_eq!(load.iter().map(|slice| slice.cpu_ns).sum::<u64>(), 0);
}

#[test]
fn readings_join_by_overlap() {
    let mut counters = GpuCounters::default();
    let slow = GpuReading {
        sm_mhz: Reading::Value(1_000),
        busy_ppm: Reading::Value(450_000),
        thermal_ns: Reading::Value(60 * MS),
        process_sm_ppm: Reading::Value(vec![(PROCESS.pid, 300_000), (999, 200_000)]),
        ..reading(1)
    };
    counters.add(window(0, 100 * MS), &reading(1));
    counters.add(window(100 * MS, 200 * MS), &slow);
    let half = window(50 * MS, 200 * MS);
    let clock = counters.clock(half).value().copied().unwrap();
    // (50 ms x 0.9 x 1755 MHz + 100 ms x 0.45 x 1000 MHz) / (45 + 45)
    assert_eq!(
        (clock.sm_mhz, clock.thermal_ns, clock.power_mw),
        (1_377, 60 * MS, 600_000)
    );
    let activity = counters.activity(half, 800_000).value().copied().unwrap();
    assert_eq!((activity.busy_ppm, activity.compute_sm_ppm), (600_000, 800_000));
    let foreign = counters
        .foreign(half, |pid| pid == PROCESS.pid)
        .value()
        .copied()
        .unwrap();
    assert_eq!(
        (foreign.processes, foreign.largest_pid, foreign.sm_ppm),
        (1, 999, 133_333)
    );
    assert_eq!(counters.clock(window(300 * MS, 400 * MS)), Reading::NotMeasured);
}

#[test]
fn unsupported_counters_are_not_zero() {
    let mut counters = GpuCounters::default();
    let old = GpuReading {
        tensor_ppm: Reading::Unsupported,
        ..reading(1)
    };
    counters.add(window(0, 100 * MS), &old);
    assert_eq!(counters.activity(window(0, 100 * MS), 0), Reading::Unsupported);
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
fn history_stays_bounded_without_any_edge() {
    let mut fed = Process::new(process(PROCESS, ProcessRole::Gpu), 0);
    let mut at_ns = 0;
    for round in 0..150_000_u64 {
        at_ns += 10_000;
        let call = window(at_ns - 5_000, at_ns);
        match round % 5 {
            0 => fed.observe(
                call,
                &Fact::LaunchRun {
                    thread: MAIN,
                    stream: round,
                    kernels: 1,
                    graphs: 0,
                },
            ),
            1 => fed.observe(
                call,
                &Fact::OffCpu {
                    thread: MAIN,
                    reason: OffCpuReason::Sleep,
                    runnable_ns: 0,
                },
            ),
            2 => fed.observe(
                call,
                &Fact::EventRecord {
                    thread: MAIN,
                    event: round,
                    stream: round,
                },
            ),
            3 => fed.observe(
                call,
                &Fact::StreamWait {
                    thread: MAIN,
                    stream: 1,
                    event: round - 1,
                },
            ),
            _ => fed.observe(
                call,
                &Fact::Sync {
                    thread: MAIN,
                    target: SyncTarget::Stream(round),
                    result: 0,
                },
            ),
        }
    }
    assert!(fed.forgotten() > 0, "what does not fit is counted");
    let states = fed.host.states_within(window(0, u64::MAX));
    assert!(states.len() < 60_000, "{} states", states.len());
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

fn job(waits_ms: &[u64], buckets: u32, busy_ms: u64) -> Script {
    let mut script = Script::new(1_000 * MS);
    script.communicator(5);
    for wait_ms in waits_ms {
        script.step(wait_ms * MS, buckets, busy_ms * MS);
        let end_ns = script.now_ns;
        script.log.push(Observation {
            window: window(end_ns - 100 * MS, end_ns),
            fact: Fact::Gpu(Box::new(reading(1))),
        });
        script.off_cpu(
            LOADER,
            OffCpuReason::Sleep,
            MS,
            window(end_ns - 30 * MS, end_ns - 3 * MS),
        );
    }
    script
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    /// Whatever the waits: covered to the nanosecond, budgets sum, every step between two drains.
    #[test]
    fn time_is_covered_exactly(
        waits_ms in prop::collection::vec(0_u64..80, 30..60),
        buckets in 1_u32..7,
        busy_ms in 8_u64..120,
        drop in prop::collection::vec(0_usize..4_000, 0..12),
    ) {
        let mut log = job(&waits_ms, buckets, busy_ms).log;
        for at in drop {
            if at > 3 && at < log.len() {
                log.remove(at);
            }
        }
        let end_ns = log.iter().map(|observation| observation.window.end_ns()).max().unwrap();
        let events = run(&log);
        assert_covered(&events, 1_000 * MS, end_ns);
        for event in &events {
            if let Event::Step { step, .. } = event {
                let sum: i64 = step.budget.leaves().iter().sum();
                prop_assert_eq!(sum, step.window.len_ns().cast_signed());
            }
        }
    }

    /// The order of arrival within the reorder window does not matter, nor does when the timeline is advanced.
    #[test]
    fn arrival_order_does_not_matter(
        waits_ms in prop::collection::vec(0_u64..60, 30..40),
        delays_ms in prop::collection::vec(0_u64..290, 64),
        batch in 1_usize..200,
    ) {
        let log = job(&waits_ms, 4, 60).log;
        let mut arrivals: Vec<(u64, usize)> = log
            .iter()
            .enumerate()
            .map(|(at, observation)| (observation.window.end_ns() + delays_ms[at % delays_ms.len()] * MS, at))
            .collect();
        arrivals.sort_unstable();
        let mut timeline = Timeline::new("node-a");
        let mut shuffled = Vec::new();
        for part in arrivals.chunks(batch) {
            part.iter().for_each(|(_, at)| timeline.push(log[*at].clone()));
            timeline.advance(&mut shuffled);
        }
        timeline.finish(&mut shuffled);
        let mut sorted = log.clone();
        sorted.sort_by_key(|observation| observation.window.end_ns());
        prop_assert_eq!(run(&sorted), shuffled);
        prop_assert_eq!(timeline.counters().late, 0);
    }
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
