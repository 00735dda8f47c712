//! A 64-GPU job with one slow worker, recorded by others as operator spans, converted to what agents on its nodes
//! would have recorded.
//!
//! The trace holds one of four tensor-parallel ranks of every worker, so 16 of 64 ranks on 8 nodes. The conversion
//! takes from it when operators ran. It adds what the trace does not say: that the host runs ahead of its GPU within a
//! micro-batch and waits for transfers, as Megatron's schedule does, and that NCCL's kernels hold a tenth of the SMs
//! while they wait, against nine tenths for compute.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::Value;
use stallscope::answers::recordings;
use stallscope::observation::{
    Collective, CollectiveFunction, CommCreated, Fact, GpuReading, Observation, ProcessFacts, ProcessKey,
    ProcessRole, SyncTarget, Thread,
};
use stallscope::record::Recorder;
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;
use stallscope_report::document::Document;

use super::{oracle_says, path};

const TRACE: &str = "straggler/trace-AR.parquet";
/// Steps of the trace that are converted: enough to see the pattern and to judge.
const STEPS: usize = 12;
pub(super) const MS: u64 = 1_000_000;
/// Between two steps, which the trace took at different times.
const PAUSE_NS: u64 = 5 * MS;
const READING_NS: u64 = 200 * MS;
const COMPUTE_STREAM: u64 = 1;
const COMM_STREAM: u64 = 2;
/// By how much a rank's share of all blame may be off what its slowness costs: where the edges of the first steps are not
/// known yet, averages of the devices over a minute tell who was late, and the other pipelines' own bubbles count.
const OFF_OF_OTHERS: f64 = 0.02;
/// The same of the slow rank, which lacks what all others have too much.
const OFF_OF_SLOWEST: f64 = 0.1;

fn script(arguments: &[&str], test: &str) -> Option<String> {
    oracle_says(test, "straggler.py", arguments)
}

fn trace() -> String {
    path(TRACE).to_str().expect("a path").to_owned()
}

/// The published analysis of the trace, by its authors' simulator.
fn published() -> Value {
    let text = std::fs::read(path("straggler/mw-AR.json")).expect("the published numbers");
    serde_json::from_slice(&text).expect("JSON")
}

/// What the replay says of the trace; `None` without Python.
fn what_if(test: &str) -> Option<Value> {
    let text = script(&["what-if", &trace(), &STEPS.to_string()], test)?;
    Some(serde_json::from_str(&text).expect("JSON"))
}

fn number(value: &Value) -> f64 {
    value.as_f64().expect("a number")
}

#[test]
fn the_slow_worker_explains_the_slowdown() {
    let Some(found) = what_if("the_slow_worker_explains_the_slowdown") else {
        return;
    };
    assert_eq!(found["slowest"], serde_json::json!([0, 0]));
    let slowdown = number(&published()["tori"]) / number(&published()["tideal"]);
    assert!((slowdown - 1.973).abs() < 0.0005, "{slowdown}");
    assert!((number(&found["slowdown"]) - slowdown).abs() < 0.0005, "{found}");
    let share = number(&published()["Mw"]);
    assert!(
        (number(&found["share_of_slowest"]) - share).abs() < 0.0005,
        "{found}"
    );
    let seconds = |key: &str| number(&found["mean_seconds"][key]);
    for (key, expected) in [
        ("0,0,forward-compute", 0.5461),
        ("1,0,forward-compute", 0.2174),
        ("0,0,backward-compute", 0.8692),
        ("1,0,backward-compute", 0.382),
    ] {
        assert!((seconds(key) - expected).abs() < 0.0005, "{key}: {found}");
    }
}

/// The report on recordings of the job; `None`, with the reason said, without Python.
pub(super) fn document(test: &str) -> Option<Document> {
    let text = script(&["spans", &trace(), &STEPS.to_string()], test)?;
    let folder = tempfile::tempdir().expect("a folder");
    let recordings = convert(&text, folder.path());
    assert_eq!(recordings.len(), 8);
    Some(recordings::document(&recordings).expect("a report"))
}

#[test]
fn recordings_of_the_job_blame_its_slow_worker() {
    let Some(document) = document("recordings_of_the_job_blame_its_slow_worker") else {
        return;
    };
    document.check().expect("sums hold");
    let [job] = document.jobs.as_slice() else {
        panic!("one job");
    };
    assert_eq!(job.gpus.len(), 16);
    assert!(!job.verdicts.is_empty());
    for verdict in &job.verdicts {
        assert_eq!(verdict.place.rank, Some(0), "{}", verdict.cause);
        assert!(!verdict.cause.starts_with("network."), "{}", verdict.cause);
    }
    assert!(
        job.verdicts[0]
            .ruled_out
            .iter()
            .any(|out| out.cause == "network.nic"),
        "the network is ruled out by name"
    );
    // What each worker's slowness costs by the replay: all but one are victims.
    let costs = what_if("recordings_of_the_job_blame_its_slow_worker").expect("the same Python");
    let mut blamed: BTreeMap<Option<u32>, u64> = BTreeMap::new();
    for blame in &job.blame {
        *blamed.entry(blame.rank).or_default() += blame.cost_ns;
    }
    let all: u64 = blamed.values().sum();
    for (rank, cost_ns) in blamed {
        let rank = rank.expect("all waiting was for somebody");
        let found = cost_ns as f64 / all as f64;
        let cost = number(&costs["share_by_rank"][rank.to_string()]);
        let off = if rank == 0 { OFF_OF_SLOWEST } else { OFF_OF_OTHERS };
        assert!(
            (found - cost).abs() < off,
            "rank {rank} is blamed for {found} of the waiting; its slowness costs {cost} of the slowdown"
        );
    }
}

/// One operator of one worker, ns on the job's clock.
#[derive(Debug, Clone)]
struct Operator {
    name: String,
    start_ns: u64,
    end_ns: u64,
}

impl Operator {
    fn is_compute(&self) -> bool {
        self.name.ends_with("-compute") || self.name == "optimizer"
    }
}

#[derive(Debug, Default)]
struct Worker {
    dp: u64,
    stage: u64,
    operators: Vec<Operator>,
}

/// A recording per node of the job; their paths.
fn convert(spans: &str, folder: &Path) -> Vec<PathBuf> {
    let mut nodes: BTreeMap<u32, Vec<Observation>> = BTreeMap::new();
    for (rank, worker) in workers(spans) {
        nodes
            .entry(rank / 8)
            .or_default()
            .extend(worker.observations(rank));
    }
    let record = |(node, mut observations): (u32, Vec<Observation>)| {
        observations.sort_by_key(|observation| observation.window.end_ns());
        let path = folder.join(format!("node{node}.obs"));
        let mut recorder = Recorder::create(&path, &format!("node{node}")).expect("a recording");
        for batch in observations.chunks(512) {
            recorder.write(batch).expect("a batch");
        }
        recorder.finish().expect("a whole recording");
        path
    };
    nodes.into_iter().map(record).collect()
}

/// Workers by rank, with the steps one after another.
fn workers(spans: &str) -> BTreeMap<u32, Worker> {
    let rows: Vec<Vec<&str>> = spans.lines().map(|line| line.split(',').collect()).collect();
    let number = |text: &str| text.parse::<u64>().expect("a number");
    let mut lengths: BTreeMap<u64, u64> = BTreeMap::new();
    for row in &rows {
        let length = lengths.entry(number(row[0])).or_default();
        *length = (*length).max(number(row[5]) + number(row[6]));
    }
    let mut begin_ns = 1_000 * MS;
    let mut begins = BTreeMap::new();
    for (step, length) in lengths {
        begins.insert(step, begin_ns);
        begin_ns += length + PAUSE_NS;
    }
    let mut workers: BTreeMap<u32, Worker> = BTreeMap::new();
    for row in rows {
        let rank = u32::try_from(number(row[1])).expect("a rank");
        let worker = workers.entry(rank).or_default();
        (worker.dp, worker.stage) = (number(row[2]), number(row[3]));
        let start_ns = begins[&number(row[0])] + number(row[5]);
        worker.operators.push(Operator {
            name: row[4].to_owned(),
            start_ns,
            end_ns: start_ns + number(row[6]),
        });
    }
    workers
}

impl Worker {
    fn observations(&self, rank: u32) -> Vec<Observation> {
        let process = ProcessKey {
            pid: 1_000 + rank,
            start_ticks: 1,
        };
        let thread = Thread {
            process,
            tid: process.pid,
        };
        let mut log = vec![observation(0, 0, Fact::Process(Box::new(facts(process, rank))))];
        log.extend(self.communicators(thread));
        for group in self.groups() {
            self.host(thread, group, &mut log);
        }
        log.extend(self.readings(process.pid, rank % 8));
        log
    }

    /// Operators that begin together, and each compute operator with what follows at its end.
    fn groups(&self) -> impl Iterator<Item = &[Operator]> {
        self.operators
            .chunk_by(|a, b| !a.is_compute() && !b.is_compute() && b.start_ns < a.start_ns + MS)
    }

    fn communicators(&self, thread: Thread) -> Vec<Observation> {
        let created = |(comm, key, rank, ranks): (u64, u64, u64, u32)| {
            let fact = Fact::CommCreated(CommCreated {
                thread,
                comm,
                key: Some(key),
                rank: u32::try_from(rank).ok(),
                ranks: Some(ranks),
                result: 0,
                is_nccl_hash: false,
                device: None,
                found_in_use: false,
            });
            observation(MS, 2 * MS, fact)
        };
        let all = [
            (PIPELINE, 100 + self.dp, self.stage, 4),
            (REPLICAS, 200 + self.stage, self.dp, 4),
            (EMBEDDING, 300 + self.dp, u64::from(self.stage > 0), 2),
            (WORLD, 400, self.dp * 4 + self.stage, 16),
        ];
        all.map(created).into()
    }

    /// What the launching thread did for operators that begin together.
    fn host(&self, thread: Thread, group: &[Operator], log: &mut Vec<Observation>) {
        let start_ns = group[0].start_ns;
        let end_ns = group
            .iter()
            .map(|operator| operator.end_ns)
            .max()
            .unwrap_or(start_ns);
        if group[0].is_compute() {
            let launches = Fact::LaunchRun {
                thread,
                stream: COMPUTE_STREAM,
                kernels: 1_000,
                graphs: 0,
            };
            log.push(observation(start_ns, start_ns + 5 * MS, launches));
            return;
        }
        let mut calls: Vec<Fact> = group
            .iter()
            .filter_map(|operator| self.call(thread, &operator.name))
            .collect();
        if calls.is_empty() {
            return;
        }
        // Transfers that begin together are one group call, whose order the program fixes.
        calls.sort_by_key(|call| format!("{call:?}"));
        let count = calls.len() as u64;
        for (at, call) in (0..).zip(calls) {
            log.push(observation(
                start_ns + at * 10_000,
                start_ns + at * 10_000 + 5_000,
                call,
            ));
        }
        let called_ns = start_ns + count * 10_000;
        let sync = Fact::Sync {
            thread,
            target: SyncTarget::Context,
            result: 0,
        };
        log.push(observation(called_ns, end_ns.max(called_ns), sync));
    }

    fn call(&self, thread: Thread, name: &str) -> Option<Fact> {
        let (comm, function, peer) = match name {
            "forward-send" => (PIPELINE, CollectiveFunction::Send, Some(self.stage + 1)),
            "backward-send" => (PIPELINE, CollectiveFunction::Send, Some(self.stage - 1)),
            "forward-recv" => (PIPELINE, CollectiveFunction::Recv, Some(self.stage - 1)),
            "backward-recv" => (PIPELINE, CollectiveFunction::Recv, Some(self.stage + 1)),
            "params-all-gather" => (REPLICAS, CollectiveFunction::AllGather, None),
            "grads-reduce-scatter" => (REPLICAS, CollectiveFunction::ReduceScatter, None),
            "embedding-grads-all-reduce" => (EMBEDDING, CollectiveFunction::AllReduce, None),
            "optimizer-clip-main-grad" => (WORLD, CollectiveFunction::AllReduce, None),
            // Garbage collection is a moment, and the tensor-parallel peers of the layer norms are not in the trace.
            _ => return None,
        };
        Some(Fact::Collective(Collective {
            thread,
            comm,
            function,
            count: 1 << 20,
            datatype: 9,
            peer: peer.and_then(|peer| i32::try_from(peer).ok()),
            stream: COMM_STREAM,
            result: Some(0),
        }))
    }

    /// The device's counters, from when its operators ran.
    fn readings(&self, pid: u32, gpu: u32) -> Vec<Observation> {
        let end_ns = self
            .operators
            .iter()
            .map(|operator| operator.end_ns)
            .max()
            .unwrap_or(0);
        let bins = usize::try_from(end_ns / READING_NS).unwrap_or(0);
        let (mut compute, mut comm) = (vec![0_u64; bins], vec![0_u64; bins]);
        for operator in &self.operators {
            let busy = if operator.is_compute() {
                &mut compute
            } else {
                &mut comm
            };
            let first = usize::try_from(operator.start_ns / READING_NS).unwrap_or(0);
            for (at, bin) in busy.iter_mut().enumerate().skip(first) {
                let from = at as u64 * READING_NS;
                if from >= operator.end_ns {
                    break;
                }
                let (from, to) = (
                    operator.start_ns.max(from),
                    operator.end_ns.min(from + READING_NS),
                );
                *bin += to - from;
            }
        }
        (0..bins)
            .map(|at| {
                let ppm = |ns: u64| u32::try_from(ns.min(READING_NS) * 1_000_000 / READING_NS).unwrap_or(0);
                let waiting = comm[at].min(READING_NS.saturating_sub(compute[at]));
                let (compute, waiting) = (ppm(compute[at]), ppm(waiting));
                let from_ns = at as u64 * READING_NS;
                let fact = Fact::Gpu(Box::new(reading(pid, gpu, compute, waiting)));
                observation(from_ns, from_ns + READING_NS, fact)
            })
            .collect()
    }
}

const PIPELINE: u64 = 0x1000;
const REPLICAS: u64 = 0x2000;
const EMBEDDING: u64 = 0x3000;
const WORLD: u64 = 0x4000;

pub(super) fn observation(start_ns: u64, end_ns: u64, fact: Fact) -> Observation {
    let window = Window::new(start_ns, end_ns).expect("a window");
    Observation { window, fact }
}

pub(super) fn facts(key: ProcessKey, rank: u32) -> ProcessFacts {
    ProcessFacts {
        key,
        parent_pid: 1,
        comm: "trainer".to_owned(),
        role: ProcessRole::Gpu,
        works_for: None,
        job: Some("straggler-AR".to_owned()),
        rank: Some(rank),
        world: Some(64),
        local_rank: Some(rank % 8),
        gpu: Some(rank % 8),
        cgroup: "/".to_owned(),
        kind: Some("pretrain".to_owned()),
        model_flops_per_step: None,
    }
}

pub(super) fn reading(pid: u32, gpu: u32, compute_ppm: u32, waiting_ppm: u32) -> GpuReading {
    GpuReading {
        gpu,
        pci: format!("0000:{gpu:02x}:00.0"),
        device: "NVIDIA H100 80GB HBM3".to_owned(),
        pci_device_id: 0x2330_10de,
        busy_ppm: Reading::Value(compute_ppm + waiting_ppm),
        sm_ppm: Reading::Value(compute_ppm / 10 * 9 + waiting_ppm / 10),
        occupancy_ppm: Reading::Value(compute_ppm / 4),
        tensor_ppm: Reading::Value(compute_ppm / 2),
        dram_ppm: Reading::Value(compute_ppm / 3),
        pcie_rx_bytes_per_s: Reading::NotMeasured,
        pcie_tx_bytes_per_s: Reading::NotMeasured,
        sm_mhz: Reading::Value(1_830),
        sm_max_mhz: Reading::Value(1_980),
        clock_reasons: Reading::Value(0),
        thermal_ns: Reading::Value(0),
        power_limit_ns: Reading::Value(0),
        energy_mj: Reading::NotMeasured,
        temperature_c: Reading::Value(50),
        memory_used_bytes: Reading::NotMeasured,
        process_sm_ppm: Reading::NotMeasured,
        processes: Reading::Value(vec![pid]),
        links: Reading::NotMeasured,
    }
}
