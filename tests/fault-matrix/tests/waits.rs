//! Jobs whose network slows down, seen by nothing but what NCCL's network steps waited for.

use stallscope_attribution::cause::{Cause, Place};
use stallscope_attribution::facts::{
    HardwareFact, HardwareFacts, JobFacts, PortFacts, ProcessWaits, StepWait, StepWaits,
};
use stallscope_attribution::job::{JobAnalysis, analyse};
use stallscope_fault_matrix::job::play;
use stallscope_fault_matrix::observe::{facts, node_name};
use stallscope_fault_matrix::ring::{Ring, Spent};
use stallscope_fault_matrix::variant::{Dose, Fault, GPUS, Injected, NODES, Variant};
use stallscope_fault_matrix::work::MS;

/// Steps of the job, the fault in the second half.
const STEPS: usize = 60;
const ONSET: usize = 30;
/// Whose ring is slow.
const NODE: usize = 2;
/// Collectives of a step.
const BUCKETS: u64 = 4;

fn waits(spent: &Spent, pid: u32, watched_ns: u64) -> ProcessWaits {
    let wait = |(all, any): (u64, u64)| StepWait {
        steps_ns: all * BUCKETS,
        any_ns: any * BUCKETS,
        entered: BUCKETS,
    };
    ProcessWaits {
        pid,
        watched_ns,
        waits: StepWaits {
            send_gpu: wait(spent.send[0]),
            send_credit: Some(wait(spent.send[1])),
            send_wire: wait(spent.send[2]),
            receive_wire: wait(spent.receive[0]),
            receive_flush: wait(spent.receive[1]),
            receive_gpu: wait(spent.receive[2]),
            sent: BUCKETS,
            received: BUCKETS,
            unknown: 0,
        },
    }
}

/// A job whose collectives take longer from the onset on when `slow`, the first rank of each node in a ring. Of the flows of
/// the kernel `ports` says what remains to be seen.
fn analysed(slow: bool, ring: &Ring, ports: impl Fn(Vec<PortFacts>) -> Vec<PortFacts>) -> JobAnalysis {
    let injected = Injected {
        fault: Fault::SlowNic { node: NODE },
        from: ONSET,
        until: if slow { STEPS } else { ONSET },
    };
    let variant = Variant {
        scenario: "waits",
        faults: vec![injected],
        dose: Dose::Loud,
        steps: STEPS,
        seed: 5,
    };
    let mut seen: JobFacts = facts(&variant, &play(&variant));
    seen.ports = ports(std::mem::take(&mut seen.ports));
    let (healthy, fault) = (Ring::healthy(NODES).play().1, ring.play().1);
    for node in 0..NODES {
        let history = &seen.gpus[node * GPUS];
        // Every third step is watched.
        let told = history.steps.iter().step_by(3).map(|step| {
            let spent = if step.index >= ONSET as u64 {
                &fault
            } else {
                &healthy
            };
            let of = waits(&spent[node], history.subject.pid, step.window.len_ns());
            HardwareFacts {
                node: node_name(node),
                window: step.window,
                realtime_offset_ns: step.realtime_offset_ns,
                fact: HardwareFact::Waits(Box::new(of)),
            }
        });
        seen.hardware.extend(told);
    }
    analyse(&seen)
}

fn none(_: Vec<PortFacts>) -> Vec<PortFacts> {
    Vec::new()
}

/// A healthy ring but for one rank.
fn but(change: impl Fn(&mut Ring)) -> Ring {
    let mut ring = Ring::healthy(NODES);
    change(&mut ring);
    ring
}

fn slow_way() -> Ring {
    but(|ring| ring.wires[NODE] = MS)
}

fn late() -> Ring {
    but(|ring| ring.works[NODE] = MS)
}

fn rank_place(place: &Place) -> (Option<&str>, Option<u32>) {
    (place.node.as_deref(), place.rank)
}

fn first(analysis: &JobAnalysis) -> (Cause, &Place) {
    let first = analysis.verdicts.first().expect("a verdict");
    (first.cause, &first.place)
}

fn is_network(cause: Cause) -> bool {
    cause.name().starts_with("network.") || cause == Cause::HostReceiver
}

#[test]
fn who_is_slow_is_told_from_who_waits_for_it() {
    let node = node_name(NODE);
    let rank = u32::try_from(NODE * GPUS).expect("a rank");

    let way = analysed(true, &slow_way(), none);
    let (cause, place) = first(&way);
    assert_eq!(
        (cause, rank_place(place)),
        (Cause::NetworkFabric, (Some(node.as_str()), None))
    );
    assert_eq!(place.link, Some(format!("{node} -> its peers")));

    let flush = analysed(true, &but(|ring| ring.flushes[NODE] = 6 * MS), none);
    let (cause, place) = first(&flush);
    assert_eq!(
        (cause, rank_place(place)),
        (Cause::NetworkPcie, (Some(node.as_str()), Some(rank)))
    );

    let host = analysed(true, &but(|ring| ring.offers[NODE] = 8 * MS), none);
    let (cause, place) = first(&host);
    assert_eq!(
        (cause, rank_place(place)),
        (Cause::HostReceiver, (Some(node.as_str()), Some(rank)))
    );

    let all = analysed(true, &but(|ring| ring.wires.fill(MS)), none);
    let (cause, place) = first(&all);
    assert_eq!((cause, place), (Cause::NetworkFabric, &Place::default()));
}

#[test]
fn a_late_gpu_is_not_the_networks() {
    // The flows too: they are busy for longer, because the collectives take longer.
    let busy = |mut ports: Vec<PortFacts>| {
        for port in &mut ports {
            port.backlog_bytes = stallscope_attribution::reading::Reading::Value(0);
            port.queue_overlimits = stallscope_attribution::reading::Reading::Value(0);
            for flow in &mut port.flows {
                flow.unsent_bytes = 0;
                flow.rtt_us = 9_000;
            }
        }
        ports
    };
    let fooled = analysed(true, &slow_way(), busy);
    assert_eq!(first(&fooled).0, Cause::NetworkFabric, "{:#?}", fooled.verdicts);
    for ports in [none as fn(Vec<PortFacts>) -> Vec<PortFacts>, busy] {
        for ring in [late(), Ring::healthy(NODES)] {
            let analysis = analysed(true, &ring, ports);
            assert!(
                analysis.verdicts.iter().all(|verdict| !is_network(verdict.cause)),
                "{:#?}",
                analysis.verdicts
            );
        }
    }
}

#[test]
fn waits_that_cost_nothing_accuse_nobody() {
    for ring in [slow_way(), late(), but(|ring| ring.wires.fill(MS))] {
        let analysis = analysed(false, &ring, none);
        let causes: Vec<Cause> = analysis.verdicts.iter().map(|verdict| verdict.cause).collect();
        assert_eq!(causes, [Cause::None]);
    }
}

#[test]
fn what_the_port_says_stays_and_the_steps_are_its_evidence() {
    let analysis = analysed(true, &slow_way(), |ports| ports);
    let verdict = analysis.verdicts.first().expect("a verdict");
    assert_eq!(verdict.cause, Cause::NetworkNic);
    assert_eq!(verdict.place.node, Some(node_name(NODE)));
    let row = verdict
        .evidence
        .iter()
        .find(|row| row.what.contains("network steps"))
        .expect("a row");
    assert!(row.what.contains(&node_name(NODE)), "the slow one first: {row:?}");
    let [gpu, credit, wire] = slow_way().play().1[NODE].send.map(|(all, _)| all as f64);
    let share = format!("{:.1} % wire", 100.0 * wire / (gpu + credit + wire));
    assert!(row.value.contains(&share), "{row:?} is not {share}");
}
