//! Whether the host was starved: threads of the job and of the stand-ins were ready and got no processor.
//!
//! A starved thread that carries bytes or tells the GPU of an arrival lengthens what the log shows as communication, so
//! leaves cannot tell. The kernel's own count of waiting can.

use super::blame::Rank;
use super::sweep::{Leaf, sum};

/// From this share of GPU time on, a starved host is the cause of a run that no fault explains.
pub(super) const CAUSE: f64 = 0.12;
/// From this share on, naming it beside another cause is no false accusation. Between the two it may be named or not:
/// the longest wait of a step is the most that can have been lost, not what was.
pub(super) const BESIDE: f64 = 0.05;

/// Share of the job's time that was lost to it: in each step the longest wait of the worst rank, which the others wait
/// for, as far as that rank's GPU computed nothing.
pub(super) fn share(ranks: &[Rank]) -> f64 {
    let steps = ranks.iter().map(|rank| rank.steps.len()).min().unwrap_or(0);
    let (mut lost, mut whole) = (0, 0);
    for step in 0..steps {
        lost += ranks.iter().map(|rank| lost_ns(rank, step)).max().unwrap_or(0);
        whole += ranks
            .iter()
            .map(|rank| rank.steps[step].1 - rank.steps[step].0)
            .max()
            .unwrap_or(0);
    }
    if whole == 0 {
        0.0
    } else {
        lost as f64 / whole as f64
    }
}

fn lost_ns(rank: &Rank, step: usize) -> u64 {
    let (from, to) = rank.steps[step];
    let leaves = sum(&rank.pieces, from, to);
    let computed: i64 = leaves
        .iter()
        .filter(|(leaf, _)| computes(leaf))
        .map(|(_, ns)| ns)
        .sum();
    let exposed = (to - from).saturating_sub(u64::try_from(computed).unwrap_or(0));
    rank.delays.get(step).copied().unwrap_or(0).min(exposed)
}

fn computes(leaf: Leaf) -> bool {
    leaf == "ideal" || leaf.starts_with("compute.")
}

#[cfg(test)]
mod tests {
    use virtual_node_state::log::{Kind, Record};

    use super::super::sweep::tile;
    use super::*;

    const MS: u64 = 1_000_000;

    /// Two steps of 100 ms, of which the GPU computes 60.
    fn rank(delays: [u64; 2]) -> Rank {
        let kernel = |start_ns: u64| Record {
            start_ns,
            end_ns: start_ns + 60 * MS,
            reference_ns: 60 * MS,
            alone_ns: 60 * MS,
            ..Record::new(Kind::Kernel)
        };
        let records = [kernel(0), kernel(100 * MS)];
        let steps = vec![(0, 100 * MS), (100 * MS, 200 * MS)];
        let mut rank = Rank::new(tile(&records, &[], 0, 200 * MS), &records, steps);
        rank.delays = delays.map(|ms| ms * MS).to_vec();
        rank
    }

    #[test]
    fn the_worst_rank_of_each_step_counts_and_no_more_than_was_exposed() {
        let close = |share: f64, wanted: f64| (share - wanted).abs() < 1e-9;
        assert!(close(share(&[rank([0, 0]), rank([0, 0])]), 0.0));
        assert!(close(share(&[rank([10, 0]), rank([4, 30])]), 0.2));
        assert!(close(share(&[rank([90, 90])]), 0.4));
        assert!(close(share(&[]), 0.0));
    }
}
