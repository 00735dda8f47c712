//! What each GPU model can do at best, by PCI device id.
//!
//! Peaks are dense vendor figures for the 16-bit tensor types that training runs in, and hold at the reference
//! clock of the same row; the figure is never rescaled, the clock leaf carries the difference. Names are a
//! fallback only: several products share a marketing name and differ by a third in peak.

mod table;

use crate::facts::DeviceProfile;

/// The type that matrix operands have, by which a device has different peaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Precision {
    /// FP32 on the plain units.
    Fp32,
    /// FP32 operands rounded to TF32 on the tensor units.
    Tf32,
    /// BF16 or FP16 on the tensor units.
    Half,
    /// FP8 on the tensor units.
    Fp8,
}

impl Precision {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Fp32, Self::Tf32, Self::Half, Self::Fp8];

    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Tf32 => "tf32",
            Self::Half => "bf16",
            Self::Fp8 => "fp8",
        }
    }

    /// The precision of that name; `fp16` has the peak of `bf16`.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "fp16" {
            return Some(Self::Half);
        }
        Self::ALL.into_iter().find(|known| known.name() == name)
    }
}

/// One GPU model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Device {
    /// PCI vendor id.
    pub vendor: u16,
    /// PCI device id, without the vendor; 0 when not known.
    pub pci_device: u16,
    /// Names the driver reports for it.
    pub names: &'static [&'static str],
    /// Dense BF16/FP16 tensor peak, GFLOP/s.
    pub peak_gflops: u64,
    /// FP32 peak without tensor units, GFLOP/s.
    pub fp32_gflops: Option<u64>,
    /// Dense TF32 peak, GFLOP/s.
    pub tf32_gflops: Option<u64>,
    /// Dense FP8 peak, GFLOP/s.
    pub fp8_gflops: Option<u64>,
    /// Best BF16 GEMM rate that was measured, GFLOP/s.
    pub reachable_gflops: Option<u64>,
    /// SM clock at which the peak holds, MHz.
    pub reference_sm_mhz: Option<u32>,
    /// Streaming multiprocessors.
    pub sm_count: Option<u32>,
    /// Device memory, MB/s.
    pub hbm_mbytes_per_s: Option<u64>,
    /// Host link in one direction, MB/s.
    pub host_link_mbytes_per_s: Option<u64>,
    /// Where the figures come from.
    pub source: &'static str,
}

impl Device {
    /// Dense peak of a precision, FLOP/s; `None` when the device has none or it is not known.
    #[must_use]
    pub const fn peak_flops_per_s(&self, precision: Precision) -> Option<u64> {
        let gflops = match precision {
            Precision::Fp32 => self.fp32_gflops,
            Precision::Tf32 => self.tf32_gflops,
            Precision::Half => Some(self.peak_gflops),
            Precision::Fp8 => self.fp8_gflops,
        };
        match gflops {
            Some(gflops) => Some(gflops * 1_000_000_000),
            None => None,
        }
    }
}

/// PCI vendor id of NVIDIA.
const NVIDIA: u16 = 0x10de;
/// PCI vendor id of AMD.
const AMD: u16 = 0x1002;

/// The row of a device, by its PCI id as NVML gives it (`device << 16 | vendor`, 0 when unknown), else by the
/// driver's name for it.
///
/// `None` means that no figure of this device is known: every share of its peak is then unmeasured.
#[must_use]
pub fn find(pci_device_id: u32, name: &str) -> Option<&'static Device> {
    let (device, vendor) = (pci_device_id >> 16, pci_device_id & 0xffff);
    let row = table::DEVICES.iter().find(|row| {
        row.pci_device != 0 && u32::from(row.pci_device) == device && u32::from(row.vendor) == vendor
    });
    if row.is_some() {
        return row;
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
                assert!(row.pci_device == 0 || row.pci_device != other.pci_device);
                assert!(!row.names.iter().any(|name| other.names.contains(name)));
            }
            if let Some(reachable) = row.reachable_gflops {
                assert!(reachable < row.peak_gflops, "{:?}", row.names);
            }
        }
    }

    #[test]
    fn precisions_have_their_own_peaks() {
        let a100 = find(0, "NVIDIA A100-PG509-200").expect("A100");
        let peaks = Precision::ALL.map(|precision| {
            a100.peak_flops_per_s(precision)
                .map(|flops| flops / 100_000_000_000)
        });
        assert_eq!(peaks, [Some(195), Some(1560), Some(3120), None]);
        let v100 = find(0, "Tesla V100-SXM2-32GB").expect("V100");
        assert_eq!(
            v100.peak_flops_per_s(Precision::Tf32),
            None,
            "Volta's tensor cores take 16 bits"
        );
        assert_eq!(find(0x74a1_1002, "").map(|row| row.peak_gflops), Some(1_307_400));
        for precision in Precision::ALL {
            assert_eq!(Precision::from_name(precision.name()), Some(precision));
        }
    }

    #[test]
    fn volta_peaks_equal_their_silicon_at_the_reference_clock() {
        // 8 tensor cores an SM of 64 fused multiply-adds a clock, and 64 plain ones.
        for id in [0x1db1, 0x1db4, 0x1db5, 0x1db6, 0x1db7] {
            let row = find(id << 16 | u32::from(NVIDIA), "").expect("Volta row");
            let (sms, mhz) = (row.sm_count.expect("SMs"), row.reference_sm_mhz.expect("clock"));
            let gflops = |fma: u64| u64::from(sms) * fma * 2 * u64::from(mhz) / 1000;
            assert!(
                gflops(8 * 64).abs_diff(row.peak_gflops) * 100 < row.peak_gflops,
                "{:?}",
                row.names
            );
            let plain = row.fp32_gflops.expect("FP32");
            assert!(gflops(64).abs_diff(plain) * 100 < plain * 2, "{:?}", row.names);
        }
    }

    #[test]
    fn hopper_peaks_equal_their_silicon_at_the_reference_clock() {
        // 4 tensor cores an SM, 512 fused multiply-adds a clock each.
        for id in [0x2330, 0x2331, 0x2335] {
            let row = find(id << 16 | u32::from(NVIDIA), "").expect("Hopper row");
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
