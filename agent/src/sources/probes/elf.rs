//! The parts of an ELF library that tell where its functions lie, read piece by piece.
//!
//! The file may be hostile, and sparse: a few bytes on disk can claim tables of any size. So a table is refused by its
//! size before it is read, and no allocation is larger than a piece, whatever the file says.

use std::cmp::Ordering;
use std::collections::HashMap;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use object::elf::{
    ELFCLASS64, ELFDATA2LSB, ELFMAG, EV_CURRENT, PF_X, PT_GNU_EH_FRAME, PT_LOAD, SHN_UNDEF, SHT_GNU_VERSYM,
    STT_FUNC, VERSYM_HIDDEN,
};

use super::symbols::SymbolError;

/// Bytes read, and held, at a time.
const PIECE_BYTES: usize = 64 << 10;
/// Most sections and segments looked at; libraries have under a hundred, and a header can count to this.
const MAX_HEADERS: u64 = 65_535;
/// Most segments of code kept; one is usual.
const MAX_CODE_SEGMENTS: usize = 64;
/// Most bytes of a symbol table and its names together; the largest probed library has under 5 MiB.
const MAX_TABLE_BYTES: u64 = 64 << 20;
/// Most places at which the wanted names may lie; each lies at one or two.
const MAX_NAMES: usize = 4096;
/// How the list for unwinding starts when it is what every linker writes: version 1, a relative pointer, a count of 4 bytes,
/// and entries of two numbers of 4 bytes relative to the list (LSB, "Exception Frames").
const UNWINDING: [u8; 4] = [1, 0x1b, 0x03, 0x3b];
const UNWINDING_BYTES: usize = 12;
const UNWINDING_ENTRY_BYTES: u64 = 8;
/// A wanted name is looked up by its last bytes first.
const KEY_BYTES: usize = 4;

const HEADER_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
const SECTION_BYTES: usize = 64;
const SYMBOL_BYTES: usize = 24;

#[cfg(target_arch = "x86_64")]
pub(super) const MACHINE: u16 = object::elf::EM_X86_64;
#[cfg(target_arch = "aarch64")]
pub(super) const MACHINE: u16 = object::elf::EM_AARCH64;

/// An ELF library of this machine.
pub(super) struct Elf<'file, F> {
    file: &'file F,
    code: Vec<CodeSegment>,
    /// Where unwinders look up functions: not executed, but of the same form.
    unwinding: Option<CodeSegment>,
    sections_at: u64,
    sections: u64,
}

/// Addresses that are executed, and where the file holds them.
struct CodeSegment {
    address: u64,
    file_offset: u64,
    file_bytes: u64,
}

/// A symbol table and its names; sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Table {
    at: u64,
    bytes: u64,
    names_at: u64,
    names_bytes: u64,
}

impl Table {
    pub(super) const fn is_empty(&self) -> bool {
        self.bytes < SYMBOL_BYTES as u64
    }
}

/// A function that the file defines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Function {
    /// Offset of its name among the table's names.
    pub(super) name: u32,
    pub(super) address: u64,
    /// Its place in the table.
    pub(super) index: u64,
}

struct Section {
    kind: u32,
    at: u64,
    bytes: u64,
    link: u32,
}

impl<'file, F: FileExt> Elf<'file, F> {
    pub(super) fn open(file: &'file F) -> Result<Self, SymbolError> {
        let mut header = [0; HEADER_BYTES];
        file.read_exact_at(&mut header, 0)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => SymbolError::NotElf,
                _ => SymbolError::Read(Arc::new(error)),
            })?;
        if header[..4] != ELFMAG || header[4..7] != [ELFCLASS64, ELFDATA2LSB, EV_CURRENT] {
            return Err(SymbolError::NotElf);
        }
        let machine = u16::from_le_bytes(field(&header, 18));
        if machine != MACHINE {
            return Err(SymbolError::OtherMachine(machine));
        }
        let mut elf = Self {
            file,
            code: Vec::new(),
            unwinding: None,
            sections_at: u64::from_le_bytes(field(&header, 40)),
            sections: u64::from(u16::from_le_bytes(field(&header, 60))),
        };
        elf.find_code(&header)?;
        elf.count_sections(&header)?;
        Ok(elf)
    }

    fn find_code(&mut self, header: &[u8; HEADER_BYTES]) -> Result<(), SymbolError> {
        let at = u64::from_le_bytes(field(header, 32));
        let count = u64::from(u16::from_le_bytes(field(header, 56)));
        if count > 0 && usize::from(u16::from_le_bytes(field(header, 54))) != SEGMENT_BYTES {
            return Err(SymbolError::Damaged(
                "its segments are described at another length",
            ));
        }
        let (mut code, mut unwinding) = (Vec::new(), None);
        self.entries::<SEGMENT_BYTES>(at, count, |entry| {
            let kind = u32::from_le_bytes(field(entry, 0));
            let is_code = kind == PT_LOAD && u32::from_le_bytes(field(entry, 4)) & PF_X != 0;
            let segment = CodeSegment {
                address: u64::from_le_bytes(field(entry, 16)),
                file_offset: u64::from_le_bytes(field(entry, 8)),
                file_bytes: u64::from_le_bytes(field(entry, 32)),
            };
            if is_code && code.len() < MAX_CODE_SEGMENTS {
                code.push(segment);
            } else if kind == PT_GNU_EH_FRAME {
                unwinding = Some(segment);
            }
        })?;
        self.code = code;
        self.unwinding = unwinding;
        Ok(())
    }

    fn count_sections(&mut self, header: &[u8; HEADER_BYTES]) -> Result<(), SymbolError> {
        if self.sections_at == 0 {
            self.sections = 0;
            return Ok(());
        }
        if usize::from(u16::from_le_bytes(field(header, 58))) != SECTION_BYTES {
            return Err(SymbolError::Damaged(
                "its sections are described at another length",
            ));
        }
        if self.sections == 0 {
            // More than the header can count: the first section's size tells how many.
            self.sections = self.section(0)?.bytes;
        }
        if self.sections > MAX_HEADERS {
            return Err(SymbolError::TooLarge {
                what: "sections",
                claimed: self.sections,
                most: MAX_HEADERS,
            });
        }
        Ok(())
    }

    fn section(&self, index: u64) -> Result<Section, SymbolError> {
        let at = (index * SECTION_BYTES as u64)
            .checked_add(self.sections_at)
            .ok_or(OUTSIDE)?;
        let mut entry = [0; SECTION_BYTES];
        self.read(at, &mut entry)?;
        Ok(section(&entry))
    }

    /// The first table of this kind with its names, when there is one.
    pub(super) fn table(&self, kind: u32) -> Result<Option<Table>, SymbolError> {
        let mut found = None;
        self.entries::<SECTION_BYTES>(self.sections_at, self.sections, |entry| {
            let section = section(entry);
            if section.kind == kind && found.is_none() {
                found = Some(section);
            }
        })?;
        let Some(symbols) = found else { return Ok(None) };
        if u64::from(symbols.link) >= self.sections {
            return Err(SymbolError::Damaged("a symbol table has no names"));
        }
        let names = self.section(u64::from(symbols.link))?;
        let bytes = symbols.bytes.saturating_add(names.bytes);
        if bytes > MAX_TABLE_BYTES {
            return Err(SymbolError::TooLarge {
                what: "bytes of symbols",
                claimed: bytes,
                most: MAX_TABLE_BYTES,
            });
        }
        Ok(Some(Table {
            at: symbols.at,
            bytes: symbols.bytes,
            names_at: names.at,
            names_bytes: names.bytes,
        }))
    }

    /// Where among the table's names those wanted lie; a longer name's end is a place too, linkers share them. A name of
    /// under four bytes is not found.
    pub(super) fn places(
        &self,
        table: &Table,
        wanted: &[&'static str],
    ) -> Result<HashMap<u32, &'static str>, SymbolError> {
        let keys: Vec<_> = wanted.iter().map(|name| key(name.as_bytes())).collect();
        let longest = wanted.iter().map(|name| name.len()).max().unwrap_or(0);
        let mut places = HashMap::new();
        let mut window: Vec<u8> = Vec::with_capacity(longest + PIECE_BYTES);
        let mut done = 0;
        while done < table.names_bytes {
            // The end of what was read stays: a name may lie across two pieces.
            window.drain(..window.len().saturating_sub(longest));
            let kept = window.len();
            let count = piece(table.names_bytes - done);
            window.resize(kept + count, 0);
            let at = table.names_at.checked_add(done).ok_or(OUTSIDE)?;
            self.read(at, &mut window[kept..])?;
            for end in memchr::memchr_iter(0, &window[kept..]) {
                let before = &window[..kept + end];
                let this = key(before);
                for (name, _) in wanted
                    .iter()
                    .zip(&keys)
                    .filter(|&(_, key)| this.is_some() && *key == this)
                {
                    let place = (done + end as u64).checked_sub(name.len() as u64);
                    if before.ends_with(name.as_bytes())
                        && let Some(Ok(place)) = place.map(u32::try_from)
                    {
                        places.insert(place, *name);
                    }
                }
                if places.len() > MAX_NAMES {
                    return Err(SymbolError::Damaged("it repeats the names of its functions"));
                }
            }
            done += count as u64;
        }
        Ok(places)
    }

    /// Calls `each` with every function that the table defines.
    pub(super) fn functions(&self, table: &Table, mut each: impl FnMut(Function)) -> Result<(), SymbolError> {
        let count = table.bytes / SYMBOL_BYTES as u64;
        let mut next = 0;
        self.entries::<SYMBOL_BYTES>(table.at, count, |entry| {
            let index = next;
            next += 1;
            // An indirect function is of another type: its symbol is its resolver, which sees nothing of the calls.
            if entry[4] & 0xf == STT_FUNC && u16::from_le_bytes(field(entry, 6)) != SHN_UNDEF {
                each(Function {
                    name: u32::from_le_bytes(field(entry, 0)),
                    address: u64::from_le_bytes(field(entry, 8)),
                    index,
                });
            }
        })
    }

    /// Where the versions of the dynamic symbols lie in the file, when they have any.
    pub(super) fn versions(&self) -> Result<Option<u64>, SymbolError> {
        let mut at = None;
        self.entries::<SECTION_BYTES>(self.sections_at, self.sections, |entry| {
            let section = section(entry);
            if section.kind == SHT_GNU_VERSYM && at.is_none() {
                at = Some(section.at);
            }
        })?;
        Ok(at)
    }

    /// Whether the dynamic symbol is of a version that only programs get which were built with that version.
    pub(super) fn is_outdated(&self, versions: u64, index: u64) -> bool {
        let mut version = [0; 2];
        let at = index
            .checked_mul(2)
            .and_then(|inside| inside.checked_add(versions));
        at.is_some_and(|at| self.read(at, &mut version).is_ok())
            && u16::from_le_bytes(version) & VERSYM_HIDDEN != 0
    }

    /// Whether a function starts at this offset in the file, by the sorted list that unwinders use. It is there in stripped
    /// files too.
    pub(super) fn starts_function(&self, file_offset: u64) -> Result<bool, SymbolError> {
        const NO_LIST: SymbolError = SymbolError::Damaged("it has no list of its functions for unwinding");
        let list = self.unwinding.as_ref().ok_or(NO_LIST)?;
        let mut header = [0; UNWINDING_BYTES];
        self.read(list.file_offset, &mut header)?;
        if header[..4] != UNWINDING {
            return Err(NO_LIST);
        }
        let Some(wanted) = self.address_of(file_offset) else {
            return Ok(false);
        };
        let fits = list.file_bytes.saturating_sub(UNWINDING_BYTES as u64) / UNWINDING_ENTRY_BYTES;
        let (mut low, mut high) = (0, u64::from(u32::from_le_bytes(field(&header, 8))).min(fits));
        while low < high {
            let middle = low + (high - low) / 2;
            let mut start = [0; 4];
            let at = (UNWINDING_BYTES as u64 + middle * UNWINDING_ENTRY_BYTES).checked_add(list.file_offset);
            self.read(at.ok_or(OUTSIDE)?, &mut start)?;
            let start = list
                .address
                .wrapping_add_signed(i64::from(i32::from_le_bytes(start)));
            match start.cmp(&wanted) {
                Ordering::Equal => return Ok(true),
                Ordering::Less => low = middle + 1,
                Ordering::Greater => high = middle,
            }
        }
        Ok(false)
    }

    fn address_of(&self, file_offset: u64) -> Option<u64> {
        self.code.iter().find_map(|segment| {
            let inside = file_offset.checked_sub(segment.file_offset)?;
            (inside < segment.file_bytes).then(|| segment.address.wrapping_add(inside))
        })
    }

    /// The file offset of an address and the code there, if an executable segment of the file holds it.
    pub(super) fn code_at<const N: usize>(&self, address: u64) -> Option<(u64, [u8; N])> {
        let segment = self.code.iter().find(|segment| {
            address
                .checked_sub(segment.address)
                .is_some_and(|inside| inside < segment.file_bytes)
        })?;
        let offset = (address - segment.address).checked_add(segment.file_offset)?;
        let mut code = [0; N];
        self.file.read_exact_at(&mut code, offset).ok()?;
        Some((offset, code))
    }

    /// Calls `each` with the bytes of every entry of a list.
    fn entries<const N: usize>(
        &self,
        at: u64,
        count: u64,
        mut each: impl FnMut(&[u8; N]),
    ) -> Result<(), SymbolError> {
        let per_piece = PIECE_BYTES / N;
        let mut buffer = vec![0; per_piece * N];
        let mut done = 0;
        while done < count {
            let now = per_piece.min(usize::try_from(count - done).unwrap_or(per_piece));
            let offset = done
                .checked_mul(N as u64)
                .and_then(|from_start| at.checked_add(from_start))
                .ok_or(OUTSIDE)?;
            let bytes = &mut buffer[..now * N];
            self.read(offset, bytes)?;
            let (entries, _) = bytes.as_chunks::<N>();
            for entry in entries {
                each(entry);
            }
            done += now as u64;
        }
        Ok(())
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> Result<(), SymbolError> {
        self.file
            .read_exact_at(bytes, at)
            .map_err(|error| match error.kind() {
                // What lies behind the largest offset there can be is refused as an invalid argument.
                io::ErrorKind::UnexpectedEof | io::ErrorKind::InvalidInput => OUTSIDE,
                _ => SymbolError::Read(Arc::new(error)),
            })
    }
}

const OUTSIDE: SymbolError = SymbolError::Damaged("a part of it lies behind its end");

fn section(entry: &[u8; SECTION_BYTES]) -> Section {
    Section {
        kind: u32::from_le_bytes(field(entry, 4)),
        at: u64::from_le_bytes(field(entry, 24)),
        bytes: u64::from_le_bytes(field(entry, 32)),
        link: u32::from_le_bytes(field(entry, 40)),
    }
}

/// How much of what is left is read next, bytes.
fn piece(left: u64) -> usize {
    usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES))
}

fn key(name: &[u8]) -> Option<[u8; KEY_BYTES]> {
    name.last_chunk::<KEY_BYTES>().copied()
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut field = [0; N];
    field.copy_from_slice(&bytes[at..at + N]);
    field
}
