//! Shares of a whole: integers to the last moment, and printed digits that sum.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// One million parts.
const PPM: f64 = 1e6;
/// Parts per million in one percentage point.
const PPM_PER_POINT: f64 = 1e4;

/// A share of a whole, held as parts per million; a fraction between 0 and 1 in JSON.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Share {
    /// Parts per million.
    pub ppm: u32,
}

/// Percentage points, held as parts per million; hundredths survive in JSON (`37.82`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Points {
    /// Parts per million.
    pub ppm: u32,
}

impl Points {
    /// From hundredths of a point.
    #[must_use]
    pub const fn from_centipoints(centipoints: u32) -> Self {
        Self {
            ppm: centipoints.saturating_mul(100),
        }
    }
}

impl Serialize for Share {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.ppm) / PPM)
    }
}

impl<'de> Deserialize<'de> for Share {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parts(f64::deserialize(deserializer)? * PPM).map(|ppm| Self { ppm })
    }
}

impl Serialize for Points {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(f64::from(self.ppm) / PPM_PER_POINT)
    }
}

impl<'de> Deserialize<'de> for Points {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        parts(f64::deserialize(deserializer)? * PPM_PER_POINT).map(|ppm| Self { ppm })
    }
}

fn parts<E: serde::de::Error>(value: f64) -> Result<u32, E> {
    let rounded = value.round();
    if (0.0..=f64::from(u32::MAX)).contains(&rounded) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "checked to be in range"
        )]
        return Ok(rounded as u32);
    }
    Err(E::custom(format!(
        "a share must not be negative or larger than 4294 wholes, and {value} parts are"
    )))
}

/// Largest share of anything, either way: sums of many stay far from overflow. Only numbers that are no times reach it.
const MOST: i128 = 1_000_000_000_000_000;

/// Splits `units` among `parts` in proportion by largest remainder, so that the result sums to `units` exactly
/// whenever the parts sum to something positive. A part of zero gets zero; negative parts get negative units.
///
/// With nothing to split (sum zero or negative) every part gets zero.
#[must_use]
pub fn apportion(parts: &[i128], units: i64) -> Vec<i64> {
    let total = parts
        .iter()
        .fold(0_i128, |total, part| total.saturating_add(*part));
    if total <= 0 {
        return vec![0; parts.len()];
    }
    let mut shares: Vec<i64> = Vec::with_capacity(parts.len());
    let mut remainders: Vec<(i128, usize)> = Vec::with_capacity(parts.len());
    for (index, part) in parts.iter().enumerate() {
        let scaled = part.saturating_mul(i128::from(units));
        shares.push(i64::try_from(scaled.div_euclid(total).clamp(-MOST, MOST)).unwrap_or(0));
        remainders.push((scaled.rem_euclid(total), index));
    }
    let missing = units - shares.iter().sum::<i64>();
    // Largest remainder first, and the earlier part on a tie, so that the same budget always prints the same.
    remainders.sort_by(|left, right| right.0.cmp(&left.0).then(left.1.cmp(&right.1)));
    for (_, index) in remainders.into_iter().take(usize::try_from(missing).unwrap_or(0)) {
        shares[index] += 1;
    }
    shares
}

/// Tenths of a percent of each part; they sum to 1000.
#[must_use]
pub fn tenths_of_percent(parts: &[i128]) -> Vec<i64> {
    apportion(parts, 1000)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn thirds_sum_to_the_whole() {
        assert_eq!(tenths_of_percent(&[1, 1, 1]), [334, 333, 333]);
        assert_eq!(tenths_of_percent(&[0, 2, 1]), [0, 667, 333]);
        assert_eq!(tenths_of_percent(&[110, -10]), [1100, -100]);
        assert_eq!(tenths_of_percent(&[0, 0]), [0, 0]);
    }

    #[test]
    fn shares_are_fractions_in_json() {
        let json = serde_json::to_string(&(Share { ppm: 160_123 }, Points::from_centipoints(3782)));
        assert_eq!(json.ok().as_deref(), Some("[0.160123,37.82]"));
        assert!(serde_json::from_str::<Share>("-0.5").is_err());
    }

    proptest! {
        #[test]
        fn printed_digits_always_sum(parts in proptest::collection::vec(-1_000_000_000_i128..1_000_000_000_000, 1..40)) {
            let shares = tenths_of_percent(&parts);
            let total: i128 = parts.iter().sum();
            prop_assert_eq!(shares.iter().sum::<i64>(), if total > 0 { 1000 } else { 0 });
            for (part, share) in parts.iter().zip(&shares).filter(|_| total > 0) {
                // Never further than one printed digit from the true share.
                let error = (i128::from(*share) * total - part * 1000).abs();
                prop_assert!(error < total);
                prop_assert!(*part != 0 || *share == 0);
            }
        }

        #[test]
        fn ppm_survives_json(ppm in 0_u32..=1_000_000) {
            let json = serde_json::to_string(&(Share { ppm }, Points { ppm }))?;
            prop_assert_eq!(serde_json::from_str::<(Share, Points)>(&json)?, (Share { ppm }, Points { ppm }));
        }
    }
}
