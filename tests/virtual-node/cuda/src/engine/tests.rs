#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use virtual_node_state::log;

use virtual_node_state::log::Record;
use virtual_node_state::power::REFERENCE_MHZ;

use super::schedule::COPY_LATENCY_NS;
use super::*;
use crate::module::KernelLoad;

const MS: u64 = 1_000_000;

/// An engine on a GPU of its own, and the folder of its state.
fn engine_on(name: &str) -> (&'static Engine, PathBuf, Shared<Gpu>) {
    let folder = std::env::temp_dir().join(format!("engine-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let gpu = Gpu::create(&folder, 0, "GPU-test").unwrap();
    let engine = Box::leak(Box::new(Engine::new()));
    assert!(engine.use_gpu(0, Gpu::open_in(&folder, 0).unwrap(), Some(folder.join("log"))));
    (engine, folder, gpu)
}

fn kernel(dur_ns: u64, clocked: bool) -> Arc<KernelSpec> {
    let load = KernelLoad {
        sm: 900_000,
        occupancy: 300_000,
        tensor: 400_000,
        dram: 300_000,
    };
    Arc::new(KernelSpec {
        name: "k".into(),
        dur_ns,
        load,
        flops: 7,
        clocked,
        claim_ppm: 0,
    })
}

/// What was logged, once the engine has written it out.
fn logged(engine: &Engine, folder: &std::path::Path) -> Vec<Record> {
    engine.lock().flush(u64::MAX);
    let records = log::read(&folder.join("log")).unwrap();
    std::fs::remove_dir_all(folder).unwrap();
    records
}

#[test]
fn kernels_of_a_stream_follow_each_other_without_holes() {
    let (engine, folder, gpu) = engine_on("order");
    let stream = engine.stream_create(0);
    let begin = now_ns();
    for _ in 0..100 {
        assert!(engine.launch(stream, kernel(MS, true)));
    }
    assert_eq!(engine.stream_idle(stream), Some(false));
    assert!(engine.stream_synchronize(stream));
    let end = now_ns();
    assert!(end - begin >= 100 * MS, "returned before the GPU was done");
    let totals = gpu.activity.integrate(begin, end);
    assert!(totals.busy_ns.abs_diff(100 * MS) < 3 * MS, "{totals:?}");
    assert!(totals.tensor_ns.abs_diff(40 * MS) < MS, "{totals:?}");
    let records = logged(engine, &folder);
    assert_eq!(records.len(), 100);
    assert!(records.iter().all(|record| record.end_ns - record.start_ns == MS));
    assert!(records.windows(2).all(|pair| pair[1].start_ns >= pair[0].end_ns));
    assert!(records[99].end_ns <= end);
}

#[test]
fn clock_and_neighbours_stretch_kernels() {
    let (engine, folder, gpu) = engine_on("stretch");
    let stream = engine.stream_create(0);
    gpu.sm_mhz.store(REFERENCE_MHZ / 2, SeqCst);
    engine.launch(stream, kernel(MS, true));
    engine.launch(stream, kernel(MS, false));
    engine.stream_synchronize(stream);
    let other = &gpu.clients[gpu.register(std::os::unix::process::parent_id()).unwrap()];
    other.claim_ppm.store(500_000, SeqCst);
    other.claimed_until_ns.store(u64::MAX, SeqCst);
    engine.launch(stream, kernel(MS, false));
    engine.stream_synchronize(stream);
    let lengths: Vec<u64> = logged(engine, &folder)
        .iter()
        .map(|record| record.end_ns - record.start_ns)
        .collect();
    assert_eq!(lengths, [2 * MS, MS, 2 * MS]);
}

#[test]
fn a_stream_waits_for_another_streams_event() {
    let (engine, folder, _gpu) = engine_on("events");
    let (first, second, event) = (
        engine.stream_create(0),
        engine.stream_create(0),
        engine.event_create(),
    );
    assert_eq!(engine.event_done(event), Some(true), "never recorded");
    engine.launch(first, kernel(40 * MS, true));
    engine.event_record(event, first);
    engine.stream_wait(second, event);
    engine.copy(second, Kind::ToHost, 55_000_000);
    assert_eq!(engine.event_done(event), Some(false));
    assert!(engine.event_synchronize(event));
    assert_eq!(engine.event_done(event), Some(true));
    engine.stream_synchronize(second);
    let records = logged(engine, &folder);
    let copy = records.iter().find(|record| record.kind == Kind::ToHost).unwrap();
    let kernel = records.iter().find(|record| record.kind == Kind::Kernel).unwrap();
    assert_eq!(copy.start_ns, kernel.end_ns);
    assert_eq!(
        copy.end_ns - copy.start_ns,
        MS + COPY_LATENCY_NS,
        "55 MB at 55 GB/s"
    );
}

#[test]
fn a_collective_holds_its_stream_until_it_is_told_its_end() {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    extern "C" fn begins(_user: *mut c_void, number: u64, _at_ns: u64) {
        NUMBER.store(number, SeqCst);
    }
    let (engine, folder, gpu) = engine_on("collective");
    let stream = engine.stream_create(0);
    let collective = Collective {
        start: begins,
        user: std::ptr::null_mut(),
        sm_ppm: 120_000,
        bytes: 9,
        wire_bytes: 9,
        comm: 1,
        sequence: 2,
        ranks_nodes: 4,
    };
    let begin = now_ns();
    engine.collective(stream, collective);
    engine.launch(stream, kernel(MS, true));
    std::thread::sleep(Duration::from_millis(60));
    assert_eq!(engine.stream_idle(stream), Some(false));
    let busy_ns = gpu.activity.integrate(begin, now_ns()).busy_ns;
    assert!(
        busy_ns > 20 * MS,
        "a waiting collective keeps the GPU busy, {busy_ns} ns"
    );
    let end_ns = now_ns();
    let end = CollectiveEnd {
        arrived_ns: begin,
        all_arrived_ns: end_ns,
        moved_ns: end_ns,
        end_ns,
    };
    assert!(engine.collective_ended(NUMBER.load(SeqCst), &end));
    assert!(!engine.collective_ended(NUMBER.load(SeqCst), &end), "told twice");
    engine.stream_synchronize(stream);
    let records = logged(engine, &folder);
    assert_eq!(records[0].kind, Kind::Collective);
    assert_eq!(
        (records[0].end_ns, records[0].all_arrived_ns, records[0].sequence),
        (end_ns, end_ns, 2)
    );
    assert!(records[1].start_ns >= end_ns);
}

#[test]
fn unknown_streams_and_events_are_refused() {
    let (engine, folder, _gpu) = engine_on("unknown");
    assert!(!engine.launch(7, kernel(MS, true)));
    assert!(!engine.stream_synchronize(7));
    assert!(!engine.event_synchronize(7));
    let stream = engine.stream_create(0);
    assert!(engine.stream_destroy(stream));
    assert!(!engine.launch(stream, kernel(MS, true)));
    assert!(logged(engine, &folder).is_empty());
}

#[test]
fn a_captured_run_happens_when_launched_and_as_often() {
    let (engine, folder, _gpu) = engine_on("graph");
    let stream = engine.stream_create(0);
    assert_eq!(engine.is_capturing(stream), Some(false));
    assert!(engine.capture_begin(stream) && !engine.capture_begin(stream));
    for _ in 0..3 {
        assert!(engine.launch(stream, kernel(MS, false)));
    }
    assert!(engine.copy(stream, Kind::ToHost, 4));
    assert_eq!(
        engine.stream_idle(stream),
        Some(true),
        "nothing runs while it is recorded"
    );
    let graph = engine.capture_end(stream).unwrap();
    assert!(engine.capture_end(stream).is_none());
    assert_eq!(graph.len(), 4);
    assert!(engine.graph_launch(stream, &graph) && engine.graph_launch(stream, &graph));
    assert!(engine.stream_synchronize(stream));
    let records = logged(engine, &folder);
    let kernels = records
        .iter()
        .filter(|record| record.kind == Kind::Kernel)
        .count();
    assert_eq!((kernels, records.len()), (6, 8));
}
