#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;
use std::sync::atomic::Ordering::SeqCst;

use crate::PPM;
use crate::activity::{BUCKETS, Load};
use crate::clock::now_ns;
use crate::gpu::Gpu;
use crate::log::{Kind, Record, Writer, read};
use crate::map::Shared;
use crate::power::{IDLE_MW, LIMIT_MW, MAX_MHZ, REFERENCE_MHZ, active_mw};

const MS: u64 = 1_000_000;

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("state-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).unwrap();
    }
}

fn gpu(folder: &Folder) -> Shared<Gpu> {
    Gpu::create(&folder.0, 0, "GPU-1").unwrap()
}

fn load(sm_ppm: u64, client: usize) -> Load {
    Load {
        resident: true,
        sm_ppm,
        tensor_ppm: sm_ppm / 2,
        client,
        ..Load::default()
    }
}

#[test]
fn activity_is_what_was_added() {
    let folder = Folder::new("added");
    let gpu = gpu(&folder);
    let t = 5_000_000 * MS;
    gpu.activity
        .add(t + MS / 2, t + 10 * MS + MS / 2, &load(800_000, 3));
    let totals = gpu.activity.integrate(t, t + 20 * MS);
    assert_eq!((totals.window_ns, totals.busy_ns), (20 * MS, 10 * MS));
    assert_eq!((totals.sm_ns, totals.tensor_ns), (8 * MS, 4 * MS));
    assert_eq!(totals.client_sm_ns[3], 8 * MS);
    assert_eq!(totals.energy_uj, 20 * IDLE_MW, "no power was given beyond idle");
    assert_eq!(totals.ppm(totals.busy_ns), PPM / 2);
}

#[test]
fn overlapping_streams_are_busy_once() {
    let folder = Folder::new("overlap");
    let gpu = gpu(&folder);
    let t = 7_000_000 * MS;
    gpu.activity.add(t, t + 6 * MS + MS / 4, &load(500_000, 0));
    gpu.activity.add(t + 2 * MS, t + 8 * MS, &load(300_000, 0));
    let totals = gpu.activity.integrate(t, t + 10 * MS);
    assert_eq!(totals.busy_ns, 8 * MS, "the union");
    assert_eq!(totals.sm_ns, 4_925_000, "the sum");
}

#[test]
fn readers_look_no_further_than_they_ask() {
    let folder = Folder::new("future");
    let gpu = gpu(&folder);
    let t = 9_000_000 * MS;
    gpu.activity.add(t, t + 30 * MS, &load(PPM, 0));
    assert_eq!(gpu.activity.integrate(t, t + 10 * MS).busy_ns, 10 * MS);
}

#[test]
fn the_ring_forgets_and_never_mixes_times() {
    let folder = Folder::new("ring");
    let gpu = gpu(&folder);
    let t = 11_000_000 * MS;
    let later = t + BUCKETS as u64 * MS;
    gpu.activity.add(t, t + MS, &load(PPM, 0));
    gpu.activity.add(later, later + MS / 2, &load(PPM, 0));
    assert_eq!(gpu.activity.integrate(later, later + MS).busy_ns, MS / 2);
    assert_eq!(
        gpu.activity.integrate(t, t + MS).busy_ns,
        0,
        "overwritten, so unknown, so idle"
    );
    gpu.activity.add(t, t + MS, &load(PPM, 0));
    assert_eq!(
        gpu.activity.integrate(later, later + MS).busy_ns,
        MS / 2,
        "a late writer spoils nothing"
    );
}

#[test]
fn copies_move_bytes_without_being_busy() {
    let folder = Folder::new("bytes");
    let gpu = gpu(&folder);
    let t = 13_000_000 * MS;
    let copy = Load {
        to_device_bytes: 1_000_001,
        to_host_bytes: 77,
        ..Load::default()
    };
    gpu.activity.add(t + 300_000, t + 4 * MS + 100_000, &copy);
    let totals = gpu.activity.integrate(t, t + 5 * MS);
    assert_eq!(
        (totals.to_device_bytes, totals.to_host_bytes, totals.busy_ns),
        (1_000_001, 77, 0)
    );
}

#[test]
fn writers_of_many_threads_lose_nothing() {
    let folder = Folder::new("threads");
    let gpu = gpu(&folder);
    let t = 17_000_000 * MS;
    std::thread::scope(|scope| {
        for client in 0..4 {
            let gpu = &gpu;
            scope.spawn(move || {
                (0..2_000).for_each(|at| {
                    gpu.activity
                        .add(t + at * MS, t + at * MS + 100_000, &load(PPM, client))
                })
            });
        }
    });
    let totals = gpu.activity.integrate(t, t + 2_000 * MS);
    assert_eq!(totals.client_sm_ns[..4], [200 * MS; 4]);
}

#[test]
fn sums_outlive_the_ring() {
    let folder = Folder::new("settle");
    let gpu = gpu(&folder);
    let begin = now_ns();
    let busy = Load {
        power_mw: 400_000,
        to_host_bytes: 5_000,
        ..load(PPM, 0)
    };
    gpu.activity.add(begin, begin + 100 * MS, &busy);
    let later = begin + 1_000 * MS;
    gpu.settle(later);
    gpu.activity
        .add(later + 20_000 * MS, later + 20_001 * MS, &load(PPM, 0));
    let totals = gpu.since_boot(later + 10_000 * MS);
    assert_eq!(totals.to_host_bytes, 5_000);
    let expected_uj = 400_000 * 100 + IDLE_MW * 11_000;
    assert!(
        totals.energy_uj.abs_diff(expected_uj) < expected_uj / 100,
        "{}",
        totals.energy_uj
    );
}

#[test]
fn only_others_claims_count_and_only_while_they_hold() {
    let folder = Folder::new("claims");
    let gpu = gpu(&folder);
    let own = gpu.register(std::process::id()).unwrap();
    assert_eq!(
        gpu.register(std::process::id()),
        Some(own),
        "once a client, always the same slot"
    );
    let other = gpu.register(std::os::unix::process::parent_id()).unwrap();
    assert_ne!(own, other);
    gpu.clients[other].claim_ppm.store(350_000, SeqCst);
    gpu.clients[other].claimed_until_ns.store(100, SeqCst);
    assert_eq!(gpu.foreign_ppm(own, 99), 350_000);
    assert_eq!(gpu.foreign_ppm(own, 100), 0);
    assert_eq!(gpu.foreign_ppm(other, 99), 0);
    gpu.unregister(other);
    assert_eq!(gpu.processes(), [(own, std::process::id())]);
}

#[test]
fn time_held_back_accumulates() {
    let folder = Folder::new("held");
    let gpu = gpu(&folder);
    gpu.hw_thermal.set(true, 100);
    gpu.hw_thermal.set(true, 150);
    assert_eq!(gpu.hw_thermal.total_ns(180), 80);
    gpu.hw_thermal.set(false, 200);
    assert_eq!(gpu.hw_thermal.total_ns(999), 100);
}

#[test]
fn a_matrix_product_draws_most_of_the_limit_and_less_at_a_lower_clock() {
    let busy = IDLE_MW + active_mw(930_000, 700_000, 400_000, REFERENCE_MHZ);
    assert!((LIMIT_MW / 2..LIMIT_MW).contains(&busy), "{busy}");
    assert!(active_mw(PPM, PPM, PPM, REFERENCE_MHZ / 2) * 3 < active_mw(PPM, PPM, PPM, REFERENCE_MHZ));
    assert!(active_mw(PPM, PPM, PPM, MAX_MHZ) > active_mw(PPM, PPM, PPM, REFERENCE_MHZ));
}

#[test]
fn logs_read_back_what_was_written() {
    let folder = Folder::new("log");
    let path = folder.0.join("log");
    let record = Record {
        stream: 1,
        enqueued_ns: 2,
        start_ns: 3,
        end_ns: 4,
        reference_ns: 5,
        alone_ns: 6,
        flops: 7,
        tensor_ppm: 8,
        clock_mhz: 9,
        bytes: 10,
        wire_bytes: 11,
        arrived_ns: 12,
        all_arrived_ns: 13,
        moved_ns: 14,
        comm: 15,
        sequence: 16,
        ranks_nodes: 17,
        ..Record::new(Kind::Collective)
    };
    let mut writer = Writer::create(&path).unwrap();
    writer.write(&record).unwrap();
    writer.write(&Record::new(Kind::ToHost)).unwrap();
    writer.flush().unwrap();
    assert_eq!(read(&path).unwrap(), [record, Record::new(Kind::ToHost)]);
    std::fs::write(&path, [255; 300]).unwrap();
    assert!(read(&path).is_err(), "not a log");
}

#[test]
fn strangers_files_are_refused() {
    let folder = Folder::new("strangers");
    std::fs::write(Gpu::path(&folder.0, 0), [0; 64]).unwrap();
    assert!(Gpu::open_in(&folder.0, 0).is_err(), "too short");
    assert!(Gpu::open_in(&folder.0, 1).is_err(), "missing");
}
