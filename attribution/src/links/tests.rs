//! Made-up devices with known faults, expectations from what the drivers' counters mean.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::facts::{
    AerSeverity, Counter, DeviceEvent, DeviceEventKind, HardwareFact, PciDevice, PciKind, PciLink, QueuePair,
    RdmaPort,
};
use crate::reading::Reading;

const S: u64 = 1_000_000_000;

fn at(second: u64, node: &str, fact: HardwareFact) -> HardwareFacts {
    HardwareFacts {
        node: node.into(),
        window: Window::new(second * S, (second + 2) * S).unwrap(),
        realtime_offset_ns: 0,
        fact,
    }
}

fn counters(of: &[(&str, u64)]) -> Vec<Counter> {
    of.iter()
        .map(|(name, growth)| Counter {
            name: (*name).into(),
            growth: Reading::Value(*growth),
        })
        .collect()
}

/// A healthy port that moves 100,000 packets each way in two seconds, beside other counters.
fn port(second: u64, node: &str, device: &str, of: &[(&str, u64)]) -> HardwareFacts {
    let traffic = [
        ("port_xmit_packets", 100_000),
        ("port_rcv_packets", 100_000),
        ("port_xmit_data", 400_000_000),
    ];
    let healthy = RdmaPort {
        device: device.into(),
        port: 1,
        link_layer: "Ethernet".into(),
        active: Reading::Value(true),
        rate_bytes_per_s: Reading::Value(50_000_000_000),
        counters: counters(&[&traffic, of].concat()),
        ..RdmaPort::default()
    };
    at(second, node, HardwareFact::RdmaPort(healthy))
}

fn on_nodes(nodes: &[&str], of: impl Fn(&str, u64) -> Vec<(&'static str, u64)>) -> Vec<HardwareFacts> {
    let windows = (0..10).flat_map(|window| nodes.iter().map(move |node| (window, *node)));
    windows
        .map(|(window, node)| port(window * 2, node, "mlx5_0", &of(node, window)))
        .collect()
}

fn findings(facts: &[HardwareFacts]) -> Vec<Finding> {
    examine(facts, &[], &[]).findings
}

fn only(facts: &[HardwareFacts]) -> Finding {
    let mut all = findings(facts);
    assert_eq!(all.len(), 1, "{all:#?}");
    all.remove(0)
}

fn node(finding: &Finding) -> &str {
    finding.place.node.as_deref().unwrap_or_default()
}

#[test]
fn counters_that_exist_and_a_few_events_accuse_nobody() {
    let quiet = on_nodes(&["a", "b", "c"], |_, window| {
        vec![
            ("packet_seq_err", u64::from(window == 3)),
            ("out_of_sequence", u64::from(window == 3)),
            ("np_cnp_sent", 40),
            ("rp_cnp_handled", 40),
            ("port_xmit_wait", 5_000_000),
            ("symbol_error", 0),
            ("out_of_buffer", 1),
        ]
    });
    assert_eq!(findings(&quiet), []);
    assert_eq!(findings(&[]), []);
}

#[test]
fn loss_is_told_with_its_direction() {
    // a sends, b misses packets and a sends them again: mlx5's packet_seq_err counts at the sender.
    let lossy = on_nodes(&["a", "b"], |node, _| match node {
        "a" => vec![
            ("packet_seq_err", 300),
            ("out_of_sequence", 0),
            ("np_cnp_sent", 0),
            ("symbol_error", 0),
        ],
        _ => vec![
            ("packet_seq_err", 0),
            ("out_of_sequence", 300),
            ("np_cnp_sent", 0),
            ("symbol_error", 0),
        ],
    });
    let finding = only(&lossy);
    assert_eq!(
        (finding.cause, finding.side, node(&finding)),
        (Cause::NetworkFabric, Side::Sender, "a")
    );
    assert_eq!(finding.place.link.as_deref(), Some("a mlx5_0:1 -> b mlx5_0:1"));
    assert!(
        finding.ruled_out.iter().any(|not| not.cause == Cause::NetworkNic),
        "{finding:#?}"
    );
}

#[test]
fn soft_roce_tells_it_by_its_own_names() {
    let lossy = on_nodes(&["a", "b"], |node, _| match node {
        "b" => vec![
            ("sent_pkts", 90_000),
            ("rcvd_seq_err", 400),
            ("completer_retry_err", 20),
            ("out_of_seq_request", 0),
        ],
        _ => vec![
            ("rcvd_pkts", 90_000),
            ("rcvd_seq_err", 0),
            ("out_of_seq_request", 400),
        ],
    });
    let finding = only(&lossy);
    assert_eq!((finding.cause, node(&finding)), (Cause::NetworkFabric, "b"));
}

#[test]
fn lost_answers_are_the_answering_side() {
    // a times out, b gets packets twice and misses none: what b sends gets lost.
    let lossy = on_nodes(&["a", "b"], |node, _| match node {
        "a" => vec![("local_ack_timeout_err", 60), ("packet_seq_err", 0)],
        _ => vec![("duplicate_request", 60), ("out_of_sequence", 0)],
    });
    assert_eq!(node(&only(&lossy)), "b");
}

#[test]
fn many_senders_and_one_receiver_are_the_way_into_the_receiver() {
    let lossy = on_nodes(&["a", "b", "c", "d"], |node, _| match node {
        "d" => vec![("out_of_sequence", 900), ("packet_seq_err", 0)],
        "c" => vec![("out_of_sequence", 0), ("packet_seq_err", 0)],
        _ => vec![("out_of_sequence", 0), ("packet_seq_err", 450)],
    });
    let finding = only(&lossy);
    assert_eq!((finding.side, node(&finding)), (Side::Receiver, "d"));
}

#[test]
fn loss_everywhere_is_nobodys() {
    let lossy = on_nodes(&["a", "b", "c"], |_, _| {
        vec![("packet_seq_err", 200), ("out_of_sequence", 200)]
    });
    let finding = only(&lossy);
    assert_eq!((finding.cause, finding.side), (Cause::NetworkFabric, Side::Path));
    assert_eq!(finding.place, Place::default());
}

#[test]
fn queue_pairs_tell_who_the_peer_is() {
    let mut lossy = on_nodes(&["a", "b", "c"], |node, _| match node {
        "a" => vec![("packet_seq_err", 300)],
        "c" => vec![("out_of_sequence", 300)],
        _ => vec![("packet_seq_err", 0), ("out_of_sequence", 0)],
    });
    let pair = |number, peer_number| {
        HardwareFact::QueuePair(QueuePair {
            pid: 7,
            device: "mlx5_0".into(),
            port: 1,
            number,
            peer_number,
            ..QueuePair::default()
        })
    };
    lossy.push(at(0, "a", pair(10, 30)));
    lossy.push(at(0, "c", pair(30, 10)));
    lossy.push(at(0, "b", pair(20, 99)));
    assert_eq!(
        only(&lossy).place.link.as_deref(),
        Some("a mlx5_0:1 -> c mlx5_0:1")
    );
}

#[test]
fn a_receiver_that_congests_is_named_and_who_obeys() {
    // One packet in a hundred marked at c alone; the others send to it and slow down.
    let congested = on_nodes(&["a", "b", "c"], |node, _| match node {
        "c" => vec![
            ("np_cnp_sent", 1_000),
            ("rp_cnp_handled", 0),
            ("out_of_buffer", 0),
        ],
        _ => vec![("np_cnp_sent", 2), ("rp_cnp_handled", 500), ("out_of_buffer", 0)],
    });
    let finding = only(&congested);
    assert_eq!(
        (finding.cause, finding.side, node(&finding)),
        (Cause::NetworkFabric, Side::Receiver, "c")
    );
    assert!(
        finding
            .ruled_out
            .iter()
            .any(|not| not.cause == Cause::HostReceiver)
    );
    assert!(
        finding
            .evidence
            .iter()
            .any(|seen| seen.value.contains("a mlx5_0:1 obeyed 5000")),
        "{finding:#?}"
    );
}

#[test]
fn a_late_receiver_is_the_hosts_and_not_the_networks() {
    let late = on_nodes(&["a", "b"], |node, _| {
        vec![("out_of_buffer", if node == "b" { 200 } else { 0 })]
    });
    let finding = only(&late);
    assert_eq!(
        (finding.cause, finding.side, node(&finding)),
        (Cause::HostReceiver, Side::Receiver, "b")
    );
}

#[test]
fn back_pressure_is_told_without_notifications_only() {
    // 100,000,000 words sent a window; b waits for as long again.
    let waiting = |cnp| {
        on_nodes(&["a", "b"], move |node, _| {
            vec![
                ("port_xmit_wait", if node == "b" { 100_000_000 } else { 500_000 }),
                ("rp_cnp_handled", cnp),
            ]
        })
    };
    let finding = only(&waiting(0));
    assert_eq!(
        (finding.cause, finding.side, node(&finding)),
        (Cause::NetworkFabric, Side::Path, "b")
    );
    assert_eq!(findings(&waiting(500)), []);
}

#[test]
fn a_port_that_goes_down_or_links_badly_is_its_own_fault() {
    let mut facts = on_nodes(&["a", "b"], |_, _| vec![]);
    let mut down = port(20, "b", "mlx5_0", &[]);
    if let HardwareFact::RdmaPort(port) = &mut down.fact {
        port.active = Reading::Value(false);
    }
    facts.push(down);
    let finding = only(&facts);
    assert_eq!(
        (finding.cause, finding.severity, node(&finding)),
        (Cause::NetworkNic, Severity::Failed, "b")
    );
    assert_eq!(finding.window.start_ns(), 20 * S, "since it went down");

    let bad = on_nodes(&["a", "b"], |node, _| {
        vec![("symbol_error", if node == "a" { 90 } else { 0 })]
    });
    assert_eq!(
        (only(&bad).cause, node(&only(&bad)).to_owned()),
        (Cause::NetworkNic, "a".to_owned())
    );

    // Never cabled, on every node alike.
    let unused: Vec<HardwareFacts> = ["a", "b"]
        .iter()
        .map(|node| {
            let mut facts = port(0, node, "mlx5_9", &[]);
            if let HardwareFact::RdmaPort(port) = &mut facts.fact {
                port.active = Reading::Value(false);
            }
            facts
        })
        .collect();
    assert_eq!(findings(&unused), []);
}

#[test]
fn a_port_slower_than_its_likes_is_configuration_and_a_management_port_is_not() {
    let rated = |node: &str, device: &str, gigabits: u64| {
        let mut facts = port(0, node, device, &[]);
        if let HardwareFact::RdmaPort(port) = &mut facts.fact {
            port.rate_bytes_per_s = Reading::Value(gigabits * 125_000_000);
        }
        facts
    };
    let mixed = |slow| {
        vec![
            rated("a", "mlx5_0", 400),
            rated("b", "mlx5_0", 400),
            rated("c", "mlx5_0", slow),
            rated("a", "mlx5_4", 25),
            rated("b", "mlx5_4", 25),
            rated("c", "mlx5_4", 25),
        ]
    };
    assert_eq!(findings(&mixed(400)), []);
    let finding = only(&mixed(200));
    assert_eq!((finding.cause, node(&finding)), (Cause::NetworkConfig, "c"));
    assert_eq!(finding.place.nic_port.as_deref(), Some("mlx5_0:1"));
}

fn device(address: &str, kind: PciKind, lanes: u32, rate: u32, under_load: bool) -> PciDevice {
    PciDevice {
        address: address.into(),
        kind,
        link: Reading::Value(PciLink {
            rate_mt_per_s: rate,
            lanes,
            best_rate_mt_per_s: 32_000,
            best_lanes: 16,
            under_load,
        }),
        path: vec!["0000:10:00.0".into(), "0000:00:01.0".into()],
        ..PciDevice::default()
    }
}

#[test]
fn links_below_their_best_are_told_and_idle_gpus_are_not() {
    let idle = at(
        0,
        "a",
        HardwareFact::Pci(device("0000:17:00.0", PciKind::Gpu, 16, 2_500, false)),
    );
    let nic = at(
        0,
        "a",
        HardwareFact::Pci(device("0000:18:00.0", PciKind::Nic, 8, 32_000, false)),
    );
    let gpu = at(
        0,
        "b",
        HardwareFact::Pci(device("0000:19:00.0", PciKind::Gpu, 16, 16_000, true)),
    );
    assert_eq!(findings(core::slice::from_ref(&idle)), []);
    let of_nic = only(&[idle.clone(), nic]);
    assert_eq!(
        (of_nic.cause, of_nic.place.pci.as_deref()),
        (Cause::NetworkPcie, Some("0000:18:00.0"))
    );
    assert_eq!(of_nic.evidence[0].value, "x8 at 32.0 GT/s");
    assert_eq!(
        of_nic.evidence[0].expected,
        "x16 at 32.0 GT/s: device and slot can do that"
    );
    let of_gpu = only(&[idle, gpu]);
    assert_eq!((of_gpu.cause, node(&of_gpu)), (Cause::DevicePcie, "b"));
}

fn event(second: u64, pci: &str, kind: DeviceEventKind) -> HardwareFacts {
    at(
        second,
        "a",
        HardwareFact::Event(DeviceEvent {
            pci: pci.into(),
            kind,
        }),
    )
}

#[test]
fn pcie_errors_are_of_the_device_behind_the_port() {
    let gpu = at(
        0,
        "a",
        HardwareFact::Pci(device("0000:17:00.0", PciKind::Gpu, 16, 32_000, true)),
    );
    let aer = |pci: &str, severity| event(1, pci, DeviceEventKind::Aer { severity, status: 1 });
    let fatal = only(&[gpu.clone(), aer("0000:10:00.0", AerSeverity::Fatal)]);
    assert_eq!(
        (fatal.cause, fatal.severity),
        (Cause::DevicePcie, Severity::Failed)
    );
    assert_eq!(
        fatal.place.pci.as_deref(),
        Some("0000:17:00.0"),
        "the one below the bridge"
    );
    let corrected = only(&[gpu.clone(), aer("0000:17:00.0", AerSeverity::Correctable)]);
    assert_eq!(
        corrected.severity,
        Severity::Notice,
        "one error that the link recovered from"
    );

    let mut counted = device("0000:17:00.0", PciKind::Gpu, 16, 32_000, true);
    counted.errors = counters(&[
        ("aer_dev_correctable.BadTLP", 500),
        ("aer_dev_correctable.TOTAL_ERR_COR", 500),
    ]);
    let many = only(&[gpu, at(2, "a", HardwareFact::Pci(counted))]);
    assert_eq!(many.severity, Severity::Degraded);
    assert!(
        many.evidence[0].value.contains("500 correctable"),
        "the total repeats the named one: {many:#?}"
    );
}

#[test]
fn xids_accuse_the_device_only_when_they_say_so() {
    let xid = |second, code| {
        event(
            second,
            "0000:17:00.0",
            DeviceEventKind::Xid {
                code,
                message: "text".into(),
            },
        )
    };
    let of = |code| only(&[xid(0, code)]);
    for (code, cause) in [
        (79, Cause::DeviceFault),
        (48, Cause::DeviceFault),
        (94, Cause::DeviceFault),
        (74, Cause::NetworkNvlink),
        (13, Cause::Unknown),
        (31, Cause::Unknown),
        (43, Cause::Unknown),
        (45, Cause::Unknown),
        (9_999, Cause::Unknown),
    ] {
        assert_eq!(of(code).cause, cause, "XID {code}");
    }
    assert!(of(9_999).summary.contains("no known meaning"));
    let cascade = findings(&[xid(0, 48), xid(1, 45)]);
    let later = cascade
        .iter()
        .find(|finding| finding.summary.contains("XID 45"))
        .unwrap();
    assert!(
        later.evidence.iter().any(|seen| seen.value == "XID 48"),
        "{later:#?}"
    );
}

#[test]
fn the_map_goes_from_rank_to_port_by_the_shortest_way() {
    let nic = |address: &str, bridge: &str| {
        let mut nic = device(address, PciKind::Nic, 16, 32_000, true);
        nic.path = vec![bridge.into(), "0000:00:01.0".into()];
        at(0, "a", HardwareFact::Pci(nic))
    };
    let with_pci = |device: &str, pci: &str| {
        let mut facts = port(0, "a", device, &[]);
        if let HardwareFact::RdmaPort(port) = &mut facts.fact {
            port.pci = pci.into();
        }
        facts
    };
    let facts = [
        at(
            0,
            "a",
            HardwareFact::Pci(device("0000:17:00.0", PciKind::Gpu, 16, 32_000, true)),
        ),
        nic("0000:18:00.0", "0000:10:00.0"),
        nic("0000:28:00.0", "0000:20:00.0"),
        with_pci("mlx5_0", "0000:28:00.0"),
        with_pci("mlx5_1", "0000:18:00.0"),
    ];
    let subject = GpuSubject {
        job: "j".into(),
        node: "a".into(),
        gpu: 3,
        pci: "0000:17:00.0".into(),
        device: String::new(),
        rank: 5,
        world: 8,
        pid: 42,
    };
    let report = examine(&facts, &[], &[&subject]);
    let [path] = report.paths.as_slice() else {
        panic!("{:#?}", report.paths)
    };
    assert_eq!((path.rank, path.gpu), (Some(5), Some(3)));
    let [port] = path.ports.as_slice() else {
        panic!("{path:#?}")
    };
    assert_eq!(
        (port.port.as_str(), port.distance),
        ("mlx5_1:1", Distance::Switch)
    );
    assert_eq!(
        port.is_used,
        Reading::NotMeasured,
        "queue pairs were not looked at"
    );
}

#[test]
fn what_was_not_measured_is_not_seen_and_not_healthy() {
    let mut facts = port(0, "a", "mlx5_0", &[]);
    if let HardwareFact::RdmaPort(port) = &mut facts.fact {
        port.active = Reading::Failed("input/output error".into());
        port.counters = vec![Counter {
            name: "out_of_buffer".into(),
            growth: Reading::Failed("was reset".into()),
        }];
    }
    let subject = GpuSubject {
        job: "j".into(),
        node: "b".into(),
        gpu: 0,
        pci: String::new(),
        device: String::new(),
        rank: 0,
        world: 1,
        pid: 1,
    };
    let unseen: Vec<String> = examine(&[facts], &[], &[&subject])
        .unseen
        .into_iter()
        .map(|unseen| format!("{}: {}", unseen.node, unseen.what))
        .collect();
    for part in [
        "a: mlx5_0:1: whether the port is active could not be read: input/output error",
        "a: mlx5_0:1: out_of_buffer in part of the time: was reset",
        "b: RDMA ports, PCIe links and faults of devices: nothing was told",
    ] {
        assert!(
            unseen.iter().any(|line| line.contains(part)),
            "{part:?} is not in {unseen:#?}"
        );
    }
}

/// Both ports on the same interface, as soft-`RoCE` has them.
fn on_interface(mut facts: Vec<HardwareFacts>, name: &str) -> Vec<HardwareFacts> {
    for facts in &mut facts {
        if let HardwareFact::RdmaPort(port) = &mut facts.fact {
            port.netdev = name.into();
        }
    }
    facts
}

/// Four windows of an interface's own queue.
fn own_queue(node: &str, backlog_bytes: u64, overlimits: u64) -> Vec<PortFacts> {
    let queue = PortFacts {
        node: node.into(),
        port: "eth1".into(),
        window: Window::new(0, S).unwrap(),
        realtime_offset_ns: 0,
        line_bytes_per_s: Reading::NotMeasured,
        sent_bytes: 1_000_000,
        received_bytes: 0,
        backlog_bytes: Reading::Value(backlog_bytes),
        queue_overlimits: Reading::Value(overlimits),
        flows: Vec::new(),
    };
    vec![queue; 4]
}

#[test]
fn what_the_own_queue_drops_is_the_senders_and_not_the_ways() {
    let facts = on_nodes(&["a", "b"], |node, _| match node {
        "a" => vec![("packet_seq_err", 300)],
        _ => vec![("out_of_sequence", 300)],
    });
    let ports = [own_queue("a", 50_000, 500), own_queue("b", 0, 0)].concat();
    let found = examine(&on_interface(facts, "eth1"), &ports, &[]).findings;
    let [finding] = found.as_slice() else {
        panic!("{found:#?}")
    };
    assert_eq!(
        (finding.cause, finding.side, node(finding)),
        (Cause::NetworkNic, Side::Sender, "a")
    );
}

#[test]
fn what_the_own_queue_loses_without_holding_it_back_is_lost_on_the_way() {
    // As Linux 6.1 counts with netem losing packets: dropped, and nothing ever waits.
    let facts = on_nodes(&["a", "b"], |node, _| match node {
        "a" => vec![("completer_retry_err", 65), ("rcvd_seq_err", 12)],
        _ => vec![("out_of_seq_request", 65)],
    });
    let ports = [own_queue("a", 0, 16), own_queue("b", 0, 0)].concat();
    let found = examine(&on_interface(facts, "eth1"), &ports, &[]).findings;
    let [finding] = found.as_slice() else {
        panic!("{found:#?}")
    };
    assert_eq!(
        (finding.cause, finding.side, node(finding)),
        (Cause::NetworkFabric, Side::Sender, "a")
    );
}

#[test]
fn what_the_own_queue_delays_is_late_and_not_lost() {
    // a times out and sends again what b gets twice: by the ports alone, b's answers could be lost.
    let facts = on_nodes(&["a", "b"], |node, _| match node {
        "a" => vec![("completer_retry_err", 60), ("rcvd_seq_err", 0)],
        _ => vec![("duplicate_request", 60), ("out_of_seq_request", 0)],
    });
    let facts = on_interface(facts, "eth1");
    let told = |ports: &[PortFacts]| {
        let found = examine(&facts, ports, &[]).findings;
        let [finding] = found.as_slice() else {
            panic!("{found:#?}")
        };
        (finding.cause, finding.side, node(finding).to_owned())
    };
    let idle = [own_queue("a", 0, 0), own_queue("b", 0, 0)].concat();
    assert_eq!(told(&idle), (Cause::NetworkFabric, Side::Sender, "b".to_owned()));
    let late = [own_queue("a", 50_000, 0), own_queue("b", 0, 0)].concat();
    assert_eq!(told(&late), (Cause::NetworkFabric, Side::Path, "a".to_owned()));
}

#[test]
fn shares_are_printed_with_the_digits_they_need() {
    assert_eq!(share(0), "0.00000 %");
    assert_eq!(share(10_000), "0.00100 %");
    assert_eq!(share(123_000_000), "12.3 %");
}
