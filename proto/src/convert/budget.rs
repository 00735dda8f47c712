//! Budgets: leaves as packed numbers in the order of a versioned table of names.

use stallscope_attribution::budget::Budget;
use stallscope_attribution::facts::LeafInterval;
use stallscope_attribution::leaf::Leaf;

use super::WireError;
use crate::v1;

/// Version of the leaf table this build writes.
pub const LEAF_TABLE: u32 = 1;

/// Names of the leaves of table 1, in wire order. Tables are never changed: a new leaf makes a new table.
const TABLE_1: &[&str] = &[
    "ideal",
    "compute.recompute",
    "compute.platform",
    "compute.clock",
    "compute.contention",
    "compute.nonmatmul",
    "compute.kernel",
    "comm.transfer",
    "comm.net",
    "comm.skew",
    "comm.proto",
    "memory.copy",
    "memory.pcie",
    "idle.data.cpu",
    "idle.data.storage",
    "idle.ckpt",
    "idle.gc",
    "idle.cpu.sched",
    "idle.cpu.sync",
    "idle.alloc",
    "idle.compile",
    "idle.launch",
    "idle.dep",
    "idle.unknown",
];

/// The names of a table's leaves in wire order; `None` for a version this build does not know.
#[must_use]
pub fn leaf_table(version: u32) -> Option<&'static [&'static str]> {
    (version == LEAF_TABLE).then_some(TABLE_1)
}

impl From<&Budget> for v1::Budget {
    fn from(budget: &Budget) -> Self {
        let mut wire = Self {
            leaf_table: LEAF_TABLE,
            window_ns: budget.window_ns(),
            ..Self::default()
        };
        for (position, leaf_name) in TABLE_1.iter().enumerate() {
            let leaf = Leaf::from_name(leaf_name);
            wire.leaves_ns.push(leaf.map_or(0, |leaf| budget.leaf_ns(leaf)));
            if leaf.is_some_and(|leaf| budget.is_measured(leaf)) {
                wire.measured_bits |= 1 << position;
            }
        }
        for interval in budget.intervals() {
            let position = TABLE_1
                .iter()
                .position(|leaf_name| *leaf_name == interval.leaf.name());
            let width_ns = u64::try_from(i128::from(interval.high_ns) - i128::from(interval.low_ns));
            if let (Some(Ok(position)), Ok(width_ns)) = (position.map(u32::try_from), width_ns) {
                wire.interval_leaves.push(position);
                wire.interval_lows_ns.push(interval.low_ns);
                wire.interval_widths_ns.push(width_ns);
            }
        }
        wire
    }
}

impl TryFrom<v1::Budget> for Budget {
    type Error = WireError;

    fn try_from(wire: v1::Budget) -> Result<Self, WireError> {
        let version = wire.leaf_table;
        let table = leaf_table(version).ok_or(WireError::LeafTable {
            version,
            newest: LEAF_TABLE,
        })?;
        if wire.leaves_ns.len() != table.len() {
            return Err(WireError::LeafCount {
                version,
                found: wire.leaves_ns.len(),
                expected: table.len(),
            });
        }
        let mut leaves = [0_i64; Leaf::COUNT];
        let mut measured = 0_u32;
        for (position, (leaf_name, ns)) in table.iter().zip(&wire.leaves_ns).enumerate() {
            let leaf = Leaf::from_name(leaf_name).ok_or(WireError::LeafTable {
                version,
                newest: LEAF_TABLE,
            })?;
            leaves[leaf.index()] = *ns;
            if wire.measured_bits & (1 << position) != 0 {
                measured |= 1 << leaf.index();
            }
        }
        if wire.measured_bits >> table.len() != 0 {
            return Err(WireError::Unknown {
                field: "measured_bits",
                value: wire.measured_bits.into(),
            });
        }
        let intervals = intervals(&wire, table)?;
        Ok(Self::from_leaves(wire.window_ns, leaves, measured, intervals)?)
    }
}

fn intervals(wire: &v1::Budget, table: &[&str]) -> Result<Vec<LeafInterval>, WireError> {
    let count = wire.interval_leaves.len();
    if count != wire.interval_lows_ns.len() || count != wire.interval_widths_ns.len() {
        return Err(WireError::Intervals {
            why: "unequal numbers of leaves, lows and widths",
        });
    }
    if count > table.len() {
        return Err(WireError::Intervals {
            why: "more intervals than leaves",
        });
    }
    let bounds = wire.interval_lows_ns.iter().zip(&wire.interval_widths_ns);
    wire.interval_leaves
        .iter()
        .zip(bounds)
        .map(|(position, (low_ns, width_ns))| {
            let leaf = usize::try_from(*position)
                .ok()
                .and_then(|position| table.get(position))
                .and_then(|leaf_name| Leaf::from_name(leaf_name))
                .ok_or(WireError::Intervals {
                    why: "a leaf is not in the table",
                })?;
            let high_ns = low_ns
                .checked_add_unsigned(*width_ns)
                .ok_or(WireError::Intervals {
                    why: "an upper bound overflows",
                })?;
            Ok(LeafInterval {
                leaf,
                low_ns: *low_ns,
                high_ns,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_table_names_every_leaf_once() {
        let names: Vec<_> = Leaf::ALL.iter().map(|leaf| leaf.name()).collect();
        let table = leaf_table(LEAF_TABLE).expect("the newest table is known");
        assert_eq!(names.len(), table.len(), "a new leaf needs a new table");
        for leaf_name in table {
            assert!(
                names.contains(leaf_name),
                "{leaf_name} is in the table and not a leaf"
            );
        }
        assert!(table.len() < 32, "measured_bits holds 32 leaves");
    }
}
