//! The source over the kernel of the test's own network namespace.

#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;

const S: u64 = 1_000_000_000;

#[test]
fn reports_every_port_once_a_second() {
    let mut source = NetSource::open("n0").unwrap();
    let traced = BTreeSet::from([std::process::id()]);
    assert_eq!(source.poll(S, 5, &traced), []);
    assert_eq!(source.poll(S + S / 10, 5, &traced), []);
    let observations = source.poll(2 * S, 5, &traced);
    assert_eq!(source.trouble(), None);
    let with_address = links::links(&mut source.route).unwrap();
    let own: BTreeSet<i32> = source.addresses.values().copied().collect();
    let expected: BTreeSet<String> = with_address
        .into_iter()
        .filter(|(index, _)| own.contains(index))
        .map(|(_, link)| link.name)
        .collect();
    let mut seen = BTreeSet::new();
    for observation in &observations {
        let Fact::Port(port) = &observation.fact else {
            panic!("{observation:?}")
        };
        assert_eq!((port.node.as_str(), port.realtime_offset_ns), ("n0", 5));
        assert_eq!(port.window, Window::new(S, 2 * S).unwrap());
        assert!(port.flows.iter().all(|flow| flow.pid == std::process::id()));
        seen.insert(port.port.clone());
    }
    assert_eq!(seen, expected);
    assert_eq!(source.poll(2 * S + S / 10, 5, &traced), []);
}

#[test]
fn a_queue_made_anew_starts_at_zero() {
    let queue = |overlimits| Queue {
        backlog_bytes: 0,
        overlimits,
    };
    assert_eq!(overlimits(Some(&queue(5)), Some(&queue(9))), Some(4));
    assert_eq!(overlimits(Some(&queue(9)), Some(&queue(5))), Some(5));
    assert_eq!(overlimits(None, Some(&queue(5))), Some(5));
    assert_eq!(overlimits(Some(&queue(5)), None), None);
}
