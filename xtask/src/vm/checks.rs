//! The checks, in the order in which they are made.

mod links;
mod nccl;
mod pcie;
mod programs;
mod rdma;
mod recorded;

use anyhow::Result;

use super::pair::Pair;

/// A check says what it found, or what is wrong.
type Check = fn(&Pair) -> Result<String>;

/// Every check with its name.
pub(super) const ALL: [(&str, Check); 9] = [
    ("programs load", programs::load),
    ("doctor", programs::doctor),
    ("RDMA counters", rdma::counters),
    ("lost packets", links::loss),
    ("late packets", links::delay),
    ("PCIe errors", pcie::errors),
    ("PCIe width", pcie::width),
    ("NCCL transport", nccl::transport),
    ("devices recorded", recorded::devices),
];
