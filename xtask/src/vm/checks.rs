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
pub(super) const ALL: [(&str, Check); 12] = [
    ("programs load", programs::load),
    ("doctor", programs::doctor),
    ("RDMA counters", rdma::counters),
    ("PCIe errors", pcie::errors),
    ("PCIe width", pcie::width),
    ("devices recorded", recorded::devices),
    ("queue pairs", recorded::queue_pairs),
    ("NCCL transport", nccl::transport),
    ("lost packets", links::loss),
    ("late packets", links::delay),
    ("limited link", links::limit),
    ("recorders stop", recorded::stopped),
];
