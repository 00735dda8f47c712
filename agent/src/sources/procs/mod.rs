//! Processes: discovery, job, rank, GPU.
