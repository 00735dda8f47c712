//! The plugin between a program that plays NCCL, by NCCL's own headers, and the agent.

mod agent;
mod caller;
mod job;
