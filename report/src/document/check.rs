//! A document from outside is believed only when its sums hold.

use std::collections::BTreeMap;

use stallscope_attribution::leaf::{Class, Leaf};

use super::{Document, Gpu, Job, Rollup, SCHEMA, Sweep, build};

/// Why a document is not one.
#[derive(Debug, thiserror::Error)]
pub enum DocumentError {
    /// Not JSON, or JSON of another shape.
    #[error("not a stallscope report: {0}")]
    Json(#[from] serde_json::Error),
    /// A schema that this version does not read.
    #[error("schema {found:?} is not {SCHEMA:?}; use the stallscope version that wrote it")]
    Schema {
        /// What the document says it is.
        found: String,
    },
    /// Leaves or classes that do not sum to their total.
    #[error(
        "{what} sum to {sum_ns} ns, not to the {total_ns} ns of {whose}: the report was altered or cut short"
    )]
    Sum {
        /// Leaves or classes.
        what: &'static str,
        /// Which budget.
        whose: String,
        /// Their sum.
        sum_ns: i128,
        /// What they should sum to.
        total_ns: i128,
    },
    /// A leaf that cannot be negative is.
    #[error("leaf {leaf} of {whose} is {ns} ns: the report was altered")]
    Negative {
        /// Which leaf.
        leaf: String,
        /// Which budget.
        whose: String,
        /// Its value.
        ns: i64,
    },
    /// A roll-up that is not the sum of its GPUs.
    #[error("the totals of {whose} are not the sum of its GPUs: the report was altered or cut short")]
    Rollup {
        /// Which roll-up.
        whose: String,
    },
}

impl Document {
    /// Checks the schema and every sum; sums that an older producer left out are filled in by [`Self::from_json`]'s
    /// defaults and not checked.
    ///
    /// # Errors
    /// The first thing that does not hold.
    pub fn check(&self) -> Result<(), DocumentError> {
        if self.schema != SCHEMA {
            return Err(DocumentError::Schema {
                found: self.schema.clone(),
            });
        }
        self.jobs.iter().try_for_each(Job::check)
    }
}

impl Job {
    fn check(&self) -> Result<(), DocumentError> {
        self.gpus.iter().try_for_each(Gpu::check)?;
        if self.total != Rollup::default() && self.total != Rollup::over(&self.gpus) {
            return Err(DocumentError::Rollup {
                whose: format!("job {:?}", self.job),
            });
        }
        if !self.nodes.is_empty() && self.nodes != build::by_node(&self.gpus) {
            return Err(DocumentError::Rollup {
                whose: format!("the nodes of job {:?}", self.job),
            });
        }
        Ok(())
    }
}

impl Gpu {
    fn check(&self) -> Result<(), DocumentError> {
        let whose = || format!("rank {} on {:?}", self.rank, self.node);
        let total_ns = i128::from(self.total_ns);
        let leaves_ns: i128 = self.budget.values().copied().map(i128::from).sum();
        if leaves_ns != total_ns {
            return Err(DocumentError::Sum {
                what: "leaves",
                whose: whose(),
                sum_ns: leaves_ns,
                total_ns,
            });
        }
        let may_be_negative = |name: &str| Leaf::from_name(name).is_none_or(Leaf::may_be_negative);
        if let Some((leaf, ns)) = self
            .budget
            .iter()
            .find(|(leaf, ns)| **ns < 0 && !may_be_negative(leaf))
        {
            return Err(DocumentError::Negative {
                leaf: leaf.clone(),
                whose: whose(),
                ns: *ns,
            });
        }
        if self.sweep != swept(&self.budget) {
            let sum_ns = self.sweep.total_ns();
            return Err(DocumentError::Sum {
                what: "classes",
                whose: whose(),
                sum_ns,
                total_ns,
            });
        }
        Ok(())
    }
}

/// The classes of a budget. A leaf added by a newer producer belongs to the class its first word names.
fn swept(budget: &BTreeMap<String, i64>) -> Sweep {
    let mut sweep = Sweep::default();
    for (leaf, ns) in budget {
        let class = Leaf::from_name(leaf).map_or_else(|| class_by_prefix(leaf), Leaf::class);
        let sum = match class {
            Class::Compute => &mut sweep.compute_ns,
            Class::Comm => &mut sweep.exposed_comm_ns,
            Class::Memory => &mut sweep.exposed_memory_ns,
            Class::Idle => &mut sweep.idle_ns,
        };
        *sum += i128::from(*ns);
    }
    sweep
}

fn class_by_prefix(leaf: &str) -> Class {
    match leaf.split('.').next() {
        Some("compute" | "ideal") => Class::Compute,
        Some("comm") => Class::Comm,
        Some("memory") => Class::Memory,
        _ => Class::Idle,
    }
}
