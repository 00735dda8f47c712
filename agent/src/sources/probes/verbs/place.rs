//! From an address in a process to a place in a file.
//!
//! The address is what the process says. A probe in the middle of an instruction breaks every process that runs the file, and
//! one on a busy function slows them. So it is taken only where a function of a provider's library starts.

use std::fs::File;
use std::io::{self, BufRead};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::super::elf::Elf;
use super::super::open::open_plain_file;
use super::super::symbols::SymbolError;
use crate::sources::procs::{LibraryId, Mapping, for_each_mapping};

/// Names of providers, as in `libmlx5-rdmav34.so` and `libmlx5.so.1`.
const PROVIDERS: [&str; 20] = [
    "bnxt_re",
    "cxgb4",
    "efa",
    "erdma",
    "hfi1verbs",
    "hns",
    "ionic",
    "ipathverbs",
    "irdma",
    "mana",
    "mlx4",
    "mlx5",
    "mthca",
    "ocrdma",
    "qedr",
    "rxe",
    "siw",
    "vmw_pvrdma",
    "xscale",
    "zxdh",
];

/// A place in a file that a process maps executable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct Place {
    pub(super) id: LibraryId,
    pub(in super::super) file_offset: u64,
    /// As the process names the file.
    pub(super) shown: String,
    pub(super) is_provider: bool,
    range: String,
    deleted: bool,
}

impl Place {
    /// Where the address leads; `None` when to no file or nothing executable.
    pub(in super::super) fn of(maps: impl BufRead, address: u64) -> io::Result<Option<Self>> {
        let mut found = None;
        for_each_mapping(maps, |mapping| {
            let place = (|| {
                let columns = mapping.columns()?;
                let (start, end) = columns.addresses()?;
                let inside = address.checked_sub(start).filter(|_| address < end)?;
                columns
                    .executable
                    .then(|| Self::new(&mapping, columns.file_offset.checked_add(inside)?))?
            })();
            match place {
                Some(place) => {
                    found = Some(place);
                    ControlFlow::Break(())
                }
                None => ControlFlow::Continue(()),
            }
        })?;
        Ok(found)
    }

    /// The code of each provider's library that is mapped, with the address at which its first byte lies.
    pub(super) fn of_providers(maps: impl BufRead, most: usize) -> io::Result<Vec<(Self, u64)>> {
        let mut found: Vec<(Self, u64)> = Vec::new();
        for_each_mapping(maps, |mapping| {
            if is_provider(mapping.name())
                && let Some(columns) = mapping.columns().filter(|columns| columns.executable)
                && let Some((start, _)) = columns.addresses()
                && let Some(place) = Self::new(&mapping, columns.file_offset)
            {
                found.push((place, start));
            }
            if found.len() == most {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        })?;
        Ok(found)
    }

    fn new(mapping: &Mapping<'_>, file_offset: u64) -> Option<Self> {
        let columns = mapping.columns()?;
        Some(Self {
            id: columns.id,
            file_offset,
            shown: mapping.path(),
            is_provider: is_provider(mapping.name()),
            range: columns.range.to_owned(),
            deleted: mapping.deleted(),
        })
    }

    /// Another place in the same file.
    pub(super) fn at(&self, file_offset: u64) -> Self {
        Self {
            file_offset,
            ..self.clone()
        }
    }

    /// Opens the file, by the path that the process shows or else by its mapping.
    pub(super) fn open(&self, tgid: u32) -> io::Result<File> {
        let process = PathBuf::from(format!("/proc/{tgid}"));
        if !self.deleted {
            let path = process.join("root").join(self.shown.trim_start_matches('/'));
            if let Ok(file) = open_plain_file(&path, self.id.inode) {
                return Ok(file);
            }
        }
        open_plain_file(
            &process.join("map_files").join(Path::new(&self.range)),
            self.id.inode,
        )
    }

    /// Whether a function starts there.
    pub(super) fn starts_function(&self, file: &File) -> Result<bool, SymbolError> {
        Elf::open(file)?.starts_function(self.file_offset)
    }
}

fn is_provider(name: &[u8]) -> bool {
    let Some(rest) = name.strip_prefix(b"lib") else {
        return false;
    };
    PROVIDERS.iter().any(|provider| {
        rest.strip_prefix(provider.as_bytes())
            .is_some_and(|rest| rest.starts_with(b"-rdmav") || rest.starts_with(b".so"))
    })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::FileExt as _;

    use super::*;

    const MAPS: &str = "\
7f0000000000-7f0000001000 r--p 00000000 fd:01 77 /usr/lib/libibverbs/libmlx5-rdmav34.so
7f0000001000-7f0000004000 r-xp 00002000 fd:01 77 /usr/lib/libibverbs/libmlx5-rdmav34.so
7f0000010000-7f0000011000 r-xp 00000000 00:00 0
7f0000020000-7f0000021000 r-xp 00000000 fd:01 78 /usr/lib/libc.so.6
7ffe00000000-7ffe00001000 r-xp 00000000 00:00 0                          [vdso]
";

    fn at(address: u64) -> Option<(u64, u64, bool)> {
        let place = Place::of(MAPS.as_bytes(), address).unwrap()?;
        Some((place.id.inode, place.file_offset, place.is_provider))
    }

    #[test]
    fn an_address_leads_to_a_place_in_a_file() {
        assert_eq!(at(0x7f00_0000_1000), Some((77, 0x2000, true)));
        assert_eq!(at(0x7f00_0000_3fff), Some((77, 0x4fff, true)));
        assert_eq!(at(0x7f00_0000_4000), None, "behind it");
        assert_eq!(at(0x7f00_0000_0fff), None, "not executable");
        assert_eq!(at(0x7f00_0001_0000), None, "no file");
        assert_eq!(at(0x7ffe_0000_0000), None, "the kernel's");
        assert_eq!(at(0x7f00_0002_0010), Some((78, 0x10, false)));
        assert_eq!(at(0), None);
    }

    #[test]
    fn finds_what_is_mapped_in_its_file() {
        let maps = "55d0a000-55d0c000 r--p 00000000 fe:00 12 /usr/bin/stallscope\n\
                    55d0c000-55d20000 r-xp 00001000 fe:00 12 /usr/bin/stallscope\n\
                    7ffd1000-7ffd3000 rw-p 00000000 00:00 0  [stack]\n";
        let at = |maps: &str, address| {
            Place::of(maps.as_bytes(), address)
                .unwrap()
                .map(|place| place.file_offset)
        };
        assert_eq!(at(maps, 0x55d0_c040), Some(0x1040));
        assert_eq!(at(maps, 0x55d2_0000), None);
        assert_eq!(at("nonsense\n1-2\n", 1), None);
    }

    #[inline(never)]
    fn somewhere(number: u64) -> u64 {
        std::hint::black_box(number) + 1
    }

    fn own_maps() -> io::BufReader<File> {
        io::BufReader::new(File::open("/proc/self/maps").unwrap())
    }

    #[test]
    fn the_start_of_a_function_is_told_from_its_inside() {
        let address = somewhere as fn(u64) -> u64 as usize as u64;
        let place = Place::of(own_maps(), address).unwrap().unwrap();
        let file = place.open(std::process::id()).unwrap();
        assert!(place.starts_function(&file).unwrap());
        for inside in 1..4 {
            let place = Place::of(own_maps(), address + inside).unwrap().unwrap();
            assert!(!place.starts_function(&file).unwrap(), "{inside} bytes in");
        }
        let nowhere = Place {
            file_offset: u64::MAX,
            ..place
        };
        assert!(!nowhere.starts_function(&file).unwrap());
    }

    /// Every byte of the headers is damaged once: an answer or an error, no panic.
    #[test]
    fn damaged_libraries_are_survived() {
        let address = somewhere as fn(u64) -> u64 as usize as u64;
        let place = Place::of(own_maps(), address).unwrap().unwrap();
        let mut copy = tempfile::tempfile().unwrap();
        io::copy(&mut File::open("/proc/self/exe").unwrap(), &mut copy).unwrap();
        for at in 0..1_024 {
            let mut old = [0];
            copy.read_exact_at(&mut old, at).unwrap();
            copy.write_all_at(&[old[0] ^ 0xff], at).unwrap();
            let _ = place.starts_function(&copy);
            copy.write_all_at(&old, at).unwrap();
        }
        assert!(place.starts_function(&copy).is_ok());
    }

    #[test]
    fn providers_are_known_by_name() {
        let is = |name: &str| is_provider(name.as_bytes());
        assert!(is("libmlx5-rdmav34.so") && is("libmlx5.so.1.24.44.0") && is("librxe-rdmav34.so"));
        assert!(
            !is("libc.so.6") && !is("libmlx5ish.so.1") && !is("mlx5-rdmav34.so") && !is("libibverbs.so.1")
        );
        let found = Place::of_providers(MAPS.as_bytes(), 8).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|(place, start)| (place.id.inode, place.file_offset, *start))
            .collect();
        assert_eq!(found, [(77, 0x2000, 0x7f00_0000_1000)]);
    }
}
