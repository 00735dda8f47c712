//! A small cluster on this machine: virtual nodes with a job, one agent per node, a collector.
//!
//! Everything started here dies with this process, also when it is killed: children get a signal when their parent
//! is gone, and the virtual nodes watch their standard input.

pub mod certificates;
pub mod cluster;
pub mod interrupt;
pub mod leftovers;
pub mod observe;
pub mod process;
pub mod virtual_nodes;
