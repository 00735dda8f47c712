//! Sweeping overlapping layers of intervals into disjoint segments: exact integers, `O(n log n)`.
//!
//! The same sweep splits the launching thread's states inside an idle gap and the events of a GPU inside a step.

use crate::time::Window;

/// Most layers a sweep can have.
pub const LAYERS: usize = 32;

/// A stretch in which the same layers are active.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// When.
    pub window: Window,
    /// Bit `i` is set when layer `i` is active.
    pub active: u32,
}

impl Segment {
    /// The active layer with the lowest number, which has the highest priority; `None` in a hole.
    #[must_use]
    pub const fn first(&self) -> Option<usize> {
        if self.active == 0 {
            None
        } else {
            Some(self.active.trailing_zeros() as usize)
        }
    }
}

/// The segments of `within` in order: disjoint, adjacent, covering it whole. Intervals are given with their layer;
/// they may overlap, also within a layer, and parts outside `within` do not count. Layers at or above [`LAYERS`] are
/// ignored.
#[must_use]
pub fn sweep(within: Window, intervals: impl IntoIterator<Item = (usize, Window)>) -> Vec<Segment> {
    let mut edges: Vec<(u64, usize, i32)> = Vec::new();
    for (layer, window) in intervals {
        if let Some(inside) = window.intersect(within).filter(|_| layer < LAYERS) {
            edges.push((inside.start_ns(), layer, 1));
            edges.push((inside.end_ns(), layer, -1));
        }
    }
    edges.sort_unstable();
    let mut depth = [0_i32; LAYERS];
    let mut active = 0_u32;
    let mut from = within.start_ns();
    let mut segments: Vec<Segment> = Vec::new();
    for (at, layer, change) in edges {
        push(&mut segments, from, at, active);
        from = from.max(at);
        depth[layer] += change;
        if depth[layer] > 0 {
            active |= 1 << layer;
        } else {
            active &= !(1 << layer);
        }
    }
    push(&mut segments, from, within.end_ns(), active);
    segments
}

/// Nanoseconds of each layer by priority: where layers overlap the lowest number has the time. The second part is
/// the time that no layer covers. All of it sums to the length of `within`.
#[must_use]
pub fn by_priority(
    within: Window,
    intervals: impl IntoIterator<Item = (usize, Window)>,
) -> ([u64; LAYERS], u64) {
    let mut layers = [0; LAYERS];
    let mut uncovered = 0;
    for segment in sweep(within, intervals) {
        match segment.first() {
            Some(layer) => layers[layer] += segment.window.len_ns(),
            None => uncovered += segment.window.len_ns(),
        }
    }
    (layers, uncovered)
}

fn push(segments: &mut Vec<Segment>, from: u64, to: u64, active: u32) {
    let Some(window) = Window::new(from, to).filter(|window| !window.is_empty()) else {
        return;
    };
    if let Some(last) = segments.last_mut()
        && last.active == active
        && let Some(joined) = Window::new(last.window.start_ns(), to)
    {
        last.window = joined;
        return;
    }
    segments.push(Segment { window, active });
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn window(start: u64, end: u64) -> Window {
        Window::new(start, end).unwrap_or_default()
    }

    #[test]
    fn the_lower_layer_wins_where_layers_overlap() {
        let (layers, hole) = by_priority(
            window(0, 100),
            [
                (1, window(0, 60)),
                (0, window(40, 50)),
                (2, window(30, 200)),
                (1, window(5, 20)),
            ],
        );
        assert_eq!((layers[0], layers[1], layers[2], hole), (10, 50, 40, 0));
    }

    #[test]
    fn an_empty_window_has_no_segments() {
        assert!(sweep(window(5, 5), [(0, window(0, 10))]).is_empty());
    }

    proptest! {
        #[test]
        fn equals_counting_every_nanosecond(
            intervals in proptest::collection::vec((0_usize..5, 0_u64..80, 0_u64..40), 0..20),
            start in 0_u64..40,
            length in 0_u64..60,
        ) {
            let within = window(start, start + length);
            let intervals: Vec<_> =
                intervals.into_iter().map(|(layer, at, len)| (layer, window(at, at + len))).collect();
            let (layers, hole) = by_priority(within, intervals.iter().copied());
            let mut counted = [0_u64; LAYERS];
            let mut uncovered = 0;
            for at in within.start_ns()..within.end_ns() {
                let owner = intervals
                    .iter()
                    .filter(|(_, window)| window.start_ns() <= at && at < window.end_ns())
                    .map(|(layer, _)| *layer)
                    .min();
                match owner {
                    Some(layer) => counted[layer] += 1,
                    None => uncovered += 1,
                }
            }
            prop_assert_eq!(layers, counted);
            prop_assert_eq!(hole, uncovered);
        }

        #[test]
        fn segments_cover_the_window_without_overlap(
            intervals in proptest::collection::vec((0_usize..32, 0_u64..1000, 0_u64..400), 0..40),
        ) {
            let within = window(100, 900);
            let mut at = within.start_ns();
            for segment in sweep(within, intervals.iter().map(|(layer, s, l)| (*layer, window(*s, s + l)))) {
                prop_assert_eq!(segment.window.start_ns(), at);
                prop_assert!(!segment.window.is_empty());
                at = segment.window.end_ns();
            }
            prop_assert_eq!(at, within.end_ns());
        }
    }
}
