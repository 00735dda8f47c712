//! The proxy thread: carries each collective from its kernel's start to its end.

use std::ffi::c_void;
use std::io;
use std::net::TcpStream;
use std::sync::{Arc, PoisonError};

use virtual_node_state::clock::now_ns;

use crate::comm::{Begun, Comm};
use crate::gpu::{self, End, Kernel};
use crate::steps::Steps;
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

    /// Whether a node receives from the one before, and sends to the next.
    fn directions(self, comm: &Comm) -> (bool, bool) {
        let nodes = comm.nodes.len();
        match self {
            Self::AllReduce | Self::Ring => (true, true),
            Self::Chain { first } => {
                let position = (comm.node + nodes - first) % nodes;
                (position > 0, position < nodes - 1)
            }
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
    // Nothing to carry is no operation of the proxy.
    let posted = comm.ring.as_ref();
    let mut ring = posted.map(|(to, from)| Ring::post(comm, to, from, pattern, bytes > 0));
    let on_node = comm
        .meeting
        .wait_arrivals(sequence, comm.local_ranks, aborted)
        .map_err(gone)?;
    let (all_arrived_ns, moved_ns) = match &mut ring {
        None => (on_node, on_node),
        Some(ring) => {
            let all = agree(comm, ring.to, ring.from, on_node, aborted)?;
            travel(comm, pattern, bytes, ring, aborted)?;
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

/// The two directions of a ring as one operation uses them.
struct Ring<'a> {
    to: &'a TcpStream,
    from: &'a TcpStream,
    sending: Steps,
    receiving: Steps,
}

impl<'a> Ring<'a> {
    /// Both directions posted: they wait for the GPUs, here and before.
    fn post(comm: &Comm, to: &'a TcpStream, from: &'a TcpStream, pattern: Pattern, carries: bool) -> Self {
        let mut ring = Self {
            to,
            from,
            sending: Steps::new(comm, 0, true),
            receiving: Steps::new(comm, 1, false),
        };
        let (receives, sends) = pattern.directions(comm);
        if receives && carries {
            ring.receiving.post();
        }
        if sends && carries {
            ring.sending.post();
        }
        ring
    }

    fn carry(&mut self, send: u64, receive: u64, aborted: &dyn Fn() -> bool) -> io::Result<()> {
        let sending = Transfer {
            stream: self.to,
            sends: true,
            left: send,
            steps: &mut self.sending,
        };
        let receiving = Transfer {
            stream: self.from,
            sends: false,
            left: receive,
            steps: &mut self.receiving,
        };
        carry(&mut [sending, receiving], aborted)
    }
}

fn travel(
    comm: &Comm,
    pattern: Pattern,
    bytes: u64,
    ring: &mut Ring<'_>,
    aborted: &dyn Fn() -> bool,
) -> io::Result<()> {
    let nodes = comm.nodes.len();
    let part = bytes.div_ceil(nodes as u64);
    match pattern {
        Pattern::AllReduce => (0..2 * (nodes - 1)).try_for_each(|_| ring.carry(part, part, aborted)),
        Pattern::Ring => (0..nodes - 1).try_for_each(|_| ring.carry(part, part, aborted)),
        Pattern::Chain { .. } => {
            let (receives, sends) = pattern.directions(comm);
            if receives {
                ring.carry(0, bytes, aborted)?;
            }
            if sends {
                ring.carry(bytes, 0, aborted)?;
            }
            Ok(())
        }
    }
}

/// Sends and receives of one group, all at once. Both sides first say when they arrived.
fn peers(comm: &Comm, ops: &[PeerOp], arrived_ns: u64, aborted: &dyn Fn() -> bool) -> io::Result<End> {
    let mut streams = Vec::with_capacity(ops.len());
    for (sub, op) in ops.iter().enumerate().filter(|(_, op)| op.sends) {
        let stream = comm.peer_out(op.peer)?;
        send_word(&stream, arrived_ns, aborted)?;
        streams.push((stream, *op, Steps::new(comm, sub, true)));
    }
    let mut all_arrived_ns = arrived_ns;
    for (sub, op) in ops.iter().enumerate().filter(|(_, op)| !op.sends) {
        let stream = comm.peer_in(op.peer)?;
        let mut steps = Steps::new(comm, sub, false);
        steps.post();
        all_arrived_ns = all_arrived_ns.max(receive_word(&stream, aborted)?);
        streams.push((stream, *op, steps));
    }
    let mut transfers: Vec<Transfer<'_>> = streams
        .iter_mut()
        .map(|(stream, op, steps)| Transfer {
            stream,
            sends: op.sends,
            left: op.bytes,
            steps,
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
