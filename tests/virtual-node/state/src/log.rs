//! The log of what really ran on a virtual GPU, from which the truth is told.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

/// What a record describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A compute kernel.
    Kernel,
    /// A copy to the device.
    ToDevice,
    /// A copy to the host.
    ToHost,
    /// A collective's kernel.
    Collective,
}

impl Kind {
    const ALL: [Self; 4] = [Self::Kernel, Self::ToDevice, Self::ToHost, Self::Collective];
}

/// Words of a record on disk.
const WORDS: usize = 18;

/// One thing that ran on the GPU. Fields that do not apply are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Record {
    /// What it was.
    pub kind: Kind,
    /// Stream, as the process counts them.
    pub stream: u64,
    /// When the host submitted it.
    pub enqueued_ns: u64,
    /// When it began to run.
    pub start_ns: u64,
    /// When it ended.
    pub end_ns: u64,
    /// How long it takes alone at the reference clock (kernels, copies).
    pub reference_ns: u64,
    /// How long it took before other processes slowed it down: clock included, ns (kernels).
    pub alone_ns: u64,
    /// Model FLOPs it computes.
    pub flops: u64,
    /// Tensor pipe activity, ppm.
    pub tensor_ppm: u64,
    /// SM clock it ran at, MHz.
    pub clock_mhz: u64,
    /// Bytes copied or given to the collective.
    pub bytes: u64,
    /// Bytes each node has to send to the next (collectives).
    pub wire_bytes: u64,
    /// When this rank arrived as its peers saw it: later than the start when its host got no processor (collectives).
    pub arrived_ns: u64,
    /// When the last rank arrived (collectives).
    pub all_arrived_ns: u64,
    /// When the bytes had moved between nodes (collectives).
    pub moved_ns: u64,
    /// Key of the communicator.
    pub comm: u64,
    /// Position in the communicator's sequence.
    pub sequence: u64,
    /// Ranks in the communicator (low half) and nodes it spans (high half).
    pub ranks_nodes: u64,
}

impl Record {
    /// A record of which nothing is known but its kind.
    #[must_use]
    pub const fn new(kind: Kind) -> Self {
        Self {
            kind,
            stream: 0,
            enqueued_ns: 0,
            start_ns: 0,
            end_ns: 0,
            reference_ns: 0,
            alone_ns: 0,
            flops: 0,
            tensor_ppm: 0,
            clock_mhz: 0,
            bytes: 0,
            wire_bytes: 0,
            arrived_ns: 0,
            all_arrived_ns: 0,
            moved_ns: 0,
            comm: 0,
            sequence: 0,
            ranks_nodes: 0,
        }
    }

    fn words(&self) -> [u64; WORDS] {
        [
            self.kind as u64,
            self.stream,
            self.enqueued_ns,
            self.start_ns,
            self.end_ns,
            self.reference_ns,
            self.alone_ns,
            self.flops,
            self.tensor_ppm,
            self.clock_mhz,
            self.bytes,
            self.wire_bytes,
            self.arrived_ns,
            self.all_arrived_ns,
            self.moved_ns,
            self.comm,
            self.sequence,
            self.ranks_nodes,
        ]
    }

    fn from_words(words: [u64; WORDS]) -> Option<Self> {
        let [
            kind,
            stream,
            enqueued_ns,
            start_ns,
            end_ns,
            reference_ns,
            alone_ns,
            flops,
            ..,
        ] = words;
        let [
            ..,
            tensor_ppm,
            clock_mhz,
            bytes,
            wire_bytes,
            arrived_ns,
            all_arrived_ns,
            moved_ns,
            comm,
            sequence,
            ranks_nodes,
        ] = words;
        Some(Self {
            kind: *Kind::ALL.get(usize::try_from(kind).ok()?)?,
            stream,
            enqueued_ns,
            start_ns,
            end_ns,
            reference_ns,
            alone_ns,
            flops,
            tensor_ppm,
            clock_mhz,
            bytes,
            wire_bytes,
            arrived_ns,
            all_arrived_ns,
            moved_ns,
            comm,
            sequence,
            ranks_nodes,
        })
    }
}

/// Writes records; buffered, so [`Writer::flush`] before the process ends.
#[derive(Debug)]
pub struct Writer(BufWriter<File>);

impl Writer {
    /// Creates the log.
    ///
    /// # Errors
    /// When the file cannot be created.
    pub fn create(path: &Path) -> io::Result<Self> {
        Ok(Self(BufWriter::with_capacity(1 << 18, File::create(path)?)))
    }

    /// Appends a record.
    ///
    /// # Errors
    /// When the disk is full or gone.
    pub fn write(&mut self, record: &Record) -> io::Result<()> {
        let mut bytes = [0; WORDS * 8];
        for (to, word) in bytes.chunks_exact_mut(8).zip(record.words()) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.0.write_all(&bytes)
    }

    /// Hands everything to the kernel.
    ///
    /// # Errors
    /// When the disk is full or gone.
    pub fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

/// Reads a whole log; a record cut short by a killed process is left out.
///
/// # Errors
/// When the file cannot be read or holds something else.
pub fn read(path: &Path) -> io::Result<Vec<Record>> {
    let mut bytes = Vec::new();
    File::open(path)?.read_to_end(&mut bytes)?;
    let records = bytes.chunks_exact(WORDS * 8).map(|chunk| {
        let mut words = [0; WORDS];
        for (word, eight) in words.iter_mut().zip(chunk.chunks_exact(8)) {
            *word = u64::from_le_bytes(eight.try_into().unwrap_or_default());
        }
        Record::from_words(words)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not an activity log"))
    });
    records.collect()
}
