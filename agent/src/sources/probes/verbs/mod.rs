//! RDMA queue pairs of traced processes, with no plugin in the job: who is connected to whom, what was posted, what went wrong.
//!
//! Programs do not call a library to post: they call their device's provider through a pointer that the device's context holds.
//! The library's control calls lead to that pointer. The kernel tells of it once ([`ProcessEvent::PostsThrough`]), and a probe is
//! put where it leads, by file and offset ([`PostProbes`]); posts and bytes are counted in a kernel map and read every other
//! second ([`Queues`]).
//!
//! Programs that post by the newer functions of an `ibv_qp_ex` call those through pointers in the queue pair; each request that
//! moves data calls one that gives it its parts, and these are probed in the same way. What is aborted after that counts too.
//!
//! Not seen: posts before the probe was there (`QueuePair::posts_unseen`), and traffic that a GPU starts itself (GIN, GPUNetIO, IBGDA), which passes no CPU: the counters of
//! the ports have it.
//!
//! [`ProcessEvent::PostsThrough`]: crate::sources::procs::ProcessEvent::PostsThrough

mod facts;
mod place;
mod posts;
mod queues;

pub(super) use facts::{event, hardware, queue_pair};
pub(super) use place::Place;
pub use posts::PostsError;
pub(super) use posts::{PostProbes, Watched};
pub use queues::PairGrowth;
pub(super) use queues::Queues;
