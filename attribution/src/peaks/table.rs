//! The table behind [`super::find`].
//!
//! Device ids are those of the PCI ID repository. Peaks are the vendor's dense figures (the sparse ones, exactly
//! twice as large, are refused); best measured GEMM rates are the MAMF table of stas00/ml-engineering (BF16).
//! Host links are PCIe 4.0 and 5.0 x16 after 128b/130b encoding.

use super::Device;

/// PCIe 4.0 x16, one direction, MB/s.
const PCIE4_X16: Option<u64> = Some(31_508);
/// PCIe 5.0 x16, one direction, MB/s.
const PCIE5_X16: Option<u64> = Some(63_015);

/// A100 data sheet; whitepaper: 108 SMs, 1410 MHz boost.
const A100_SXM: &str = "A100 data sheet (312 dense); MAMF 271.2 measured on A100 SXM";
/// The PCIe card has the same peak and a lower power limit; no measured best rate is known for it.
const A100_PCIE: &str = "A100 data sheet (312 dense)";

pub(super) const DEVICES: &[Device] = &[
    Device {
        pci_device: 0x2330,
        names: &["NVIDIA H100 80GB HBM3"],
        peak_gflops: 989_400,
        reachable_gflops: Some(794_500),
        reference_sm_mhz: Some(1830),
        sm_count: Some(132),
        host_link_mbytes_per_s: PCIE5_X16,
        source: "H100 SXM data sheet (989.4 dense, at 1830 MHz: 528 tensor cores x 512 FMA); MAMF 794.5",
    },
    Device {
        pci_device: 0x2331,
        names: &["NVIDIA H100 PCIe"],
        peak_gflops: 756_000,
        reachable_gflops: None,
        // Follows from the peak: 756e12 / (114 SMs x 4 x 512 FMA x 2).
        reference_sm_mhz: Some(1619),
        sm_count: Some(114),
        host_link_mbytes_per_s: PCIE5_X16,
        source: "H100 PCIe data sheet (756 dense); clock derived from the peak and 114 SMs",
    },
    Device {
        pci_device: 0x2335,
        names: &["NVIDIA H200"],
        peak_gflops: 989_400,
        reachable_gflops: None,
        reference_sm_mhz: Some(1830),
        sm_count: Some(132),
        host_link_mbytes_per_s: PCIE5_X16,
        source: "H200 SXM data sheet (989.4 dense), same compute silicon as H100 SXM",
    },
    Device {
        pci_device: 0x20b0,
        names: &["NVIDIA A100-SXM4-40GB"],
        peak_gflops: 312_000,
        reachable_gflops: Some(271_200),
        reference_sm_mhz: Some(1410),
        sm_count: Some(108),
        host_link_mbytes_per_s: PCIE4_X16,
        source: A100_SXM,
    },
    Device {
        pci_device: 0x20b2,
        names: &["NVIDIA A100-SXM4-80GB"],
        peak_gflops: 312_000,
        reachable_gflops: Some(271_200),
        reference_sm_mhz: Some(1410),
        sm_count: Some(108),
        host_link_mbytes_per_s: PCIE4_X16,
        source: A100_SXM,
    },
    Device {
        pci_device: 0x20f1,
        names: &["NVIDIA A100-PCIE-40GB"],
        peak_gflops: 312_000,
        reachable_gflops: None,
        reference_sm_mhz: Some(1410),
        sm_count: Some(108),
        host_link_mbytes_per_s: PCIE4_X16,
        source: A100_PCIE,
    },
    Device {
        pci_device: 0x20b5,
        names: &["NVIDIA A100 80GB PCIe"],
        peak_gflops: 312_000,
        reachable_gflops: None,
        reference_sm_mhz: Some(1410),
        sm_count: Some(108),
        host_link_mbytes_per_s: PCIE4_X16,
        source: A100_PCIE,
    },
    Device {
        pci_device: 0x2901,
        names: &["NVIDIA B200"],
        peak_gflops: 2_250_000,
        reachable_gflops: Some(1_745_000),
        // No published clock belongs to the figure.
        reference_sm_mhz: None,
        sm_count: Some(148),
        host_link_mbytes_per_s: PCIE5_X16,
        source: "HGX B200 data sheet (2250 dense); MAMF 1745.0",
    },
];
