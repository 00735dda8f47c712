//! Observations become per-GPU history.
