//! `libnccl.so.2` without the silicon: NCCL's public names and ABI. Ranks of a node meet in shared memory; between
//! nodes a ring of node leaders moves real bytes over TCP on a proxy thread. A collective's kernel stays resident on
//! the virtual GPU until every rank has arrived and the bytes have moved.

mod api;
mod bootstrap;
mod comm;
mod drain;
mod extras;
mod gpu;
mod local;
mod profiling;
mod proxy;
mod steps;
mod wire;
