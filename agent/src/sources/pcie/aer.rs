//! Errors that the kernel counts of a device.

use std::collections::BTreeMap;
use std::path::Path;

use stallscope_attribution::facts::Counter;
use stallscope_attribution::reading::Reading;

use super::super::sysfs::{Lack, number, text};

/// One line an error and its count (Documentation/ABI/testing/sysfs-bus-pci-devices-aer_stats).
const TABLES: [&str; 3] = ["aer_dev_correctable", "aer_dev_nonfatal", "aer_dev_fatal"];
/// Messages that a root port received from below.
const TOTALS: [&str; 3] = [
    "aer_rootport_total_err_cor",
    "aer_rootport_total_err_nonfatal",
    "aer_rootport_total_err_fatal",
];
/// Kinds of errors of one table.
const MOST_KINDS: usize = 64;
const MOST_NAME: usize = 64;

/// Counts by name, or why there are none.
pub(super) type Counts = BTreeMap<String, Result<u64, Lack>>;

/// Reads every count of the device.
pub(super) fn counts(device: &Path) -> Counts {
    let mut counts = Counts::new();
    for table in TABLES {
        match text(&device.join(table)) {
            Ok(text) => {
                counts.extend(lines(&text).map(|(kind, count)| (format!("{table}.{kind}"), Ok(count))))
            }
            // A device without error reporting.
            Err(Lack::Absent | Lack::Unsupported) => {}
            Err(lack) => {
                counts.insert(table.to_owned(), Err(lack));
            }
        }
    }
    for total in TOTALS {
        match number(&device.join(total)) {
            Err(Lack::Absent | Lack::Unsupported) => {}
            count => {
                counts.insert(total.to_owned(), count);
            }
        }
    }
    counts
}

/// Lines of `name count`; others are left out.
fn lines(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().take(MOST_KINDS).filter_map(|line| {
        let (kind, count) = line.trim().rsplit_once(' ')?;
        let kind = kind.trim();
        let is_name =
            (1..=MOST_NAME).contains(&kind.len()) && kind.chars().all(|char| char.is_ascii_graphic());
        Some((kind, count.parse().ok()?)).filter(|_| is_name)
    })
}

/// How far each count went.
pub(super) fn growth(before: &Counts, now: &Counts) -> Vec<Counter> {
    let growth = |(name, now): (&String, &Result<u64, Lack>)| {
        let growth = match (before.get(name), now) {
            (_, Err(lack)) => lack.clone().reading(),
            (Some(Ok(before)), Ok(now)) => now.checked_sub(*before).map_or_else(
                || Reading::Failed(format!("the counter was reset: from {before} to {now}")),
                Reading::Value,
            ),
            (_, Ok(_)) => Reading::NotMeasured,
        };
        Counter {
            name: name.clone(),
            growth,
        }
    };
    now.iter().map(growth).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_as_the_kernel_prints_them() {
        let text = "RxErr 2\nBadTLP 0\nRollover 1\nTOTAL_ERR_COR 3\n";
        let all: Vec<_> = lines(text).collect();
        assert_eq!(
            all,
            [("RxErr", 2), ("BadTLP", 0), ("Rollover", 1), ("TOTAL_ERR_COR", 3)]
        );
        let strange = "\n 5\nNoCount\nToo many words 5\nBig 99999999999999999999999\nNeg -1\nOk 7";
        assert_eq!(lines(strange).collect::<Vec<_>>(), [("Ok", 7)]);
        assert_eq!(lines(&"A 1\n".repeat(10_000)).count(), MOST_KINDS);
    }

    #[test]
    fn counts_that_went_back_or_were_not_there() {
        let counts = |values: &[(&str, u64)]| -> Counts {
            values
                .iter()
                .map(|(name, value)| ((*name).to_owned(), Ok(*value)))
                .collect()
        };
        let told = growth(
            &counts(&[("a", 5), ("b", 5)]),
            &counts(&[("a", 7), ("b", 1), ("c", 9)]),
        );
        let growths: Vec<_> = told.into_iter().map(|counter| counter.growth).collect();
        assert_eq!(growths[0], Reading::Value(2));
        assert!(matches!(growths[1], Reading::Failed(_)));
        assert_eq!(growths[2], Reading::NotMeasured);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_survived(text: String) {
            proptest::prop_assert!(lines(&text).count() <= MOST_KINDS);
        }
    }
}
