//! Made-up loads of ports, each with one thing wrong.

use super::*;
use crate::reading::Reading;

fn load(node: &str, held: u64, busy_ppm: u64, backlog_bytes: u64) -> PortLoad {
    PortLoad {
        node: node.into(),
        port: "eth0".into(),
        windows: 100,
        held_windows: held,
        backlog_bytes,
        busy_ns: busy_ppm * 1000,
        window_ns: 1_000_000_000,
        ..PortLoad::default()
    }
}

#[test]
fn ports_without_flows_of_the_job_are_left_out() {
    let facts = |port: &str, busy_ns, backlog| PortFacts {
        node: "a".into(),
        port: port.into(),
        window: Window::new(0, 1_000_000_000).expect("a window"),
        realtime_offset_ns: 0,
        sent_bytes: 1,
        received_bytes: 1,
        line_bytes_per_s: Reading::Value(125_000_000),
        backlog_bytes: Reading::Value(backlog),
        queue_overlimits: Reading::Value(0),
        flows: vec![FlowFacts {
            pid: 1,
            local: "10.0.0.1:1".into(),
            peer: "10.0.0.2:1".into(),
            acked_bytes: 1,
            busy_ns,
            receiver_limited_ns: 0,
            unsent_bytes: 0,
            retransmits: 0,
            rtt_us: 50,
            min_rtt_us: 50,
            ..FlowFacts::default()
        }],
    };
    let all = [facts("eth0", 90_000_000, 0), facts("eth1", 1_000_000, 300_000)];
    let within = Window::new(0, 2_000_000_000).expect("a window");
    let mut used = loads(&all, within);
    retain_used(&mut [&mut used]);
    assert_eq!(
        used.iter().map(|load| load.port.as_str()).collect::<Vec<_>>(),
        ["eth0"]
    );
}

#[test]
fn a_port_that_waits_for_a_lossy_one_is_what_that_is_compared_with() {
    let idle = |load: PortLoad| PortLoad { busy_ns: 0, ..load };
    let mut healthy = vec![sending("a", 400_000_000, 0), sending("b", 400_000_000, 130)];
    let mut lossy = vec![
        idle(sending("a", 70_000_000, 0)),
        sending("b", 70_000_000, 4_400),
        idle(sending("other", 900, 0)),
    ];
    retain_used(&mut [&mut healthy, &mut lossy]);
    assert_eq!(lossy.len(), 2, "the third is used in no stretch");
    assert_eq!(pressure(&lossy, Some(&healthy)), Pressure::Lossy(1));
}

#[test]
fn the_one_port_that_holds_packets_back_is_named() {
    let loads = [load("a", 2, 100_000, 0), load("b", 80, 600_000, 90_000)];
    assert_eq!(pressure(&loads, None), Pressure::Port(1));
}

#[test]
fn shaped_ports_are_told_apart_by_their_queues() {
    let before = [load("a", 90, 100_000, 10_000), load("b", 90, 100_000, 10_000)];
    let loads = [load("a", 90, 100_000, 12_000), load("b", 95, 500_000, 200_000)];
    assert_eq!(pressure(&loads, Some(&before)), Pressure::Port(1));
    assert_eq!(pressure(&before, Some(&before)), Pressure::None);
}

#[test]
fn busy_flows_without_a_local_queue_wait_for_the_fabric() {
    let loads = [load("a", 0, 500_000, 0), load("b", 0, 550_000, 0)];
    assert_eq!(pressure(&loads, None), Pressure::Fabric);
}

#[test]
fn a_line_that_was_negotiated_down_is_named() {
    let with = |node: &str, line, busy| PortLoad {
        line_bytes_per_s: Some(line),
        ..load(node, 0, busy, 0)
    };
    let loads = [
        with("a", 12_500, 100_000),
        with("b", 6_250, 300_000),
        with("c", 12_500, 100_000),
    ];
    assert_eq!(pressure(&loads, None), Pressure::Port(1));
    let alike = [with("a", 6_250, 100_000), with("b", 6_250, 300_000)];
    assert_eq!(pressure(&alike, None), Pressure::None);
}

#[test]
fn a_quiet_network_is_not_blamed() {
    let loads = [load("a", 1, 120_000, 0), load("b", 0, 100_000, 0)];
    assert_eq!(pressure(&loads, None), Pressure::None);
    assert_eq!(pressure(&[], None), Pressure::None);
}

fn sending(node: &str, sent_bytes: u64, retransmits: u64) -> PortLoad {
    PortLoad {
        sent_bytes,
        retransmits,
        ..load(node, 0, 500_000, 0)
    }
}

#[test]
fn who_sends_again_sends_over_a_lossy_way() {
    // 1 % of a million segments.
    let loads = [
        sending("a", 1_448_000_000, 20),
        sending("b", 1_448_000_000, 10_000),
    ];
    assert_eq!(pressure(&loads, None), Pressure::Lossy(1));
    let before = [sending("a", 1_448_000_000, 0), sending("b", 1_448_000_000, 8_000)];
    assert_ne!(
        pressure(&loads, Some(&before)),
        Pressure::Lossy(1),
        "as lossy as ever"
    );
    let held = [
        sending("a", 1_448_000_000, 20),
        PortLoad {
            held_windows: 80,
            ..sending("b", 1_448_000_000, 10_000)
        },
    ];
    assert_eq!(
        pressure(&held, None),
        Pressure::Port(1),
        "its own queue drops them"
    );
}

#[test]
fn a_receiver_that_takes_nothing_is_not_the_network() {
    let waiting = |node: &str, limited_ppm: u64| PortLoad {
        receiver_limited_ns: limited_ppm * 1_000,
        ..load(node, 0, 600_000, 0)
    };
    let loads = [waiting("a", 550_000), waiting("b", 20_000)];
    assert_eq!(pressure(&loads, None), Pressure::Receiver(0));
    let before = [waiting("a", 400_000), waiting("b", 20_000)];
    assert_ne!(
        pressure(&loads, Some(&before)),
        Pressure::Receiver(0),
        "as slow as ever"
    );
    let both = [waiting("a", 550_000), waiting("b", 500_000)];
    assert!(!matches!(pressure(&both, None), Pressure::Receiver(_)));
}

#[test]
fn a_process_that_leaves_unread_what_arrives_is_not_the_network() {
    let unread = |node: &str, behind_windows| PortLoad {
        behind_windows,
        behind: [(7, behind_windows), (8, 1)].into(),
        rtt_percent: 5_000,
        ..load(node, 0, 600_000, 0)
    };
    let loads = [unread("a", 10), unread("b", 90)];
    assert_eq!(pressure(&loads, None), Pressure::Behind(1));
    assert_eq!(loads[1].most_behind(), Some(7));
    let before = [unread("a", 10), unread("b", 80)];
    assert_eq!(
        pressure(&loads, Some(&before)),
        Pressure::None,
        "it is as far behind as ever, and no flow is busier"
    );
    assert_eq!(
        pressure(&[unread("a", 80), unread("b", 90)], None),
        Pressure::Fabric
    );
}

#[test]
fn the_receiver_is_the_only_process_that_talks_to_the_sender() {
    let flow = |pid, local: &str, peer: &str, receiver_limited_ns| FlowFacts {
        pid,
        local: local.into(),
        peer: peer.into(),
        acked_bytes: 1,
        busy_ns: 900_000_000,
        receiver_limited_ns,
        unsent_bytes: 0,
        retransmits: 0,
        rtt_us: 50,
        min_rtt_us: 50,
        receive_backlog_bytes: 0,
        window_probes: 0,
    };
    let port = |node: &str, flows| PortFacts {
        node: node.into(),
        port: "eth0".into(),
        window: Window::new(0, 1_000_000_000).expect("a window"),
        realtime_offset_ns: 0,
        sent_bytes: 1,
        received_bytes: 1,
        line_bytes_per_s: Reading::NotMeasured,
        backlog_bytes: Reading::Value(0),
        queue_overlimits: Reading::Value(0),
        flows,
    };
    let ports = [
        port("a", vec![flow(1, "10.0.0.1:5", "10.0.0.2:6", 800_000_000)]),
        port("b", vec![flow(7, "10.0.0.2:9", "10.0.0.1:8", 0)]),
    ];
    let loads = loads(&ports, Window::new(0, 2_000_000_000).expect("a window"));
    let receiver = loads[0].slowest_receiver().expect("one");
    assert_eq!((receiver.node.as_str(), receiver.pid), ("b", Some(7)));
}
