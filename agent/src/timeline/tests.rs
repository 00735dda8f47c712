//! The timeline over made-up jobs; what is read off its events is here, the tests are by concept.

#![expect(clippy::unwrap_used, reason = "tests")]

mod drains;
mod evidence;
mod properties;
mod spans;
mod steps;

use super::process::Process;
use super::synthetic::{HELPER, PROCESS, process};
use super::*;

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
