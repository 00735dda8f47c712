//! The QUIC stream to a collector.
//!
//! [`core`] is the protocol without sockets or clock; `link` is one QUIC connection; [`run`] joins them; [`query()`]
//! asks a collector for a report. What is sent is read from the store and stays there until the collector has it on
//! disk, so an outage loses nothing as long as the store has room.

pub mod core;
mod driver;
mod link;
mod query;

pub use driver::{StreamStatus, run};
pub use link::LinkError;
pub use query::{QueryError, query};
