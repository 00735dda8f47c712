//! Numbers, times and foreign names as people read them.

/// Longest foreign text printed in one place, characters.
const LONGEST: usize = 400;

/// Foreign text made safe for a terminal: control characters (escape sequences, line breaks) and characters that
/// reorder or hide text become `U+FFFD`, and the length is bounded.
pub(crate) fn clean(text: &str) -> String {
    let mut clean: String = text
        .chars()
        .take(LONGEST)
        .map(|c| if is_unsafe(c) { '\u{fffd}' } else { c })
        .collect();
    if text.chars().nth(LONGEST).is_some() {
        clean.push('…');
    }
    clean
}

const fn is_unsafe(c: char) -> bool {
    matches!(c, '\0'..='\u{1f}' | '\u{7f}'..='\u{9f}' | '\u{ad}' | '\u{61c}')
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// Tenths of a percent as `12.3`.
pub(crate) fn tenths(tenths: i64) -> String {
    let sign = if tenths < 0 { "-" } else { "" };
    format!(
        "{sign}{}.{}",
        tenths.unsigned_abs() / 10,
        tenths.unsigned_abs() % 10
    )
}

/// Parts per million as percent with one digit, rounded half up.
pub(crate) fn ppm_percent(ppm: u32) -> String {
    tenths((i64::from(ppm) + 500) / 1000)
}

/// A length of time with a unit that suits it: `742 ns`, `18.31 ms`, `38.00 s`, `61.2 min`, `40.2 h`,
/// `11.9 y`.
pub(crate) fn duration(ns: i128) -> String {
    const MINUTE: u128 = 60_000_000_000;
    let sign = if ns < 0 { "-" } else { "" };
    let ns = ns.unsigned_abs();
    let (unit_ns, unit, digits) = match ns {
        0 => return "0 s".to_owned(),
        1..1_000 => (1, "ns", 0),
        1_000..1_000_000 => (1_000, "us", 1),
        1_000_000..1_000_000_000 => (1_000_000, "ms", 2),
        1_000_000_000..600_000_000_000 => (1_000_000_000, "s", 2),
        600_000_000_000..7_200_000_000_000 => (MINUTE, "min", 1),
        7_200_000_000_000..36_000_000_000_000_000 => (60 * MINUTE, "h", 1),
        // A mean Gregorian year.
        _ => (525_949 * MINUTE + MINUTE / 5, "y", 1),
    };
    let scale = 10_u128.pow(digits);
    let rounded = ns.saturating_mul(scale).saturating_add(unit_ns / 2) / unit_ns;
    let (whole, fraction) = (rounded / scale, rounded % scale);
    match digits {
        0 => format!("{sign}{whole} {unit}"),
        _ => format!("{sign}{whole}.{fraction:0width$} {unit}", width = digits as usize),
    }
}

/// A moment as `2026-11-22 00:58:25 UTC`.
pub(crate) fn utc(unix_ns: u64) -> String {
    let seconds = unix_ns / 1_000_000_000;
    let (year, month, day) = civil(seconds / 86_400);
    format!("{year:04}-{month:02}-{day:02} {} UTC", clock(unix_ns))
}

/// The time of day as `00:58:25`, UTC.
pub(crate) fn clock(unix_ns: u64) -> String {
    let of_day = unix_ns / 1_000_000_000 % 86_400;
    format!("{:02}:{:02}:{:02}", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

/// Year, month and day of a day since 1970 (Howard Hinnant, "chrono-compatible low-level date algorithms").
const fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let of_era = shifted % 146_097;
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_index = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_index + 2) / 5 + 1;
    let month = if month_index < 10 {
        month_index + 3
    } else {
        month_index - 9
    };
    let year = year_of_era + era * 400 + if month <= 2 { 1 } else { 0 };
    (year, month, day)
}

/// `1 GPU`, `4 GPUs`.
pub(crate) fn counted(count: u64, noun: &str) -> String {
    if count == 1 {
        format!("{count} {noun}")
    } else {
        format!("{count} {noun}s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_choose_their_unit() {
        let cases = [
            (0, "0 s"),
            (742, "742 ns"),
            (-18_310_000, "-18.31 ms"),
            (1_500, "1.5 us"),
            (38_000_000_054, "38.00 s"),
            (3_672_000_000_000, "61.2 min"),
            (144_720_000_000_000, "40.2 h"),
            (31_556_952_000_000_000 * 12, "12.0 y"),
        ];
        for (ns, text) in cases {
            assert_eq!(duration(ns), text);
        }
        assert!(duration(i128::MIN).ends_with(" y"));
    }

    #[test]
    fn moments_are_civil() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_400_000_000_000), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_795_309_105_999_999_999), "2026-11-22 00:58:25 UTC");
        assert!(utc(u64::MAX).starts_with("2554-07-21"));
    }

    #[test]
    fn percentages_keep_their_sign() {
        assert_eq!([tenths(-5), tenths(1000), tenths(123)], ["-0.5", "100.0", "12.3"]);
        assert_eq!(ppm_percent(398_150), "39.8");
    }

    #[test]
    fn foreign_text_cannot_steer_a_terminal() {
        assert_eq!(
            clean("a\u{1b}[31m\nb\u{202e}c"),
            "a\u{fffd}[31m\u{fffd}b\u{fffd}c"
        );
        assert_eq!(clean(&"x".repeat(9_999)).chars().count(), LONGEST + 1);
    }
}
