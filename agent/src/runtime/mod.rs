//! The running agent: sources, timeline and sinks joined.

pub mod status;
