//! Generated jobs with known faults, and how right the verdicts on them are.
//!
//! A [`variant::Variant`] says which fault hits a job of 4 nodes with 8 GPUs each, how hard, where and when.
//! [`job::play`] plays it step by step in exact nanoseconds; what was put in is the [`truth::Truth`]. [`observe`]
//! shows the job as an agent would have seen it, with its lags, blurs, clock offsets and losses, and the code under
//! test answers; [`traced`] shows it as profilers on its ranks would have, [`ring`] plays what a ring's network steps wait for. [`score`] compares, [`table`] prints. Only names of leaves and causes are common with that code.
#![forbid(unsafe_code)]

pub mod job;
pub mod matrix;
pub mod observe;
mod random;
pub mod ring;
pub mod score;
pub mod table;
pub mod traced;
pub mod truth;
pub mod variant;
pub mod work;
