//! Where functions lie in a library file.
//!
//! Library files come from processes that are traced, so they may be hostile or cut short: every size is bounded
//! before anything is read, and every inconsistency is an error with a name.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use object::elf::{FileHeader64, PF_X, PT_LOAD, SHN_UNDEF, SHT_DYNSYM, SHT_SYMTAB, STT_FUNC, STT_GNU_IFUNC};
use object::read::elf::{FileHeader as _, ProgramHeader as _, SectionHeader as _, Sym as _};
use object::{Endianness, ReadCache, ReadRef};

/// Symbols that one table may hold; the largest library met (a static libtorch) holds under two million.
const MAX_SYMBOLS: usize = 8 << 20;
/// Bytes that the symbol and string tables of one file may take together.
const MAX_TABLE_BYTES: u64 = 1 << 30;
/// Bytes of machine code looked at to classify a first instruction.
const FIRST_BYTES: u64 = 16;

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
#[derive(Debug, thiserror::Error)]
pub enum SymbolError {
    /// Reading failed.
    #[error("the file cannot be read: {0}")]
    Read(#[from] io::Error),
    /// It is not a 64-bit ELF file of this byte order.
    #[error("it is not a 64-bit ELF library")]
    NotElf,
    /// A part of it contradicts another, or lies outside of the file.
    #[error("it is cut short or damaged: {0}")]
    Damaged(object::read::Error),
    /// It is for another CPU.
    #[error("it holds code for another CPU (ELF machine {0})")]
    OtherMachine(u16),
    /// It has more symbols than any library.
    #[error(
        "its symbol tables are larger than any library's ({symbols} symbols, {bytes} bytes); it is left alone"
    )]
    TooLarge {
        /// Symbols.
        symbols: u64,
        /// Bytes.
        bytes: u64,
    },
    /// It has no symbols at all.
    #[error("it has no symbol table; a stripped static library cannot be traced")]
    NoTable,
}

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = object::elf::EM_X86_64;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = object::elf::EM_AARCH64;

type Elf = FileHeader64<Endianness>;
type Segments<'data> = &'data [object::elf::ProgramHeader64<Endianness>];

impl Symbols {
    /// Finds those of `wanted` that the file defines, in its dynamic symbols and, for those not there, in its full ones.
    ///
    /// # Errors
    /// See [`SymbolError`]; a name that is not there is no error.
    pub fn read(file: &File, wanted: &[&'static str]) -> Result<Self, SymbolError> {
        file.metadata()?;
        let cache = ReadCache::new(file);
        Self::parse(&cache, wanted)
    }

    fn parse<'data, R: ReadRef<'data>>(data: R, wanted: &[&'static str]) -> Result<Self, SymbolError> {
        let header = Elf::parse(data).map_err(|_| SymbolError::NotElf)?;
        let endian = header.endian().map_err(|_| SymbolError::NotElf)?;
        if !header.is_class_64() {
            return Err(SymbolError::NotElf);
        }
        let machine = header.e_machine(endian);
        if machine != MACHINE {
            return Err(SymbolError::OtherMachine(machine));
        }
        let segments = header
            .program_headers(endian, data)
            .map_err(SymbolError::Damaged)?;
        let sections = header.sections(endian, data).map_err(SymbolError::Damaged)?;
        check_size(endian, sections.iter())?;
        let mut symbols = Self::default();
        let mut has_table = false;
        for kind in [SHT_DYNSYM, SHT_SYMTAB] {
            if symbols.found.len() == wanted.len() {
                break;
            }
            let table = sections
                .symbols(endian, data, kind)
                .map_err(SymbolError::Damaged)?;
            has_table |= !table.is_empty();
            for symbol in table.iter() {
                if !is_function(symbol.st_type()) || symbol.st_shndx(endian) == SHN_UNDEF {
                    continue;
                }
                let Ok(name) = table.symbol_name(endian, symbol) else {
                    continue;
                };
                let Some(name) = wanted.iter().find(|wanted| wanted.as_bytes() == name) else {
                    continue;
                };
                if let Some(found) = locate(endian, data, segments, symbol.st_value(endian)) {
                    symbols.found.entry(name).or_insert(found);
                }
            }
        }
        if has_table {
            Ok(symbols)
        } else {
            Err(SymbolError::NoTable)
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

/// An indirect function's symbol is its resolver: a probe there would see nothing of the calls.
fn is_function(kind: u8) -> bool {
    kind == STT_FUNC && kind != STT_GNU_IFUNC
}

fn check_size<'a>(
    endian: Endianness,
    sections: impl Iterator<Item = &'a object::elf::SectionHeader64<Endianness>>,
) -> Result<(), SymbolError> {
    let (mut symbols, mut bytes) = (0u64, 0u64);
    for section in sections {
        let kind = section.sh_type(endian);
        if kind == SHT_DYNSYM || kind == SHT_SYMTAB || kind == object::elf::SHT_STRTAB {
            let size = section.sh_size(endian);
            bytes = bytes.saturating_add(size);
            if kind != object::elf::SHT_STRTAB {
                symbols = symbols.saturating_add(size / 24);
            }
        }
    }
    if symbols > MAX_SYMBOLS as u64 || bytes > MAX_TABLE_BYTES {
        return Err(SymbolError::TooLarge { symbols, bytes });
    }
    Ok(())
}

/// The file offset of an address, if an executable segment of the file holds it.
fn locate<'data, R: ReadRef<'data>>(
    endian: Endianness,
    data: R,
    segments: Segments<'_>,
    address: u64,
) -> Option<Symbol> {
    let segment = segments.iter().find(|segment| {
        segment.p_type(endian) == PT_LOAD
            && segment.p_flags(endian) & PF_X != 0
            && address
                .checked_sub(segment.p_vaddr(endian))
                .is_some_and(|inside| inside < segment.p_filesz(endian))
    })?;
    let file_offset = (address - segment.p_vaddr(endian)).checked_add(segment.p_offset(endian))?;
    let code = data.read_bytes_at(file_offset, FIRST_BYTES).ok()?;
    Some(Symbol {
        file_offset,
        first: classify(code),
    })
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

    use std::io::Write as _;

    use proptest::prelude::*;

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

    fn parse(file: &[u8]) -> Result<Symbols, SymbolError> {
        Symbols::parse(file, WANTED)
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
