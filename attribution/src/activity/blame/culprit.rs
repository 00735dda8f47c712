//! Whether waiting was for one rank, one node, one pipeline stage, or for another each time.

use std::collections::{BTreeMap, BTreeSet};

/// A rank is the culprit when it has at least this share of the waiting, percent.
const SHARE_PERCENT: u64 = 50;
/// A node or a stage needs more, percent: of four nodes chance alone gives each a quarter and one often a half.
const SHARE_OF_SET_PERCENT: u64 = 60;
/// It is so for good when it has most of the waiting in this share of the steps, percent.
const STEPS_PERCENT: u64 = 60;
/// A node or a stage in this share.
const STEPS_OF_SET_PERCENT: u64 = 75;
/// Fewer steps show no habit.
const LEAST_STEPS: usize = 3;
/// Steps with less than this share of the mean waiting have no culprit, percent.
const QUIET_PERCENT: u64 = 25;

/// Who kept the others waiting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::activity) struct Culprit {
    /// Its ranks, by position; empty when it is another each time.
    pub(in crate::activity) ranks: Vec<usize>,
    /// What these ranks are.
    pub(in crate::activity) kind: Kind,
    /// Waiting for them, ns.
    pub(in crate::activity) ns: u64,
    /// Steps in which they had most of the waiting, of the steps with any; `None` when too few were seen.
    pub(in crate::activity) steps: Option<(usize, usize)>,
}

/// What the ranks of a culprit have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::activity) enum Kind {
    /// One rank.
    Rank,
    /// The ranks of one node.
    Node,
    /// The replicas of one pipeline stage.
    Stage,
    /// No habit.
    Moving,
}

impl Culprit {
    /// Whether the same were late step after step. One that was late once may have had a bad moment.
    pub(in crate::activity) fn is_persistent(&self) -> bool {
        self.kind != Kind::Moving && self.steps.is_none_or(|steps| is_habit(steps, STEPS_PERCENT))
    }
}

/// Whether steps with most of the waiting are enough of the steps with any.
const fn is_habit((own, all): (usize, usize), percent: u64) -> bool {
    own as u64 * 100 >= all as u64 * percent
}

/// Ranks that stand or fall together, by position.
#[derive(Debug, Clone, Default)]
pub(in crate::activity) struct Groups {
    /// Ranks of one node each; empty when there is but one node.
    pub(in crate::activity) nodes: Vec<Vec<usize>>,
    /// Ranks of one pipeline stage each; empty without a pipeline.
    pub(in crate::activity) stages: Vec<Vec<usize>>,
}

impl Groups {
    /// From the ranks' nodes, the pairs that send to each other, and the members of each communicator.
    ///
    /// Ranks joined by sends are one pipeline. A communicator in which no two ranks are of one pipeline lies within
    /// a stage (tensor, data and expert parallelism), and stages are what such communicators join; one with two ranks
    /// of a pipeline (the world, tied embeddings) crosses stages and joins nothing.
    pub(in crate::activity) fn new(nodes: &[&str], sends: &[(usize, usize)], members: &[Vec<usize>]) -> Self {
        let pipelines = Joins::over(nodes.len(), sends.iter().map(|(from, to)| vec![*from, *to]));
        let within = members.iter().filter(|ranks| {
            let roots: BTreeSet<usize> = ranks.iter().map(|rank| pipelines.root(*rank)).collect();
            roots.len() == ranks.len()
        });
        let stages = if sends.is_empty() {
            Vec::new()
        } else {
            let joined = Joins::over(nodes.len(), within.cloned());
            let sets = joined
                .sets()
                .into_iter()
                .filter(|set| set.len() > 1)
                .collect::<Vec<_>>();
            if sets.len() > 1 { sets } else { Vec::new() }
        };
        let mut by_node: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (rank, node) in nodes.iter().enumerate() {
            by_node.entry(node).or_default().push(rank);
        }
        let several = by_node.len() > 1;
        let nodes = by_node.into_values().filter(|ranks| several && ranks.len() > 1);
        Self {
            nodes: nodes.collect(),
            stages,
        }
    }
}

/// Who most of the waiting was for. `waited` is by rank and step, `nobodys_ns` what is nobody's, ns. `structural` says
/// that stages are to be named before nodes that hold the same ranks.
pub(in crate::activity) fn culprit(
    waited: &BTreeMap<(usize, Option<u32>), u64>,
    nobodys_ns: u64,
    groups: &Groups,
    structural: bool,
) -> Option<Culprit> {
    let mut by_rank: BTreeMap<usize, u64> = BTreeMap::new();
    for ((rank, _), ns) in waited {
        *by_rank.entry(*rank).or_default() += ns;
    }
    let all: u64 = by_rank
        .values()
        .fold(nobodys_ns, |sum: u64, ns| sum.saturating_add(*ns));
    let of = |ranks: &[usize]| {
        let parts = ranks.iter().filter_map(|rank| by_rank.get(rank));
        parts.fold(0_u64, |sum, ns| sum.saturating_add(*ns))
    };
    let has_most = |kind: Kind, ns: u64| {
        let percent = if kind == Kind::Rank {
            SHARE_PERCENT
        } else {
            SHARE_OF_SET_PERCENT
        };
        u128::from(ns) * 100 >= u128::from(all) * u128::from(percent)
    };
    let (worst, theirs) = by_rank
        .iter()
        .max_by_key(|(rank, ns)| (**ns, core::cmp::Reverse(**rank)))?;
    if all == 0 {
        return None;
    }
    let mut sets: Vec<(Kind, Vec<usize>)> = vec![(Kind::Rank, vec![*worst])];
    let nodes = groups.nodes.iter().map(|ranks| (Kind::Node, ranks.clone()));
    let stages = groups.stages.iter().map(|ranks| (Kind::Stage, ranks.clone()));
    sets.extend(
        nodes
            .chain(stages)
            .filter(|(_, ranks)| is_shared(ranks, &by_rank)),
    );
    // The smallest that has most: a node within a stage, or a stage within a node.
    let first = if structural { Kind::Stage } else { Kind::Node };
    let found = sets
        .into_iter()
        .filter(|(kind, ranks)| has_most(*kind, of(ranks)))
        .filter(|(kind, ranks)| {
            // What a set did now and then its ranks did by chance.
            let steady = |steps| is_habit(steps, STEPS_OF_SET_PERCENT);
            *kind == Kind::Rank || habit(waited, ranks).is_none_or(steady)
        })
        .min_by_key(|(kind, ranks)| (ranks.len(), *kind != first));
    let (kind, ranks) = found.unwrap_or((Kind::Moving, Vec::new()));
    let ns = if kind == Kind::Moving { *theirs } else { of(&ranks) };
    Some(Culprit {
        steps: habit(waited, &ranks),
        ranks,
        kind,
        ns,
    })
}

/// Whether the ranks of a set kept others waiting alike: by chance another is last each time, so none has more than
/// three times its part.
fn is_shared(ranks: &[usize], by_rank: &BTreeMap<usize, u64>) -> bool {
    let shares = || ranks.iter().filter_map(|rank| by_rank.get(rank));
    let all: u128 = shares().map(|ns| u128::from(*ns)).sum();
    let most = shares().max().copied().map_or(0, u128::from);
    all > 0 && most * ranks.len() as u128 <= all * 3 && most * 10 <= all * 8
}

/// In how many steps with waiting the ranks had most of it.
fn habit(waited: &BTreeMap<(usize, Option<u32>), u64>, ranks: &[usize]) -> Option<(usize, usize)> {
    let mut steps: BTreeMap<u32, (u64, u64)> = BTreeMap::new();
    for ((rank, step), ns) in waited {
        if let Some(step) = step {
            let (own, all) = steps.entry(*step).or_default();
            *all = all.saturating_add(*ns);
            if ranks.contains(rank) {
                *own = own.saturating_add(*ns);
            }
        }
    }
    let sum: u128 = steps.values().map(|(_, all)| u128::from(*all)).sum();
    let mean = sum / steps.len().max(1) as u128;
    let loud: Vec<(u64, u64)> = steps
        .into_values()
        .filter(|(_, all)| u128::from(*all) * 100 >= mean * u128::from(QUIET_PERCENT))
        .collect();
    let own = loud
        .iter()
        .filter(|(own, all)| u128::from(*own) * 2 >= u128::from(*all))
        .count();
    (loud.len() >= LEAST_STEPS).then_some((own, loud.len()))
}

/// Sets of ranks that are joined pair by pair.
struct Joins {
    parents: Vec<usize>,
}

impl Joins {
    fn over(ranks: usize, sets: impl IntoIterator<Item = Vec<usize>>) -> Self {
        let mut joins = Self {
            parents: (0..ranks).collect(),
        };
        for set in sets {
            for pair in set.windows(2) {
                let (a, b) = (joins.root(pair[0]), joins.root(pair[1]));
                // The lower number is the root: the same sets in any order.
                joins.parents[a.max(b)] = a.min(b);
            }
        }
        joins
    }

    fn root(&self, rank: usize) -> usize {
        let mut at = rank;
        while self.parents[at] != at {
            at = self.parents[at];
        }
        at
    }

    fn sets(&self) -> Vec<Vec<usize>> {
        let mut sets: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for rank in 0..self.parents.len() {
            sets.entry(self.root(rank)).or_default().push(rank);
        }
        sets.into_values().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn waited(parts: &[(usize, u32, u64)]) -> BTreeMap<(usize, Option<u32>), u64> {
        parts
            .iter()
            .map(|(rank, step, ns)| ((*rank, Some(*step)), *ns))
            .collect()
    }

    /// Two pipelines of two stages on two nodes: stage 0 is ranks 0 and 2, stage 1 is ranks 1 and 3.
    fn pipelines() -> Groups {
        let members = [vec![0, 2], vec![1, 3], vec![0, 1, 2, 3]];
        Groups::new(&["a", "a", "b", "b"], &[(0, 1), (2, 3)], &members)
    }

    #[test]
    fn stages_are_what_communicators_without_two_ranks_of_a_pipeline_join() {
        let groups = pipelines();
        assert_eq!(groups.stages, [vec![0, 2], vec![1, 3]]);
        assert_eq!(groups.nodes, [vec![0, 1], vec![2, 3]]);
        assert!(Groups::new(&["a", "a"], &[], &[vec![0, 1]]).stages.is_empty());
    }

    #[test]
    fn a_rank_comes_before_its_node_and_its_stage() {
        let found = culprit(&waited(&[(1, 0, 70), (3, 0, 30)]), 0, &pipelines(), true).expect("a culprit");
        assert_eq!((found.kind, found.ranks, found.ns), (Kind::Rank, vec![1], 70));
    }

    #[test]
    fn replicas_of_a_stage_are_one_culprit() {
        let parts = [(1, 0, 45), (3, 0, 40), (0, 0, 15)];
        let found = culprit(&waited(&parts), 0, &pipelines(), true).expect("a culprit");
        assert_eq!((found.kind, found.ranks, found.ns), (Kind::Stage, vec![1, 3], 85));
    }

    #[test]
    fn another_rank_each_step_is_a_moving_culprit() {
        let parts: Vec<(usize, u32, u64)> = (0..4).map(|step| (step as usize, step, 100)).collect();
        let found = culprit(&waited(&parts), 0, &pipelines(), false).expect("a culprit");
        assert_eq!(found.kind, Kind::Moving);
        assert!(!found.is_persistent());
    }

    #[test]
    fn one_bad_moment_is_no_habit() {
        let parts = [(1, 0, 900), (0, 1, 300), (2, 2, 300)];
        let found = culprit(&waited(&parts), 0, &Groups::default(), false).expect("a culprit");
        assert_eq!((found.kind, found.steps), (Kind::Rank, Some((1, 3))));
        assert!(!found.is_persistent());
    }

    #[test]
    fn nobody_waited_for_nobody() {
        assert_eq!(culprit(&BTreeMap::new(), 0, &Groups::default(), true), None);
    }
}
