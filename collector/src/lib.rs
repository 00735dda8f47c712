//! The reference collector: takes the streams of agents, keeps them, joins nodes into jobs, answers reports.
//!
//! The way of a message: [`server`] (QUIC, mutual certificates) → session (frames, one client's state) → intake (the
//! one writer: dedupe, [`store`], flush, acknowledge) → [`board`] (recent facts by job) → analysis on demand.
#![forbid(unsafe_code)]

mod answer;
pub mod board;
mod clock;
pub mod config;
mod intake;
pub mod server;
mod session;
pub mod stats;
pub mod store;
pub mod tls;
pub mod verdicts;

pub use config::{CollectorConfig, DEFAULT_MAX_BYTES, Limits};
pub use server::{Collector, StartError};
