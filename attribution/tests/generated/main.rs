//! Jobs made from their causes, and what the analysis says about them.

mod faults;
mod generator;
mod job;
