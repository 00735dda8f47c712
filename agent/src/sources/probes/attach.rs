//! Probes on libraries: attached once per file, whoever maps it.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use aya::Ebpf;
use aya::programs::uprobe::{UProbeAttachLocation, UProbeAttachPoint, UProbeLink, UProbeScope};
use aya::programs::{ProgramError, UProbe};

use super::detach;
use super::library::{Content, Nccl};
use super::nccl::{CommLayout, NcclVersion};
use super::open::open_plain_file;
use super::points::{Point, points};
use super::symbols::{FirstInstruction, SymbolError};
use super::waits::{NoWaitHooks, WaitHooks};
use crate::sources::procs::{Library, LibraryId};

/// Libraries whose symbols are remembered after release, for when another process maps them again.
const REMEMBERED_LIBRARIES: usize = 64;
/// Most libraries with probes at the same time: each takes some hundred descriptors, and a node has a few versions at most.
const MAX_LIBRARIES: usize = 64;

/// What became of a library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    /// Which file.
    pub id: LibraryId,
    /// Functions with probes.
    pub functions: usize,
    /// Known functions that this version does not export.
    pub absent: Vec<&'static str>,
    /// Functions on which attaching failed, with the reason; their calls stay unseen.
    pub failed: Vec<SymbolFailure>,
    /// Functions whose first instruction the kernel has to single-step, which makes a hit about three times as dear.
    pub single_stepped: Vec<&'static str>,
    /// Whether the opened file has another inode than the mapping was listed with: as on overlay file systems, or because
    /// the file was replaced on disk after the process mapped it. In the latter case nothing will be seen of it.
    pub inode_differs: bool,
    /// Of an NCCL: its version, where its code tells.
    pub version: Option<NcclVersion>,
    /// Of an NCCL: where its communicators hold their identity, where its code tells.
    pub layout: Option<CommLayout>,
    /// Of an NCCL: the hooks for what its network steps wait for, or why there are none.
    pub waits: Option<Result<WaitHooks, NoWaitHooks>>,
    /// Time it took.
    pub took: Duration,
}

/// A function that cannot be probed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SymbolFailure {
    /// The symbol.
    pub symbol: &'static str,
    /// Why.
    pub why: String,
}

/// Why a library cannot be traced at all.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It cannot be opened: the process that mapped it is gone, or the path is.
    #[error("{shown} of process {pid} cannot be opened ({source}); its calls stay unseen")]
    Open {
        /// As the process names it.
        shown: String,
        /// The process.
        pid: u32,
        /// Why.
        source: io::Error,
    },
    /// Its symbols cannot be read.
    #[error("{shown} cannot be traced: {source}; its calls stay unseen")]
    Symbols {
        /// As the process names it.
        shown: String,
        /// Why.
        source: SymbolError,
    },
    /// As many are traced as may be.
    #[error("{shown} is not traced: {MAX_LIBRARIES} other library files are already; its calls stay unseen")]
    TooMany {
        /// As the process names it.
        shown: String,
    },
    /// It has none of the functions, or none could be probed.
    #[error("{shown} cannot be traced: {why}; its calls stay unseen")]
    Nothing {
        /// As the process names it.
        shown: String,
        /// Why.
        why: String,
    },
}

struct Links {
    /// Detached first: an entry without its return leaves a call open, a return without its entry nothing.
    entries: Vec<UProbeLink>,
    returns: Vec<UProbeLink>,
}

impl Drop for Links {
    fn drop(&mut self) {
        self.entries.clear();
        self.returns.clear();
    }
}

/// The libraries with probes.
#[derive(Default)]
pub(super) struct Attachments {
    attached: HashMap<LibraryId, (Links, Attached)>,
    /// Still detaching; attached anew before it is over, every call would be seen twice.
    detaching: HashMap<LibraryId, JoinHandle<()>>,
    contents: HashMap<FileIdentity, Content>,
    /// Files that cannot be read as libraries: they are offered again every few seconds, and reading may take a second.
    unreadable: HashMap<FileIdentity, SymbolError>,
}

/// A file's content, as far as its inode tells: a rewritten file has another time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct FileIdentity {
    device: u64,
    inode: u64,
    bytes: u64,
    modified_s: i64,
    modified_ns: i64,
}

impl Drop for Attachments {
    fn drop(&mut self) {
        self.attached.clear();
        for (_, detaching) in self.detaching.drain() {
            // A panic in dropping a link is not ours to repeat.
            let _ = detaching.join();
        }
    }
}

impl Attachments {
    pub(super) fn ids(&self) -> impl Iterator<Item = LibraryId> {
        self.attached.keys().copied()
    }

    pub(super) fn release(&mut self, id: LibraryId) {
        self.detaching.retain(|_, detaching| !detaching.is_finished());
        let Some((links, _)) = self.attached.remove(&id) else {
            return;
        };
        if let Some(detaching) = detach::in_background(move || drop(links)) {
            self.detaching.insert(id, detaching);
        }
    }

    /// Gives the file too when it is newly attached.
    pub(super) fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        library: &Library,
    ) -> Result<(Attached, Option<File>), AttachError> {
        if let Some((_, attached)) = self.attached.get(&library.id) {
            return Ok((attached.clone(), None));
        }
        let start = Instant::now();
        if let Some(detaching) = self.detaching.remove(&library.id) {
            // A panic in dropping a link is not ours to repeat.
            let _ = detaching.join();
        }
        let open = |source| AttachError::Open {
            shown: library.shown.clone(),
            pid: library.pid,
            source,
        };
        self.check_room(library)?;
        let file = open_plain_file(&library.path, library.id.inode).map_err(open)?;
        let metadata = file.metadata().map_err(open)?;
        let identity = FileIdentity {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.size(),
            modified_s: metadata.mtime(),
            modified_ns: metadata.mtime_nsec(),
        };
        let content = self.content(&file, identity, library)?.clone();
        let nccl = content.nccl.as_ref();
        let mut attached = Attached {
            id: library.id,
            functions: 0,
            absent: Vec::new(),
            failed: Vec::new(),
            single_stepped: Vec::new(),
            inode_differs: identity.inode != library.id.inode,
            version: nccl.and_then(|nccl| nccl.version),
            layout: nccl.and_then(|nccl| nccl.layout),
            waits: nccl.map(|nccl| nccl.hooks.clone()),
            took: Duration::ZERO,
        };
        let links = attach_points(ebpf, &file, points(library.kind), &content, &mut attached);
        attached.took = start.elapsed();
        if attached.functions == 0 {
            let why = match attached.failed.first() {
                Some(failure) => format!("the kernel refuses probes ({}: {})", failure.symbol, failure.why),
                None => "it exports none of the known functions".to_owned(),
            };
            return Err(AttachError::Nothing {
                shown: library.shown.clone(),
                why,
            });
        }
        self.attached.insert(library.id, (links, attached.clone()));
        Ok((attached, Some(file)))
    }

    fn check_room(&mut self, library: &Library) -> Result<(), AttachError> {
        self.detaching.retain(|_, detaching| !detaching.is_finished());
        // What is still detaching holds its descriptors.
        if self.attached.len() + self.detaching.len() >= MAX_LIBRARIES {
            return Err(AttachError::TooMany {
                shown: library.shown.clone(),
            });
        }
        Ok(())
    }

    /// The content of a file, read once: the tables of the large libraries take a tenth of a second.
    fn content(
        &mut self,
        file: &File,
        identity: FileIdentity,
        library: &Library,
    ) -> Result<&Content, AttachError> {
        if !self.contents.contains_key(&identity) {
            let read = match self.unreadable.get(&identity) {
                Some(failure) => Err(failure.clone()),
                None => Content::read(file, library.kind),
            };
            let content = read.map_err(|source| {
                self.remember_failure(identity, &source);
                AttachError::Symbols {
                    shown: library.shown.clone(),
                    source,
                }
            })?;
            if self.contents.len() >= REMEMBERED_LIBRARIES {
                self.contents.clear();
            }
            self.contents.insert(identity, content);
        }
        Ok(&self.contents[&identity])
    }

    /// What is wrong with a file's content stays so until it is written again; a failed read may pass.
    fn remember_failure(&mut self, identity: FileIdentity, failure: &SymbolError) {
        if matches!(failure, SymbolError::Read(_)) {
            return;
        }
        if self.unreadable.len() >= REMEMBERED_LIBRARIES {
            self.unreadable.clear();
        }
        self.unreadable.insert(identity, failure.clone());
    }
}

/// Attaches every point that the file has. Functions that share an address are one function: the first name wins.
fn attach_points(
    ebpf: &mut Ebpf,
    file: &File,
    points: &[Point],
    content: &Content,
    attached: &mut Attached,
) -> Links {
    // By descriptor, so that it is the file whose symbols were read even when its path leads elsewhere by now.
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let mut links = Links {
        entries: Vec::new(),
        returns: Vec::new(),
    };
    let mut seen = Vec::new();
    for point in points {
        let Some(symbol) = content.symbols.get(point.symbol) else {
            attached.absent.push(point.symbol);
            continue;
        };
        if seen.contains(&symbol.file_offset) {
            continue;
        }
        seen.push(symbol.file_offset);
        match attach_point(ebpf, &path, point, symbol.file_offset, content.nccl.as_ref()) {
            Ok((entry, on_return)) => {
                links.entries.push(entry);
                links.returns.extend(on_return);
                attached.functions += 1;
                if symbol.first == FirstInstruction::SingleStepped {
                    attached.single_stepped.push(point.symbol);
                }
            }
            Err(error) => {
                attached.failed.push(SymbolFailure {
                    symbol: point.symbol,
                    why: describe(&error),
                });
            }
        }
    }
    links
}

fn describe(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// The return goes first, so that no entry is seen whose return is not.
fn attach_point(
    ebpf: &mut Ebpf,
    path: &std::path::Path,
    point: &Point,
    offset: u64,
    nccl: Option<&Nccl>,
) -> Result<(UProbeLink, Option<UProbeLink>), ProgramError> {
    let on_return = match point.on_return {
        Some(program) => Some(attach_program(ebpf, path, program, offset, None)?),
        None => None,
    };
    let version = nccl.and_then(|nccl| nccl.version).map(NcclVersion::code);
    let rank_offset = nccl.and_then(|nccl| nccl.layout).map(|layout| layout.rank);
    let cookie = point.cookie(version, rank_offset);
    let entry = attach_program(ebpf, path, point.entry, offset, Some(cookie))?;
    Ok((entry, on_return))
}

pub(super) fn attach_program(
    ebpf: &mut Ebpf,
    path: &std::path::Path,
    program: &str,
    offset: u64,
    cookie: Option<u64>,
) -> Result<UProbeLink, ProgramError> {
    let program = ebpf.program_mut(program).ok_or(ProgramError::InvalidName {
        name: program.to_owned(),
    })?;
    let program = <&mut UProbe>::try_from(program)?;
    let point = UProbeAttachPoint {
        location: UProbeAttachLocation::AbsoluteOffset(offset),
        cookie,
    };
    let id = program.attach(point, path, UProbeScope::AllProcesses)?;
    program.take_link(id)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::sources::procs::LibraryKind;

    fn library(inode: u64) -> Library {
        Library {
            id: LibraryId { device: 1, inode },
            kind: LibraryKind::Cuda,
            path: PathBuf::from("/absent/libcuda.so.1"),
            shown: "libcuda.so.1".to_owned(),
            pid: 1,
        }
    }

    /// The second time the file is given write-only: whoever reads it fails otherwise.
    #[test]
    fn a_file_that_is_no_library_is_read_once_until_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libcuda.so.1");
        std::fs::write(&path, "no library").unwrap();
        let write_only = File::options().write(true).open(&path).unwrap();
        let mut identity = FileIdentity {
            device: 1,
            inode: 1,
            bytes: 10,
            modified_s: 1,
            modified_ns: 0,
        };
        let mut attachments = Attachments::default();
        let mut why = |file: &File, identity| match attachments.content(file, identity, &library(1)) {
            Err(AttachError::Symbols { source, .. }) => source,
            other => panic!("{other:?}"),
        };
        // A read that fails is no fault of the content.
        assert!(matches!(why(&write_only, identity), SymbolError::Read(_)));
        assert!(matches!(
            why(&File::open(&path).unwrap(), identity),
            SymbolError::NotElf
        ));
        assert!(matches!(why(&write_only, identity), SymbolError::NotElf));
        identity.modified_ns = 1;
        assert!(matches!(why(&write_only, identity), SymbolError::Read(_)));
    }

    #[test]
    fn no_library_is_attached_beyond_the_bound() {
        let mut attachments = Attachments::default();
        let still_detaching = Arc::new(Mutex::new(()));
        let held = still_detaching.lock().unwrap();
        for inode in 0..MAX_LIBRARIES as u64 {
            attachments.check_room(&library(inode)).unwrap();
            let gate = Arc::clone(&still_detaching);
            let detaching = std::thread::spawn(move || drop(gate.lock()));
            attachments.detaching.insert(library(inode).id, detaching);
        }
        let refused = attachments.check_room(&library(1_000));
        assert!(matches!(refused, Err(AttachError::TooMany { .. })), "{refused:?}");
        drop(held);
    }
}
