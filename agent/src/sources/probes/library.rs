//! What is known about a library before anything is attached: its functions, and which NCCL it is.

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use super::nccl::{CommLayout, NcclVersion};
use super::points::points;
use super::symbols::{SymbolError, Symbols};
use super::waits::{self, NoWaitHooks, WaitHooks};
use crate::sources::procs::LibraryKind;

const VERSION: &str = "ncclGetVersion";
/// In the order that [`CommLayout::derive`] wants.
const ACCESSORS: [&str; 3] = ["ncclCommUserRank", "ncclCommCount", "ncclCommCuDevice"];
/// `ncclGetVersion` is a store and a return.
const VERSION_BYTES: usize = 64;
/// The accessors open a range for a profiler first, and load their field late.
const ACCESSOR_BYTES: usize = 1024;

/// A library's content, as far as it matters here.
#[derive(Debug, Clone)]
pub(super) struct Content {
    pub(super) symbols: Symbols,
    /// Of an NCCL.
    pub(super) nccl: Option<Nccl>,
}

/// What is known about an NCCL.
#[derive(Debug, Clone)]
pub(super) struct Nccl {
    pub(super) version: Option<NcclVersion>,
    pub(super) layout: Option<CommLayout>,
    pub(super) hooks: Result<WaitHooks, NoWaitHooks>,
}

impl Content {
    pub(super) fn read(file: &File, kind: LibraryKind) -> Result<Self, SymbolError> {
        let mut wanted: Vec<_> = points(kind).iter().map(|point| point.symbol).collect();
        if kind == LibraryKind::Nccl {
            wanted.push(VERSION);
            wanted.extend(ACCESSORS);
            wanted.extend(waits::SYMBOLS);
        }
        let symbols = Symbols::read(file, &wanted)?;
        let nccl = (kind == LibraryKind::Nccl).then(|| Nccl::read(file, &symbols));
        Ok(Self { symbols, nccl })
    }
}

impl Nccl {
    fn read(file: &File, symbols: &Symbols) -> Self {
        let version =
            code(file, symbols, VERSION, VERSION_BYTES).and_then(|code| NcclVersion::in_code(&code));
        let accessors = ACCESSORS.map(|name| code(file, symbols, name, ACCESSOR_BYTES).unwrap_or_default());
        Self {
            version,
            layout: CommLayout::derive(accessors.each_ref().map(Vec::as_slice)),
            hooks: WaitHooks::find(version, symbols),
        }
    }
}

/// The first bytes of a function, at most `bytes`; `None` when it is not there or cannot be read.
fn code(file: &File, symbols: &Symbols, name: &str, bytes: usize) -> Option<Vec<u8>> {
    let mut code = vec![0; bytes];
    let read = file.read_at(&mut code, symbols.get(name)?.file_offset).ok()?;
    code.truncate(read);
    Some(code)
}
