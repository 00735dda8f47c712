//! The hash by which NCCL itself names a communicator.
//!
//! It is `commHash` in the library, `commId` in its log and its profiler, `hash` in RAS, and the payload of its NVTX ranges;
//! the same on every rank. By NCCL's source: `src/misc/utils.cc` up to 2.25, `src/include/bitops.h` from 2.26.2 on, and
//! `ncclCommInitRankFunc` in `src/init.cc`.

use super::NcclVersion;

/// A communicator's hash as NCCL computes it.
pub type CommHash = u64;

/// The first version with another hash function than DJB2a.
const MIXES: NcclVersion = NcclVersion::new(2, 26, 2);
/// The first version that counts the splits of a communicator.
const COUNTS_SPLITS: NcclVersion = NcclVersion::new(2, 24, 0);

/// Of a communicator made from a unique id; of many ids the first.
#[must_use]
pub fn of_unique_id(version: NcclVersion, id: &[u8; 128]) -> CommHash {
    if version >= MIXES {
        Mixer::new().eat(id).digest()
    } else {
        djb2a(id)
    }
}

/// Of a communicator split from a parent, which was split `count` times with this one. A shrunk communicator has count and
/// colour 0.
#[must_use]
pub fn of_split(version: NcclVersion, parent: CommHash, count: u32, color: i32) -> CommHash {
    if version >= MIXES {
        let mixer = Mixer::new().eat(&parent.to_le_bytes());
        return mixer.eat(&count.to_le_bytes()).eat(&color.to_le_bytes()).digest();
    }
    // Up to 2.25 a text takes the place of the unique id.
    let text = if version >= COUNTS_SPLITS {
        format!("{parent:016x}-{count}-{color}")
    } else {
        format!("{parent:016x}-{color}")
    };
    let mut id = [0; 128];
    for (byte, character) in id.iter_mut().zip(text.bytes()) {
        *byte = character;
    }
    djb2a(&id)
}

/// `hashCombine`, with which 2.29 and later name communicators that grew: the magic of a grown one is that of its parent
/// combined with the number of its children, and its hash is that magic combined with the number of ranks.
#[must_use]
pub fn combined(base: u64, value: u64) -> u64 {
    Mixer::new()
        .eat(&base.to_le_bytes())
        .eat(&value.to_le_bytes())
        .digest()
}

/// DJB2a over C's `char`, which has a sign on x86-64 and none on AArch64.
fn djb2a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(5381u64, |hash, byte| {
        let character = if cfg!(target_arch = "x86_64") {
            i64::from(byte.cast_signed()).cast_unsigned()
        } else {
            u64::from(*byte)
        };
        hash.wrapping_mul(33) ^ character
    })
}

/// Two accumulators; what is eaten apart hashes apart.
struct Mixer([u64; 2]);

impl Mixer {
    const fn new() -> Self {
        Self([1, 1])
    }

    fn eat(mut self, bytes: &[u8]) -> Self {
        let [a, b] = &mut self.0;
        *a ^= bytes.len() as u64;
        for chunk in bytes.chunks(8) {
            *a = a.wrapping_add(*b);
            *b ^= *a;
            *a ^= *a >> 31;
            *a = a.wrapping_mul(0x9de6_2bbc_8cef_3ce3);
            *b ^= *b >> 32;
            *b = b.wrapping_mul(0x485c_d631_1b59_9e79);
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            *a = a.wrapping_add(u64::from_le_bytes(word));
        }
        self
    }

    const fn digest(self) -> u64 {
        let [a, b] = self.0;
        let mut hash = a ^ (a >> 31);
        hash = hash.wrapping_mul(0xbac3_bd56_2846_de6b);
        hash = hash.wrapping_add(b);
        hash ^= hash >> 32;
        hash.wrapping_mul(0x995a_187a_14e7_b445)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: u64 = 0x1122_3344_5566_7788;

    /// Ids and what the real libraries' own hash functions, called in a process, gave for them: 2.21.5, then 2.27.5 and
    /// 2.32.3, which agree. The first two ids are plain; the third has bytes above 127, where a sign matters.
    fn ids() -> [([u8; 128], u64, u64); 3] {
        let count = std::array::from_fn(|at| at as u8);
        let wrap = std::array::from_fn(|at| (at * 37 + 200) as u8);
        [
            ([0x5a; 128], 0xfbf2_f21f_a214_3505, 0x3e97_385d_3fda_a372),
            (count, 0xbf47_c767_cbdf_3105, 0x6afe_1cc1_7717_e1f4),
            (wrap, 0x6d51_a6fa_7a62_0005, 0x130b_f80b_b2fc_3c2b),
        ]
    }

    #[test]
    fn an_id_hashes_as_in_the_real_libraries() {
        for (at, (id, djb2a, mixed)) in ids().into_iter().enumerate() {
            if at < 2 || cfg!(target_arch = "x86_64") {
                assert_eq!(of_unique_id(NcclVersion::new(2, 21, 5), &id), djb2a);
                assert_eq!(of_unique_id(NcclVersion::new(2, 25, 1), &id), djb2a);
            }
            for version in [(2, 26, 2), (2, 27, 5), (2, 32, 3)] {
                let version = NcclVersion::new(version.0, version.1, version.2);
                assert_eq!(of_unique_id(version, &id), mixed);
            }
        }
    }

    /// By the functions of the real libraries on what `ncclCommInitRankFunc` feeds them.
    #[test]
    fn children_hash_as_in_the_real_libraries() {
        let of = |major, minor, patch| of_split(NcclVersion::new(major, minor, patch), PARENT, 2, -3);
        assert_eq!(of(2, 21, 5), 0x8356_2d71_3316_8cb6);
        assert_eq!(of(2, 24, 3), 0x196a_61a0_b274_adc9);
        assert_eq!(of(2, 27, 5), 0x5f43_7e37_4994_2076);
        assert_eq!(of(2, 32, 3), 0x5f43_7e37_4994_2076);
        assert_eq!(combined(PARENT, 12), 0x0aba_7040_47ae_af68);
    }
}
