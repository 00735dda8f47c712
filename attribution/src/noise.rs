//! How much steps vary, and how small a loss stands out of that.

use crate::budget::arith::{median, mul_div};
use crate::facts::PPM;

/// Noise of the steps' lengths at which a job counts as noisy, parts per million.
const NOISY_PPM: u64 = 12_000;
/// In a steady job this share of the usual threshold is enough, percent.
const STEADY_PERCENT: u64 = 35;
/// However steady: least share of GPU time that is named, parts per million.
const LEAST_PPM: u64 = 18_000;

/// Median distance of steps' lengths from the median, parts per million of it.
pub(crate) fn noise_ppm(lengths: &[u64]) -> u64 {
    let middle = median(lengths.to_vec());
    mul_div(
        median(lengths.iter().map(|length| length.abs_diff(middle)).collect()),
        PPM,
        middle,
    )
}

/// What is left of a usual threshold in a job whose steps vary that much, all in parts per million.
pub(crate) fn least_ppm(usual_ppm: u64, noise_ppm: u64) -> u64 {
    let steadiness = mul_div(noise_ppm, 100, NOISY_PPM).clamp(STEADY_PERCENT, 100);
    mul_div(usual_ppm, steadiness, 100).max(usual_ppm.min(LEAST_PPM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_fall_with_the_noise_down_to_a_floor() {
        assert_eq!(noise_ppm(&[100, 101, 99, 100, 140]), 10_000);
        assert_eq!(noise_ppm(&[]), 0);
        assert_eq!(least_ppm(50_000, 12_000), 50_000);
        assert_eq!(least_ppm(50_000, 90_000), 50_000, "never above the usual one");
        assert_eq!(least_ppm(50_000, 6_000), 25_000);
        assert_eq!(least_ppm(50_000, 0), LEAST_PPM);
        assert_eq!(
            least_ppm(10_000, 0),
            10_000,
            "the driver's word needs no more for steadiness"
        );
    }
}
