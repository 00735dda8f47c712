//! Decimal microseconds to integer nanoseconds, never through a binary float.

/// Why a time is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum BadTime {
    /// Not a decimal number: missing, NaN, infinite, text.
    NotANumber,
    /// Below zero.
    Negative,
    /// More than 64 bits of nanoseconds.
    Overflow,
}

/// Nanoseconds of a JSON number of microseconds. Digits beyond the nanosecond are cut off.
pub(super) fn micros_to_ns(text: &[u8]) -> Result<u64, BadTime> {
    plain(text).map_or_else(|| general(text), Ok)
}

/// What nearly every writer writes: up to 16 digits, and perhaps up to three after a point.
fn plain(text: &[u8]) -> Option<u64> {
    let whole = text
        .iter()
        .position(|byte| !byte.is_ascii_digit())
        .unwrap_or(text.len());
    if !(1..=16).contains(&whole) {
        return None;
    }
    let digits = |text: &[u8]| text.iter().fold(0, |ns, byte| ns * 10 + u64::from(byte - b'0'));
    let us = digits(&text[..whole]);
    let fraction = match &text[whole..] {
        [] => 0,
        [b'.', fraction @ ..] if fraction.len() <= 3 && fraction.iter().all(u8::is_ascii_digit) => {
            digits(fraction) * [1000, 100, 10, 1][fraction.len()]
        }
        _ => return None,
    };
    // 16 digits of microseconds are below 2^64 ns.
    Some(us * 1000 + fraction)
}

fn general(text: &[u8]) -> Result<u64, BadTime> {
    let text = std::str::from_utf8(text).map_err(|_| BadTime::NotANumber)?;
    let text = text.trim_matches('"');
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |rest| (true, rest));
    let (mantissa, exponent) = match digits.split_once(['e', 'E']) {
        None => (digits, 0),
        Some((mantissa, exponent)) => {
            let exponent = exponent.strip_prefix('+').unwrap_or(exponent);
            (
                mantissa,
                exponent.parse::<i32>().map_err(|_| BadTime::NotANumber)?,
            )
        }
    };
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let numeric = |part: &str| part.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty() || !numeric(whole) || !numeric(fraction) {
        return Err(BadTime::NotANumber);
    }
    // The decimal point moves by three for nanoseconds, and by the exponent.
    let scale = i64::from(exponent) + 3;
    let point = i64::try_from(whole.len())
        .map_err(|_| BadTime::Overflow)?
        .saturating_add(scale);
    let mut ns = 0_u64;
    let mut at = 0;
    let mut nonzero = false;
    for byte in whole.bytes().chain(fraction.bytes()) {
        let digit = u64::from(byte - b'0');
        nonzero |= digit > 0;
        if at < point {
            ns = ns
                .checked_mul(10)
                .and_then(|ns| ns.checked_add(digit))
                .ok_or(BadTime::Overflow)?;
        }
        at += 1;
    }
    while at < point && ns > 0 {
        ns = ns.checked_mul(10).ok_or(BadTime::Overflow)?;
        at += 1;
    }
    if negative && nonzero {
        Err(BadTime::Negative)
    } else {
        Ok(ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_are_exact() {
        let cases = [
            ("0", 0),
            ("-0.0", 0),
            ("1", 1000),
            ("1623142623460111", 1_623_142_623_460_111_000),
            ("1712195495519689.0", 1_712_195_495_519_689_000),
            ("3743411230047.485", 3_743_411_230_047_485),
            ("0.1", 100),
            ("0.", 0),
            ("9999999999999999.999", 9_999_999_999_999_999_999),
            ("18446744073709551.615", u64::MAX),
            ("0.0019", 1),
            ("0.1239999", 123),
            ("\"12.5\"", 12_500),
            ("1.5e3", 1_500_000),
            ("1.5E+3", 1_500_000),
            ("15e-1", 1500),
            ("15e-9", 0),
            ("0e99", 0),
        ];
        for (text, ns) in cases {
            assert_eq!(micros_to_ns(text.as_bytes()), Ok(ns), "{text}");
        }
    }

    #[test]
    fn what_is_no_time_has_a_name() {
        let cases = [
            ("NaN", BadTime::NotANumber),
            ("Infinity", BadTime::NotANumber),
            ("-Infinity", BadTime::NotANumber),
            ("", BadTime::NotANumber),
            (".5", BadTime::NotANumber),
            ("1e", BadTime::NotANumber),
            ("0x10", BadTime::NotANumber),
            ("1e99999999999", BadTime::NotANumber),
            ("-1", BadTime::Negative),
            ("-0.0001", BadTime::Negative),
            ("99999999999999999999", BadTime::Overflow),
            ("1e30", BadTime::Overflow),
            ("1e2000000000", BadTime::Overflow),
        ];
        for (text, why) in cases {
            assert_eq!(micros_to_ns(text.as_bytes()), Err(why), "{text}");
        }
    }
}
