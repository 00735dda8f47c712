//! Stretches of steps of one length: where a fault begins and ends.
//!
//! The segmentation with the least absolute deviation from the medians, each cut verified: the medians differ by more
//! than six in a hundred and the steps of each side lie on its own side of the middle. Single slow steps cut nothing.

use core::ops::Range;

use super::align::AlignedStep;
use crate::budget::arith::median;
use crate::facts::PPM;
use crate::noise::noise_ppm;

/// Least difference of medians on a noisy host, parts per million of the smaller.
const DIFFERENCE_PPM: u64 = 60_000;
/// Least difference however steady the steps are.
const STEADY_PPM: u64 = 18_000;
/// Least difference in units of the steps' noise.
const OF_NOISE: u64 = 4;
/// Leading steps that may be the job's warm-up: compilation, loading of modules, a profiler that attaches.
const WARM_UP_STEPS: usize = 5;
/// A leading step this much longer than the median belongs to the warm-up, percent.
const WARM_UP_PERCENT: u64 = 150;
/// Share of steps that must lie on their side's half, percent.
const SEPARATED_PERCENT: usize = 75;
/// A side has at least this many steps, or lasts this long.
const LEAST_STEPS: usize = 10;
const LEAST_NS: u64 = 3_000_000_000;
/// Fewest steps of a side, however long they are.
const FEWEST_STEPS: usize = 4;
/// Points the search works on; longer histories are folded by medians.
const POINTS: usize = 240;

/// The regimes, in order; they cover all steps but those of the job's warm-up.
pub(super) fn find(steps: &[AlignedStep<'_>]) -> Vec<Range<usize>> {
    let lengths: Vec<u64> = steps.iter().map(AlignedStep::step_ns).collect();
    let warm_up = warm_up(&lengths);
    let regimes = split(&lengths[warm_up..]);
    regimes
        .into_iter()
        .map(|regime| regime.start + warm_up..regime.end + warm_up)
        .collect()
}

/// How many of the first steps are far longer than what follows; none when they are many.
fn warm_up(lengths: &[u64]) -> usize {
    let normal = median(lengths.to_vec());
    let long = |length: &u64| u128::from(*length) * 100 >= u128::from(normal) * u128::from(WARM_UP_PERCENT);
    let first = lengths.iter().take_while(|length| long(length)).count();
    if first <= WARM_UP_STEPS && first * 4 <= lengths.len() {
        first
    } else {
        0
    }
}

/// Least difference of two stretches with such noise, parts per million: a steady job shows small changes.
fn difference_ppm(noise_ppm: u64) -> u64 {
    noise_ppm
        .saturating_mul(OF_NOISE)
        .clamp(STEADY_PPM, DIFFERENCE_PPM)
}

/// A regime is compared with one whose steps are shorter by this many parts per million.
pub(super) fn healthier_ppm(noise_ppm: u64) -> u64 {
    difference_ppm(noise_ppm) / 12 * 11
}

/// As [`find`], from lengths of steps in ns.
fn split(lengths: &[u64]) -> Vec<Range<usize>> {
    if lengths.is_empty() {
        return Vec::new();
    }
    let stride = lengths.len().div_ceil(POINTS);
    let points: Vec<u64> = lengths
        .chunks(stride)
        .map(|chunk| median(chunk.to_vec()))
        .collect();
    let mut cuts = segment(&points, stride);
    // A cut that does not stand up goes, the weakest first: its sides may make a neighbour's cut fail or stand.
    while let Some(weakest) = (1..cuts.len() - 1)
        .filter(|at| !verified(&points[cuts[at - 1]..cuts[*at]], &points[cuts[*at]..cuts[at + 1]]))
        .min_by_key(|at| step_between(&points[cuts[at - 1]..cuts[*at]], &points[cuts[*at]..cuts[at + 1]]))
    {
        cuts.remove(weakest);
    }
    let at = |cut: usize| {
        if cut == points.len() {
            lengths.len()
        } else {
            cut * stride
        }
    };
    cuts.windows(2).map(|ends| at(ends[0])..at(ends[1])).collect()
}

/// The segmentation with the least sum of deviations plus a price per segment, by dynamic programming; as cuts, both
/// ends included. A point stands for `stride` steps.
fn segment(points: &[u64], stride: usize) -> Vec<usize> {
    let count = points.len();
    // Half of what the smallest change worth finding saves over the shortest side.
    let typical = median(points.to_vec());
    let price = typical.saturating_mul(FEWEST_STEPS as u64) * (DIFFERENCE_PPM / 2) / 1_000_000;
    let mut best: Vec<(u64, usize)> = vec![(u64::MAX, 0); count + 1];
    best[0] = (0, 0);
    for start in 0..count {
        let so_far = best[start].0;
        if so_far == u64::MAX {
            continue;
        }
        let mut sorted: Vec<u64> = Vec::with_capacity(count - start);
        for end in start + 1..=count {
            let value = points[end - 1];
            sorted.insert(sorted.partition_point(|other| *other < value), value);
            // Of sorted values, the deviation from the median is the upper half less the lower.
            let (lower, upper) = sorted.split_at(sorted.len() / 2);
            let (below, above): (u64, u64) = (lower.iter().sum(), upper.iter().sum());
            if !long_enough(
                sorted.len() * stride,
                (below + above).saturating_mul(stride as u64),
            ) {
                continue;
            }
            let middle = if sorted.len() % 2 == 1 { upper[0] } else { 0 };
            let total = so_far
                .saturating_add(above - middle - below)
                .saturating_add(price);
            if total < best[end].0 {
                best[end] = (total, start);
            }
        }
    }
    let mut cuts = vec![count];
    // A history shorter than one side has no way to its end but as a whole.
    let mut at = if best[count].0 == u64::MAX {
        0
    } else {
        best[count].1
    };
    while at > 0 {
        cuts.push(at);
        at = best[at].1;
    }
    cuts.push(0);
    cuts.reverse();
    cuts
}

/// Whether so many steps of that length together are a stretch of their own.
const fn long_enough(steps: usize, length_ns: u64) -> bool {
    steps >= LEAST_STEPS || (steps >= FEWEST_STEPS && length_ns >= LEAST_NS)
}

fn step_between(before: &[u64], after: &[u64]) -> u64 {
    median(before.to_vec()).abs_diff(median(after.to_vec()))
}

fn verified(before: &[u64], after: &[u64]) -> bool {
    let (left, right) = (median(before.to_vec()), median(after.to_vec()));
    let smaller = left.min(right);
    let least = difference_ppm(noise_ppm(before).max(noise_ppm(after)));
    if u128::from(left.abs_diff(right)) * u128::from(PPM) < u128::from(smaller) * u128::from(least) {
        return false;
    }
    let middle = smaller + left.abs_diff(right) / 2;
    let own_side = |part: &[u64], high: bool| {
        let count = part.iter().filter(|value| (**value > middle) == high).count();
        count * 100 >= part.len() * SEPARATED_PERCENT
    };
    own_side(before, left > right) && own_side(after, right > left)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Deterministic noise of up to `spread` parts in a thousand.
    fn noisy(base_ms: u64, count: usize, spread: u64, seed: u64) -> Vec<u64> {
        (0..count as u64)
            .map(|at| {
                let hash = (at + seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                base_ms * MS * (1000 + hash % (2 * spread + 1) - spread) / 1000
            })
            .collect()
    }

    #[test]
    fn a_steady_job_is_one_regime() {
        assert_eq!(split(&noisy(400, 200, 60, 1)), vec![0..200]);
        assert!(split(&[]).is_empty());
    }

    #[test]
    fn onset_and_end_are_found_to_the_step() {
        let lengths = [
            noisy(400, 30, 40, 1),
            noisy(560, 40, 40, 2),
            noisy(400, 20, 40, 3),
        ]
        .concat();
        assert_eq!(split(&lengths), vec![0..30, 30..70, 70..90]);
    }

    #[test]
    fn a_fault_in_the_middle_third_is_found() {
        let lengths = [
            noisy(400, 40, 40, 1),
            noisy(560, 55, 40, 2),
            noisy(400, 55, 40, 3),
        ]
        .concat();
        assert_eq!(split(&lengths), vec![0..40, 40..95, 95..150]);
    }

    #[test]
    fn a_few_steps_are_one_regime() {
        assert_eq!(split(&[400 * MS]), vec![0..1]);
        assert_eq!(split(&noisy(400, 7, 300, 1)), vec![0..7]);
    }

    #[test]
    fn long_steps_need_seconds_not_ten_of_them() {
        let lengths = [noisy(400, 40, 40, 1), noisy(1100, 4, 40, 2)].concat();
        assert_eq!(split(&lengths), vec![0..40, 40..44]);
    }

    #[test]
    fn single_slow_steps_split_nothing() {
        let mut lengths = noisy(400, 90, 40, 1);
        for slow in [8, 30, 31, 77] {
            lengths[slow] *= 4;
        }
        assert_eq!(split(&lengths), vec![0..90]);
    }

    #[test]
    fn a_small_change_is_noise() {
        let noise = [noisy(400, 40, 40, 1), noisy(420, 40, 40, 2)].concat();
        assert_eq!(split(&noise), vec![0..80]);
        let smaller = [noisy(400, 40, 5, 1), noisy(406, 40, 5, 2)].concat();
        assert_eq!(split(&smaller), vec![0..80]);
    }

    #[test]
    fn a_steady_job_shows_a_small_change() {
        let lengths = [noisy(400, 40, 5, 1), noisy(412, 40, 5, 2)].concat();
        assert_eq!(split(&lengths), vec![0..40, 40..80]);
    }

    #[test]
    fn a_long_first_step_is_warm_up_and_a_long_start_is_not() {
        let steady = noisy(400, 40, 5, 1);
        let attached = [vec![4_000 * MS], steady.clone()].concat();
        assert_eq!(warm_up(&attached), 1);
        assert_eq!(warm_up(&steady), 0);
        let slow_start = [noisy(900, 12, 5, 2), steady].concat();
        assert_eq!(warm_up(&slow_start), 0);
    }

    #[test]
    fn a_long_history_is_folded_and_still_split() {
        let lengths = [noisy(400, 5000, 40, 1), noisy(600, 5000, 40, 2)].concat();
        let regimes = split(&lengths);
        assert_eq!(regimes.len(), 2);
        assert!(regimes[0].end.abs_diff(5000) <= 50, "{regimes:?}");
    }
}
