//! The stream against a model in virtual time, and against the real collector over loopback.
#![expect(clippy::unwrap_used, reason = "tests")]

mod hostile;
mod kill;
mod lab;
mod loopback;
mod spool;
mod virtual_time;
