//! From the library's answers to readings. Pure.

use std::collections::BTreeMap;
use std::convert::Infallible;

use nvml_wrapper::enums::device::SampleValue;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::struct_wrappers::device::ProcessUtilizationSample;
use stallscope_attribution::reading::Reading;

use super::watch::GpuShared;
use crate::observation::GpuReading;

const PPM_PER_PERCENT: u32 = 10_000;
const BYTES_PER_MIB: f64 = 1_048_576.0;

/// What the device or driver cannot do is apart from what went wrong.
pub(super) fn reading<T>(result: Result<T, NvmlError>) -> Reading<T> {
    match result {
        Ok(value) => Reading::Value(value),
        Err(NvmlError::NotSupported | NvmlError::FunctionNotFound | NvmlError::FailedToLoadSymbol(_)) => {
            Reading::Unsupported
        }
        Err(error) => Reading::Failed(error.to_string()),
    }
}

/// Why there is no value: a reading that cannot hold one.
pub(super) type Lack = Reading<Infallible>;

/// The lack an error stands for.
pub(super) fn lack(error: NvmlError) -> Lack {
    reading(Err(error))
}

/// The lack, as a reading of any quantity.
pub(super) fn lacking<T>(lack: &Lack) -> Reading<T> {
    lack.clone().map(|never| match never {})
}

/// A reading whose value may turn out not to be one.
pub(super) fn and_then<T, U>(reading: Reading<T>, convert: impl FnOnce(T) -> Reading<U>) -> Reading<U> {
    match reading {
        Reading::Value(value) => convert(value),
        Reading::NotMeasured => Reading::NotMeasured,
        Reading::Unsupported => Reading::Unsupported,
        Reading::Failed(why) => Reading::Failed(why),
    }
}

/// A share that the library gives as 0.0 to 100.0.
pub(super) fn percent_to_ppm(percent: f64) -> Reading<u32> {
    if !percent.is_finite() {
        return Reading::Failed(format!("the driver answered {percent} percent"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "clamped to 0..=1_000_000"
    )]
    let ppm = (percent.clamp(0.0, 100.0) * f64::from(PPM_PER_PERCENT)).round() as u32;
    Reading::Value(ppm)
}

/// The same for whole percents.
pub(super) fn whole_percent_to_ppm(percent: u32) -> u32 {
    percent.min(100) * PPM_PER_PERCENT
}

/// GPM gives link rates in MiB/s.
pub(super) fn mib_to_bytes(mib_per_s: f64) -> Reading<u64> {
    if !mib_per_s.is_finite() || mib_per_s < 0.0 {
        return Reading::Failed(format!("the driver answered {mib_per_s} MiB/s"));
    }
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "finite, not negative; saturates"
    )]
    let bytes = (mib_per_s * BYTES_PER_MIB).round() as u64;
    Reading::Value(bytes)
}

/// A field's value as a counter.
pub(super) fn counter(value: SampleValue) -> Reading<u64> {
    match value {
        SampleValue::U32(value) => Reading::Value(value.into()),
        SampleValue::U64(value) => Reading::Value(value),
        SampleValue::I64(value) => u64::try_from(value).map_or_else(
            |_| Reading::Failed(format!("the driver's counter is {value}")),
            Reading::Value,
        ),
        SampleValue::F64(value) => Reading::Failed(format!("the driver's counter is not whole: {value}")),
    }
}

/// How far a counter went between two reads.
pub(super) fn advance(before: &Reading<u64>, now: &Reading<u64>) -> Reading<u64> {
    match (before, now) {
        (Reading::Value(before), Reading::Value(now)) => now.checked_sub(*before).map_or_else(
            || Reading::Failed("the counter went back: the driver was reset".to_owned()),
            Reading::Value,
        ),
        (_, Reading::Value(_)) => Reading::NotMeasured,
        (_, now) => now.clone(),
    }
}

/// Time for which at least one of several reasons held, from the time each held: at least the longest. Bounded by the
/// window, because the driver counts with its own clock.
pub(super) fn longest(each: &[Reading<u64>], window_ns: u64) -> Reading<u64> {
    let known = each.iter().filter_map(Reading::value).max();
    match known {
        Some(&ns) => Reading::Value(ns.min(window_ns)),
        None => each.first().cloned().unwrap_or_default(),
    }
}

/// The mean share of each process over the samples newer than `last_seen_us`; and the newest sample's time.
pub(super) fn process_shares(
    samples: &[ProcessUtilizationSample],
    last_seen_us: u64,
) -> (Vec<(u32, u32)>, u64) {
    // Sum of shares and number of samples, by pid.
    let mut sums: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
    let fresh = samples
        .iter()
        .filter(|sample| sample.timestamp > last_seen_us && sample.pid != 0);
    for sample in fresh {
        let (sum, count) = sums.entry(sample.pid).or_default();
        *sum += u64::from(whole_percent_to_ppm(sample.sm_util));
        *count += 1;
    }
    let newest = samples
        .iter()
        .map(|sample| sample.timestamp)
        .max()
        .unwrap_or(0)
        .max(last_seen_us);
    let mean =
        |(pid, (sum, count)): (u32, (u64, u64))| (pid, u32::try_from(sum / count.max(1)).unwrap_or(u32::MAX));
    (sums.into_iter().map(mean).collect(), newest)
}

/// A reading with nothing measured yet.
pub(super) fn empty_reading(shared: &GpuShared) -> GpuReading {
    let identity = shared.identity();
    GpuReading {
        gpu: identity.index,
        pci: identity.pci,
        device: identity.name,
        pci_device_id: shared.pci_device_id(),
        busy_ppm: Reading::NotMeasured,
        sm_ppm: Reading::NotMeasured,
        occupancy_ppm: Reading::NotMeasured,
        tensor_ppm: Reading::NotMeasured,
        dram_ppm: Reading::NotMeasured,
        pcie_rx_bytes_per_s: Reading::NotMeasured,
        pcie_tx_bytes_per_s: Reading::NotMeasured,
        sm_mhz: Reading::NotMeasured,
        sm_max_mhz: Reading::NotMeasured,
        clock_reasons: Reading::NotMeasured,
        thermal_ns: Reading::NotMeasured,
        power_limit_ns: Reading::NotMeasured,
        energy_mj: Reading::NotMeasured,
        temperature_c: Reading::NotMeasured,
        memory_used_bytes: Reading::NotMeasured,
        process_sm_ppm: Reading::NotMeasured,
        processes: Reading::NotMeasured,
        links: Reading::NotMeasured,
    }
}

/// A reading of a GPU that does not answer.
pub(super) fn failed_reading(shared: &GpuShared, why: &str) -> GpuReading {
    let small = || Reading::<u32>::Failed(why.to_owned());
    let large = || Reading::<u64>::Failed(why.to_owned());
    GpuReading {
        busy_ppm: small(),
        sm_ppm: small(),
        occupancy_ppm: small(),
        tensor_ppm: small(),
        dram_ppm: small(),
        pcie_rx_bytes_per_s: large(),
        pcie_tx_bytes_per_s: large(),
        sm_mhz: small(),
        sm_max_mhz: small(),
        clock_reasons: large(),
        thermal_ns: large(),
        power_limit_ns: large(),
        energy_mj: large(),
        temperature_c: small(),
        memory_used_bytes: large(),
        process_sm_ppm: Reading::Failed(why.to_owned()),
        processes: Reading::Failed(why.to_owned()),
        links: Reading::Failed(why.to_owned()),
        ..empty_reading(shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unsupported_failed_and_zero_are_three_things() {
        assert_eq!(reading(Ok(0)), Reading::Value(0));
        assert_eq!(reading::<u32>(Err(NvmlError::NotSupported)), Reading::Unsupported);
        assert_eq!(
            reading::<u32>(Err(NvmlError::FailedToLoadSymbol("x".to_owned()))),
            Reading::Unsupported
        );
        assert!(matches!(
            reading::<u32>(Err(NvmlError::GpuLost)),
            Reading::Failed(_)
        ));
    }

    #[test]
    fn shares_keep_fractions_and_refuse_nonsense() {
        assert_eq!(percent_to_ppm(12.34567), Reading::Value(123_457));
        assert_eq!(percent_to_ppm(100.2), Reading::Value(1_000_000));
        assert_eq!(percent_to_ppm(-0.1), Reading::Value(0));
        assert!(matches!(percent_to_ppm(f64::NAN), Reading::Failed(_)));
        assert_eq!(mib_to_bytes(1.5), Reading::Value(1_572_864));
        assert!(matches!(mib_to_bytes(-1.0), Reading::Failed(_)));
        assert_eq!(mib_to_bytes(1e300), Reading::Value(u64::MAX));
    }

    #[test]
    fn counters_advance_or_say_why_not() {
        let value = Reading::Value;
        assert_eq!(advance(&value(5), &value(5)), value(0));
        assert_eq!(advance(&value(5), &value(9)), value(4));
        assert!(matches!(advance(&value(9), &value(5)), Reading::Failed(_)));
        assert_eq!(advance(&Reading::Unsupported, &value(5)), Reading::NotMeasured);
        assert_eq!(advance(&value(5), &Reading::Unsupported), Reading::Unsupported);
        assert!(matches!(counter(SampleValue::I64(-1)), Reading::Failed(_)));
        assert_eq!(counter(SampleValue::U32(7)), value(7));
    }

    #[test]
    fn overlapping_reasons_count_once_and_never_more_than_the_window() {
        let value = Reading::Value;
        assert_eq!(longest(&[value(30), value(50)], 100), value(50));
        assert_eq!(longest(&[value(30), Reading::Unsupported], 20), value(20));
        assert_eq!(
            longest(&[Reading::Unsupported, Reading::NotMeasured], 20),
            Reading::Unsupported
        );
    }

    #[test]
    fn process_shares_are_means_of_fresh_samples() {
        let sample = |pid, timestamp, sm_util| ProcessUtilizationSample {
            pid,
            timestamp,
            sm_util,
            mem_util: 0,
            enc_util: 0,
            dec_util: 0,
        };
        let samples = [
            sample(7, 100, 90),
            sample(7, 101, 50),
            sample(7, 102, 30),
            sample(8, 102, 101),
            sample(0, 103, 9),
        ];
        assert_eq!(
            process_shares(&samples, 100),
            (vec![(7, 400_000), (8, 1_000_000)], 103)
        );
        assert_eq!(process_shares(&[], 5), (Vec::new(), 5));
    }
}
