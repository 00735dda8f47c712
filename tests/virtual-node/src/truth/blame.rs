//! Whose fault the waiting was: exposed skew moves to the rank that came last, and there to the leaves in which that
//! rank's step exceeded the victim's.

use std::collections::{BTreeMap, HashMap};

use virtual_node_state::log::{Kind, Record};

use super::sweep::{Leaf, Leaves, Piece, sum};

/// One rank, swept.
#[derive(Debug)]
pub(super) struct Rank {
    pub(super) pieces: Vec<Piece>,
    pub(super) collectives: Vec<Record>,
    /// Begin and end of each step, from the first.
    pub(super) steps: Vec<(u64, u64)>,
    /// The longest wait of a thread for a processor in each step, ns.
    pub(super) delays: Vec<u64>,
}

/// Nanoseconds by (rank, leaf) in one step; sums to the step's time over all ranks.
#[derive(Debug, Default, Clone)]
pub(super) struct StepBlame {
    pub(super) begin_ns: u64,
    pub(super) total_ns: i64,
    pub(super) by: BTreeMap<(usize, Leaf), i64>,
    /// Skew moved to each rank.
    pub(super) moved_to: BTreeMap<usize, i64>,
}

impl Rank {
    pub(super) fn new(pieces: Vec<Piece>, records: &[Record], steps: Vec<(u64, u64)>) -> Self {
        let collectives = records
            .iter()
            .filter(|record| record.kind == Kind::Collective)
            .copied()
            .collect();
        Self {
            pieces,
            collectives,
            steps,
            delays: Vec::new(),
        }
    }
}

/// Leaves in which a rank can be late by itself.
fn own(leaf: Leaf) -> bool {
    !leaf.starts_with("comm.")
}

/// Moves each step's skew.
pub(super) fn move_skew(ranks: &[Rank]) -> Vec<StepBlame> {
    let steps = ranks.iter().map(|rank| rank.steps.len()).min().unwrap_or(0);
    let lasts = last_arrivals(ranks);
    (0..steps).map(|step| one_step(ranks, step, &lasts)).collect()
}

type Key = (u64, u64);

/// The rank that came last to each collective.
fn last_arrivals(ranks: &[Rank]) -> HashMap<Key, usize> {
    let mut last: HashMap<Key, (u64, usize)> = HashMap::new();
    for (index, rank) in ranks.iter().enumerate() {
        for record in &rank.collectives {
            let entry = last
                .entry((record.comm, record.sequence))
                .or_insert((record.arrived_ns, index));
            *entry = (*entry).max((record.arrived_ns, index));
        }
    }
    last.into_iter().map(|(key, (_, rank))| (key, rank)).collect()
}

fn one_step(ranks: &[Rank], step: usize, lasts: &HashMap<Key, usize>) -> StepBlame {
    let leaves: Vec<Leaves> = ranks
        .iter()
        .map(|rank| {
            let (from, to) = rank.steps[step];
            sum(&rank.pieces, from, to)
        })
        .collect();
    let mut blame = StepBlame {
        begin_ns: ranks.iter().map(|rank| rank.steps[step].0).min().unwrap_or(0),
        ..StepBlame::default()
    };
    for (victim, own_leaves) in leaves.iter().enumerate() {
        for (leaf, ns) in own_leaves {
            *blame.by.entry((victim, leaf)).or_insert(0) += ns;
            blame.total_ns += ns;
        }
        for (late, ns) in skew_by_culprit(&ranks[victim], step, lasts) {
            if late == victim || ns == 0 {
                continue;
            }
            *blame.by.entry((victim, "comm.skew")).or_insert(0) -= ns;
            *blame.moved_to.entry(late).or_insert(0) += ns;
            for (leaf, part) in excess(&leaves[late], own_leaves, ns) {
                *blame.by.entry((late, leaf)).or_insert(0) += part;
            }
        }
    }
    blame
}

/// The victim's exposed skew in a step, by who was waited for.
fn skew_by_culprit(victim: &Rank, step: usize, lasts: &HashMap<Key, usize>) -> BTreeMap<usize, i64> {
    let (from, to) = victim.steps[step];
    let mut found = BTreeMap::new();
    for record in victim
        .collectives
        .iter()
        .filter(|record| record.all_arrived_ns > from && record.start_ns < to)
    {
        let waited = sum(
            &victim.pieces,
            record.start_ns.max(from),
            record.all_arrived_ns.min(to),
        );
        if let (Some(ns), Some(late)) = (
            waited.get("comm.skew"),
            lasts.get(&(record.comm, record.sequence)),
        ) {
            *found.entry(*late).or_insert(0) += ns;
        }
    }
    found
}

/// Shares `ns` out over the leaves in which `late` exceeds `victim`; what has no such leaf stays skew.
fn excess(late: &Leaves, victim: &Leaves, ns: i64) -> Vec<(Leaf, i64)> {
    let beyond = late
        .iter()
        .filter(|(leaf, _)| own(leaf))
        .map(|(leaf, own)| (*leaf, own - victim.get(leaf).unwrap_or(&0)));
    let beyond: Vec<(Leaf, i64)> = beyond.filter(|(_, more)| *more > 0).collect();
    let Some(largest) = beyond.iter().max_by_key(|(_, more)| *more).map(|(leaf, _)| *leaf) else {
        return vec![("comm.skew", ns)];
    };
    let sum: i128 = beyond.iter().map(|(_, more)| i128::from(*more)).sum();
    let part = |more: i64| i64::try_from(i128::from(ns) * i128::from(more) / sum).unwrap_or(0);
    let mut parts: Vec<(Leaf, i64)> = beyond.iter().map(|(leaf, more)| (*leaf, part(*more))).collect();
    let given: i64 = parts.iter().map(|(_, ns)| ns).sum();
    parts.push((largest, ns - given));
    parts
}

#[cfg(test)]
mod tests {
    use super::super::sweep::tile;
    use super::*;

    /// One step of 100 ns: a rank computes for `compute_ns`, then both wait for each other.
    fn rank(compute_ns: u64, alone_ns: u64) -> Rank {
        let kernel = Record {
            end_ns: compute_ns,
            reference_ns: 50,
            alone_ns,
            tensor_ppm: 1,
            ..Record::new(Kind::Kernel)
        };
        let reduce = Record {
            start_ns: compute_ns,
            arrived_ns: compute_ns,
            end_ns: 100,
            all_arrived_ns: 90,
            moved_ns: 100,
            ..Record::new(Kind::Collective)
        };
        let records = [kernel, reduce];
        Rank::new(tile(&records, &[], 0, 100), &records, vec![(0, 100)])
    }

    #[test]
    fn waiting_moves_to_what_made_the_last_rank_late() {
        let ranks = [rank(50, 50), rank(90, 90), rank(50, 50)];
        let blame = &move_skew(&ranks)[0];
        assert_eq!(blame.total_ns, 300);
        assert_eq!(blame.by.values().sum::<i64>(), 300, "every nanosecond is kept");
        assert_eq!(blame.by[&(1, "compute.clock")], 40 + 2 * 40);
        assert_eq!(blame.by[&(0, "comm.skew")], 0);
        assert_eq!(blame.moved_to[&1], 80);
    }

    #[test]
    fn a_rank_that_is_late_for_no_reason_keeps_the_skew() {
        assert_eq!(
            excess(&Leaves::from([("ideal", 5)]), &Leaves::from([("ideal", 5)]), 7),
            [("comm.skew", 7)]
        );
    }
}
