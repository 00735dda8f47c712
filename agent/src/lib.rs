//! The node side of stallscope.
//!
//! Data flows one way: [`sources`] yield [`observation::Observation`]s, [`timeline`] turns them into per-GPU history,
//! the budget (crate `stallscope-attribution`) turns history into budgets, and every sink — [`store`], [`stream`],
//! the control socket — sees the same messages.

pub mod answers;
pub mod cli;
pub mod config;
pub mod control;
pub mod doctor;
pub mod observation;
pub mod record;
pub mod runtime;
pub mod sources;
pub mod store;
pub mod stream;
pub mod timeline;
