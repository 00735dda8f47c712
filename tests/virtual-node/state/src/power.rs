//! What a virtual GPU draws, and what heat does to it.

use crate::PPM;

/// Draw of an idle GPU, milliwatts.
pub const IDLE_MW: u64 = 95_000;
/// Power limit, milliwatts (H100 SXM).
pub const LIMIT_MW: u64 = 700_000;
/// SM clock at which the data-sheet peak holds, MHz.
pub const REFERENCE_MHZ: u32 = 1_830;
/// Highest SM clock, MHz.
pub const MAX_MHZ: u32 = 1_980;

/// Milliwatts above idle for the given activity shares (ppm) at an SM clock.
///
/// Linear in activity, quadratic in clock: voltage follows the clock in this range. Calibrated so that a GEMM at the
/// reference clock comes near the power limit.
#[must_use]
pub fn active_mw(sm_ppm: u64, tensor_ppm: u64, dram_ppm: u64, clock_mhz: u32) -> u64 {
    let at_reference = (sm_ppm * 220_000 + tensor_ppm * 300_000 + dram_ppm * 85_000) / PPM;
    let (clock, reference) = (u64::from(clock_mhz), u64::from(REFERENCE_MHZ));
    at_reference * clock * clock / (reference * reference)
}
