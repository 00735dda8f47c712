//! What the text of a port's files means. Pure.

use stallscope_attribution::reading::Reading;

use super::super::sysfs::shown;

/// `4: ACTIVE`: whether the port can carry traffic.
pub(super) fn is_active(state: &str) -> Reading<bool> {
    match state.split_once(':') {
        Some((number, _)) => match number.trim().parse::<u32>() {
            // IB_PORT_ACTIVE; IB_PORT_ACTIVE_DEFER (5) passes traffic too, while the link is being changed.
            Ok(number) => Reading::Value(matches!(number, 4 | 5)),
            Err(_) => Reading::Failed(format!("the state is {:?}", shown(state))),
        },
        None => Reading::Failed(format!("the state is {:?}", shown(state))),
    }
}

/// `100 Gb/sec (4X EDR)`, `2.5 Gb/sec (1X SDR)`: bytes/s in one direction.
pub(super) fn rate_bytes_per_s(rate: &str) -> Reading<u64> {
    const BYTES_PER_TENTH: u64 = 100_000_000 / 8;
    let failed = || Reading::Failed(format!("the rate is {:?}", shown(rate)));
    let Some(gigabits) = rate.split_ascii_whitespace().next() else {
        return failed();
    };
    let (whole, tenth) = gigabits.split_once('.').unwrap_or((gigabits, "0"));
    let (Ok(whole), Ok(tenth), 1) = (whole.parse::<u64>(), tenth.parse::<u64>(), tenth.len()) else {
        return failed();
    };
    if !rate.contains("Gb/sec") || whole > 1_000_000 {
        return failed();
    }
    match whole * 10 + tenth {
        0 => Reading::Unsupported,
        tenths => Reading::Value(tenths * BYTES_PER_TENTH),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states() {
        assert_eq!(is_active("4: ACTIVE"), Reading::Value(true));
        for down in ["1: DOWN", "2: INIT", "3: ARMED", "0: NOP"] {
            assert_eq!(is_active(down), Reading::Value(false), "{down}");
        }
        for nonsense in ["", "ACTIVE", ": 4", "four: ACTIVE"] {
            assert!(matches!(is_active(nonsense), Reading::Failed(_)), "{nonsense}");
        }
    }

    #[test]
    fn rates() {
        assert_eq!(
            rate_bytes_per_s("400 Gb/sec (4X NDR)"),
            Reading::Value(50_000_000_000)
        );
        assert_eq!(
            rate_bytes_per_s("2.5 Gb/sec (1X SDR)"),
            Reading::Value(312_500_000)
        );
        assert_eq!(rate_bytes_per_s("0 Gb/sec (4X)"), Reading::Unsupported);
        for nonsense in [
            "",
            "400",
            "400 Mb/sec",
            "99999999999999999999 Gb/sec",
            "1.25 Gb/sec",
            "-1 Gb/sec",
            "9999999 Gb/sec",
        ] {
            assert!(
                matches!(rate_bytes_per_s(nonsense), Reading::Failed(_)),
                "{nonsense}"
            );
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_survived(text: String) {
            let _ = (is_active(&text), rate_bytes_per_s(&text));
        }
    }
}
