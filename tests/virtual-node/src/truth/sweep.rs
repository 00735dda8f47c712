//! One rank's time, cut into pieces that tile its window: what ran, by the GPU's own log, and where nothing ran, what
//! the training thread did, by its own log.

use std::collections::BTreeMap;

use virtual_node_state::log::{Kind, Record};

use crate::trainer::spans::{Span, SpanKind};

/// Leaf names as the loss budget has them.
pub(super) type Leaf = &'static str;
/// Nanoseconds by leaf.
pub(super) type Leaves = BTreeMap<Leaf, i64>;

/// Data-sheet peak of an H100 SXM, dense bfloat16, FLOP/s.
const PEAK_FLOPS_PER_S: u128 = 989_000_000_000_000;
/// Best rate that any matrix product reaches on it (MAMF).
const REACHABLE_FLOPS_PER_S: u128 = 794_500_000_000_000;
/// Line rate between nodes, as the interfaces report it: 10 Gbit/s.
const LINE_BYTES_PER_S: u128 = 1_250_000_000;

/// A stretch of time and the leaves it belongs to; the parts sum to its length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) start_ns: u64,
    pub(super) end_ns: u64,
    parts: Vec<(Leaf, i64)>,
}

impl Piece {
    fn whole(start_ns: u64, end_ns: u64, leaf: Leaf) -> Self {
        Self {
            start_ns,
            end_ns,
            parts: vec![(leaf, (end_ns - start_ns).cast_signed())],
        }
    }

    /// Shares the stretch out in proportion; the first leaf takes what rounding leaves.
    fn shared(start_ns: u64, end_ns: u64, weights: &[(Leaf, u64)]) -> Self {
        let length = end_ns - start_ns;
        let sum: u128 = weights.iter().map(|(_, weight)| u128::from(*weight)).sum();
        if sum == 0 {
            return Self::whole(start_ns, end_ns, weights[0].0);
        }
        let part = |weight: u64| i64::try_from(u128::from(length) * u128::from(weight) / sum).unwrap_or(0);
        let mut parts: Vec<(Leaf, i64)> = weights
            .iter()
            .map(|(leaf, weight)| (*leaf, part(*weight)))
            .collect();
        let given: i64 = parts.iter().map(|(_, ns)| ns).sum();
        parts[0].1 += length.cast_signed() - given;
        Self {
            start_ns,
            end_ns,
            parts,
        }
    }

    /// Adds the part of the piece that lies in `[from, to)` to `sums`; exact for the whole piece, and in sum otherwise.
    fn add_within(&self, from: u64, to: u64, sums: &mut Leaves) {
        let (start, end) = (self.start_ns.max(from), self.end_ns.min(to));
        if start >= end {
            return;
        }
        let (length, taken) = (i128::from(self.end_ns - self.start_ns), i128::from(end - start));
        let mut given = 0;
        for (leaf, ns) in &self.parts[1..] {
            let share = i64::try_from(i128::from(*ns) * taken / length).unwrap_or(0);
            given += share;
            *sums.entry(leaf).or_insert(0) += share;
        }
        *sums.entry(self.parts[0].0).or_insert(0) += (end - start).cast_signed() - given;
    }
}

/// Sums the pieces within `[from, to)`; together exactly its length, if the pieces tile it.
pub(super) fn sum(pieces: &[Piece], from: u64, to: u64) -> Leaves {
    let mut sums = Leaves::new();
    let first = pieces.partition_point(|piece| piece.end_ns <= from);
    pieces[first..]
        .iter()
        .take_while(|piece| piece.start_ns < to)
        .for_each(|piece| piece.add_within(from, to, &mut sums));
    sums
}

/// Cuts `[from, to)` into pieces.
pub(super) fn tile(records: &[Record], spans: &[Span], from: u64, to: u64) -> Vec<Piece> {
    let of = |wanted: &dyn Fn(&Record) -> bool| -> Vec<&Record> {
        let inside = records
            .iter()
            .filter(|record| record.end_ns > from && record.start_ns < to && wanted(record));
        let mut found: Vec<&Record> = inside.collect();
        found.sort_by_key(|record| record.start_ns);
        found
    };
    let mut pieces = Vec::new();
    let mut gaps = vec![(from, to)];
    let compute = of(&|record| record.kind == Kind::Kernel);
    gaps = fill(&gaps, &compute, |record, start, end| {
        pieces.push(kernel(record, start, end))
    });
    let comm = of(&|record| record.kind == Kind::Collective);
    gaps = fill(&gaps, &comm, |record, start, end| {
        collective(record, start, end, &mut pieces)
    });
    let copies = of(&|record| matches!(record.kind, Kind::ToDevice | Kind::ToHost));
    gaps = fill(&gaps, &copies, |record, start, end| {
        pieces.push(copy(record, start, end))
    });
    idle(&gaps, spans, &mut pieces);
    pieces.sort_by_key(|piece| piece.start_ns);
    pieces
}

/// Lays `records` (sorted by start) into the gaps and returns the gaps that remain.
fn fill(gaps: &[(u64, u64)], records: &[&Record], mut lay: impl FnMut(&Record, u64, u64)) -> Vec<(u64, u64)> {
    let mut left = Vec::new();
    let mut next = 0;
    for &(gap_start, gap_end) in gaps {
        let mut at = gap_start;
        // Records of one class may overlap each other, so a later one may still reach back before `next`.
        while next > 0 && records[next - 1].end_ns > gap_start {
            next -= 1;
        }
        while next < records.len() && records[next].start_ns < gap_end {
            let record = records[next];
            next += 1;
            let (start, end) = (record.start_ns.max(at), record.end_ns.min(gap_end));
            if start >= end {
                continue;
            }
            if start > at {
                left.push((at, start));
            }
            lay(record, start, end);
            at = end;
        }
        if at < gap_end {
            left.push((at, gap_end));
        }
    }
    left
}

fn flops_ns(flops: u64, rate: u128) -> i64 {
    i64::try_from(u128::from(flops) * 1_000_000_000 / rate).unwrap_or(0)
}

/// A kernel's time: alone at the reference clock, then what the clock and what others cost it.
fn kernel(record: &Record, start_ns: u64, end_ns: u64) -> Piece {
    let whole = (record.end_ns - record.start_ns).cast_signed();
    let reference = record.reference_ns.cast_signed();
    let clock = record.alone_ns.cast_signed() - reference;
    let contention = whole - record.alone_ns.cast_signed();
    let mut parts = if record.tensor_ppm == 0 {
        vec![("compute.nonmatmul", reference)]
    } else {
        let ideal = flops_ns(record.flops, PEAK_FLOPS_PER_S);
        let platform = flops_ns(record.flops, REACHABLE_FLOPS_PER_S) - ideal;
        vec![
            ("compute.kernel", reference - ideal - platform),
            ("ideal", ideal),
            ("compute.platform", platform),
        ]
    };
    parts.push(("compute.clock", clock));
    parts.push(("compute.contention", contention));
    let full = Piece {
        start_ns: record.start_ns,
        end_ns: record.end_ns,
        parts,
    };
    if (start_ns, end_ns) == (full.start_ns, full.end_ns) {
        return full;
    }
    // Cut by the window's edge.
    let mut sums = Leaves::new();
    full.add_within(start_ns, end_ns, &mut sums);
    Piece {
        start_ns,
        end_ns,
        parts: sums.into_iter().collect(),
    }
}

/// A copy's time: at the rate of a whole link, then what the lanes that are missing cost it.
fn copy(record: &Record, start_ns: u64, end_ns: u64) -> Piece {
    let slower = (record.end_ns - record.start_ns).saturating_sub(record.reference_ns);
    Piece::shared(
        start_ns,
        end_ns,
        &[("memory.copy", record.reference_ns), ("memory.pcie", slower)],
    )
}

/// A collective's exposed time: waiting for the last rank, what the bytes need, what they took beyond, the tail.
fn collective(record: &Record, start_ns: u64, end_ns: u64, pieces: &mut Vec<Piece>) {
    let wire_ns = u128::from(record.wire_bytes) * 1_000_000_000 / LINE_BYTES_PER_S;
    let arrived = record.all_arrived_ns.clamp(record.start_ns, record.end_ns);
    let moved = record.moved_ns.clamp(arrived, record.end_ns);
    let transferred = arrived
        .saturating_add(u64::try_from(wire_ns).unwrap_or(u64::MAX))
        .min(moved);
    let phases = [
        (record.start_ns, arrived, "comm.skew"),
        (arrived, transferred, "comm.transfer"),
        (transferred, moved, "comm.net"),
        (moved, record.end_ns, "comm.proto"),
    ];
    for (from, to, leaf) in phases {
        let (from, to) = (from.max(start_ns), to.min(end_ns));
        if from < to {
            pieces.push(Piece::whole(from, to, leaf));
        }
    }
}

/// Splits idle time by what the training thread did; spans do not overlap, except that a step holds the others.
fn idle(gaps: &[(u64, u64)], spans: &[Span], pieces: &mut Vec<Piece>) {
    let mut inner: Vec<&Span> = spans
        .iter()
        .filter(|span| span.kind != SpanKind::Step && span.end_ns > span.start_ns)
        .collect();
    inner.sort_by_key(|span| span.start_ns);
    for &(gap_start, gap_end) in gaps {
        let mut at = gap_start;
        let first = inner.partition_point(|span| span.end_ns <= gap_start);
        for span in inner[first..].iter().take_while(|span| span.start_ns < gap_end) {
            let (start, end) = (span.start_ns.max(at), span.end_ns.min(gap_end));
            if start >= end {
                continue;
            }
            if start > at {
                pieces.push(Piece::whole(at, start, "idle.unknown"));
            }
            pieces.push(host(span, start, end));
            at = end;
        }
        if at < gap_end {
            pieces.push(Piece::whole(at, gap_end, "idle.unknown"));
        }
    }
}

fn host(span: &Span, start_ns: u64, end_ns: u64) -> Piece {
    let length = span.end_ns - span.start_ns;
    match span.kind {
        SpanKind::DataWait => {
            // The loader's own account of this batch: computing, blocked in reads, throttled by the quota.
            let throttled = span.third.saturating_sub(span.first + span.second);
            let weights = [
                ("idle.data.cpu", span.first),
                ("idle.data.storage", span.second),
                ("idle.cpu.sched", throttled),
            ];
            Piece::shared(start_ns, end_ns, &weights)
        }
        SpanKind::Launch => {
            let on_cpu = span.first.min(length);
            Piece::shared(
                start_ns,
                end_ns,
                &[("idle.launch", on_cpu), ("idle.cpu.sched", length - on_cpu)],
            )
        }
        SpanKind::Sync => {
            let length = end_ns - start_ns;
            let late = if end_ns == span.end_ns {
                span.first.min(length)
            } else {
                0
            };
            Piece::shared(
                start_ns,
                end_ns,
                &[("idle.cpu.sync", length - late), ("idle.cpu.sched", late)],
            )
        }
        SpanKind::Checkpoint => Piece::whole(start_ns, end_ns, "idle.ckpt"),
        SpanKind::Step => Piece::whole(start_ns, end_ns, "idle.unknown"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(kind: Kind, start_ns: u64, end_ns: u64) -> Record {
        Record {
            start_ns,
            end_ns,
            reference_ns: end_ns - start_ns,
            alone_ns: end_ns - start_ns,
            ..Record::new(kind)
        }
    }

    fn total(leaves: &Leaves) -> i64 {
        leaves.values().sum()
    }

    #[test]
    fn pieces_tile_the_window_whatever_overlaps() {
        // A small deterministic generator: overlapping kernels, collectives and copies, cut by both edges.
        let mut word = 7_u64;
        let mut next = |below: u64| {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (word >> 33) % below
        };
        for _ in 0..200 {
            let mut records = Vec::new();
            for _ in 0..next(30) {
                let start = next(1_000);
                let kind = [Kind::Kernel, Kind::Collective, Kind::ToDevice, Kind::ToHost][next(4) as usize];
                let mut record = at(kind, start, start + 1 + next(200));
                record.all_arrived_ns = start + next(300);
                record.moved_ns = start + next(300);
                record.flops = next(50) * 1_000_000;
                record.tensor_ppm = next(2);
                records.push(record);
            }
            let spans: Vec<Span> = (0..next(8))
                .map(|index| Span {
                    kind: [SpanKind::DataWait, SpanKind::Launch, SpanKind::Sync][next(3) as usize],
                    start_ns: index * 150,
                    end_ns: index * 150 + next(150),
                    first: next(100),
                    second: next(100),
                    third: next(300),
                })
                .collect();
            let pieces = tile(&records, &spans, 100, 900);
            let mut edge = 100;
            for piece in &pieces {
                assert_eq!(piece.start_ns, edge, "a hole or an overlap");
                let parts: i64 = piece.parts.iter().map(|(_, ns)| ns).sum();
                assert_eq!(parts, (piece.end_ns - piece.start_ns).cast_signed());
                edge = piece.end_ns;
            }
            assert_eq!(edge, 900);
            let cut = 100 + next(800);
            assert_eq!(
                total(&sum(&pieces, 100, cut)) + total(&sum(&pieces, cut, 900)),
                800
            );
        }
    }

    #[test]
    fn a_slowed_kernel_names_clock_and_neighbour() {
        let mut record = at(Kind::Kernel, 0, 300);
        (record.reference_ns, record.alone_ns, record.tensor_ppm) = (100, 150, 400_000);
        record.flops = 40 * 989_000;
        let leaves = sum(&tile(&[record], &[], 0, 300), 0, 300);
        assert_eq!(leaves["ideal"], 40);
        assert_eq!(leaves["compute.platform"], 9);
        assert_eq!(leaves["compute.kernel"], 51);
        assert_eq!(leaves["compute.clock"], 50);
        assert_eq!(leaves["compute.contention"], 150);
    }

    #[test]
    fn a_collective_is_split_where_the_last_rank_arrived() {
        let mut record = at(Kind::Collective, 0, 100);
        (record.all_arrived_ns, record.moved_ns, record.wire_bytes) = (40, 90, 25);
        let kernel = at(Kind::Kernel, 0, 10);
        let leaves = sum(&tile(&[record, kernel], &[], 0, 100), 0, 100);
        assert_eq!(leaves["comm.skew"], 30, "the kernel hides ten");
        assert_eq!(leaves["comm.transfer"], 20, "25 bytes at 1.25 bytes/ns");
        assert_eq!(leaves["comm.net"], 30);
        assert_eq!(leaves["comm.proto"], 10);
    }

    #[test]
    fn a_batch_that_was_waited_for_is_the_loaders() {
        let wait = Span {
            kind: SpanKind::DataWait,
            start_ns: 0,
            end_ns: 100,
            first: 150,
            second: 50,
            third: 200,
        };
        let leaves = sum(&tile(&[], &[wait], 0, 120), 0, 120);
        assert_eq!(leaves["idle.data.cpu"], 75);
        assert_eq!(leaves["idle.data.storage"], 25);
        assert_eq!(leaves["idle.unknown"], 20);
    }
}
