//! The eBPF programs: loading, attaching, reading.
