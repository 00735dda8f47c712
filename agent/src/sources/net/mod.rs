//! Ports, their queues, and the TCP flows of traced processes, in the agent's own network namespace.
//!
//! # Facade
//! - [`NetSource::open`]`(node_name) -> Result<NetSource, NetError>`.
//! - [`NetSource::poll`]`(now_ns, realtime_offset_ns, &traced_pids) -> Vec<Observation>`: call every 100 to 200 ms; each
//!   call samples, and about once a second it returns one `Fact::Port` per port.
//! - [`NetSource::trouble`]`() -> Option<String>`: what cannot be seen, for status and report.
