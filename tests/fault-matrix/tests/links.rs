//! Jobs over RDMA whose network slows down: no flow of the kernel tells why, only the devices do.

use stallscope_attribution::cause::{Cause, Place};
use stallscope_attribution::facts::{
    Counter, HardwareFact, HardwareFacts, JobFacts, PciDevice, PciKind, PciLink, RdmaPort,
};
use stallscope_attribution::job::{JobAnalysis, analyse};
use stallscope_attribution::links::FindingCost;
use stallscope_attribution::reading::Reading;
use stallscope_fault_matrix::job::play;
use stallscope_fault_matrix::observe::{facts, node_name};
use stallscope_fault_matrix::truth;
use stallscope_fault_matrix::variant::{Dose, Fault, GPUS, Injected, NODES, Variant};

/// Steps of the job, the fault in the second half.
const STEPS: usize = 60;
const ONSET: usize = 30;
/// Where the device is at fault.
const NODE: usize = 2;

/// What one window of a device tells, by node and by whether the fault acts.
type Device = fn(node: usize, acts: bool) -> HardwareFact;

/// A job whose collectives take longer from the onset on when `slow`.
fn variant(slow: bool) -> Variant {
    let injected = Injected {
        fault: Fault::SlowNic { node: NODE },
        from: ONSET,
        until: if slow { STEPS } else { ONSET },
    };
    Variant {
        scenario: "links",
        faults: vec![injected],
        dose: Dose::Loud,
        steps: STEPS,
        seed: 5,
    }
}

/// The job seen without any flow, beside what devices tell.
fn analysed(slow: bool, device: Device) -> JobAnalysis {
    let variant = variant(slow);
    let mut seen: JobFacts = facts(&variant, &play(&variant));
    seen.ports.clear();
    for node in 0..NODES {
        let steps = &seen.gpus[node * GPUS].steps;
        let told = steps.iter().map(|step| HardwareFacts {
            node: node_name(node),
            window: step.window,
            realtime_offset_ns: step.realtime_offset_ns,
            fact: device(node, step.index >= ONSET as u64),
        });
        seen.hardware.extend(told);
    }
    analyse(&seen)
}

fn port(active: bool, counters: &[(&str, u64)]) -> HardwareFact {
    let traffic = [("port_xmit_packets", 900_000), ("port_rcv_packets", 900_000)];
    let counter = |(name, growth): &(&str, u64)| Counter {
        name: (*name).to_owned(),
        growth: Reading::Value(*growth),
    };
    HardwareFact::RdmaPort(RdmaPort {
        device: "mlx5_0".to_owned(),
        port: 1,
        link_layer: "Ethernet".to_owned(),
        active: Reading::Value(active),
        rate_bytes_per_s: Reading::Value(50_000_000_000),
        counters: traffic.iter().chain(counters).map(counter).collect(),
        ..RdmaPort::default()
    })
}

/// What node 2 sends gets lost: it sends again what its peers miss.
fn loss(node: usize, acts: bool) -> HardwareFact {
    let (again, missed) = match (acts, node) {
        (true, NODE) => (3_000, 0),
        (true, _) => (0, 1_000),
        _ => (0, 0),
    };
    port(true, &[("packet_seq_err", again), ("out_of_sequence", missed)])
}

/// Switches mark what goes to node 2; its peers slow down.
fn congestion(node: usize, acts: bool) -> HardwareFact {
    let (sent, handled) = match (acts, node) {
        (true, NODE) => (20_000, 0),
        (true, _) => (10, 6_000),
        _ => (10, 10),
    };
    port(
        true,
        &[
            ("np_cnp_sent", sent),
            ("rp_cnp_handled", handled),
            ("out_of_buffer", 0),
        ],
    )
}

/// The interface of node 2 falls to half its lanes.
fn half_lanes(node: usize, acts: bool) -> HardwareFact {
    HardwareFact::Pci(PciDevice {
        address: "0000:18:00.0".to_owned(),
        kind: PciKind::Nic,
        name: "mlx5_0".to_owned(),
        link: Reading::Value(PciLink {
            rate_mt_per_s: 32_000,
            lanes: if acts && node == NODE { 8 } else { 16 },
            best_rate_mt_per_s: 32_000,
            best_lanes: 16,
            under_load: true,
        }),
        ..PciDevice::default()
    })
}

/// The port of node 2 goes down; its traffic takes another way.
fn down(node: usize, acts: bool) -> HardwareFact {
    port(!(acts && node == NODE), &[])
}

/// Node 2 has no buffers for what arrives.
fn late_receiver(node: usize, acts: bool) -> HardwareFact {
    port(
        true,
        &[("out_of_buffer", if acts && node == NODE { 4_000 } else { 0 })],
    )
}

const CASES: [(&str, Device, Cause); 5] = [
    ("loss", loss, Cause::NetworkFabric),
    ("congestion", congestion, Cause::NetworkFabric),
    ("half the lanes", half_lanes, Cause::NetworkPcie),
    ("port down", down, Cause::NetworkNic),
    ("late receiver", late_receiver, Cause::HostReceiver),
];

fn names_node(place: &Place) -> bool {
    place.node == Some(node_name(NODE))
}

#[test]
fn what_the_devices_say_names_the_cause_and_the_place() {
    for (name, device, cause) in CASES {
        let analysis = analysed(true, device);
        let first = analysis.verdicts.first().expect("a verdict");
        assert_eq!(first.cause, cause, "{name}: {:#?}", analysis.verdicts);
        assert!(names_node(&first.place), "{name}: {:#?}", first.place);
        assert_eq!(analysis.verdicts.len(), 1, "{name}: {:#?}", analysis.verdicts);
        let named = analysis
            .links
            .findings
            .iter()
            .any(|finding| finding.cause == cause && finding.cost == FindingCost::Named);
        assert!(named, "{name}: {:#?}", analysis.links.findings);
    }
}

#[test]
fn what_costs_nothing_is_seen_and_accuses_nobody() {
    for (name, device, cause) in CASES {
        let analysis = analysed(false, device);
        let causes: Vec<Cause> = analysis.verdicts.iter().map(|verdict| verdict.cause).collect();
        assert_eq!(causes, [Cause::None], "{name}");
        let costs: Vec<FindingCost> = analysis
            .links
            .findings
            .iter()
            .filter(|finding| finding.cause == cause)
            .map(|finding| finding.cost)
            .collect();
        assert_eq!(costs, [FindingCost::NothingMeasured], "{name}");
    }
}

#[test]
fn a_slow_network_that_no_device_explains_accuses_no_device() {
    let analysis = analysed(true, |_, _| port(true, &[("packet_seq_err", 0)]));
    assert!(
        analysis
            .verdicts
            .iter()
            .all(|verdict| verdict.place.node.is_none()),
        "{:#?}",
        analysis.verdicts
    );
    assert_eq!(analysis.links.findings, []);
}

/// Half the lanes from the first step on: nobody saw the job without it.
#[test]
fn a_link_that_was_slow_from_the_start_is_told_with_what_it_may_cost() {
    let analysis = analysed(false, |node, _| half_lanes(node, true));
    let causes: Vec<Cause> = analysis.verdicts.iter().map(|verdict| verdict.cause).collect();
    assert_eq!(causes, [Cause::None]);
    let [finding] = &analysis.links.findings[..] else {
        panic!("{:#?}", analysis.links.findings);
    };
    assert_eq!(finding.cost, FindingCost::NothingMeasured);
    let row = finding.evidence.last().expect("a row");
    let most = row
        .value
        .strip_prefix("from 0 % to ")
        .and_then(|rest| rest.split(' ').next());
    let most: f64 = most.and_then(|most| most.parse().ok()).expect("a share");

    let variant = variant(false);
    let truth = truth::of(&variant, &play(&variant));
    let exposed: i64 = truth
        .leaves
        .iter()
        .filter(|(leaf, _)| leaf.starts_with("comm.") && **leaf != "comm.skew")
        .map(|(_, ns)| ns)
        .sum();
    let half = 100.0 * exposed as f64 / truth.total_ns as f64 / 2.0;
    assert!(
        half > 1.0 && (most - half).abs() < half / 5.0,
        "{row:?}, and {half} %"
    );
}
