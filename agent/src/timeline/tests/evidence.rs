//! What is known of host, helpers and GPU within a window.

use stallscope_attribution::facts::{HardwareFact, HostState};
use stallscope_attribution::reading::Reading;

use super::{process_fed, run};
use crate::observation::{Fact, GpuReading, Observation, OffCpuReason, ProcessKey, StepWaits, Thread};
use crate::timeline::synthetic::{COMPUTE, LOADER, MAIN, MS, PROCESS, Script, reading, window};
use crate::timeline::{Event, GpuCounters, Process, subject};

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
fn a_thread_whose_scheduler_records_were_lost_is_not_called_on_cpu() {
    let mut script = Script::new(1_000 * MS);
    script.launches(COMPUTE, 1, MS);
    let base = script.now_ns;
    for start_ms in [10, 60, 100] {
        let at = window(base + start_ms * MS, base + (start_ms + 10) * MS);
        script.off_cpu(MAIN, OffCpuReason::Sleep, 0, at);
        script.off_cpu(LOADER, OffCpuReason::Sleep, 0, at);
    }
    let mut fed = process_fed(&script.log);
    let on_cpu = |fed: &Process| -> u64 {
        let states = fed.host.states_within(window(base, base + 110 * MS));
        let on_cpu = states.iter().filter(|part| part.state == HostState::OnCpu);
        on_cpu.map(|part| part.window.len_ns()).sum()
    };
    assert_eq!(on_cpu(&fed), (10 + 40 + 30) * MS);
    fed.lost("cuda", window(base + 30 * MS, base + 40 * MS), 5);
    assert_eq!(on_cpu(&fed), (10 + 40 + 30) * MS, "calls were lost, not waits");
    fed.lost("sched", window(base + 30 * MS, base + 40 * MS), 5);
    assert_eq!(
        on_cpu(&fed),
        (10 + 20 + 30) * MS,
        "a lost wait may have begun at 20 ms"
    );
}

#[test]
fn a_loader_whose_scheduler_records_were_lost_is_not_called_busy() {
    let base = 1_000 * MS;
    let mut script = Script::new(base);
    let sleep = |script: &mut Script, start_ms: u64| {
        let at = window(base + start_ms * MS, base + (start_ms + 10) * MS);
        script.off_cpu(LOADER, OffCpuReason::Sleep, 0, at);
    };
    sleep(&mut script, 0);
    let mut fed = process_fed(&script.log);
    fed.lost("sched", window(base + 30 * MS, base + 60 * MS), 1);
    let mut later = Script::new(base);
    sleep(&mut later, 100);
    for observation in later
        .log
        .iter()
        .filter(|later| matches!(later.fact, Fact::OffCpu { .. }))
    {
        fed.observe_helper(observation.window, &observation.fact);
    }
    let load = fed.workers.within(window(base, base + 200 * MS), &[]);
    assert_eq!(load.iter().map(|load| load.cpu_ns).sum::<u64>(), 40 * MS);
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
fn names_fit_the_wire() {
    assert_eq!(subject::name("a\nb").as_deref(), Some("a b"));
    assert_eq!(subject::name(" \u{7} "), None);
    assert_eq!(
        subject::name(&"\u{e9}".repeat(2_000)).map(|name| name.len()),
        Some(1_024)
    );
}
#[test]
fn waits_of_network_steps_are_passed_on_with_their_process() {
    let mut script = Script::new(1_000 * MS);
    script.launches(COMPUTE, 1, MS);
    let base = script.now_ns;
    let waits = |any_ms| {
        let mut waits = StepWaits::default();
        waits.send_wire.any_ns = any_ms * MS;
        Box::new(waits)
    };
    let stranger = Thread {
        process: ProcessKey {
            pid: 1,
            start_ticks: 1,
        },
        tid: 1,
    };
    for (thread, at_ms, any_ms) in [(MAIN, 0, 30), (stranger, 0, 500), (MAIN, 1_000, 4)] {
        script.log.push(Observation {
            window: window(base + at_ms * MS, base + (at_ms + 1_000) * MS),
            fact: Fact::StepWaits {
                thread,
                waits: waits(any_ms),
            },
        });
    }
    let told: Vec<_> = run(&script.log)
        .into_iter()
        .filter_map(|event| match event {
            Event::Hardware(facts) => Some(*facts),
            _ => None,
        })
        .collect();
    let [facts] = &told[..] else {
        panic!("not one of the followed process alone: {told:?}");
    };
    assert_eq!(facts.node, "node-a");
    assert_eq!(facts.window, window(base, base + 2_000 * MS));
    let HardwareFact::Waits(waits) = &facts.fact else {
        panic!("{facts:?}");
    };
    assert_eq!((waits.pid, waits.watched_ns), (PROCESS.pid, 2_000 * MS));
    assert_eq!(waits.waits.send_wire.any_ns, 34 * MS);
}
