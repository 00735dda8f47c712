//! `libcuda.so.1` without the silicon: the driver API's names and ABI, and behind them a virtual GPU that runs
//! streams in order in real time.
//!
//! Kernels do not compute; they take time. A module image is a text that says how long each kernel takes at the
//! reference clock and what it uses (see `module.rs`).

mod api;
mod engine;
mod memory;
mod module;
mod symbols;
