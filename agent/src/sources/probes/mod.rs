//! The eBPF programs: loading, attaching, reading.
//!
//! # Facade
//! - [`Probes::load`]`(&ProbesConfig) -> Result<Loaded, LoadError>`: finds and loads the object. [`Loaded`] holds
//!   [`Probes`] (control), [`Reader`] (records; may go to its own thread) and [`Health`] (what each program gives, or why not).
//! - [`Probes::attach_library`]`(&Library) -> Result<Attached, AttachError>` and [`Probes::release_library`]`(LibraryId)`;
//!   both may take a while (milliseconds a symbol), so call them away from the reader's thread.
//! - [`Probes::trace_process`]`(tgid, ProcessRole)` and [`Probes::forget_process`]`(tgid)`: the kernel's filter. Children of
//!   traced processes are added by the kernel; [`ProcessEvent::Fork`] tells of them. The scheduler and file programs are
//!   attached while at least one process is traced.
//! - [`Reader::drain`]`(timeout, &mut dyn FnMut(RawEvent))`: waits, then gives everything there is. Call it at least every
//!   100 ms; kernel-side counters, idle launch runs and losses come through it too, so nothing else has to be polled.
//! - [`Probes::poll_waits`]`(now)`: attaches NCCL's wait hooks for a window now and then, and gives what the windows held.
//! - [`Probes::poll_device_errors`]`(now)`: what the kernel's own events told of devices.
//! - [`Probes::watch_posts`]`(tgid, address, by)` when [`ProcessEvent::PostsThrough`] says so: attaches to the RDMA provider's
//!   function there. [`Probes::look_for_posts`]`(tgid)` finds providers of processes that are older than the agent.
//! - [`Decoder::decode`]`(RawEvent, lookup, out)`: raw events to [`Decoded`]: an [`Observation`] or a [`ProcessEvent`].
//! - [`Probes::verifier_stats`], [`Probes::run_stats`], [`Reader::lost`], [`Decoder::refused`]: the probes' own cost and losses.
//!
//! [`Observation`]: crate::observation::Observation
//! [`ProcessEvent`]: crate::sources::procs::ProcessEvent
//! [`ProcessEvent::Fork`]: crate::sources::procs::ProcessEvent::Fork
//! [`ProcessEvent::PostsThrough`]: crate::sources::procs::ProcessEvent::PostsThrough

mod attach;
mod comms;
mod decode;
mod detach;
mod device_errors;
mod elf;
mod filter;
mod format;
mod health;
#[cfg(feature = "bpf-log")]
mod kernel_log;
mod library;
pub mod nccl;
mod object;
mod open;
mod points;
mod programs;
mod rings;
mod stats;
mod symbols;
mod verbs;
mod waits;

pub use attach::{AttachError, Attached, SymbolFailure};
pub use decode::{Decoded, Decoder, Refused};
pub use device_errors::{DeviceError, EventState};
pub use filter::FilterError;
pub use health::{Health, Outcome, ProgramHealth};
pub use object::{LoadError, Loaded, Probes, ProbesConfig, object_places};
pub use rings::{DrainError, Drained, RawEvent, Reader};
pub use stats::{RunStats, VerifierStats};
pub use symbols::{FirstInstruction, SymbolError, Symbols};
pub use verbs::{PairGrowth, PostsError};
pub(super) use waits::pause_ns;
pub use waits::{NoWaitHooks, ThreadWaits, WaitHooks, WaitsConfig};
