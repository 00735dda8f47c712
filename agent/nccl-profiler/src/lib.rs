//! `libnccl-profiler-stallscope.so`: NCCL's own events of a job, for the agent on its node.
//!
//! NCCL loads it when `NCCL_PROFILER_PLUGIN` names it. It makes memory of fixed size ([`stallscope_records::profiler`]), which
//! the agent finds by the name of its file, and asks NCCL for nothing until an agent asks for something.
//!
//! What a job is promised:
//!
//! - **On NCCL's threads nothing waits.** After `init` no call allocates, locks, enters the kernel (the clock is read through
//!   the vDSO) or can panic; all loops are bounded. Without an agent NCCL does not call at all: its mask is 0.
//! - **No handle is a pointer.** NCCL's handles are names of entries with a generation, checked whenever they come back. Events
//!   that end twice, never, or after they are gone, and handles of other processes cost a counter.
//! - **One thread, asleep.** NCCL's mask is a variable of NCCL's that somebody has to write, and while it is 0 nobody calls
//!   here. A thread with every signal blocked looks four times a second whether the agent asks for another mask, and takes
//!   the agent for gone after [`PATIENCE_NS`](stallscope_records::profiler::PATIENCE_NS) without a sign of life.
//! - **It stays out of the way.** What cannot be set up makes `init` fail, and NCCL goes on without a profiler. In a child made
//!   by `fork` it does nothing.

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("threads are told by their x86-64 thread pointer");

mod abi;
mod communicators;
mod events;
mod interface;
mod shared;
mod switch;
mod thread;
