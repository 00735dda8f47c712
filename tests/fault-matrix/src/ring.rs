//! A ring of ranks that pass chunks on, as NCCL's proxies and GPUs do: a GPU takes a chunk in, works on it and gives it
//! to its sender; a sender needs room at the receiver; a receiver makes room when its GPU has taken the chunk. What every
//! chunk waits for follows from these rules alone.

use crate::work::MS;

/// Chunks in flight between two ranks.
const ROOM: usize = 8;
/// Chunks that go round the ring side by side.
const SLICES: usize = 16;
/// Times a chunk is passed on, at most one less than ranks in a real ring; more make the ring settle.
const ROUNDS: usize = 6;

/// What makes one collective of one ring slow, by rank, ns.
#[derive(Debug, Clone)]
pub struct Ring {
    /// When the GPU begins, after the first.
    pub begins: Vec<u64>,
    /// The GPU's work on a chunk.
    pub works: Vec<u64>,
    /// How long a chunk that the rank sends keeps the wire busy.
    pub wires: Vec<u64>,
    /// Flushing a received chunk to the GPU.
    pub flushes: Vec<u64>,
    /// How long the host takes to offer room that its GPU has made.
    pub offers: Vec<u64>,
}

/// Time one rank's chunks spent in each wait: all of them, and at least one of them, ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Spent {
    /// Sending: for the GPU, for room at the receiver, on the wire.
    pub send: [(u64, u64); 3],
    /// Receiving: for the chunk, for the flush, for the GPU.
    pub receive: [(u64, u64); 3],
}

impl Ring {
    /// A healthy ring: a chunk takes 0.2 ms on the wire and 0.02 ms on a GPU.
    #[must_use]
    pub fn healthy(ranks: usize) -> Self {
        Self {
            begins: vec![0; ranks],
            works: vec![MS / 50; ranks],
            wires: vec![MS / 5; ranks],
            flushes: vec![MS / 200; ranks],
            offers: vec![0; ranks],
        }
    }

    /// Plays one collective: how long it took, and what each rank's chunks waited for.
    #[must_use]
    pub fn play(&self) -> (u64, Vec<Spent>) {
        let (ranks, chunks) = (self.begins.len(), SLICES * ROUNDS);
        let mut given = vec![Vec::with_capacity(chunks); ranks];
        let mut arrived = vec![Vec::with_capacity(chunks); ranks];
        let mut taken: Vec<Vec<u64>> = vec![Vec::with_capacity(chunks); ranks];
        let mut waits = vec![(Vec::new(), Vec::new()); ranks];
        let earlier = |of: &[u64], chunk: usize, by: usize| chunk.checked_sub(by).map_or(0, |at| of[at]);
        for chunk in 0..chunks {
            for rank in 0..ranks {
                // The GPU gives what it has taken a round before, into a place that its sender has emptied.
                let from = (rank + 1) % ranks;
                let emptied = earlier(&arrived[from], chunk, ROOM);
                let source = earlier(&taken[rank], chunk, SLICES);
                let before = earlier(&given[rank], chunk, 1);
                let ready = self.begins[rank].max(emptied).max(source).max(before) + self.works[rank];
                given[rank].push(ready);
            }
            for rank in 0..ranks {
                let to = (rank + 1) % ranks;
                let offered = earlier(&taken[to], chunk, ROOM) + self.offers[to];
                let posted = earlier(&arrived[to], chunk, ROOM);
                let sent = given[rank][chunk].max(offered);
                let free = earlier(&arrived[to], chunk, 1);
                let there = sent.max(free) + self.wires[rank];
                arrived[to].push(there);
                waits[rank].0.push([posted, given[rank][chunk], sent, there]);
            }
            for rank in 0..ranks {
                let flushed = arrived[rank][chunk] + self.flushes[rank];
                let before = earlier(&taken[rank], chunk, 1);
                let has_taken = flushed.max(given[rank][chunk]).max(before);
                let offered = earlier(&taken[rank], chunk, ROOM) + self.offers[rank];
                waits[rank]
                    .1
                    .push([offered, arrived[rank][chunk], flushed, has_taken]);
                taken[rank].push(has_taken);
            }
        }
        let end = taken.iter().flatten().max().copied().unwrap_or(0);
        let spent = waits.iter().map(|(send, receive)| Spent {
            send: spent(send),
            receive: spent(receive),
        });
        (end, spent.collect())
    }
}

/// Time between each two moments of all chunks: summed, and with overlaps counted once.
fn spent(moments: &[[u64; 4]]) -> [(u64, u64); 3] {
    [0, 1, 2].map(|wait| {
        let mut parts: Vec<(u64, u64)> = moments
            .iter()
            .map(|at| (at[wait], at[wait + 1].max(at[wait])))
            .collect();
        let all = parts.iter().map(|(start, end)| end - start).sum();
        parts.sort_unstable();
        let mut until = 0;
        let any = parts.into_iter().map(|(start, end)| {
            let new = end.saturating_sub(start.max(until));
            until = until.max(end);
            new
        });
        (all, any.sum())
    })
}
