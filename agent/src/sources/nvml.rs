//! The NVIDIA management library, one thread per GPU with a deadline.
