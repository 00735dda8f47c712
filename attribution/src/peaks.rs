//! What each GPU model can do at best, by PCI device id.
//!
//! Peaks are dense vendor figures for the 16-bit tensor types that training runs in, and hold at the reference
//! clock of the same row; the figure is never rescaled, the clock leaf carries the difference. Names are a
//! fallback only: several products share a marketing name and differ by a third in peak.

mod table;

use crate::facts::DeviceProfile;

/// One GPU model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// PCI device id, without the vendor.
    pub pci_device: u16,
    /// Names the driver reports for it.
    pub names: &'static [&'static str],
    /// Dense BF16/FP16 tensor peak, GFLOP/s.
    pub peak_gflops: u64,
    /// Best BF16 GEMM rate that was measured, GFLOP/s.
    pub reachable_gflops: Option<u64>,
    /// SM clock at which the peak holds, MHz.
    pub reference_sm_mhz: Option<u32>,
    /// Streaming multiprocessors.
    pub sm_count: Option<u32>,
    /// Host link in one direction, MB/s.
    pub host_link_mbytes_per_s: Option<u64>,
    /// Where the figures come from.
    pub source: &'static str,
}

/// PCI vendor id of NVIDIA.
const NVIDIA: u32 = 0x10de;

/// The row of a device, by its PCI id as NVML gives it (`device << 16 | vendor`, 0 when unknown), else by the
/// driver's name for it.
///
/// `None` means that no figure of this device is known: every share of its peak is then unmeasured.
#[must_use]
pub fn find(pci_device_id: u32, name: &str) -> Option<&'static Device> {
    let (device, vendor) = (pci_device_id >> 16, pci_device_id & 0xffff);
    if pci_device_id != 0 {
        let row = (vendor == NVIDIA)
            .then(|| {
                table::DEVICES
                    .iter()
                    .find(|row| u32::from(row.pci_device) == device)
            })
            .flatten();
        if row.is_some() {
            return row;
        }
    }
    table::DEVICES
        .iter()
        .find(|row| row.names.iter().any(|known| same_name(known, name)))
}

/// The profile of a device: see [`find`]. An unknown device has no field set.
///
/// The model's FLOPs and the communication reference are the job's and the network's, not the device's, and stay
/// unset.
#[must_use]
pub fn profile(pci_device_id: u32, name: &str) -> DeviceProfile {
    find(pci_device_id, name).map_or_else(DeviceProfile::default, |row| DeviceProfile {
        peak_flops_per_s: Some(row.peak_gflops * 1_000_000_000),
        reachable_flops_per_s: row.reachable_gflops.map(|rate| rate * 1_000_000_000),
        reference_sm_mhz: row.reference_sm_mhz,
        sm_count: row.sm_count,
        host_link_bytes_per_s: row.host_link_mbytes_per_s.map(|rate| rate * 1_000_000),
        ..DeviceProfile::default()
    })
}

/// Whether two names are the same up to case and the vendor's prefix. Never by substring: "H100" is in the names
/// of products with 756, 835 and 989 TFLOP/s.
fn same_name(known: &str, name: &str) -> bool {
    let bare = |text: &str| {
        let text = text.trim().to_ascii_lowercase();
        text.strip_prefix("nvidia ")
            .map_or_else(|| text.clone(), ToOwned::to_owned)
    };
    !name.trim().is_empty() && bare(known) == bare(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_by_its_pci_id_whatever_its_name() {
        let row = find(0x2330_10de, "something else").expect("H100 SXM");
        assert_eq!(row.peak_gflops, 989_400);
        let profile = profile(0x2330_10de, "");
        assert_eq!(profile.peak_flops_per_s, Some(989_400_000_000_000));
        assert_eq!(profile.reachable_flops_per_s, Some(794_500_000_000_000));
        assert_eq!(
            (profile.reference_sm_mhz, profile.sm_count),
            (Some(1830), Some(132))
        );
        assert_eq!(profile.model_flops_per_step, None);
    }

    #[test]
    fn a_device_without_an_id_is_found_by_its_whole_name() {
        assert_eq!(
            find(0, "NVIDIA H100 PCIe").map(|row| row.pci_device),
            Some(0x2331)
        );
        assert_eq!(
            find(0, "nvidia h100 80gb hbm3").map(|row| row.pci_device),
            Some(0x2330)
        );
        assert_eq!(find(0, "H100"), None);
        assert_eq!(find(0, ""), None);
    }

    #[test]
    fn an_unknown_device_has_no_figures() {
        assert_eq!(profile(0xffff_10de, "NVIDIA H999"), DeviceProfile::default());
        assert_eq!(
            find(0x2330_1002, ""),
            None,
            "another vendor's device of the same number"
        );
    }

    #[test]
    fn rows_are_unique_and_agree_with_their_clocks() {
        for (index, row) in table::DEVICES.iter().enumerate() {
            for other in &table::DEVICES[index + 1..] {
                assert_ne!(row.pci_device, other.pci_device);
            }
            if let Some(reachable) = row.reachable_gflops {
                assert!(reachable < row.peak_gflops, "{:?}", row.names);
            }
        }
    }

    #[test]
    fn hopper_peaks_equal_their_silicon_at_the_reference_clock() {
        // 4 tensor cores an SM, 512 fused multiply-adds a clock each.
        for id in [0x2330, 0x2331, 0x2335] {
            let row = find(id << 16 | NVIDIA, "").expect("Hopper row");
            let (sms, mhz) = (row.sm_count.expect("SMs"), row.reference_sm_mhz.expect("clock"));
            let gflops = u64::from(sms) * 4 * 512 * 2 * u64::from(mhz) / 1000;
            assert!(
                gflops.abs_diff(row.peak_gflops) * 1000 < row.peak_gflops,
                "{:?}: {gflops}",
                row.names
            );
        }
    }
}
