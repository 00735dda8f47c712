//! What a process maps, and which of that are probed libraries: `/proc/PID/maps`.

use std::io::BufRead;
use std::ops::ControlFlow;

use super::{LibraryId, LibraryKind};

/// Longest line considered: a path has at most 4096 bytes, the columns before it under 100. The rest is skipped.
const LINE_BYTES: usize = 8192;
/// Most lines read of one process: the kernel's default `vm.max_map_count` is 65530.
const MAX_LINES: usize = 1 << 18;
/// Most probed libraries of one process: one or two are usual, and each costs some hundred probes and descriptors.
const MAX_LIBRARIES: usize = 16;
const DELETED: &[u8] = b" (deleted)";

/// A probed library as a process maps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MappedLibrary {
    pub(super) id: LibraryId,
    pub(super) kind: LibraryKind,
    /// As maps shows it, without ` (deleted)`.
    pub(super) path: String,
    pub(super) deleted: bool,
    /// `start-end`, the name in `map_files`.
    pub(super) range: String,
}

/// One line about a file, `start-end perms offset major:minor inode path`, proc_pid_maps(5).
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapping<'line> {
    columns: &'line [u8],
    path: &'line [u8],
    deleted: bool,
}

/// The columns before the path.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Columns<'line> {
    /// `start-end`, the name in `map_files`.
    pub(crate) range: &'line str,
    pub(crate) executable: bool,
    /// Of the first byte in the file.
    pub(crate) file_offset: u64,
    pub(crate) id: LibraryId,
}

impl<'line> Mapping<'line> {
    fn of(line: &'line [u8]) -> Option<Self> {
        let slash = line.iter().position(|&byte| byte == b'/')?;
        let (columns, path) = line.split_at(slash);
        let (path, deleted) = match path.strip_suffix(DELETED) {
            Some(path) => (path, true),
            None => (path, false),
        };
        Some(Self {
            columns,
            path,
            deleted,
        })
    }

    /// The last part of the path.
    pub(crate) fn name(&self) -> &'line [u8] {
        self.path.rsplit(|&byte| byte == b'/').next().unwrap_or_default()
    }

    pub(crate) fn path(&self) -> String {
        String::from_utf8_lossy(self.path).into_owned()
    }

    /// Whether the path leads to the file no more.
    pub(crate) fn deleted(&self) -> bool {
        self.deleted
    }

    /// `None` when the line is none of the kernel's.
    pub(crate) fn columns(&self) -> Option<Columns<'line>> {
        let mut columns = std::str::from_utf8(self.columns).ok()?.split_ascii_whitespace();
        let range = columns.next()?;
        let executable = columns.next()?.contains('x');
        let file_offset = u64::from_str_radix(columns.next()?, 16).ok()?;
        let (major, minor) = columns.next()?.split_once(':')?;
        let inode: u64 = columns.next()?.parse().ok()?;
        let device = u64::from(u32::from_str_radix(major, 16).ok()?) << 32
            | u64::from(u32::from_str_radix(minor, 16).ok()?);
        (inode != 0).then_some(Columns {
            range,
            executable,
            file_offset,
            id: LibraryId { device, inode },
        })
    }
}

impl Columns<'_> {
    /// First address, and the one behind the last.
    pub(crate) fn addresses(&self) -> Option<(u64, u64)> {
        let (start, end) = self.range.split_once('-')?;
        Some((
            u64::from_str_radix(start, 16).ok()?,
            u64::from_str_radix(end, 16).ok()?,
        ))
    }
}

/// Calls `each` with every mapping of a file until it breaks; as many as a process may have by the kernel's default.
pub(crate) fn for_each_mapping(
    mut maps: impl BufRead,
    mut each: impl FnMut(Mapping<'_>) -> ControlFlow<()>,
) -> std::io::Result<()> {
    let mut line = Vec::with_capacity(256);
    for _ in 0..MAX_LINES {
        line.clear();
        if maps.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        if line.len() > LINE_BYTES {
            continue;
        }
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        if let Some(mapping) = Mapping::of(line)
            && each(mapping).is_break()
        {
            break;
        }
    }
    Ok(())
}

/// The probed libraries with executable mappings, each file once.
pub(super) fn scan_maps(maps: impl BufRead) -> std::io::Result<Vec<MappedLibrary>> {
    let mut found: Vec<MappedLibrary> = Vec::new();
    for_each_mapping(maps, |mapping| {
        if let Some(library) = probed(&mapping)
            && found.iter().all(|known| known.id != library.id)
        {
            found.push(library);
            if found.len() == MAX_LIBRARIES {
                return ControlFlow::Break(());
            }
        }
        ControlFlow::Continue(())
    })?;
    Ok(found)
}

fn probed(mapping: &Mapping<'_>) -> Option<MappedLibrary> {
    let kind = kind_of(mapping.name())?;
    let columns = mapping.columns()?;
    columns.executable.then(|| MappedLibrary {
        id: columns.id,
        kind,
        path: mapping.path(),
        deleted: mapping.deleted,
        range: columns.range.to_owned(),
    })
}

/// `libnccl.so`, `libnccl.so.2.27.5`, ... but not `libnccl-net.so`.
fn kind_of(name: &[u8]) -> Option<LibraryKind> {
    let versioned = |stem: &[u8]| {
        name.strip_prefix(stem)
            .is_some_and(|rest| rest.is_empty() || rest[0] == b'.')
    };
    if versioned(b"libnccl.so") {
        Some(LibraryKind::Nccl)
    } else if versioned(b"libcuda.so") {
        Some(LibraryKind::Cuda)
    } else if versioned(b"libibverbs.so") {
        Some(LibraryKind::Verbs)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const MAPS: &str = "\
55d0c0000000-55d0c0001000 r-xp 00000000 08:01 11 /usr/bin/python3.12
7f0000000000-7f0000100000 r--p 00000000 fd:01 77 /opt/venv/nvidia/nccl/lib/libnccl.so.2
7f0000100000-7f0000200000 r-xp 00100000 fd:01 77 /opt/venv/nvidia/nccl/lib/libnccl.so.2
7f0000300000-7f0000400000 r-xp 00000000 fd:01 78 /opt/a dir/libcuda.so.550.54.15 (deleted)
7f0000500000-7f0000600000 r-xp 00000000 fd:01 79 /usr/lib/libnccl-net.so
7f0000700000-7f0000800000 r-xp 00000000 fd:01 80 /usr/lib/libcudart.so.12
7f0000900000-7f0000a00000 rw-p 00000000 00:00 0 [heap]
";

    #[test]
    fn finds_each_executable_library_once() {
        let found = scan_maps(MAPS.as_bytes()).unwrap();
        assert_eq!(
            found,
            [
                MappedLibrary {
                    id: LibraryId {
                        device: 0xfd << 32 | 1,
                        inode: 77
                    },
                    kind: LibraryKind::Nccl,
                    path: "/opt/venv/nvidia/nccl/lib/libnccl.so.2".to_owned(),
                    deleted: false,
                    range: "7f0000100000-7f0000200000".to_owned(),
                },
                MappedLibrary {
                    id: LibraryId {
                        device: 0xfd << 32 | 1,
                        inode: 78
                    },
                    kind: LibraryKind::Cuda,
                    path: "/opt/a dir/libcuda.so.550.54.15".to_owned(),
                    deleted: true,
                    range: "7f0000300000-7f0000400000".to_owned(),
                },
            ]
        );
    }

    #[test]
    fn a_process_that_maps_a_library_file_after_file_is_read_no_further() {
        let maps: String = (1..=10_000)
            .map(|inode| format!("7f00-7f01 r-xp 00000000 08:01 {inode} /tmp/{inode}/libnccl.so.2\n"))
            .collect();
        assert_eq!(scan_maps(maps.as_bytes()).unwrap().len(), MAX_LIBRARIES);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>, prefix in "[0-9a-f]{1,20}-[0-9a-f]{1,20} r-xp [0-9a-f:]{0,9} [0-9:]{0,5} ") {
            let mut line = prefix.into_bytes();
            line.extend(bytes);
            line.extend(b"/libcuda.so.1\n");
            proptest::prop_assert!(scan_maps(line.as_slice()).is_ok());
        }
    }
}
