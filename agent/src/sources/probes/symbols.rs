//! Where functions lie in a library file.
//!
//! Library files come from processes that are traced, so they may be hostile or cut short: see [`super::elf`].

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use object::elf::{SHT_DYNSYM, SHT_SYMTAB};

use super::elf::Elf;

/// Bytes of machine code looked at to classify a first instruction.
const FIRST_BYTES: usize = 16;
/// Most functions of wanted names that are compared by version; a hostile file may repeat a name millions of times.
const MAX_VERSION_LOOKS: u32 = 256;

/// What the kernel does when a probe on this instruction is hit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FirstInstruction {
    /// The kernel emulates it: one trap, 300 ns and up.
    Emulated,
    /// The kernel executes it out of line and traps again: 900 ns and up.
    SingleStepped,
}

impl FirstInstruction {
    /// Cost of one hit on a common bare-metal host, ns (measured by others on kernels 5.15 to 6.8).
    #[must_use]
    pub const fn predicted_hit_ns(self) -> u64 {
        match self {
            Self::Emulated => 300,
            Self::SingleStepped => 900,
        }
    }

    /// Classifies x86-64 code by what `arch/x86/kernel/uprobes.c` emulates: `push` of a register, `nop`, and relative
    /// `call`, `jmp` and conditional jumps.
    #[must_use]
    pub fn of_x86_64(code: &[u8]) -> Self {
        let code = code.strip_prefix(&[0x66]).unwrap_or(code);
        let emulated = matches!(
            code,
            [0x50..=0x57 | 0x90 | 0xe8 | 0xe9 | 0xeb | 0x70..=0x7f, ..]
                | [0x41, 0x50..=0x57, ..]
                | [0x0f, 0x1f | 0x80..=0x8f, ..]
        );
        if emulated {
            Self::Emulated
        } else {
            Self::SingleStepped
        }
    }
}

/// A function found in a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Symbol {
    /// Offset of its first instruction in the file, bytes.
    pub file_offset: u64,
    /// What a probe on it costs.
    pub first: FirstInstruction,
}

/// The functions found in one file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Symbols {
    found: HashMap<&'static str, Symbol>,
}

/// Why a file cannot be searched.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SymbolError {
    /// Reading failed.
    #[error("the file cannot be read: {0}")]
    Read(Arc<io::Error>),
    /// It is not a 64-bit ELF file of this byte order.
    #[error("it is not a 64-bit ELF library")]
    NotElf,
    /// A part of it contradicts another, or lies outside of the file.
    #[error("it is cut short or damaged: {0}")]
    Damaged(&'static str),
    /// It is for another CPU.
    #[error("it holds code for another CPU (ELF machine {0})")]
    OtherMachine(u16),
    /// It says that it has more than any library.
    #[error("it claims {claimed} {what}, more than any library has (at most {most}); it is left alone")]
    TooLarge {
        /// Of what, with its unit.
        what: &'static str,
        /// How many it says it has.
        claimed: u64,
        /// How many are taken.
        most: u64,
    },
    /// It has no symbols at all.
    #[error("it has no symbol table; a stripped static library cannot be traced")]
    NoTable,
}

impl Symbols {
    /// Finds those of `wanted` that the file defines, in its dynamic symbols and, for those not there, in its full ones. Of
    /// several versions the default one is taken.
    ///
    /// # Errors
    /// See [`SymbolError`]; a name that is not there is no error.
    pub fn read(file: &File, wanted: &[&'static str]) -> Result<Self, SymbolError> {
        Self::parse(file, wanted)
    }

    fn parse(file: &impl FileExt, wanted: &[&'static str]) -> Result<Self, SymbolError> {
        let elf = Elf::open(file)?;
        let mut symbols = Self::default();
        let mut has_table = false;
        for kind in [SHT_DYNSYM, SHT_SYMTAB] {
            if symbols.found.len() == wanted.len() {
                break;
            }
            let Some(table) = elf.table(kind)? else { continue };
            has_table |= !table.is_empty();
            let places = elf.places(&table, wanted)?;
            let versions = if kind == SHT_DYNSYM { elf.versions()? } else { None };
            let mut chosen = Chosen::new(versions);
            elf.functions(&table, |function| {
                if let Some(&name) = places.get(&function.name)
                    && (!symbols.found.contains_key(name) || chosen.is_replaced(&elf, name, function.index))
                    && let Some((file_offset, code)) = elf.code_at::<FIRST_BYTES>(function.address)
                {
                    let first = classify(&code);
                    symbols.found.insert(name, Symbol { file_offset, first });
                    chosen.by_name.insert(name, function.index);
                }
            })?;
        }
        if has_table {
            Ok(symbols)
        } else {
            Err(SymbolError::NoTable)
        }
    }

    /// Functions as if a file had them.
    #[cfg(test)]
    pub(super) fn of(found: impl IntoIterator<Item = (&'static str, Symbol)>) -> Self {
        Self {
            found: found.into_iter().collect(),
        }
    }

    /// The function of this name.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Symbol> {
        self.found.get(name).copied()
    }

    /// How many were found.
    #[must_use]
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// Whether none was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }
}

/// Which of several functions of one name is taken: a library may keep old versions beside the one that programs are built
/// with today, and those call the new one.
struct Chosen {
    by_name: HashMap<&'static str, u64>,
    versions: Option<u64>,
    looks_left: u32,
}

impl Chosen {
    fn new(versions: Option<u64>) -> Self {
        Self {
            by_name: HashMap::new(),
            versions,
            looks_left: MAX_VERSION_LOOKS,
        }
    }

    fn is_replaced(&mut self, elf: &Elf<'_, impl FileExt>, name: &str, index: u64) -> bool {
        let (Some(versions), Some(&before)) = (self.versions, self.by_name.get(name)) else {
            return false;
        };
        if self.looks_left == 0 {
            return false;
        }
        self.looks_left -= 1;
        elf.is_outdated(versions, before) && !elf.is_outdated(versions, index)
    }
}

#[cfg(target_arch = "x86_64")]
fn classify(code: &[u8]) -> FirstInstruction {
    FirstInstruction::of_x86_64(code)
}

#[cfg(not(target_arch = "x86_64"))]
fn classify(_code: &[u8]) -> FirstInstruction {
    FirstInstruction::SingleStepped
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::cell::Cell;
    use std::io::Write as _;
    use std::time::{Duration, Instant};

    use object::elf::{PF_X, PT_LOAD};
    use proptest::prelude::*;

    use super::super::elf::MACHINE;
    use super::*;

    const WANTED: &[&str] = &["ncclAllReduce", "ncclReduce", "absent"];
    const CODE_AT: u64 = 0x200;
    const ADDRESS: u64 = 0x7000_0200;

    /// A section header's type, offset, size and linked section.
    struct Section(u32, u64, u64, u32);

    /// A library with two functions: code at `CODE_AT`, symbols and strings behind it.
    fn library(value: u64, name_at: u32) -> Vec<u8> {
        let strings = b"\0ncclAllReduce\0ncclReduce\0";
        let symbols = [
            (0u32, 0u8, 0u16, 0u64),
            (name_at, 0x12, 1, value),
            (15, 0x12, 1, ADDRESS + 8),
        ];
        let (symbols_at, strings_at, sections_at) = (0x300u64, 0x380u64, 0x400u64);
        let mut file = vec![0u8; 0x600];
        let mut put = |at: u64, bytes: &[u8]| {
            let at = usize::try_from(at).unwrap();
            file[at..at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, b"\x7fELF\x02\x01\x01");
        put(16, &3u16.to_le_bytes());
        put(18, &MACHINE.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(40, &sections_at.to_le_bytes());
        for (at, value) in [(52u64, 64u16), (54, 56), (56, 1), (58, 64), (60, 3), (62, 2)] {
            put(at, &value.to_le_bytes());
        }
        put(64, &PT_LOAD.to_le_bytes());
        put(68, &(PF_X | 4).to_le_bytes());
        for (at, value) in [(72u64, CODE_AT), (80, ADDRESS), (96, 0x100), (104, 0x100)] {
            put(at, &value.to_le_bytes());
        }
        put(CODE_AT, &[0x55; 8]);
        put(CODE_AT + 8, &[0x48, 0x8b, 0x05, 0, 0, 0, 0]);
        for (index, (name, info, section, value)) in (0u64..).zip(symbols) {
            put(symbols_at + 24 * index, &name.to_le_bytes());
            put(symbols_at + 24 * index + 4, &[info]);
            put(symbols_at + 24 * index + 6, &section.to_le_bytes());
            put(symbols_at + 24 * index + 8, &value.to_le_bytes());
        }
        put(strings_at, strings);
        let sections = [
            Section(0, 0, 0, 0),
            Section(SHT_DYNSYM, symbols_at, 24 * symbols.len() as u64, 2),
            Section(object::elf::SHT_STRTAB, strings_at, strings.len() as u64, 0),
        ];
        for (index, Section(kind, offset, size, link)) in (0u64..).zip(sections) {
            let at = sections_at + 64 * index;
            put(at + 4, &kind.to_le_bytes());
            put(at + 24, &offset.to_le_bytes());
            put(at + 32, &size.to_le_bytes());
            put(at + 40, &link.to_le_bytes());
            put(at + 56, &24u64.to_le_bytes());
        }
        file
    }

    /// A file in memory that knows the most bytes asked for at once.
    struct Memory<'bytes> {
        bytes: &'bytes [u8],
        largest_read: Cell<usize>,
    }

    impl FileExt for Memory<'_> {
        fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            self.largest_read.set(self.largest_read.get().max(buffer.len()));
            let from = usize::try_from(offset).map_or(self.bytes.len(), |at| at.min(self.bytes.len()));
            let count = buffer.len().min(self.bytes.len() - from);
            buffer[..count].copy_from_slice(&self.bytes[from..from + count]);
            Ok(count)
        }

        fn write_at(&self, _: &[u8], _: u64) -> io::Result<usize> {
            Err(io::ErrorKind::ReadOnlyFilesystem.into())
        }
    }

    fn parse(bytes: &[u8]) -> Result<Symbols, SymbolError> {
        let file = Memory {
            bytes,
            largest_read: Cell::new(0),
        };
        let symbols = Symbols::parse(&file, WANTED);
        assert!(file.largest_read.get() <= 64 << 10, "a piece at a time");
        symbols
    }

    /// As `library`, and sparse behind its tables, up to a length.
    fn sparse(bytes: &[u8], length: u64) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.set_len(length).unwrap();
        file
    }

    #[test]
    fn functions_are_found_at_their_file_offset() {
        let symbols = parse(&library(ADDRESS, 1)).unwrap();
        assert_eq!(symbols.len(), 2);
        assert_eq!(symbols.get("ncclAllReduce").unwrap().file_offset, CODE_AT);
        assert_eq!(symbols.get("ncclReduce").unwrap().file_offset, CODE_AT + 8);
        assert_eq!(symbols.get("absent"), None);
        #[cfg(target_arch = "x86_64")]
        {
            assert_eq!(
                symbols.get("ncclAllReduce").unwrap().first,
                FirstInstruction::Emulated
            );
            assert_eq!(
                symbols.get("ncclReduce").unwrap().first,
                FirstInstruction::SingleStepped
            );
        }
    }

    #[test]
    fn the_same_is_found_through_a_file() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&library(ADDRESS, 1)).unwrap();
        assert_eq!(Symbols::read(&file, WANTED).unwrap().len(), 2);
    }

    #[test]
    fn a_symbol_outside_of_the_code_is_not_found() {
        for address in [0, ADDRESS - 1, ADDRESS + 0x100, u64::MAX] {
            assert_eq!(parse(&library(address, 1)).unwrap().get("ncclAllReduce"), None);
        }
        assert_eq!(
            parse(&library(ADDRESS, u32::MAX)).unwrap().get("ncclAllReduce"),
            None
        );
    }

    #[test]
    fn what_is_no_library_is_named() {
        assert!(matches!(parse(b""), Err(SymbolError::NotElf)));
        assert!(matches!(parse(b"#!/bin/sh\n"), Err(SymbolError::NotElf)));
        let mut other = library(ADDRESS, 1);
        other[18] = 0xff;
        assert!(matches!(parse(&other), Err(SymbolError::OtherMachine(_))));
        let mut stripped = library(ADDRESS, 1);
        stripped[0x400 + 64 + 4] = 1;
        assert!(matches!(parse(&stripped), Err(SymbolError::NoTable)));
    }

    #[test]
    fn a_table_of_absurd_size_is_refused_before_it_is_read() {
        let mut huge = library(ADDRESS, 1);
        huge[0x400 + 64 + 32..0x400 + 64 + 40].copy_from_slice(&(1u64 << 40).to_le_bytes());
        assert!(matches!(parse(&huge), Err(SymbolError::TooLarge { .. })));
    }

    /// The first section tells how many there are when the header says none.
    #[test]
    fn a_sparse_file_of_a_billion_sections_is_refused_before_they_are_read() {
        let mut library = library(ADDRESS, 1);
        library[60..62].fill(0);
        library[0x400 + 32..0x400 + 40].copy_from_slice(&1_000_000_000u64.to_le_bytes());
        let file = sparse(&library, 64_000_001_024);
        let start = Instant::now();
        let refused = Symbols::read(&file, WANTED);
        assert!(
            matches!(
                refused,
                Err(SymbolError::TooLarge {
                    claimed: 1_000_000_000,
                    ..
                })
            ),
            "{refused:?}"
        );
        assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    }

    #[test]
    fn a_sparse_table_as_large_as_half_the_memory_allowed_is_refused() {
        let mut library = library(ADDRESS, 1);
        library[0x400 + 64 + 32..0x400 + 64 + 40].copy_from_slice(&(100u64 << 20).to_le_bytes());
        let refused = Symbols::read(&sparse(&library, 1 << 30), WANTED);
        assert!(
            matches!(refused, Err(SymbolError::TooLarge { .. })),
            "{refused:?}"
        );
    }

    /// 60 MiB of names between the two that count: they are streamed, and the last one lies across two pieces.
    #[test]
    fn names_far_apart_are_found_a_piece_at_a_time() {
        let mut library = library(ADDRESS, 1);
        let (names_at, names_bytes) = (0x1000usize, 60usize << 20);
        library.resize(names_at + names_bytes, b'x');
        library[names_at] = 0;
        library[names_at + 1..][..14].copy_from_slice(b"ncclAllReduce\0");
        let across = (40 << 20) - 5;
        library[names_at + across..][..11].copy_from_slice(b"ncclReduce\0");
        library[0x400 + 128 + 24..][..8].copy_from_slice(&(names_at as u64).to_le_bytes());
        library[0x400 + 128 + 32..][..8].copy_from_slice(&(names_bytes as u64).to_le_bytes());
        library[0x300 + 48..][..4].copy_from_slice(&u32::try_from(across).unwrap().to_le_bytes());
        let symbols = parse(&library).unwrap();
        assert_eq!(symbols.get("ncclAllReduce").unwrap().file_offset, CODE_AT);
        assert_eq!(symbols.get("ncclReduce").unwrap().file_offset, CODE_AT + 8);
    }

    #[test]
    fn a_name_that_is_only_the_end_or_the_start_of_another_is_not_that_other() {
        let whole = library(ADDRESS, 3);
        assert_eq!(parse(&whole).unwrap().get("ncclAllReduce"), None);
        let mut longer = library(ADDRESS, 1);
        longer[0x380 + 14] = b'x';
        assert_eq!(parse(&longer).unwrap().get("ncclAllReduce"), None);
    }

    #[test]
    fn a_file_cut_at_any_byte_gives_an_error_or_fewer_symbols() {
        let whole = library(ADDRESS, 1);
        let sections_end = 0x400 + 3 * 64;
        for length in 0..whole.len() {
            let result = parse(&whole[..length]);
            assert_eq!(
                result.is_ok(),
                length >= sections_end,
                "cut at {length}: {result:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn damaged_files_never_panic(changes in prop::collection::vec((0usize..0x600, any::<u8>()), 1..40)) {
            let mut file = library(ADDRESS, 1);
            for (at, byte) in changes {
                file[at] = byte;
            }
            if let Ok(symbols) = parse(&file) {
                for name in WANTED {
                    prop_assert!(symbols.get(name).is_none_or(|symbol| symbol.file_offset < 0x600));
                }
            }
        }
    }
}
