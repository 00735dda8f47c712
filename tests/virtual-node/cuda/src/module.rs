//! Module images: what the kernels of a virtual GPU cost.
//!
//! ```text
//! //virtual-gpu kernels
//! kernel gemm_fwd dur_ns=1500000 sm=850000 occupancy=400000 tensor=480000 dram=350000 flops=800000000000
//! kernel layer_norm dur_ns=400000 sm=900000 dram=800000
//! ```
//! Shares are ppm of the whole GPU. `clocked=0` keeps the duration at any clock; `claim=<ppm>` takes that share of
//! the GPU from other processes.

use virtual_node_state::activity::Load;

/// First line of an image.
pub(crate) const MAGIC: &str = "//virtual-gpu kernels";

/// What one kernel costs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct KernelSpec {
    pub(crate) name: String,
    /// Duration alone at the reference clock, ns.
    pub(crate) dur_ns: u64,
    pub(crate) load: KernelLoad,
    pub(crate) flops: u64,
    pub(crate) clocked: bool,
    pub(crate) claim_ppm: u64,
}

/// Shares in ppm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct KernelLoad {
    pub(crate) sm: u64,
    pub(crate) occupancy: u64,
    pub(crate) tensor: u64,
    pub(crate) dram: u64,
}

impl KernelLoad {
    /// The load while the kernel gets `got_ppm` of the GPU.
    pub(crate) fn at(self, got_ppm: u64, clock_mhz: u32, client: usize) -> Load {
        let part = |share: u64| share * got_ppm / virtual_node_state::PPM;
        let (sm_ppm, tensor_ppm, dram_ppm) = (part(self.sm), part(self.tensor), part(self.dram));
        Load {
            resident: true,
            sm_ppm,
            occupancy_ppm: part(self.occupancy),
            tensor_ppm,
            dram_ppm,
            power_mw: virtual_node_state::power::active_mw(sm_ppm, tensor_ppm, dram_ppm, clock_mhz),
            client,
            ..Load::default()
        }
    }
}

/// Reads an image; `None` when it is not one of a virtual GPU's or is malformed.
pub(crate) fn parse(image: &str) -> Option<Vec<KernelSpec>> {
    let mut lines = image.lines().map(str::trim);
    if lines.next() != Some(MAGIC) {
        return None;
    }
    lines
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .map(kernel)
        .collect()
}

fn kernel(line: &str) -> Option<KernelSpec> {
    let mut words = line.strip_prefix("kernel ")?.split_whitespace();
    let mut spec = KernelSpec {
        name: words.next()?.to_owned(),
        clocked: true,
        ..KernelSpec::default()
    };
    for word in words {
        let (key, value) = word.split_once('=')?;
        let value: u64 = value.parse().ok()?;
        match key {
            "dur_ns" => spec.dur_ns = value,
            "sm" => spec.load.sm = value,
            "occupancy" => spec.load.occupancy = value,
            "tensor" => spec.load.tensor = value,
            "dram" => spec.load.dram = value,
            "flops" => spec.flops = value,
            "clocked" => spec.clocked = value != 0,
            "claim" => spec.claim_ppm = value,
            _ => return None,
        }
    }
    (spec.dur_ns > 0).then_some(spec)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_lists_its_kernels() {
        let kernels = parse("//virtual-gpu kernels\nkernel a dur_ns=5 sm=7 clocked=0\n\nkernel b dur_ns=6\n")
            .expect("image");
        assert_eq!(kernels.len(), 2);
        assert_eq!(
            (kernels[0].dur_ns, kernels[0].load.sm, kernels[0].clocked),
            (5, 7, false)
        );
        assert!(kernels[1].clocked);
    }

    #[test]
    fn foreign_images_are_refused() {
        assert_eq!(parse("\u{7f}ELF"), None);
        assert_eq!(parse("//virtual-gpu kernels\nkernel a dur_ns=x"), None);
        assert_eq!(parse("//virtual-gpu kernels\nkernel a speed=1"), None);
        assert_eq!(
            parse("//virtual-gpu kernels\nkernel a sm=1"),
            None,
            "a kernel without a duration"
        );
    }
}
