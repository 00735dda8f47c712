//! NVIDIA's management library: one thread per GPU, each call under a deadline.
//!
//! # Facade
//! - [`NvmlSource::open`]`(&config.nvml) -> Result<NvmlSource, NvmlError>`: loads the library and starts one thread per
//!   GPU; takes at most some seconds even when a GPU is sick. On an error the agent goes on without.
//! - [`NvmlSource::poll`]`(now_ns) -> Vec<Observation>`: everything that arrived, call about every 100 ms. A GPU whose
//!   call does not return has readings `Failed(..)` once a second until it does.
//! - [`NvmlSource::view`]`() -> GpuView`: devices and compute processes for `procs::Discovery::set_gpus`.
//! - [`NvmlSource::dropped`]`() -> u64`: readings lost because nobody polled.
//!
//! `process_sm_ppm` (once a second), `processes`, temperature and memory are in the reading in which they were read
//! and `NotMeasured` in the others: keep the last.
