//! Memory shared by everything that plays the part of the silicon: the state of each virtual GPU, the knobs by which
//! faults reach a running job, and the log from which the truth is told.
//!
//! All times are nanoseconds of `CLOCK_MONOTONIC`; virtual nodes share one host, so one clock serves them all.

pub mod activity;
pub mod clock;
pub mod control;
pub mod gpu;
pub mod log;
pub mod map;
pub mod power;

/// One million parts: the unit of every share in this crate.
pub const PPM: u64 = 1_000_000;

/// Environment variable naming the folder of a virtual node; read only by the stand-in libraries.
pub const VNODE_ENV: &str = "STALLSCOPE_VNODE";

#[cfg(test)]
mod tests;
