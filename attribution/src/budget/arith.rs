//! Integer shares that lose no nanosecond.

use crate::facts::PPM;

/// `ns * part / whole` rounded down, without overflow; 0 of nothing.
pub(crate) fn mul_div(ns: u64, part: u64, whole: u64) -> u64 {
    if whole == 0 {
        return 0;
    }
    u64::try_from(u128::from(ns) * u128::from(part) / u128::from(whole)).unwrap_or(u64::MAX)
}

/// The share of `ns` that `ppm` parts per million are.
pub(crate) fn ppm_of(ns: u64, ppm: u64) -> u64 {
    mul_div(ns, ppm, PPM)
}

/// Signed nanoseconds; a window of 292 years saturates.
pub(crate) fn signed(ns: u64) -> i64 {
    i64::try_from(ns).unwrap_or(i64::MAX)
}

/// The middle value, the upper one of an even number; 0 of nothing.
pub(crate) fn median<T: Ord + Copy + Default>(mut values: Vec<T>) -> T {
    values.sort_unstable();
    values.get(values.len() / 2).copied().unwrap_or_default()
}

/// Splits `total` in proportion to `weights` into parts that sum to it exactly; all zero when no weight is set.
///
/// Cumulative rounding: no part is off by more than one.
pub(crate) fn apportion(total: u64, weights: &[u64]) -> Vec<u64> {
    let sum: u128 = weights.iter().copied().map(u128::from).sum();
    // Weights that sum beyond 64 bits are scaled down, so that the products below fit.
    let shift = (u128::BITS - sum.leading_zeros()).saturating_sub(u64::BITS);
    let whole: u128 = weights.iter().map(|weight| u128::from(*weight >> shift)).sum();
    let mut seen = 0_u128;
    let mut given = 0_u64;
    weights
        .iter()
        .map(|weight| {
            if whole == 0 {
                return 0;
            }
            seen += u128::from(*weight >> shift);
            let until = u64::try_from(u128::from(total) * seen / whole).unwrap_or(u64::MAX);
            let part = until - given;
            given = until;
            part
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn nothing_is_shared_out_without_weights() {
        assert_eq!(apportion(7, &[0, 0]), [0, 0]);
        assert_eq!(apportion(7, &[]), [] as [u64; 0]);
    }

    proptest! {
        #[test]
        fn parts_sum_to_the_total(total: u64, weights in proptest::collection::vec(any::<u64>(), 1..9)) {
            let parts = apportion(total, &weights);
            prop_assert_eq!(parts.iter().map(|part| u128::from(*part)).sum::<u128>(),
                if weights.iter().all(|weight| *weight == 0) { 0 } else { u128::from(total) });
            let whole: u128 = weights.iter().map(|weight| u128::from(*weight)).sum();
            for (part, weight) in parts.iter().zip(&weights) {
                if whole > 0 && *weight == 0 {
                    prop_assert_eq!(*part, 0);
                }
            }
        }
    }
}
