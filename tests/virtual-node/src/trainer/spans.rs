//! What the training thread did, as it measured itself; read back where the truth is told.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use crate::plan::Node;

/// What a span was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpanKind {
    /// A whole step; `first` is its index, `second` the longest time that a thread of the process wanted a processor.
    Step,
    /// Waiting for a batch; the loader's own account of it: `first` ns computing or wanting a processor, `second` ns
    /// blocked in reads, `third` ns in all. What remains was taken by the group's quota.
    DataWait,
    /// Issuing work; `first` is the thread's processor time.
    Launch,
    /// Blocked in a synchronisation; `first` ns of it wanting a processor, which is once the GPU is done.
    Sync,
    /// Writing a checkpoint.
    Checkpoint,
}

const KINDS: [SpanKind; 5] = [
    SpanKind::Step,
    SpanKind::DataWait,
    SpanKind::Launch,
    SpanKind::Sync,
    SpanKind::Checkpoint,
];

/// One span, ns of `CLOCK_MONOTONIC`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) kind: SpanKind,
    pub(crate) start_ns: u64,
    pub(crate) end_ns: u64,
    pub(crate) first: u64,
    pub(crate) second: u64,
    pub(crate) third: u64,
}

/// Where a rank's spans lie.
pub(crate) fn path(node: &Node, rank: u32) -> PathBuf {
    node.state.join(format!("host-rank{rank}.bin"))
}

/// Writes spans.
#[derive(Debug)]
pub(crate) struct Spans(BufWriter<File>);

impl Spans {
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        Ok(Self(BufWriter::new(File::create(path)?)))
    }

    pub(crate) fn write(&mut self, span: &Span) -> io::Result<()> {
        let words = [
            span.kind as u64,
            span.start_ns,
            span.end_ns,
            span.first,
            span.second,
            span.third,
        ];
        words
            .iter()
            .try_for_each(|word| self.0.write_all(&word.to_le_bytes()))
    }

    pub(crate) fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Reads all spans of a rank; one cut short by a killed process is left out.
pub(crate) fn read(path: &Path) -> io::Result<Vec<Span>> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    let spans = bytes.chunks_exact(48).map(|chunk| {
        let word = |at: usize| u64::from_le_bytes(chunk[at * 8..at * 8 + 8].try_into().unwrap_or_default());
        let kind = usize::try_from(word(0)).ok().and_then(|kind| KINDS.get(kind));
        let kind = *kind.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a span log"))?;
        Ok(Span {
            kind,
            start_ns: word(1),
            end_ns: word(2),
            first: word(3),
            second: word(4),
            third: word(5),
        })
    });
    spans.collect()
}
