//! The loss budget of one window: integer nanoseconds per leaf that sum to the window.

pub(crate) mod arith;
mod assess;
mod busy;
mod idle;

use crate::facts::LeafInterval;
use crate::leaf::{Class, Leaf};

pub use assess::{assess, assess_span};

/// Where one GPU's window went. The leaves sum to the window exactly, always.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    window_ns: u64,
    leaves: [i64; Leaf::COUNT],
    /// Bit `i` is set when `Leaf::ALL[i]` was measured; an unmeasured leaf's time sits in its class's residual.
    measured: u32,
    intervals: Vec<LeafInterval>,
}

/// Why leaves do not make a budget.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BudgetError {
    /// The leaves do not sum to the window.
    #[error("leaves sum to {sum_ns} ns in a window of {window_ns} ns")]
    Sum {
        /// Sum of the leaves.
        sum_ns: i128,
        /// Length of the window.
        window_ns: u64,
    },
    /// A leaf that cannot be negative is.
    #[error("leaf {} is {ns} ns", leaf.name())]
    Negative {
        /// Which leaf.
        leaf: Leaf,
        /// Its value.
        ns: i64,
    },
}

impl Budget {
    /// A budget from its leaves.
    ///
    /// # Errors
    /// When the leaves do not sum to `window_ns`, or one that cannot be negative is.
    pub fn from_leaves(
        window_ns: u64,
        leaves: [i64; Leaf::COUNT],
        measured: u32,
        intervals: Vec<LeafInterval>,
    ) -> Result<Self, BudgetError> {
        let sum_ns: i128 = leaves.iter().copied().map(i128::from).sum();
        if sum_ns != i128::from(window_ns) {
            return Err(BudgetError::Sum { sum_ns, window_ns });
        }
        for leaf in Leaf::ALL {
            let ns = leaves[leaf.index()];
            if ns < 0 && !leaf.may_be_negative() {
                return Err(BudgetError::Negative { leaf: *leaf, ns });
            }
        }
        Ok(Self {
            window_ns,
            leaves,
            measured,
            intervals,
        })
    }

    /// A budget of a window nobody saw anything of: all of it is [`Leaf::IdleUnknown`], no leaf measured.
    #[must_use]
    pub fn unobserved(window_ns: u64) -> Self {
        let window_ns = window_ns.min(i64::MAX.unsigned_abs());
        let mut leaves = [0; Leaf::COUNT];
        leaves[Leaf::IdleUnknown.index()] = i64::try_from(window_ns).unwrap_or(i64::MAX);
        Self {
            window_ns,
            leaves,
            measured: 0,
            intervals: Vec::new(),
        }
    }

    /// The sum of budgets of disjoint windows. A leaf is measured when any part measured it; its interval is the
    /// sum of the parts' intervals, a part without one counting as exact.
    #[must_use]
    pub fn sum<'a>(parts: impl IntoIterator<Item = &'a Self>) -> Self {
        let mut window_ns = 0_u64;
        let mut leaves = [0_i64; Leaf::COUNT];
        let mut measured = 0;
        let mut slack = [(0_i64, 0_i64); Leaf::COUNT];
        for part in parts {
            window_ns = window_ns.saturating_add(part.window_ns);
            measured |= part.measured;
            for (total, ns) in leaves.iter_mut().zip(part.leaves) {
                *total = total.saturating_add(ns);
            }
            for interval in &part.intervals {
                let point = part.leaf_ns(interval.leaf);
                let (below, above) = &mut slack[interval.leaf.index()];
                *below = below.saturating_add(point.saturating_sub(interval.low_ns));
                *above = above.saturating_add(interval.high_ns.saturating_sub(point));
            }
        }
        let intervals = Leaf::ALL
            .iter()
            .filter(|leaf| slack[leaf.index()] != (0, 0))
            .map(|leaf| {
                let ((below, above), point) = (slack[leaf.index()], leaves[leaf.index()]);
                LeafInterval {
                    leaf: *leaf,
                    low_ns: point - below,
                    high_ns: point.saturating_add(above),
                }
            })
            .collect();
        Self {
            window_ns,
            leaves,
            measured,
            intervals,
        }
    }

    /// Moves time between leaves, by leaf; a change that does not sum to zero, or would make a leaf negative that
    /// cannot be, is not made. Leaves in `measured` count as measured from now on, those that changed are as uncertain
    /// as their whole class.
    pub(crate) fn shift(&mut self, changes: &[i64; Leaf::COUNT], measured: u32) {
        let mut leaves = self.leaves;
        for (leaf, change) in leaves.iter_mut().zip(changes) {
            *leaf += change;
        }
        let valid = |leaf: &Leaf| leaf.may_be_negative() || leaves[leaf.index()] >= 0;
        if changes.iter().sum::<i64>() != 0 || !Leaf::ALL.iter().all(valid) {
            return;
        }
        self.measured |= measured;
        let before = core::mem::replace(&mut self.leaves, leaves);
        for class in Class::ALL {
            let of_class = |leaf: &Leaf| leaf.class() == class;
            if Leaf::ALL
                .iter()
                .copied()
                .filter(of_class)
                .all(|leaf| changes[leaf.index()] == 0)
            {
                continue;
            }
            let mut slack = (0, 0);
            self.intervals.retain(|interval| {
                if of_class(&interval.leaf) {
                    let point = before[interval.leaf.index()];
                    slack = (
                        slack.0 + point - interval.low_ns,
                        slack.1 + interval.high_ns - point,
                    );
                }
                !of_class(&interval.leaf)
            });
            for leaf in Leaf::ALL.iter().copied().filter(of_class) {
                let ns = self.leaves[leaf.index()];
                if slack != (0, 0) && (ns != 0 || changes[leaf.index()] != 0) {
                    let low_ns = if leaf.may_be_negative() {
                        ns - slack.0
                    } else {
                        (ns - slack.0).max(0)
                    };
                    self.intervals.push(LeafInterval {
                        leaf,
                        low_ns,
                        high_ns: ns.saturating_add(slack.1),
                    });
                }
            }
        }
        self.intervals.sort_by_key(|interval| interval.leaf);
    }

    /// Length of the window in nanoseconds.
    #[must_use]
    pub const fn window_ns(&self) -> u64 {
        self.window_ns
    }

    /// Nanoseconds of one leaf.
    #[must_use]
    pub const fn leaf_ns(&self, leaf: Leaf) -> i64 {
        self.leaves[leaf.index()]
    }

    /// All leaves, in the order of [`Leaf::ALL`].
    #[must_use]
    pub const fn leaves(&self) -> &[i64; Leaf::COUNT] {
        &self.leaves
    }

    /// Whether the leaf was measured; if not, its time is in its class's residual.
    #[must_use]
    pub const fn is_measured(&self, leaf: Leaf) -> bool {
        self.measured & (1 << leaf.index()) != 0
    }

    /// Bit set of measured leaves.
    #[must_use]
    pub const fn measured_bits(&self) -> u32 {
        self.measured
    }

    /// Bounds of the leaves that are not exact.
    #[must_use]
    pub fn intervals(&self) -> &[LeafInterval] {
        &self.intervals
    }

    /// Nanoseconds of one class.
    #[must_use]
    pub fn class_ns(&self, class: Class) -> i64 {
        Leaf::ALL
            .iter()
            .filter(|leaf| leaf.class() == class)
            .map(|leaf| self.leaf_ns(*leaf))
            .sum()
    }
}

/// Leaves while a budget is made.
#[derive(Debug, Default)]
struct Leaves {
    ns: [i64; Leaf::COUNT],
    measured: u32,
    intervals: Vec<LeafInterval>,
}

impl Leaves {
    /// A measured leaf, with the bounds of an estimate.
    fn set(&mut self, leaf: Leaf, ns: i64, bounds: Option<(i64, i64)>) {
        self.ns[leaf.index()] = ns;
        self.measured |= 1 << leaf.index();
        if let Some((low_ns, high_ns)) = bounds {
            self.intervals.push(LeafInterval {
                leaf,
                low_ns: low_ns.min(ns),
                high_ns: high_ns.max(ns),
            });
        }
    }

    /// Takes back that a leaf was measured: what it holds is a remainder between the given bounds.
    fn unmeasure(&mut self, leaf: Leaf, bounds: (i64, i64)) {
        self.measured &= !(1 << leaf.index());
        self.intervals.retain(|interval| interval.leaf != leaf);
        let ns = self.ns[leaf.index()];
        self.intervals.push(LeafInterval {
            leaf,
            low_ns: bounds.0.min(ns),
            high_ns: bounds.1.max(ns),
        });
    }

    /// The budget. Leaves that contradict each other give one in which nothing is known: it still sums.
    fn into_budget(mut self, window_ns: u64) -> Budget {
        self.intervals.sort_by_key(|interval| interval.leaf);
        Budget::from_leaves(window_ns, self.ns, self.measured, self.intervals)
            .unwrap_or_else(|_| Budget::unobserved(window_ns))
    }
}
