//! The brain of stallscope: facts in, budgets and verdicts out.
//!
//! Everything here is pure: no I/O, no clock, no threads, no unsafe. The same facts give the same budgets, bit
//! for bit, whether they come from a live node, a recording or a trace file.
//!
//! The way through the crate, in the order of the data:
//! [`facts`] (what was observed for one GPU in one window) → [`budget`] (integer nanoseconds per [`leaf::Leaf`],
//! summing to the window) → [`job`] (ranks joined, waiting moved to who was late, causes named). Beside it, [`links`]
//! tells what the devices said about ports, PCIe and faults, and which GPU reaches which port.
#![forbid(unsafe_code)]

pub mod activity;
pub mod budget;
pub mod cause;
pub mod facts;
pub mod flops;
pub mod job;
pub mod leaf;
pub mod links;
mod noise;
pub mod peaks;
pub mod reading;
pub mod steps;
pub mod sweep;
pub mod time;
