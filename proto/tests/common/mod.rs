//! Facts to send through the wire.

use stallscope_attribution::budget::Budget;
use stallscope_attribution::facts::{
    Activity, AerSeverity, ClockFacts, Counter, DeviceEvent, DeviceEventKind, FlowFacts, ForeignLoad,
    GpuStep, GpuSubject, HardwareFact, HardwareFacts, LeafInterval, PciDevice, PciKind, PciLink, PortFacts,
    ProcessWaits, QueuePair, RdmaPort, RecordGap, Span, SpanKind, StepMethod, StepSignals, StepWait,
    StepWaits,
};
use stallscope_attribution::leaf::Leaf;
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;
use stallscope_proto::convert::{Payload, Record, SubjectEntry};

pub(crate) fn subject() -> GpuSubject {
    GpuSubject {
        job: "llm-7b".into(),
        node: "n1".into(),
        gpu: 1,
        pci: "0000:41:00.0".into(),
        device: "NVIDIA H100 80GB HBM3".into(),
        rank: 3,
        world: 4,
        pid: 4711,
    }
}

/// A step as a busy node sends it: many leaves, most with bounds, every reading there.
pub(crate) fn full_budget(window_ns: u64) -> Budget {
    let mut leaves = [0_i64; Leaf::COUNT];
    let mut intervals = Vec::new();
    let mut left = i64::try_from(window_ns).unwrap();
    for leaf in Leaf::ALL.iter().copied().filter(|leaf| *leaf != Leaf::Ideal) {
        let ns = if leaf == Leaf::ComputeClock {
            -1_234_567
        } else {
            left / 30
        };
        leaves[leaf.index()] = ns;
        left -= ns;
        if leaf.index() % 2 == 0 {
            intervals.push(LeafInterval {
                leaf,
                low_ns: ns - 1_000_000,
                high_ns: ns + 3_000_000,
            });
        }
    }
    leaves[Leaf::Ideal.index()] = left;
    Budget::from_leaves(window_ns, leaves, 0x00ff_00ff, intervals).unwrap()
}

pub(crate) fn full_step() -> GpuStep {
    let start_ns = 86_400_000_000_000;
    let window_ns = 1_234_567_890;
    GpuStep {
        index: 100_000,
        window: Window::new(start_ns, start_ns + window_ns).unwrap(),
        realtime_offset_ns: 1_795_000_000_000_000_000,
        method: StepMethod::CollectivePeriod,
        period_calls: 24,
        budget: full_budget(window_ns),
        signals: StepSignals {
            host_on_cpu_ns: 500_000_000,
            host_runnable_ns: 10_000_000,
            host_sync_ns: 600_000_000,
            quota_throttled_ns: Reading::Value(0),
            worker_cpu_ns: 2_000_000_000,
            worker_io_ns: 200_000_000,
            launches: 2_500,
            comm_bytes: 14_000_000_000,
            collectives: 24,
            first_collective_ns: Some(300_000_000),
            last_collective_ns: Some(900_000_000),
            activity: Reading::Value(Activity {
                busy_ppm: 912_345,
                sm_ppm: 812_345,
                occupancy_ppm: 412_345,
                tensor_ppm: 382_345,
                dram_ppm: 282_345,
                compute_sm_ppm: 962_345,
            }),
            clock: Reading::Value(ClockFacts {
                sm_mhz: 1755,
                thermal_ns: 0,
                power_ns: 123_456_789,
                temperature_c: 71,
                power_mw: 689_123,
            }),
            reference_sm_mhz: Some(1830),
            foreign: Reading::Value(ForeignLoad {
                processes: 1,
                largest_pid: 99_999,
                sm_ppm: 120_000,
            }),
            links: Reading::NotMeasured,
            lost_records: 3,
        },
    }
}

pub(crate) fn bare_step() -> GpuStep {
    let mut leaves = [0_i64; Leaf::COUNT];
    leaves[Leaf::IdleUnknown.index()] = 5;
    GpuStep {
        index: 0,
        window: Window::new(0, 5).unwrap(),
        realtime_offset_ns: -7,
        method: StepMethod::FixedWindow,
        period_calls: 0,
        budget: Budget::from_leaves(5, leaves, 0, vec![]).unwrap(),
        signals: StepSignals {
            activity: Reading::Unsupported,
            clock: Reading::Failed("the driver did not answer in 500 ms".into()),
            ..StepSignals::default()
        },
    }
}

pub(crate) fn port() -> PortFacts {
    PortFacts {
        node: "n1".into(),
        port: "eth0".into(),
        window: Window::new(1_000, 1_000_001_000).unwrap(),
        realtime_offset_ns: 1_795_000_000_000_000_000,
        line_bytes_per_s: Reading::Unsupported,
        sent_bytes: 123_456_789,
        received_bytes: 987_654_321,
        backlog_bytes: Reading::Value(0),
        queue_overlimits: Reading::Failed("netlink: no such device".into()),
        flows: vec![FlowFacts {
            pid: 4711,
            local: "10.0.0.1:40000".into(),
            peer: "10.0.0.2:50000".into(),
            acked_bytes: 1_000_000,
            busy_ns: 900_000_000,
            receiver_limited_ns: 1,
            unsent_bytes: 65_536,
            retransmits: 2,
            rtt_us: 250,
            min_rtt_us: 80,
            receive_backlog_bytes: 0,
            window_probes: 0,
        }],
    }
}

pub(crate) fn record(sequence: u64, payload: Payload) -> Record {
    Record {
        node: "n1".into(),
        boot_id: 0x0123_4567_89ab_cdef,
        sequence,
        payload,
    }
}

/// One record of every kind, each with a name.
pub(crate) fn every_kind() -> Vec<(&'static str, Record)> {
    let entry = SubjectEntry {
        subject: subject(),
        job_kind: "pretrain".into(),
    };
    let span = Span {
        kind: SpanKind::Checkpoint,
        window: Window::new(7, 1_000_007).unwrap(),
        realtime_offset_ns: 1,
        budget: full_budget(1_000_000),
    };
    let gap = RecordGap {
        node: "n2".into(),
        window: Window::new(1_795_000_000_000_000_000, 1_795_000_001_000_000_000),
        what: "records lost in ring cuda".into(),
        count: 12,
    };
    vec![
        ("subject", record(1, Payload::Subject { id: 1, entry })),
        (
            "step_full",
            record(
                2,
                Payload::Step {
                    subject: 1,
                    step: Box::new(full_step()),
                },
            ),
        ),
        (
            "step_bare",
            record(
                3,
                Payload::Step {
                    subject: 1,
                    step: Box::new(bare_step()),
                },
            ),
        ),
        (
            "span",
            record(
                4,
                Payload::Span {
                    subject: 1,
                    span: Box::new(span),
                },
            ),
        ),
        ("port", record(5, Payload::Port(port()))),
        ("gap", record(6, Payload::Gap(gap))),
        hardware("rdma_port", 7, HardwareFact::RdmaPort(rdma_port())),
        hardware("queue_pair", 8, HardwareFact::QueuePair(queue_pair())),
        hardware("waits", 14, HardwareFact::Waits(Box::new(waits()))),
        hardware("pci_device", 9, HardwareFact::Pci(pci_device())),
        hardware("pci_bare", 10, HardwareFact::Pci(bare_pci_device())),
        event(
            "aer",
            11,
            DeviceEventKind::Aer {
                severity: AerSeverity::NonFatal,
                status: 0x4000,
            },
        ),
        event(
            "xid",
            12,
            DeviceEventKind::Xid {
                code: 79,
                message: "GPU has fallen off the bus.".into(),
            },
        ),
        event(
            "verbs",
            13,
            DeviceEventKind::Verbs {
                device: "mlx5_3".into(),
                event: 9,
                element: 1,
            },
        ),
    ]
}

fn hardware(name: &'static str, sequence: u64, fact: HardwareFact) -> (&'static str, Record) {
    let facts = HardwareFacts {
        node: "n1".into(),
        window: Window::new(1_000, 2_000_001_000).unwrap(),
        realtime_offset_ns: -1,
        fact,
    };
    (name, record(sequence, Payload::Hardware(facts)))
}

fn event(name: &'static str, sequence: u64, kind: DeviceEventKind) -> (&'static str, Record) {
    let pci = "0000:b3:00.0".to_owned();
    hardware(name, sequence, HardwareFact::Event(DeviceEvent { pci, kind }))
}

fn rdma_port() -> RdmaPort {
    RdmaPort {
        device: "mlx5_3".into(),
        port: 1,
        pci: "0000:b4:00.0".into(),
        netdev: "ens3f0np0".into(),
        link_layer: "Ethernet".into(),
        active: Reading::Value(false),
        rate_bytes_per_s: Reading::Value(50_000_000_000),
        counters: vec![
            Counter {
                name: "np_cnp_sent".into(),
                growth: Reading::Value(0),
            },
            Counter {
                name: "made.by_a_newer_driver".into(),
                growth: Reading::Failed("was reset".into()),
            },
            Counter {
                name: "port_xmit_wait".into(),
                growth: Reading::Unsupported,
            },
        ],
    }
}

fn queue_pair() -> QueuePair {
    QueuePair {
        pid: 4711,
        device: "mlx5_3".into(),
        port: 1,
        number: 0x00ab_cdef,
        transport: "RC".into(),
        peer: "::ffff:10.0.0.2".into(),
        peer_number: 17,
        posts: 1_000,
        posted_bytes: 65_536_000,
        refused: 1,
        in_error: true,
        cut_calls: 2,
        posts_unseen: true,
    }
}

/// Every number is another.
fn waits() -> ProcessWaits {
    let wait = |first| StepWait {
        steps_ns: first,
        any_ns: first + 1,
        entered: first + 2,
    };
    ProcessWaits {
        pid: 4711,
        watched_ns: 2_000_000_000,
        waits: StepWaits {
            send_gpu: wait(10),
            send_credit: Some(wait(20)),
            send_wire: wait(30),
            receive_wire: wait(40),
            receive_flush: wait(50),
            receive_gpu: wait(60),
            sent: 70,
            received: 71,
            unknown: 72,
        },
    }
}

fn pci_device() -> PciDevice {
    PciDevice {
        address: "0000:b4:00.0".into(),
        kind: PciKind::Nic,
        name: "mlx5_3".into(),
        link: Reading::Value(PciLink {
            rate_mt_per_s: 16_000,
            lanes: 8,
            best_rate_mt_per_s: 32_000,
            best_lanes: 16,
            under_load: true,
        }),
        path: vec!["0000:b2:01.0".into(), "0000:b0:00.0".into()],
        numa_node: Reading::Value(0),
        errors: vec![Counter {
            name: "aer_dev_correctable.RxErr".into(),
            growth: Reading::Value(3),
        }],
    }
}

fn bare_pci_device() -> PciDevice {
    PciDevice {
        address: "0000:00:02.0".into(),
        link: Reading::Unsupported,
        numa_node: Reading::Failed("it could not be read".into()),
        ..PciDevice::default()
    }
}
