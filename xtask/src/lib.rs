//! Tasks around the product: setup, builds, the lab of virtual nodes, tests, packages.

pub mod bench;
pub mod bpf;
pub mod build;
pub mod ci;
pub mod cost;
pub mod demo;
pub mod judge;
pub mod lab;
pub mod overhead;
pub mod package;
pub mod paths;
pub mod progress;
pub mod scenario;
pub mod setup;
pub mod shell;
pub mod testing;
pub mod truth;
pub mod vm;

/// What a task prints on standard output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum OutputFormat {
    /// For people.
    Text,
    /// Exactly one JSON document.
    Json,
}
