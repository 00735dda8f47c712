//! The proxy thread: carries each collective from its kernel's start to its end.

use std::ffi::c_void;
use std::io;
use std::net::TcpStream;
use std::sync::{Arc, PoisonError};

use virtual_node_state::clock::now_ns;

use crate::comm::{Begun, Comm};
use crate::gpu::{self, End, Kernel};
use crate::wire::{Transfer, carry, receive_word, send_word};

/// Bytes/s between GPUs of a node, per direction (NVLink 4).
const NVLINK_BYTES_PER_S: u64 = 450_000_000_000;
/// Fixed cost of a collective on a node, ns.
const LATENCY_NS: u64 = 20_000;
/// A host later than this at a kernel's start has made its rank late; below it lies the wake-up of two threads.
const PUNCTUAL_NS: u64 = 2_000_000;
/// SMs a collective's kernel occupies: 16 of 132.
const SM_PPM: u64 = 121_212;

/// How bytes travel between the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pattern {
    /// Reduce-scatter then all-gather around the ring.
    AllReduce,
    /// Once around the ring: all-gather and reduce-scatter.
    Ring,
    /// From one node's leader along the ring to the last.
    Chain { first: usize },
}

/// One send or receive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PeerOp {
    pub(crate) sends: bool,
    pub(crate) peer: u32,
    pub(crate) bytes: u64,
}

/// What the proxy carries out.
#[derive(Debug)]
pub(crate) enum Work {
    Collective {
        sequence: u64,
        pattern: Pattern,
        bytes: u64,
    },
    Peers(Vec<PeerOp>),
}

/// Work of a communicator.
#[derive(Debug)]
pub(crate) struct Op {
    comm: Arc<Comm>,
    work: Work,
}

/// Called by the GPU when the kernel begins.
extern "C" fn kernel_begins(user: *mut c_void, number: u64, start_ns: u64) {
    // SAFETY: `user` is the box that `submit` leaked for exactly this call.
    let op = unsafe { Box::from_raw(user.cast::<Op>()) };
    let comm = Arc::clone(&op.comm);
    comm.queue
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .begun
        .push_back(Begun { number, start_ns, op });
    comm.begun.notify_one();
}

/// Submits work to a stream; false when the driver refuses.
pub(crate) fn submit(comm: &Arc<Comm>, stream: *mut c_void, work: Work) -> bool {
    let nodes = comm.nodes.len() as u64;
    let (bytes, wire_bytes, sequence) = match &work {
        Work::Collective {
            sequence,
            pattern,
            bytes,
        } => (*bytes, pattern.wire_bytes(*bytes, nodes), *sequence),
        Work::Peers(ops) => {
            let bytes = ops.iter().map(|op| op.bytes).sum();
            (bytes, bytes, u64::MAX)
        }
    };
    let user = Box::into_raw(Box::new(Op {
        comm: Arc::clone(comm),
        work,
    }))
    .cast();
    let kernel = Kernel {
        start: kernel_begins,
        user,
        sm_ppm: SM_PPM,
        bytes,
        wire_bytes,
        comm: comm.key,
        sequence,
        ranks_nodes: u64::from(comm.ranks) | nodes << 32,
    };
    let taken = gpu::enqueue(stream, &kernel);
    if !taken {
        // SAFETY: the driver did not keep the pointer, so the box is still ours.
        drop(unsafe { Box::from_raw(user.cast::<Op>()) });
    }
    taken
}

impl Pattern {
    /// Bytes each node sends to the next.
    pub(crate) fn wire_bytes(self, bytes: u64, nodes: u64) -> u64 {
        match self {
            _ if nodes < 2 => 0,
            Self::AllReduce => 2 * (nodes - 1) * bytes.div_ceil(nodes),
            Self::Ring => (nodes - 1) * bytes.div_ceil(nodes),
            Self::Chain { .. } => bytes,
        }
    }
}

/// The thread's body.
pub(crate) fn run(comm: &Arc<Comm>) {
    while let Some(begun) = next(comm) {
        let aborted = || comm.is_aborted();
        // A real GPU runs on while its host is starved; this one is its host. So what peers see is when the host came.
        let now = now_ns();
        let arrived_ns = if now - begun.start_ns.min(now) > PUNCTUAL_NS {
            now
        } else {
            begun.start_ns
        };
        let outcome = match &begun.op.work {
            Work::Collective {
                sequence,
                pattern,
                bytes,
            } => collective(comm, *sequence, *pattern, *bytes, arrived_ns, &aborted),
            Work::Peers(ops) => peers(comm, ops, arrived_ns, &aborted),
        };
        match outcome {
            Ok(end) => gpu::ended(begun.number, &End { arrived_ns, ..end }),
            // As with NCCL, a kernel whose peer is gone stays on the GPU until the communicator is aborted.
            Err(_) => {
                wait_for_abort(comm);
                let now = now_ns();
                gpu::ended(
                    begun.number,
                    &End {
                        arrived_ns,
                        all_arrived_ns: now,
                        moved_ns: now,
                        end_ns: now,
                    },
                );
            }
        }
    }
}

fn next(comm: &Comm) -> Option<Begun> {
    let mut queue = comm.queue.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        if let Some(begun) = queue.begun.pop_front() {
            return Some(begun);
        }
        if queue.closed {
            return None;
        }
        queue = comm.begun.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

fn wait_for_abort(comm: &Comm) {
    let mut queue = comm.queue.lock().unwrap_or_else(PoisonError::into_inner);
    while !queue.closed {
        queue = comm.begun.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

fn collective(
    comm: &Comm,
    sequence: u64,
    pattern: Pattern,
    bytes: u64,
    arrived_ns: u64,
    aborted: &dyn Fn() -> bool,
) -> io::Result<End> {
    let gone = |_| io::Error::from(io::ErrorKind::ConnectionAborted);
    comm.meeting.arrive(sequence, arrived_ns);
    if !comm.leader {
        return comm.meeting.wait_end(sequence, aborted).map_err(gone);
    }
    let on_node = comm
        .meeting
        .wait_arrivals(sequence, comm.local_ranks, aborted)
        .map_err(gone)?;
    let (all_arrived_ns, moved_ns) = match &comm.ring {
        None => (on_node, on_node),
        Some((to, from)) => {
            let all = agree(comm, to, from, on_node, aborted)?;
            travel(comm, pattern, bytes, to, from, aborted)?;
            (all, now_ns())
        }
    };
    let share =
        u64::from(comm.local_ranks.saturating_sub(1)) * 2 * bytes / u64::from(comm.local_ranks.max(1));
    let nvlink_ns =
        u64::try_from(u128::from(share) * 1_000_000_000 / u128::from(NVLINK_BYTES_PER_S)).unwrap_or(0);
    let end = End {
        arrived_ns,
        all_arrived_ns,
        moved_ns,
        end_ns: moved_ns.max(all_arrived_ns) + nvlink_ns + LATENCY_NS,
    };
    comm.meeting.finish(sequence, &end);
    Ok(end)
}

/// The last arrival over all nodes: a word goes round the ring twice, gathering and then telling.
fn agree(
    comm: &Comm,
    to: &TcpStream,
    from: &TcpStream,
    own: u64,
    aborted: &dyn Fn() -> bool,
) -> io::Result<u64> {
    let last = comm.nodes.len() - 1;
    if comm.node == 0 {
        send_word(to, own, aborted)?;
        let all = receive_word(from, aborted)?;
        send_word(to, all, aborted)?;
        return Ok(all);
    }
    let gathered = receive_word(from, aborted)?.max(own);
    send_word(to, gathered, aborted)?;
    let all = receive_word(from, aborted)?;
    if comm.node < last {
        send_word(to, all, aborted)?;
    }
    Ok(all)
}

fn travel(
    comm: &Comm,
    pattern: Pattern,
    bytes: u64,
    to: &TcpStream,
    from: &TcpStream,
    aborted: &dyn Fn() -> bool,
) -> io::Result<()> {
    let nodes = comm.nodes.len();
    let part = bytes.div_ceil(nodes as u64);
    let exchange = |left: u64| {
        let send = Transfer {
            stream: to,
            sends: true,
            left,
        };
        carry(
            &mut [
                send,
                Transfer {
                    stream: from,
                    sends: false,
                    left,
                },
            ],
            aborted,
        )
    };
    match pattern {
        Pattern::AllReduce => (0..2 * (nodes - 1)).try_for_each(|_| exchange(part)),
        Pattern::Ring => (0..nodes - 1).try_for_each(|_| exchange(part)),
        Pattern::Chain { first } => {
            let position = (comm.node + nodes - first) % nodes;
            if position > 0 {
                carry(
                    &mut [Transfer {
                        stream: from,
                        sends: false,
                        left: bytes,
                    }],
                    aborted,
                )?;
            }
            if position < nodes - 1 {
                carry(
                    &mut [Transfer {
                        stream: to,
                        sends: true,
                        left: bytes,
                    }],
                    aborted,
                )?;
            }
            Ok(())
        }
    }
}

/// Sends and receives of one group, all at once. Both sides first say when they arrived.
fn peers(comm: &Comm, ops: &[PeerOp], arrived_ns: u64, aborted: &dyn Fn() -> bool) -> io::Result<End> {
    let mut streams = Vec::with_capacity(ops.len());
    for op in ops.iter().filter(|op| op.sends) {
        let stream = comm.peer_out(op.peer)?;
        send_word(&stream, arrived_ns, aborted)?;
        streams.push((stream, *op));
    }
    let mut all_arrived_ns = arrived_ns;
    for op in ops.iter().filter(|op| !op.sends) {
        let stream = comm.peer_in(op.peer)?;
        all_arrived_ns = all_arrived_ns.max(receive_word(&stream, aborted)?);
        streams.push((stream, *op));
    }
    let mut transfers: Vec<Transfer<'_>> = streams
        .iter()
        .map(|(stream, op)| Transfer {
            stream,
            sends: op.sends,
            left: op.bytes,
        })
        .collect();
    carry(&mut transfers, aborted)?;
    let moved_ns = now_ns();
    Ok(End {
        arrived_ns,
        all_arrived_ns,
        moved_ns,
        end_ns: moved_ns + LATENCY_NS,
    })
}
