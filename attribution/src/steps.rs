//! Finding the training step in a sequence of calls, without the job's help.
//!
//! A token stands for one call: function, size and communicator (names alone collapse to period 1 on real jobs). The
//! period is the first lag at which the sequence equals itself (exact-match autocorrelation).

/// Least share of positions that must equal the position one period earlier, parts per million.
const MATCH_PPM: u64 = 950_000;

/// How often the pattern must be seen before it counts as one.
const REPEATS: usize = 3;

/// Longest period that is looked for, calls. Bounds the work on a sequence without a period.
const LONGEST: usize = 8192;

/// A repeating pattern of calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Period {
    /// Calls per step.
    pub lag: usize,
    /// Share of positions equal to the one a period earlier, parts per million.
    pub match_ppm: u32,
    /// Position in the sequence, below `lag`, at which a step begins.
    pub phase: usize,
    /// Distinct tokens in the pattern. With one, the lag says nothing about how many calls a step has: edges must
    /// then come from elsewhere (drains, gaps).
    pub distinct: usize,
}

impl Period {
    /// Whether the pattern alone tells where a step begins and ends: it has more than one distinct token.
    #[must_use]
    pub const fn is_conclusive(&self) -> bool {
        self.distinct > 1
    }
}

/// The period of a sequence of calls, with the phase of its first whole repeat; `None` when nothing repeats.
#[must_use]
pub fn find_period(tokens: &[u64]) -> Option<Period> {
    let longest = (tokens.len() / REPEATS).min(LONGEST);
    let (first, missed) = (1..=longest).find_map(|lag| Some((lag, mismatches(tokens, lag, MATCH_PPM)?)))?;
    let first = describe(tokens, first, missed);
    if missed == 0 {
        return Some(first);
    }
    // A long pattern of mostly equal calls nearly matches itself at a short lag. The mismatches are then part of
    // the pattern: a longer lag removes them and shows more distinct calls.
    let exact = (first.lag + 1..=longest).find_map(|lag| {
        let left = mismatches(tokens, lag, MATCH_PPM)?;
        (left * 4 <= missed).then_some((lag, left))
    });
    let longer = exact.map(|(lag, left)| describe(tokens, lag, left));
    Some(
        longer
            .filter(|longer| longer.distinct > first.distinct)
            .unwrap_or(first),
    )
}

/// As [`find_period`], with the phase where the calls pause longest: a step begins after its longest gap.
///
/// `times_ns` are the times of the calls, in order, one per token; with another length the phase is that of
/// [`find_period`].
#[must_use]
pub fn find_period_timed(tokens: &[u64], times_ns: &[u64]) -> Option<Period> {
    let mut period = find_period(tokens)?;
    if times_ns.len() == tokens.len() {
        period.phase = longest_gap(times_ns, period.lag).unwrap_or(period.phase);
    }
    Some(period)
}

/// How many positions differ from the one `lag` earlier; `None` when too many do.
fn mismatches(tokens: &[u64], lag: usize, least_ppm: u64) -> Option<usize> {
    let compared = tokens.len().checked_sub(lag).filter(|compared| *compared > 0)?;
    let allowed = compared as u64 * (1_000_000 - least_ppm) / 1_000_000;
    let mut missed = 0_u64;
    for (before, now) in tokens.iter().zip(&tokens[lag..]) {
        if before != now {
            missed += 1;
            if missed > allowed {
                return None;
            }
        }
    }
    usize::try_from(missed).ok()
}

fn describe(tokens: &[u64], lag: usize, missed: usize) -> Period {
    let compared = (tokens.len() - lag) as u64;
    let match_ppm = (compared - missed as u64) * 1_000_000 / compared;
    let start = (0..tokens.len().saturating_sub(2 * lag))
        .find(|at| tokens[*at..at + lag] == tokens[at + lag..at + 2 * lag])
        .unwrap_or(0);
    let mut pattern = tokens[start..start + lag].to_vec();
    pattern.sort_unstable();
    pattern.dedup();
    Period {
        lag,
        match_ppm: u32::try_from(match_ppm).unwrap_or(0),
        phase: start % lag,
        distinct: pattern.len(),
    }
}

/// Position below `lag` whose calls come after the longest pause, by the median over repeats so that one slow
/// step or a checkpoint does not move it.
fn longest_gap(times_ns: &[u64], lag: usize) -> Option<usize> {
    (0..lag)
        .filter_map(|phase| {
            let mut gaps: Vec<u64> = (phase..times_ns.len())
                .step_by(lag)
                .filter(|at| *at > 0)
                .map(|at| times_ns[at].saturating_sub(times_ns[at - 1]))
                .collect();
            gaps.sort_unstable();
            gaps.get(gaps.len() / 2).map(|median| (*median, phase))
        })
        .max_by_key(|(gap, phase)| (*gap, core::cmp::Reverse(*phase)))
        .map(|(_, phase)| phase)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repeat(pattern: &[u64], times: usize) -> Vec<u64> {
        pattern
            .iter()
            .copied()
            .cycle()
            .take(pattern.len() * times)
            .collect()
    }

    #[test]
    fn the_shortest_exact_repeat_is_the_period() {
        let period = find_period(&repeat(&[7, 7, 8, 9], 6)).expect("period");
        assert_eq!((period.lag, period.match_ppm, period.distinct), (4, 1_000_000, 3));
        assert!(period.is_conclusive());
    }

    #[test]
    fn three_repeats_are_needed() {
        assert_eq!(find_period(&repeat(&[1, 2, 3, 4, 5], 2)), None);
        assert_eq!(
            find_period(&repeat(&[1, 2, 3, 4, 5], 3)).map(|period| period.lag),
            Some(5)
        );
    }

    #[test]
    fn nothing_repeats_in_a_sequence_of_different_calls() {
        assert_eq!(find_period(&(0..500).collect::<Vec<_>>()), None);
        assert_eq!(find_period(&[]), None);
        assert_eq!(find_period(&[1]), None);
    }

    #[test]
    fn one_kind_of_call_is_a_period_that_concludes_nothing() {
        let period = find_period(&repeat(&[3], 40)).expect("period");
        assert_eq!((period.lag, period.distinct), (1, 1));
        assert!(!period.is_conclusive());
    }

    #[test]
    fn a_rare_call_in_a_long_pattern_is_part_of_it() {
        let mut pattern = vec![5; 403];
        pattern.push(6);
        assert_eq!(
            find_period(&repeat(&pattern, 5)).map(|period| period.lag),
            Some(404)
        );
    }

    #[test]
    fn a_few_foreign_calls_do_not_hide_the_period() {
        let mut tokens = repeat(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 20);
        tokens[37] = 99;
        tokens[141] = 98;
        let period = find_period(&tokens).expect("period");
        assert_eq!(period.lag, 10);
        assert!(period.match_ppm > 950_000);
    }

    #[test]
    fn a_step_begins_after_the_longest_pause() {
        let tokens = repeat(&[1, 2, 3], 8);
        let mut now = 0;
        let times: Vec<u64> = (0..tokens.len())
            .map(|at| {
                now += if at % 3 == 2 { 900 } else { 10 };
                now
            })
            .collect();
        assert_eq!(
            find_period_timed(&tokens, &times).map(|period| (period.lag, period.phase)),
            Some((3, 2))
        );
    }

    #[test]
    fn one_long_pause_elsewhere_does_not_move_the_edge() {
        let tokens = repeat(&[1, 2, 3], 8);
        let mut now = 0;
        let times: Vec<u64> = (0..tokens.len())
            .map(|at| {
                now += if at == 10 {
                    1_000_000
                } else if at % 3 == 0 {
                    500
                } else {
                    10
                };
                now
            })
            .collect();
        assert_eq!(
            find_period_timed(&tokens, &times).map(|period| period.phase),
            Some(0)
        );
    }
}
