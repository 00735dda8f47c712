//! The source over a library built for the test.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use stallscope_attribution::facts::LinkFacts;
use stallscope_attribution::reading::Reading;

use super::*;
use crate::observation::GpuReading;
use crate::sources::procs::GpuIdentity;

/// Builds the stub; its blocking files lie beside it.
fn stub(dir: &Path) -> config::Nvml {
    let library = dir.join("libnvidia-ml.so.1");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/src/sources/nvml/stub.c");
    let block = format!("-DBLOCK=\"{}\"", dir.display());
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-Wall", "-Werror", &block, "-o"])
        .arg(&library)
        .arg(source)
        .status()
        .unwrap();
    assert!(compiled.success());
    config::Nvml {
        library: library.to_str().unwrap().to_owned(),
        sample_ms: 100,
    }
}

/// Polls until `enough` or 8 s.
fn readings_until(
    source: &mut NvmlSource,
    enough: impl Fn(&[(Window, GpuReading)]) -> bool,
) -> Vec<(Window, GpuReading)> {
    let begin = Instant::now();
    let mut all = Vec::new();
    while !enough(&all) && begin.elapsed() < Duration::from_secs(8) {
        for observation in source.poll(monotonic_ns()) {
            let Fact::Gpu(reading) = observation.fact else {
                panic!("not a GPU's fact")
            };
            all.push((observation.window, *reading));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    all
}

fn of_gpu(all: &[(Window, GpuReading)], gpu: u32) -> Vec<&(Window, GpuReading)> {
    all.iter().filter(|(_, reading)| reading.gpu == gpu).collect()
}

#[test]
fn reads_counters_and_tells_unsupported_from_zero() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = NvmlSource::open(&stub(dir.path())).unwrap();
    assert_eq!(source.driver_version(), "580.95.05");
    let view = source.view();
    assert_eq!(
        view.devices[1],
        GpuIdentity {
            index: 1,
            uuid: "GPU-00000001-aaaa".to_owned(),
            pci: "0000:19:00.0".to_owned(),
            name: "Stub H100".to_owned(),
        }
    );
    assert_eq!(view.processes, Some(vec![(0, 4000), (1, 4001)]));
    assert_eq!(
        source.summaries().iter().map(|gpu| gpu.gpm).collect::<Vec<_>>(),
        [Some(true), Some(false)]
    );

    let all = readings_until(&mut source, |all| {
        of_gpu(all, 0).len() >= 3 && of_gpu(all, 1).len() >= 3
    });
    let (first, second) = (of_gpu(&all, 0), of_gpu(&all, 1));
    let (window, reading) = first[0];
    assert!(window.len_ns() >= 100_000_000, "{window:?}");
    assert_eq!(window.end_ns(), first[1].0.start_ns());
    assert_eq!(reading.busy_ppm, Reading::Value(905_000));
    assert_eq!(reading.sm_ppm, Reading::Value(802_500));
    assert_eq!(reading.occupancy_ppm, Reading::Value(300_000));
    assert_eq!(reading.tensor_ppm, Reading::Value(0));
    assert_eq!(reading.dram_ppm, Reading::Unsupported);
    assert_eq!(reading.pcie_tx_bytes_per_s, Reading::Value(2 << 20));
    assert_eq!(reading.pcie_rx_bytes_per_s, Reading::Value(3 << 20));
    assert_eq!(
        (&reading.sm_mhz, &reading.sm_max_mhz),
        (&Reading::Value(1410), &Reading::Value(1980))
    );
    assert_eq!(reading.clock_reasons, Reading::Value(0x20));
    assert!(
        matches!(reading.thermal_ns, Reading::Value(ns) if ns >= 1_000_000),
        "{:?}",
        reading.thermal_ns
    );
    assert_eq!(reading.power_limit_ns, Reading::Unsupported);
    assert!(matches!(reading.energy_mj, Reading::Value(mj) if mj >= 70));
    assert_eq!(reading.temperature_c, Reading::Value(84));
    assert_eq!(reading.memory_used_bytes, Reading::Value(5));
    assert_eq!(reading.process_sm_ppm, Reading::Value(vec![(4000, 370_000)]));
    assert_eq!(reading.processes, Reading::Value(vec![4000]));
    assert_eq!(
        (reading.pci.as_str(), reading.pci_device_id),
        ("0000:18:00.0", 0x2330_10de)
    );
    // What is read once a second is not repeated.
    assert_eq!(first[1].1.processes, Reading::NotMeasured);
    let (_, without_gpm) = second[0];
    assert_eq!(without_gpm.busy_ppm, Reading::Value(420_000));
    assert_eq!(without_gpm.sm_ppm, Reading::Unsupported);
    assert_eq!(without_gpm.thermal_ns, Reading::Value(7000));
    assert_eq!(without_gpm.temperature_c, Reading::Unsupported);
    assert_eq!(source.dropped(), 0);
}

#[test]
fn links_are_read_once_a_second_and_faults_are_heard() {
    let dir = tempfile::tempdir().unwrap();
    let mut source = NvmlSource::open(&stub(dir.path())).unwrap();
    let told = |all: &[(Window, GpuReading)]| -> Vec<LinkFacts> {
        let of_first = of_gpu(all, 0).into_iter();
        of_first
            .filter_map(|(_, reading)| reading.links.value().copied())
            .collect()
    };
    let all = readings_until(&mut source, |all| told(all).len() >= 2);
    let expected = LinkFacts {
        pcie_lanes: 8,
        pcie_lanes_max: 16,
        pcie_generation: 4,
        pcie_generation_max: 5,
        nvlinks: 4,
        nvlinks_down: 1,
        ..LinkFacts::default()
    };
    let links = told(&all);
    assert_eq!(links[0], expected);
    let grown = LinkFacts {
        pcie_replays: 3,
        nvlink_errors: 2,
        ..expected
    };
    assert_eq!(links[1], grown);
    let readings = of_gpu(&all, 0).len();
    assert!(readings >= 10, "{readings} readings, and links in two of them");
    let second: Vec<_> = of_gpu(&all, 1)
        .iter()
        .map(|(_, reading)| reading.links.clone())
        .collect();
    assert!(second.contains(&Reading::Unsupported) && second.iter().all(|links| links.value().is_none()));

    // GPU 0 refuses to tell faults; GPU 1 tells its own.
    assert_eq!(source.take_faults(), []);
    std::fs::write(dir.path().join("xid"), "").unwrap();
    let begin = Instant::now();
    let mut faults = Vec::new();
    while faults.is_empty() && begin.elapsed() < Duration::from_secs(8) {
        faults = source.take_faults();
        std::thread::sleep(Duration::from_millis(10));
    }
    let [(at_ns, xid)] = faults.as_slice() else {
        panic!("{faults:?}")
    };
    assert!(*at_ns <= monotonic_ns());
    assert_eq!((xid.pci.as_str(), xid.code), ("0000:19:00.0", 79));
}

#[test]
fn a_hung_call_fails_its_gpu_alone_and_ends_when_it_returns() {
    let dir = tempfile::tempdir().unwrap();
    let settings = stub(dir.path());
    std::fs::write(dir.path().join("hang"), "").unwrap();
    let mut source = NvmlSource::open(&settings).unwrap();
    let failed = |reading: &GpuReading| matches!(&reading.busy_ppm, Reading::Failed(why) if why.contains("nvmlDeviceGetClockInfo"));
    let all = readings_until(&mut source, |all| {
        all.iter().filter(|(_, reading)| failed(reading)).count() >= 2
    });
    let stuck = of_gpu(&all, 0);
    assert_eq!(stuck.len(), 2, "{stuck:?}");
    assert!(stuck.iter().all(|(_, reading)| failed(reading)));
    assert!(stuck[1].0.len_ns() >= 1_000_000_000);
    assert!(
        of_gpu(&all, 1).len() >= 15,
        "the other GPU went on: {}",
        of_gpu(&all, 1).len()
    );
    assert!(source.summaries()[0].trouble.is_some());

    std::fs::remove_file(dir.path().join("hang")).unwrap();
    let all = readings_until(&mut source, |all| {
        of_gpu(all, 0).iter().any(|(_, reading)| !failed(reading))
    });
    assert_eq!(
        of_gpu(&all, 0).last().unwrap().1.busy_ppm,
        Reading::Value(905_000)
    );
}

#[test]
fn a_missing_or_truncated_library_is_an_error_that_names_it() {
    let settings = |library: &str| config::Nvml {
        library: library.to_owned(),
        ..config::Nvml::default()
    };
    let missing = NvmlSource::open(&settings("/nonexistent/libnvidia-ml.so.1")).unwrap_err();
    assert!(matches!(missing, NvmlError::Library { .. }), "{missing}");
    assert!(
        missing.to_string().contains("/nonexistent/libnvidia-ml.so.1"),
        "{missing}"
    );
    let dir = tempfile::tempdir().unwrap();
    let truncated = dir.path().join("libnvidia-ml.so.1");
    std::fs::write(&truncated, b"\x7fELF\x02\x01\x01").unwrap();
    let error = NvmlSource::open(&settings(truncated.to_str().unwrap())).unwrap_err();
    assert!(matches!(error, NvmlError::Library { .. }), "{error}");
}

#[test]
fn readings_nobody_takes_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let settings = stub(dir.path());
    let nvml = Nvml::builder()
        .lib_path(settings.library.as_ref())
        .init()
        .unwrap();
    let gpu = Arc::new(GpuShared::new(0));
    let (send, _keep) = mpsc::sync_channel(1);
    let rounds = Rounds::new(nvml, &[Arc::clone(&gpu)], Duration::from_secs(1), send);
    for at in 0..4 {
        rounds.send(at, at + 1, convert::empty_reading(&gpu));
    }
    assert_eq!(rounds.dropped(), 3);
}
