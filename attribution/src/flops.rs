//! FLOPs of a transformer from its shape, and what share of a device's peak they are.
//!
//! The convention is that of PaLM (arXiv 2204.02311, appendix B): `6N + 12LHQT` per token for the model, full and not
//! causal attention, nothing repeated. Hardware FLOPs add the share `r` of the forward pass that is done again:
//! `(6 + 2r)N + (12 + 4r)LHQT`.

use crate::facts::PPM;

/// Shape of a dense transformer and of the batch it is trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Shape {
    /// Parameters; of a mixture of experts those that one token uses.
    pub parameters: u64,
    /// Layers.
    pub layers: u64,
    /// Attention heads of a layer.
    pub heads: u64,
    /// Size of a head.
    pub head_size: u64,
    /// Tokens of a sequence.
    pub sequence: u64,
    /// Tokens one GPU takes per step: the global batch in tokens over the number of GPUs.
    pub tokens_per_gpu: u64,
    /// Share of the forward pass that is done again in the backward pass, parts per million.
    pub recompute_ppm: u64,
}

/// Why a text is no shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// A part that is not `name=number`, or a name that is none.
    #[error(
        "{part:?} is no part of a shape; a shape is like \
         params=7e9,layers=32,heads=32,head_size=128,sequence=4096,tokens=65536,recompute=1"
    )]
    Part {
        /// The part.
        part: String,
    },
    /// A part is missing.
    #[error("the shape does not say {name}; MFU stays unknown without it")]
    Missing {
        /// Which part.
        name: &'static str,
    },
    /// The FLOPs do not fit 64 bits.
    #[error("the shape's FLOPs per GPU and step exceed 2^64; tokens are those of one GPU and one step")]
    TooLarge,
}

impl Shape {
    /// FLOPs of the model per GPU and step: forward and backward once.
    ///
    /// # Errors
    /// When they exceed 64 bits.
    pub fn model_flops_per_step(&self) -> Result<u64, ShapeError> {
        self.flops_per_step(0)
    }

    /// FLOPs that the devices do per GPU and step, with what is repeated.
    ///
    /// # Errors
    /// When they exceed 64 bits.
    pub fn hardware_flops_per_step(&self) -> Result<u64, ShapeError> {
        self.flops_per_step(self.recompute_ppm)
    }

    fn flops_per_step(&self, recompute_ppm: u64) -> Result<u64, ShapeError> {
        let attention = [self.heads, self.head_size, self.sequence]
            .into_iter()
            .try_fold(u128::from(self.layers), |product, part| {
                product.checked_mul(part.into())
            });
        let millions =
            |whole: u128, repeated: u128| whole * u128::from(PPM) + repeated * u128::from(recompute_ppm);
        let flops = || {
            let dense = u128::from(self.parameters).checked_mul(millions(6, 2))?;
            let attention = attention?.checked_mul(millions(12, 4))?;
            dense
                .checked_add(attention)?
                .checked_mul(self.tokens_per_gpu.into())
        };
        let flops = flops().ok_or(ShapeError::TooLarge)? / u128::from(PPM);
        u64::try_from(flops).map_err(|_| ShapeError::TooLarge)
    }
}

impl core::str::FromStr for Shape {
    type Err = ShapeError;

    /// `params=7e9,layers=32,heads=32,head_size=128,sequence=4096,tokens=65536`, in any order; `recompute` (0 to 1)
    /// may follow.
    fn from_str(text: &str) -> Result<Self, ShapeError> {
        let mut shape = Self::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let wrong = || ShapeError::Part {
                part: part.chars().take(64).collect(),
            };
            let (name, value) = part.split_once('=').ok_or_else(wrong)?;
            let (name, value) = (name.trim(), value.trim());
            if name == "recompute" {
                let share = millionths(value).filter(|ppm| *ppm <= PPM);
                shape.recompute_ppm = share.ok_or_else(wrong)?;
                continue;
            }
            let field = match name {
                "params" => &mut shape.parameters,
                "layers" => &mut shape.layers,
                "heads" => &mut shape.heads,
                "head_size" => &mut shape.head_size,
                "sequence" => &mut shape.sequence,
                "tokens" => &mut shape.tokens_per_gpu,
                _ => return Err(wrong()),
            };
            *field = whole(value).ok_or_else(wrong)?;
        }
        let parts = [
            ("params", shape.parameters),
            ("layers", shape.layers),
            ("heads", shape.heads),
            ("head_size", shape.head_size),
            ("sequence", shape.sequence),
            ("tokens", shape.tokens_per_gpu),
        ];
        match parts.into_iter().find(|(_, value)| *value == 0) {
            Some((name, _)) => Err(ShapeError::Missing { name }),
            None => Ok(shape),
        }
    }
}

/// A whole number, also written as `7e9` or `6.7e9`.
#[must_use]
pub fn whole(text: &str) -> Option<u64> {
    scaled(text, 0)
}

/// A decimal number between 0 and 18e12 as parts per million.
fn millionths(text: &str) -> Option<u64> {
    scaled(text, 6)
}

/// A decimal number times `10^scale`, exactly; `None` when that is no whole number of 64 bits.
fn scaled(text: &str, scale: i32) -> Option<u64> {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, exponent.parse::<i32>().ok()?),
        None => (text, 0),
    };
    let (before, after) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let digits = format!("{before}{after}");
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let shift = exponent
        .checked_add(scale)?
        .checked_sub(i32::try_from(after.len()).ok()?)?;
    let number: u64 = digits.parse().ok()?;
    let power = 10_u64.checked_pow(shift.unsigned_abs())?;
    if shift >= 0 {
        number.checked_mul(power)
    } else {
        number.is_multiple_of(power).then_some(number / power)
    }
}

/// Share of the peak, parts per million: `flops` in `time_ns` on one device.
#[must_use]
pub fn utilisation_ppm(flops: u64, time_ns: u64, peak_flops_per_s: u64) -> Option<u32> {
    let possible = u128::from(peak_flops_per_s) * u128::from(time_ns) / 1_000_000_000;
    (possible > 0).then(|| {
        let ppm = (u128::from(flops) * u128::from(PPM) + possible / 2) / possible;
        u32::try_from(ppm).unwrap_or(u32::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PaLM 540B on 6,144 TPU v4 of 275 TFLOP/s at 238.3 thousand tokens/s: published MFU 46.2 %, HFU 57.8 %.
    fn palm(recompute: &str) -> Shape {
        // One second's tokens of one device, times 6,144.
        format!("params=540e9,layers=118,heads=48,head_size=256,sequence=2048,tokens=238.3e3,recompute={recompute}")
            .parse()
            .expect("a shape")
    }

    #[test]
    fn palm_has_its_published_utilisation() {
        let shape = palm("0");
        let all = shape.model_flops_per_step().expect("FLOPs");
        let per_device = all / 6144;
        assert_eq!(
            utilisation_ppm(per_device, 1_000_000_000, 275_000_000_000_000),
            Some(461_993),
            "(6 * 540e9 + 12 * 118 * 48 * 256 * 2048) * 238300 / (6144 * 275e12), by hand"
        );
        // The published pair tells the share of the forward pass that was repeated: 3 (57.8 / 46.2 - 1).
        let hardware = palm("0.7532").hardware_flops_per_step().expect("FLOPs");
        let hfu = utilisation_ppm(hardware / 6144, 1_000_000_000, 275_000_000_000_000).expect("HFU");
        assert_eq!((hfu + 500) / 1000, 578);
    }

    #[test]
    fn repeating_the_whole_forward_pass_costs_a_third() {
        let shape = palm("1");
        let (model, hardware) = (shape.model_flops_per_step(), shape.hardware_flops_per_step());
        assert_eq!(hardware.expect("FLOPs"), model.expect("FLOPs") / 3 * 4);
    }

    #[test]
    fn shapes_are_read_exactly_or_refused() {
        assert_eq!(whole("6.7e9"), Some(6_700_000_000));
        assert_eq!([whole("1.5"), whole("-1"), whole("1e30"), whole("")], [None; 4]);
        let refused = |text: &str| text.parse::<Shape>().expect_err("refused").to_string();
        assert!(refused("params=7e9").contains("does not say layers"));
        assert!(refused("parms=7e9").contains("parms=7e9"));
        assert!(refused("params").contains("params"));
        let full = "params=1e18,layers=9e18,heads=9e18,head_size=9e18,sequence=9e18,tokens=9e18";
        let shape: Shape = full.parse().expect("a shape");
        assert_eq!(shape.model_flops_per_step(), Err(ShapeError::TooLarge));
    }
}
