//! The QUIC endpoint: who may connect, how many, and how it all starts and stops.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::{Connection, Endpoint, Incoming, TransportConfig, VarInt};
use stallscope_proto::close;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::answer::{Answers, load};
use crate::board::{Absence, Board};
use crate::clock::realtime_ns;
use crate::config::{CollectorConfig, Limits};
use crate::intake::{Intake, SharedBoard, locked};
use crate::session;
use crate::stats::{Stats, StatsSnapshot};
use crate::store::{SegmentStore, StoreError};
use crate::tls::{Identity, IdentityError};

/// A client that says nothing for this long is gone; agents say something every second or two.
const IDLE: Duration = Duration::from_secs(5);
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Why a collector cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The certificates.
    #[error("{0}")]
    Identity(#[from] IdentityError),
    /// The store.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The address.
    #[error("cannot listen on {listen}: {source}")]
    Listen {
        /// The address.
        listen: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The writer's thread.
    #[error("cannot start the writer: {0}")]
    Thread(std::io::Error),
}

/// What all connections share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) board: SharedBoard,
    pub(crate) intake: Intake,
    pub(crate) answers: Arc<Answers>,
    pub(crate) stats: Arc<Stats>,
    pub(crate) limits: Limits,
    /// Whether names need not be in certificates.
    pub(crate) any_name: bool,
    pub(crate) reports: Semaphore,
    /// The open connection of each node.
    agents: Mutex<BTreeMap<String, Connection>>,
}

impl Shared {
    /// Makes the connection the node's; an earlier one is closed.
    pub(crate) fn enter(&self, node: &str, connection: &Connection) {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(earlier) = agents.insert(node.to_owned(), connection.clone()) {
            let reason =
                b"another connection of this node was made; if two agents have the same name, rename one";
            earlier.close(VarInt::from_u32(close::SUPERSEDED), reason);
        }
        locked(&self.board).connected(node, realtime_ns());
    }

    /// Ends the connection's part in the node, unless another took over.
    pub(crate) fn leave(&self, node: &str, connection: &Connection, absence: Absence) {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if agents
            .get(node)
            .is_some_and(|open| open.stable_id() == connection.stable_id())
        {
            agents.remove(node);
            locked(&self.board).disconnected(node, absence);
        }
    }
}

/// A running collector.
#[derive(Debug)]
pub struct Collector {
    endpoint: Endpoint,
    shared: Arc<Shared>,
    accepting: JoinHandle<()>,
    watching: JoinHandle<()>,
    writer: Option<std::thread::JoinHandle<()>>,
}

impl Collector {
    /// Reads back what the store holds and starts to listen. Needs a tokio runtime.
    ///
    /// # Errors
    /// When certificates, store or address cannot be used.
    pub async fn start(config: CollectorConfig) -> Result<Self, StartError> {
        let mut server = Identity::load(&config.identity)?.server()?;
        server.transport_config(Arc::new(transport(&config.limits)));
        let store = SegmentStore::open(&config.store, config.max_bytes)?;
        let board = Arc::new(Mutex::new(read_back(&config).await));
        let endpoint = Endpoint::server(server, config.listen).map_err(|source| StartError::Listen {
            listen: config.listen,
            source,
        })?;
        let stats = Arc::new(Stats::default());
        let (intake, writer) =
            Intake::start(store, Arc::clone(&board), Arc::clone(&stats)).map_err(StartError::Thread)?;
        let answers = Arc::new(Answers {
            board: Arc::clone(&board),
            history: Mutex::default(),
            store_dir: config.store.clone(),
            limits: config.board,
            stats: Arc::clone(&stats),
        });
        let watching = tokio::spawn(Arc::clone(&answers).keep_watching());
        let shared = Arc::new(Shared {
            board,
            intake,
            answers,
            stats,
            limits: config.limits,
            any_name: config.any_name,
            reports: Semaphore::new(config.limits.reports.max(1)),
            agents: Mutex::default(),
        });
        let accepting = tokio::spawn(accept(endpoint.clone(), Arc::clone(&shared)));
        Ok(Self {
            endpoint,
            shared,
            accepting,
            watching,
            writer: Some(writer),
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// When the socket is gone.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> StatsSnapshot {
        self.shared.stats.snapshot()
    }

    /// Tells clients that it stops, waits until what was received is stored, and ends.
    pub async fn stop(mut self) {
        self.accepting.abort();
        self.watching.abort();
        self.endpoint
            .close(VarInt::from_u32(close::STOPPING), b"the collector is stopping");
        self.endpoint.wait_idle().await;
        let writer = self.writer.take();
        drop(self);
        if let Some(writer) = writer {
            // The writer ends when the last session has let go of it.
            let _ = tokio::task::spawn_blocking(move || writer.join()).await;
        }
    }
}

async fn read_back(config: &CollectorConfig) -> Board {
    let (dir, limits) = (config.store.clone(), config.board);
    let loaded = tokio::task::spawn_blocking(move || {
        let mut board = Board::new(limits);
        load(&dir, &mut board, &mut Vec::new());
        board
    });
    loaded.await.unwrap_or_else(|error| {
        tracing::error!(%error, "store cannot be read back; starting with nothing known");
        Board::new(config.board)
    })
}

fn transport(limits: &Limits) -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(limits.window_bytes))
        .receive_window(VarInt::from_u32(limits.window_bytes))
        .send_window(1 << 20)
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(IDLE.try_into().ok());
    transport
}

async fn accept(endpoint: Endpoint, shared: Arc<Shared>) {
    while let Some(incoming) = endpoint.accept().await {
        if endpoint.open_connections() > shared.limits.max_connections {
            Stats::add(&shared.stats.refused_connections, 1);
            incoming.refuse();
            continue;
        }
        tokio::spawn(connect(incoming, Arc::clone(&shared)));
    }
}

async fn connect(incoming: Incoming, shared: Arc<Shared>) {
    let peer = incoming.remote_address();
    match tokio::time::timeout(HANDSHAKE, incoming).await {
        Ok(Ok(connection)) => {
            Stats::add(&shared.stats.connections, 1);
            session::serve(shared, connection).await;
        }
        Ok(Err(error)) => {
            Stats::add(&shared.stats.failed_handshakes, 1);
            tracing::warn!(%peer, %error, "client refused; check that its certificate is signed by --ca");
        }
        Err(_late) => {
            Stats::add(&shared.stats.failed_handshakes, 1);
            tracing::warn!(%peer, "client refused: no handshake within {} s", HANDSHAKE.as_secs());
        }
    }
}
