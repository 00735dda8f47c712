//! Where a communicator holds its identity.

/// What a communicator starts with (`NCCL_MAGIC`, src/include/comm.h).
pub const MAGIC: u64 = 0x0280_0280_0280_0280;

/// A larger offset is none of a communicator's.
const LARGEST: u32 = 16 << 20;

/// Offsets in the library's `ncclComm`. From 2.18 to 2.32 its hash (64 bits), rank, number of ranks and device (32 bits each)
/// follow each other; where they begin moves with every version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CommLayout {
    /// Offset of the rank, bytes; the hash lies in the 8 bytes before.
    pub rank: u32,
}

impl CommLayout {
    /// Derives it from the machine code of `ncclCommUserRank`, `ncclCommCount` and `ncclCommCuDevice`, in this order: each
    /// loads its field from the communicator. `None` unless exactly one run of three fields fits all of them.
    #[must_use]
    pub fn derive(accessors: [&[u8]; 3]) -> Option<Self> {
        let [ranks, counts, devices] = accessors.map(loads);
        let mut fitting = ranks
            .into_iter()
            .filter(|rank| *rank >= 8 && counts.contains(&(rank + 4)) && devices.contains(&(rank + 8)));
        let rank = fitting.next()?;
        fitting.all(|other| other == rank).then_some(Self { rank })
    }
}

fn loads(code: &[u8]) -> Vec<u32> {
    if cfg!(target_arch = "aarch64") {
        loads_aarch64(code)
    } else {
        loads_x86_64(code)
    }
}

/// Offsets of every `mov r32, [register + offset]` with a 32-bit offset, wherever one may begin.
fn loads_x86_64(code: &[u8]) -> Vec<u32> {
    (0..code.len())
        .filter_map(|at| {
            let [0x8b, modrm, rest @ ..] = code.get(at..)? else {
                return None;
            };
            // Mode 2: a register and a 32-bit offset; register 4 takes another byte, of which only a plain base is wanted.
            let offset = match (modrm >> 6, modrm & 7) {
                (2, 4) if rest.first()? & 0x38 == 0x20 => rest.get(1..5)?,
                (2, 0..=3 | 5..=7) => rest.get(..4)?,
                _ => return None,
            };
            Some(u32::from_le_bytes(offset.try_into().ok()?))
        })
        .filter(|offset| offset.is_multiple_of(4) && *offset < LARGEST)
        .collect()
}

/// Offsets that the code can form: of `ldr wT, [xN, #offset]`, alone or after `add xN, xM, #high, lsl #12` or
/// `mov wN, #low; movk wN, #high, lsl #16` with a register load.
fn loads_aarch64(code: &[u8]) -> Vec<u32> {
    let words: Vec<u32> = code
        .as_chunks::<4>()
        .0
        .iter()
        .map(|word| u32::from_le_bytes(*word))
        .collect();
    let lows = words
        .iter()
        .filter(|word| **word & 0xffc0_0000 == 0xb940_0000)
        .map(|word| (word >> 10 & 0xfff) * 4);
    let highs: Vec<u32> = words
        .iter()
        .filter(|word| **word & 0xffc0_0000 == 0x9140_0000)
        .map(|word| (word >> 10 & 0xfff) << 12)
        .chain([0])
        .collect();
    let mut found: Vec<u32> = lows
        .flat_map(|low| highs.iter().map(move |high| high + low))
        .collect();
    found.extend(words.iter().enumerate().filter_map(|(at, word)| {
        if word & 0xffe0_0000 != 0x5280_0000 {
            return None;
        }
        let upper = words[at + 1..]
            .iter()
            .find(|next| **next & 0xffe0_001f == 0x72a0_0000 | (word & 0x1f))?;
        Some((upper >> 5 & 0xffff) << 16 | (word >> 5 & 0xffff))
    }));
    found.retain(|offset| offset.is_multiple_of(4) && *offset < LARGEST);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `mov eax, [r12 + offset]`, then `mov [r14], eax`, among other code.
    fn accessor(offset: u32) -> Vec<u8> {
        let mut code = vec![0x55, 0x48, 0x89, 0xe5, 0x48, 0x8b, 0x05, 0xcb, 0x71, 0x76, 0x0e];
        code.extend([0x41, 0x8b, 0x84, 0x24]);
        code.extend(offset.to_le_bytes());
        code.extend([0x41, 0x89, 0x06, 0xc3]);
        code
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn three_fields_in_a_row_are_the_identity() {
        let code = [accessor(0x1044b8), accessor(0x1044bc), accessor(0x1044c0)];
        let derive = |order: [usize; 3]| CommLayout::derive(order.map(|at| code[at].as_slice()));
        assert_eq!(derive([0, 1, 2]), Some(CommLayout { rank: 0x1044b8 }));
        assert_eq!(derive([1, 0, 2]), None);
        assert_eq!(derive([0, 1, 1]), None);
        assert_eq!(CommLayout::derive([&[], &[], &[]]), None);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn two_places_that_fit_are_none() {
        let both = |a: u32, b: u32| [accessor(a), accessor(b)].concat();
        let code = [both(0x100, 0x200), both(0x104, 0x204), both(0x108, 0x208)];
        assert_eq!(CommLayout::derive([0, 1, 2].map(|at| code[at].as_slice())), None);
    }

    #[test]
    fn on_aarch64_an_offset_may_come_in_two_parts() {
        let bytes = |words: &[u32]| -> Vec<u8> { words.iter().flat_map(|word| word.to_le_bytes()).collect() };
        // add x8, x19, #0x104, lsl #12; ldr w9, [x8, #0x4b8]
        assert!(loads_aarch64(&bytes(&[0x9144_1268, 0xb944_b909])).contains(&0x10_44b8));
        // mov w8, #0x44b8; movk w8, #0x10, lsl #16; ldr w9, [x19, x8]
        assert!(loads_aarch64(&bytes(&[0x5288_9708, 0x72a0_0208, 0xb868_6a69])).contains(&0x10_44b8));
    }

    proptest::proptest! {
        #[test]
        fn no_code_upsets_it(code in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _ = (CommLayout::derive([&code, &code, &code]), loads_aarch64(&code), loads_x86_64(&code));
        }
    }
}
