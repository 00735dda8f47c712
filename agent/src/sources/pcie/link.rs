//! A device's link to the bridge above it, as now and as it could be.

use std::path::Path;

use stallscope_attribution::facts::PciLink;
use stallscope_attribution::reading::Reading;

use super::super::sysfs::{Lack, shown, text};

/// A device that has fallen off the bus answers ones: all bits of the field of lanes set.
const ALL_ONES: u32 = 0x3f;
/// No link has more.
const MOST_LANES: u32 = 32;

/// What device and slot both could do; it does not change while they stay together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Best {
    rate_mt_per_s: u32,
    lanes: u32,
}

/// Best of the device and of the bridge above, where that says something. Without a best of its own the device is not a
/// PCI Express device, or a virtual function, which has the link of its physical one.
pub(super) fn best(device: &Path, above: Option<&Path>) -> Result<Best, Lack> {
    let of = |path: &Path| -> Result<Best, Lack> {
        Ok(Best {
            rate_mt_per_s: rate(path, "max_link_speed")?,
            lanes: lanes(path, "max_link_width")?,
        })
    };
    let own = of(device)?;
    if own.lanes == 0 || own.rate_mt_per_s == 0 {
        return Err(Lack::Unsupported);
    }
    // A bridge without lanes of its own is inside the root complex.
    let above = above
        .and_then(|above| of(above).ok())
        .filter(|above| above.lanes > 0 && above.rate_mt_per_s > 0);
    Ok(above.map_or(own, |above| Best {
        rate_mt_per_s: own.rate_mt_per_s.min(above.rate_mt_per_s),
        lanes: own.lanes.min(above.lanes),
    }))
}

/// The link now.
pub(super) fn link(device: &Path, best: Best, under_load: bool) -> Reading<PciLink> {
    let read = || -> Result<(u32, u32), Lack> {
        Ok((
            rate(device, "current_link_speed")?,
            lanes(device, "current_link_width")?,
        ))
    };
    match read() {
        Ok((_, ALL_ONES)) => Reading::Failed("the device does not answer on the bus".to_owned()),
        Ok((0, _) | (_, 0)) => Reading::Failed("the link is down".to_owned()),
        Ok((rate_mt_per_s, lanes)) => Reading::Value(PciLink {
            rate_mt_per_s,
            lanes,
            // What runs now is possible, whatever the best is said to be.
            best_rate_mt_per_s: best.rate_mt_per_s.max(rate_mt_per_s),
            best_lanes: best.lanes.max(lanes),
            under_load,
        }),
        Err(lack) => lack.reading(),
    }
}

fn rate(device: &Path, file: &str) -> Result<u32, Lack> {
    let text = text(&device.join(file))?;
    rate_mt_per_s(&text).ok_or_else(|| Lack::Failed(format!("{file} is {:?}", shown(&text))))
}

fn lanes(device: &Path, file: &str) -> Result<u32, Lack> {
    let text = text(&device.join(file))?;
    text.parse::<u32>()
        .ok()
        .filter(|&lanes| lanes <= MOST_LANES || lanes == ALL_ONES)
        // An unsigned byte is what newer kernels show for the same.
        .or_else(|| (text == "255").then_some(ALL_ONES))
        .ok_or_else(|| Lack::Failed(format!("{file} is {:?}", shown(&text))))
}

/// `16.0 GT/s PCIe`, `8 GT/s`; 0 for `Unknown`.
fn rate_mt_per_s(text: &str) -> Option<u32> {
    if text.starts_with("Unknown") {
        return Some(0);
    }
    let number = text.strip_suffix(" PCIe").unwrap_or(text).strip_suffix(" GT/s")?;
    let (whole, tenth) = number.split_once('.').unwrap_or((number, "0"));
    let (whole, digit): (u32, u32) = (whole.parse().ok()?, tenth.parse().ok()?);
    (whole <= 1000 && tenth.len() == 1).then_some(whole * 1000 + digit * 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_of_all_generations() {
        let known = [
            ("2.5 GT/s PCIe", 2_500),
            ("5.0 GT/s PCIe", 5_000),
            ("8.0 GT/s PCIe", 8_000),
            ("8 GT/s", 8_000),
            ("32.0 GT/s PCIe", 32_000),
            ("64.0 GT/s PCIe", 64_000),
            ("Unknown", 0),
            ("Unknown speed", 0),
        ];
        for (text, rate) in known {
            assert_eq!(rate_mt_per_s(text), Some(rate), "{text}");
        }
        for text in [
            "",
            "GT/s",
            "8.05 GT/s",
            "-8 GT/s",
            "99999999999 GT/s",
            "8 MT/s",
            "8.x GT/s",
        ] {
            assert_eq!(rate_mt_per_s(text), None, "{text}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_survived(text: String) {
            let _ = rate_mt_per_s(&text);
        }
    }
}
