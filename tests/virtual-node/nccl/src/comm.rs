//! Communicators: who is in one, on which node, and how to reach them.

use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use virtual_node_state::VNODE_ENV;
use virtual_node_state::map::Shared;

use crate::bootstrap::{self, CARD_BYTES};
use crate::local::Meeting;
use crate::{gpu, proxy, wire};

/// What a rank says about itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Card {
    pub(crate) node: u64,
    pub(crate) address: SocketAddrV4,
    pub(crate) color: i64,
    pub(crate) key: i64,
    pub(crate) device: i32,
}

impl Card {
    fn encode(&self) -> [u8; CARD_BYTES] {
        let mut bytes = [0; CARD_BYTES];
        bytes[..8].copy_from_slice(&self.node.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.address.ip().octets());
        bytes[12..14].copy_from_slice(&self.address.port().to_le_bytes());
        bytes[16..24].copy_from_slice(&self.color.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.key.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.device.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8; CARD_BYTES]) -> Self {
        let eight = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap_or_default());
        let ip = Ipv4Addr::new(bytes[8], bytes[9], bytes[10], bytes[11]);
        Self {
            node: eight(0),
            address: SocketAddrV4::new(ip, u16::from_le_bytes([bytes[12], bytes[13]])),
            color: eight(16).cast_signed(),
            key: eight(24).cast_signed(),
            device: i32::from_le_bytes(bytes[32..36].try_into().unwrap_or_default()),
        }
    }
}

/// What the GPU asks the proxy to do once a kernel has begun.
#[derive(Debug)]
pub(crate) struct Begun {
    pub(crate) number: u64,
    pub(crate) start_ns: u64,
    pub(crate) op: Box<proxy::Op>,
}

#[derive(Debug, Default)]
pub(crate) struct Queue {
    pub(crate) begun: VecDeque<Begun>,
    pub(crate) closed: bool,
}

/// Peers that connected for sends and receives, by rank.
pub(crate) type Peers = Mutex<HashMap<u32, Arc<TcpStream>>>;

/// One communicator of this process.
#[derive(Debug)]
pub(crate) struct Comm {
    pub(crate) key: u64,
    pub(crate) rank: u32,
    pub(crate) ranks: u32,
    pub(crate) device: i32,
    pub(crate) root: SocketAddrV4,
    pub(crate) cards: Vec<Card>,
    /// Nodes in order of their first rank.
    pub(crate) nodes: Vec<u64>,
    pub(crate) node: usize,
    /// Ranks on this node, and whether this is the first of them.
    pub(crate) local_ranks: u32,
    pub(crate) leader: bool,
    pub(crate) meeting: Shared<Meeting>,
    meeting_path: PathBuf,
    /// To the next node's leader and from the previous one's (leaders of several nodes only).
    pub(crate) ring: Option<(TcpStream, TcpStream)>,
    pub(crate) peers_in: Peers,
    pub(crate) peers_out: Peers,
    pub(crate) peer_arrived: Condvar,
    pub(crate) sequence: AtomicU64,
    pub(crate) splits: AtomicU64,
    pub(crate) queue: Mutex<Queue>,
    pub(crate) begun: Condvar,
    pub(crate) aborted: AtomicBool,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

const HELLO_RING: u64 = 0x52_49_4e_47;
const HELLO_PEER: u64 = 0x50_45_45_52;

fn node_key() -> u64 {
    let mut hasher = DefaultHasher::new();
    std::env::var_os(VNODE_ENV).hash(&mut hasher);
    hasher.finish()
}

fn mix(values: &[u64]) -> u64 {
    let mut hasher = DefaultHasher::new();
    values.hash(&mut hasher);
    hasher.finish() | 1
}

impl Comm {
    /// Joins the communicator `key` as `rank` of `ranks`; blocks until all have joined.
    ///
    /// # Errors
    /// When the root or a peer cannot be reached.
    pub(crate) fn join(key: u64, root: SocketAddrV4, rank: u32, ranks: u32) -> io::Result<Arc<Self>> {
        let listener = TcpListener::bind((bootstrap::own_address(), 0))?;
        let SocketAddr::V4(address) = listener.local_addr()? else {
            return Err(io::Error::other("not an IPv4 address"));
        };
        let device =
            gpu::current_device().ok_or_else(|| io::Error::other("the thread has no CUDA context"))?;
        let card = Card {
            node: node_key(),
            address,
            color: 0,
            key: 0,
            device,
        };
        let cards = bootstrap::meet(root, key, rank, ranks, &card.encode())?;
        let cards: Vec<Card> = cards.iter().map(Card::decode).collect();
        Self::assemble(key, root, rank, cards, listener)
    }

    /// Splits `self` as `ncclCommSplit` does; `None` for a negative colour.
    ///
    /// # Errors
    /// When the root or a peer cannot be reached.
    pub(crate) fn split(&self, color: i64, key: i64) -> io::Result<Option<Arc<Self>>> {
        let count = self.splits.fetch_add(1, SeqCst);
        let listener = TcpListener::bind((bootstrap::own_address(), 0))?;
        let SocketAddr::V4(address) = listener.local_addr()? else {
            return Err(io::Error::other("not an IPv4 address"));
        };
        let card = Card {
            address,
            color,
            key,
            ..self.cards[self.rank as usize]
        };
        let meeting = mix(&[self.key, count, 0x5011]);
        let all = bootstrap::meet(self.root, meeting, self.rank, self.ranks, &card.encode())?;
        if color < 0 {
            return Ok(None);
        }
        let mut members: Vec<(i64, usize, Card)> = all
            .iter()
            .map(Card::decode)
            .enumerate()
            .map(|(rank, card)| (card.key, rank, card))
            .collect();
        members.retain(|(_, _, card)| card.color == color);
        members.sort_by_key(|(key, rank, _)| (*key, *rank));
        let own = members
            .iter()
            .position(|(_, rank, _)| *rank == self.rank as usize)
            .unwrap_or(0);
        let child = mix(&[self.key, count, color.cast_unsigned()]);
        let cards = members.into_iter().map(|(_, _, card)| card).collect();
        Self::assemble(child, self.root, u32::try_from(own).unwrap_or(0), cards, listener).map(Some)
    }

    /// Shrinks `self` as `ncclCommShrink` does; called by the ranks that stay.
    ///
    /// # Errors
    /// When this rank is excluded, or the root or a peer cannot be reached.
    pub(crate) fn shrink(&self, excluded: &[i32]) -> io::Result<Arc<Self>> {
        let stays = |rank: &u32| !excluded.contains(&rank.cast_signed());
        let staying: Vec<u32> = (0..self.ranks).filter(stays).collect();
        let own = staying.iter().position(|rank| *rank == self.rank);
        let own = own
            .and_then(|rank| u32::try_from(rank).ok())
            .ok_or_else(|| io::Error::other("this rank is excluded"))?;
        let key = mix(&[self.key, self.splits.fetch_add(1, SeqCst), 0x5412]);
        Self::join(key, self.root, own, u32::try_from(staying.len()).unwrap_or(0))
    }

    fn assemble(
        key: u64,
        root: SocketAddrV4,
        rank: u32,
        cards: Vec<Card>,
        listener: TcpListener,
    ) -> io::Result<Arc<Self>> {
        let mut nodes = Vec::new();
        for card in &cards {
            if !nodes.contains(&card.node) {
                nodes.push(card.node);
            }
        }
        let own = cards
            .get(rank as usize)
            .copied()
            .ok_or_else(|| io::Error::other("rank outside the communicator"))?;
        let first = |node: u64| cards.iter().position(|card| card.node == node).unwrap_or(0);
        let node = nodes.iter().position(|node| *node == own.node).unwrap_or(0);
        let leader = first(own.node) == rank as usize;
        let folder = std::env::var_os(VNODE_ENV).map_or_else(std::env::temp_dir, PathBuf::from);
        let meeting_path = folder.join(format!("comm-{key:016x}"));
        let meeting = Meeting::open(&meeting_path)?;
        let next = cards[first(nodes[(node + 1) % nodes.len()])].address;
        let mut early = Vec::new();
        let ring = match leader && nodes.len() > 1 {
            true => Some(ring(key, next, &listener, &mut early)?),
            false => None,
        };
        let comm = Arc::new(Self {
            key,
            rank,
            ranks: u32::try_from(cards.len()).unwrap_or(0),
            device: own.device,
            root,
            local_ranks: u32::try_from(cards.iter().filter(|card| card.node == own.node).count())
                .unwrap_or(0),
            cards,
            nodes,
            node,
            leader,
            meeting,
            meeting_path,
            ring,
            peers_in: Peers::default(),
            peers_out: Peers::default(),
            peer_arrived: Condvar::new(),
            sequence: AtomicU64::new(0),
            splits: AtomicU64::new(0),
            queue: Mutex::default(),
            begun: Condvar::new(),
            aborted: AtomicBool::new(false),
            thread: Mutex::new(None),
        });
        for (peer, stream) in early {
            comm.admit(peer, stream);
        }
        let weak = Arc::downgrade(&comm);
        std::thread::Builder::new()
            .name("nccl-accept".into())
            .spawn(move || accept_peers(&listener, &weak))?;
        let worker = Arc::clone(&comm);
        let thread = std::thread::Builder::new()
            .name("nccl-proxy".into())
            .spawn(move || proxy::run(&worker))?;
        *comm.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(comm)
    }

    fn admit(&self, peer: u32, stream: TcpStream) {
        self.peers_in
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(peer, Arc::new(stream));
        self.peer_arrived.notify_all();
    }

    /// The connection to which this rank's sends to `peer` go.
    pub(crate) fn peer_out(&self, peer: u32) -> io::Result<Arc<TcpStream>> {
        let mut peers = self.peers_out.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stream) = peers.get(&peer) {
            return Ok(Arc::clone(stream));
        }
        let card = self
            .cards
            .get(peer as usize)
            .ok_or_else(|| io::Error::other("no such peer"))?;
        let stream = bootstrap::connect(card.address)?;
        stream.set_nonblocking(true)?;
        let never = || false;
        wire::send_word(&stream, self.key, &never)?;
        wire::send_word(&stream, HELLO_PEER << 32 | u64::from(self.rank), &never)?;
        let stream = Arc::new(stream);
        peers.insert(peer, Arc::clone(&stream));
        Ok(stream)
    }

    /// The connection on which `peer` sends; waits until it has connected.
    pub(crate) fn peer_in(&self, peer: u32) -> io::Result<Arc<TcpStream>> {
        let mut peers = self.peers_in.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(stream) = peers.get(&peer) {
                return Ok(Arc::clone(stream));
            }
            if self.is_aborted() {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            let pause = Duration::from_millis(500);
            peers = self
                .peer_arrived
                .wait_timeout(peers, pause)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    pub(crate) fn is_aborted(&self) -> bool {
        self.aborted.load(SeqCst)
    }

    /// Ends the proxy: at once when `abort`, else after what is queued.
    pub(crate) fn close(&self, abort: bool) {
        self.aborted.fetch_or(abort, SeqCst);
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).closed = true;
        self.begun.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A proxy that panicked has nothing left to wait for.
            let _ended = thread.join();
        }
        if self.leader {
            // Another rank may have removed the node's folder already.
            let _gone = std::fs::remove_file(&self.meeting_path);
        }
    }
}

/// Connects to the next leader and waits for the previous one.
fn ring(
    key: u64,
    next: SocketAddrV4,
    listener: &TcpListener,
    early: &mut Vec<(u32, TcpStream)>,
) -> io::Result<(TcpStream, TcpStream)> {
    let never = || false;
    let to = bootstrap::connect(next)?;
    wire::send_word(&to, key, &never)?;
    wire::send_word(&to, HELLO_RING << 32, &never)?;
    loop {
        let (from, hello) = greet(listener, key)?;
        if hello >> 32 == HELLO_RING {
            to.set_nonblocking(true)?;
            return Ok((to, from));
        }
        early.push((hello as u32, from));
    }
}

fn greet(listener: &TcpListener, key: u64) -> io::Result<(TcpStream, u64)> {
    loop {
        let (stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let never = || false;
        match (
            wire::receive_word(&stream, &never),
            wire::receive_word(&stream, &never),
        ) {
            (Ok(found), Ok(hello)) if found == key => {
                stream.set_read_timeout(None)?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                return Ok((stream, hello));
            }
            // A stranger: not one of this communicator's.
            _ => {}
        }
    }
}

fn accept_peers(listener: &TcpListener, comm: &std::sync::Weak<Comm>) {
    loop {
        let Some(key) = comm.upgrade().map(|comm| comm.key) else {
            return;
        };
        let Ok((stream, hello)) = greet(listener, key) else {
            return;
        };
        let Some(comm) = comm.upgrade() else { return };
        if hello >> 32 == HELLO_PEER {
            comm.admit(hello as u32, stream);
        }
    }
}
