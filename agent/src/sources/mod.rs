//! Where facts come in.

pub mod clock;
pub mod kineto;
pub mod net;
pub mod nvml;
pub mod probes;
pub mod procs;
