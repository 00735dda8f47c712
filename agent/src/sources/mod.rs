//! Where facts come in.

pub mod clock;
pub mod kineto;
pub mod load;
pub mod nccl_profiler;
pub mod net;
mod nic_stats;
pub mod nvml;
mod patrol;
pub mod pcie;
pub mod probes;
pub mod procs;
pub mod rdma;
mod sysfs;
pub mod xid;
