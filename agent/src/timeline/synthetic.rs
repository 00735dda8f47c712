//! A made-up training job, call by call, whose drains and steps are known by construction.

use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use crate::observation::{
    Collective, CollectiveFunction, CommCreated, CopyDirection, Fact, FileOp, GpuReading, Observation,
    OffCpuReason, ProcessFacts, ProcessKey, ProcessRole, SyncTarget, Thread,
};

pub(crate) const MS: u64 = 1_000_000;
/// Compute stream, communication stream, copy stream.
pub(crate) const COMPUTE: u64 = 0x70;
pub(crate) const COMM: u64 = 0x90;
pub(crate) const COPY: u64 = 0xb0;

pub(crate) const PROCESS: ProcessKey = ProcessKey {
    pid: 100,
    start_ticks: 7,
};
pub(crate) const HELPER: ProcessKey = ProcessKey {
    pid: 200,
    start_ticks: 8,
};
pub(crate) const MAIN: Thread = Thread {
    process: PROCESS,
    tid: 100,
};
pub(crate) const LOADER: Thread = Thread {
    process: HELPER,
    tid: 200,
};

pub(crate) fn window(start_ns: u64, end_ns: u64) -> Window {
    Window::new(start_ns, end_ns).expect("a window that ends after it starts")
}

pub(crate) fn process(key: ProcessKey, role: ProcessRole) -> ProcessFacts {
    ProcessFacts {
        key,
        parent_pid: if role == ProcessRole::Helper {
            PROCESS.pid
        } else {
            1
        },
        comm: "trainer".to_owned(),
        role,
        works_for: (role == ProcessRole::Helper).then_some(PROCESS),
        job: Some("made-up".to_owned()),
        rank: Some(3),
        world: Some(8),
        local_rank: Some(1),
        gpu: Some(1),
        cgroup: "/".to_owned(),
        kind: Some("pretrain".to_owned()),
        model_flops_per_step: None,
    }
}

/// A log of calls with a running clock.
#[derive(Debug, Default)]
pub(crate) struct Script {
    pub(crate) now_ns: u64,
    pub(crate) log: Vec<Observation>,
    events: u64,
}

impl Script {
    /// A process that is first seen at `now_ns`.
    pub(crate) fn new(now_ns: u64) -> Self {
        let mut script = Self {
            now_ns,
            log: Vec::new(),
            events: 0,
        };
        script.fact(0, Fact::RealtimeOffset { ns: 1_000 });
        script.fact(0, Fact::Process(Box::new(process(PROCESS, ProcessRole::Gpu))));
        script.fact(0, Fact::Process(Box::new(process(HELPER, ProcessRole::Helper))));
        script
    }

    /// End of the last call.
    pub(crate) fn end_ns(&self) -> u64 {
        self.log
            .iter()
            .map(|observation| observation.window.end_ns())
            .max()
            .unwrap_or(0)
    }

    /// A fact that takes `len_ns` from now.
    pub(crate) fn fact(&mut self, len_ns: u64, fact: Fact) {
        let window = window(self.now_ns, self.now_ns + len_ns);
        self.now_ns += len_ns;
        self.log.push(Observation { window, fact });
    }

    pub(crate) fn launches(&mut self, stream: u64, kernels: u32, len_ns: u64) {
        self.fact(
            len_ns,
            Fact::LaunchRun {
                thread: MAIN,
                stream,
                kernels,
                graphs: 0,
            },
        );
        self.now_ns += 1_000;
    }

    pub(crate) fn sync(&mut self, target: SyncTarget, len_ns: u64) {
        self.fact(
            len_ns,
            Fact::Sync {
                thread: MAIN,
                target,
                result: 0,
            },
        );
    }

    pub(crate) fn copy(&mut self, bytes: u64, direction: CopyDirection, stream: Option<u64>, len_ns: u64) {
        self.fact(
            len_ns,
            Fact::Copy {
                thread: MAIN,
                bytes,
                direction,
                stream,
            },
        );
        self.now_ns += 1_000;
    }

    /// `to` waits for all that `from` was given.
    pub(crate) fn join(&mut self, from: u64, to: u64) {
        self.events += 1;
        let event = 0x1000 + self.events % 16;
        self.fact(
            500,
            Fact::EventRecord {
                thread: MAIN,
                event,
                stream: from,
            },
        );
        self.now_ns += 500;
        self.fact(
            500,
            Fact::StreamWait {
                thread: MAIN,
                stream: to,
                event,
            },
        );
        self.now_ns += 500;
    }

    pub(crate) fn all_reduce(&mut self, count: u64) {
        self.fact(
            20_000,
            Fact::Collective(Collective {
                thread: MAIN,
                comm: 0xc0,
                function: CollectiveFunction::AllReduce,
                count,
                datatype: 9,
                peer: None,
                stream: COMM,
                result: Some(0),
            }),
        );
        self.now_ns += 1_000;
    }

    pub(crate) fn communicator(&mut self, key: u64) {
        self.fact(
            MS,
            Fact::CommCreated(CommCreated {
                thread: MAIN,
                comm: 0xc0,
                key: Some(key),
                is_nccl_hash: true,
                rank: Some(3),
                ranks: Some(8),
                device: None,
                result: 0,
                found_in_use: false,
            }),
        );
    }

    pub(crate) fn off_cpu(&mut self, thread: Thread, reason: OffCpuReason, runnable_ns: u64, at: Window) {
        self.log.push(Observation {
            window: at,
            fact: Fact::OffCpu {
                thread,
                reason,
                runnable_ns,
            },
        });
    }

    pub(crate) fn file(&mut self, thread: Thread, op: FileOp, bytes: u64, len_ns: u64) {
        self.fact(
            len_ns,
            Fact::FileIo {
                thread,
                op,
                bytes,
                blocked_ns: len_ns / 2,
            },
        );
    }

    /// One step: `wait_ns` for the batch, copy, forward, backward with `buckets` equal all-reduces that the compute
    /// stream joins, then a stream synchronisation. Gives when the GPU was drained: wait and time to the first copy.
    pub(crate) fn step(&mut self, wait_ns: u64, buckets: u32, busy_ns: u64) -> Window {
        let drained_ns = self.now_ns;
        if wait_ns > 0 {
            let asleep = window(self.now_ns + 100_000, self.now_ns + wait_ns);
            self.off_cpu(MAIN, OffCpuReason::Sleep, 0, asleep);
            self.now_ns += wait_ns;
        }
        let drained = window(drained_ns, self.now_ns);
        self.copy(1 << 20, CopyDirection::ToDevice, Some(COPY), 10_000);
        self.join(COPY, COMPUTE);
        self.launches(COMPUTE, 200, busy_ns / 4);
        for _ in 0..buckets {
            self.launches(COMPUTE, 50, busy_ns / 4 / u64::from(buckets));
            self.join(COMPUTE, COMM);
            self.all_reduce(1 << 20);
        }
        self.join(COMM, COMPUTE);
        self.launches(COMPUTE, 20, 100_000);
        self.sync(SyncTarget::Stream(COMPUTE), busy_ns / 2);
        drained
    }
}

/// A job with a step per wait, a GPU reading in each, and a loader that sleeps.
pub(crate) fn job(waits_ms: &[u64], buckets: u32, busy_ms: u64) -> Script {
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

pub(crate) fn reading(gpu: u32) -> GpuReading {
    GpuReading {
        gpu,
        pci: format!("0000:0{gpu}:00.0"),
        device: "NVIDIA H100 80GB HBM3".to_owned(),
        pci_device_id: 0x2330_10de,
        busy_ppm: Reading::Value(900_000),
        sm_ppm: Reading::Value(720_000),
        occupancy_ppm: Reading::Value(300_000),
        tensor_ppm: Reading::Value(400_000),
        dram_ppm: Reading::Value(250_000),
        pcie_rx_bytes_per_s: Reading::Unsupported,
        pcie_tx_bytes_per_s: Reading::Unsupported,
        sm_mhz: Reading::Value(1_755),
        sm_max_mhz: Reading::Value(1_980),
        clock_reasons: Reading::Value(0),
        thermal_ns: Reading::Value(0),
        power_limit_ns: Reading::Value(0),
        energy_mj: Reading::Value(60_000),
        temperature_c: Reading::Value(55),
        memory_used_bytes: Reading::Value(1 << 34),
        process_sm_ppm: Reading::Value(vec![(PROCESS.pid, 700_000)]),
        processes: Reading::Value(vec![PROCESS.pid]),
        links: Reading::NotMeasured,
    }
}
