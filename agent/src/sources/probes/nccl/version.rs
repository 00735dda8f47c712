//! Which NCCL a file is.

use std::fmt;

/// A version of NCCL, as `ncclGetVersion` gives it: 22705 is 2.27.5.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NcclVersion(u32);

impl NcclVersion {
    /// The version with these numbers.
    #[must_use]
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self(major * 10_000 + minor * 100 + patch)
    }

    /// The version with this code; `None` where no version from 2.9 to 9.99 has it (older ones counted otherwise).
    #[must_use]
    pub const fn from_code(code: u32) -> Option<Self> {
        if code >= 20_900 && code <= 99_999 {
            Some(Self(code))
        } else {
            None
        }
    }

    /// The code.
    #[must_use]
    pub const fn code(self) -> u32 {
        self.0
    }

    /// Finds the version in the machine code of `ncclGetVersion`, where it is stored through the first argument.
    #[must_use]
    pub fn in_code(code: &[u8]) -> Option<Self> {
        if cfg!(target_arch = "aarch64") {
            in_aarch64(code)
        } else {
            in_x86_64(code)
        }
    }
}

impl fmt::Display for NcclVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0 / 10_000, self.0 / 100 % 100, self.0 % 100)
    }
}

/// `mov dword ptr [rdi], VERSION`
fn in_x86_64(code: &[u8]) -> Option<NcclVersion> {
    code.windows(6).find_map(|bytes| match *bytes {
        [0xc7, 0x07, a, b, c, d] => NcclVersion::from_code(u32::from_le_bytes([a, b, c, d])),
        _ => None,
    })
}

/// `mov wN, #VERSION`, by the instruction's own encoding (MOVZ, 32 bits, no shift; or with the upper half in a MOVK).
fn in_aarch64(code: &[u8]) -> Option<NcclVersion> {
    let words: Vec<u32> = code
        .as_chunks::<4>()
        .0
        .iter()
        .map(|word| u32::from_le_bytes(*word))
        .collect();
    words.iter().enumerate().find_map(|(at, word)| {
        if word & 0xffe0_0000 != 0x5280_0000 {
            return None;
        }
        let register = word & 0x1f;
        let low = word >> 5 & 0xffff;
        let high = words[at + 1..]
            .iter()
            .find(|next| **next & 0xffe0_001f == 0x72a0_0000 | register)
            .map_or(0, |next| next >> 5 & 0xffff);
        NcclVersion::from_code(high << 16 | low)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `ncclGetVersion` of the 2.27.5 wheel for x86-64: a null check, the store, and the two results.
    const X86_64: &[u8] = &[
        0x48, 0x85, 0xff, 0x74, 0x09, 0xc7, 0x07, 0xb1, 0x58, 0x00, 0x00, 0x31, 0xc0, 0xc3, 0xb8, 0x04, 0x00,
        0x00, 0x00, 0xc3,
    ];

    #[test]
    fn the_version_is_the_number_that_is_stored() {
        assert_eq!(in_x86_64(X86_64), Some(NcclVersion::new(2, 27, 5)));
        assert_eq!(in_x86_64(&X86_64[..9]), None);
        assert_eq!(in_x86_64(&[0xc7, 0x07, 1, 0, 0, 0]), None);
        assert_eq!(NcclVersion::new(2, 27, 5).to_string(), "2.27.5");
    }

    #[test]
    fn on_aarch64_it_is_a_move_of_one_or_two_halves() {
        // cbz x0, ..; mov w1, #22705; str w1, [x0]
        let one = [0xb400_0080u32, 0x528b_1621, 0xb900_0001];
        // mov w2, #0x5f91; movk w2, #1, lsl 16
        let two = [0x528b_f222u32, 0x72a0_0022];
        let bytes = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
        assert_eq!(in_aarch64(&bytes(&one)), Some(NcclVersion::new(2, 27, 5)));
        assert_eq!(in_aarch64(&bytes(&two)), NcclVersion::from_code(0x1_5f91));
        assert_eq!(in_aarch64(&bytes(&[0xd503_201f; 8])), None);
    }

    proptest::proptest! {
        #[test]
        fn no_code_upsets_it(code in proptest::collection::vec(proptest::num::u8::ANY, 0..80)) {
            let _ = (in_x86_64(&code), in_aarch64(&code));
        }
    }
}
