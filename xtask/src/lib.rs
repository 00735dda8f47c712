//! Tasks around the product: setup, builds, the lab of virtual nodes, tests, packages.

pub mod bpf;
pub mod build;
pub mod lab;
pub mod paths;
pub mod setup;
pub mod shell;
