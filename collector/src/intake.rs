//! The one writer: dedupes, stores, flushes, and only then acknowledges and shows.
//!
//! Batches of all connections that wait at the same time share one flush.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use stallscope_proto::v1;
use tokio::sync::{mpsc, oneshot};

use crate::board::{Admission, Board, MOST_AHEAD};
use crate::clock::realtime_ns;
use crate::stats::Stats;
use crate::store::{SegmentStore, StoreError};

/// Batches that wait for the writer; a connection has one at a time.
const QUEUE_BATCHES: usize = 64;

/// One envelope, as bytes and parsed.
#[derive(Debug)]
pub(crate) struct Arrival {
    pub(crate) bytes: Bytes,
    pub(crate) envelope: v1::Envelope,
}

/// Why a batch was not stored.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum IntakeError {
    /// The disk refused.
    #[error("{0}")]
    Store(String),
    /// The board has no room for another node.
    #[error("too many nodes: raise the bound of nodes or start another collector")]
    TooManyNodes,
    /// A number that no agent comes to by counting; taking it would make everything after it a duplicate.
    #[error(
        "message {sequence} is more than {MOST_AHEAD} ahead of the last one known: the store of the agent is damaged, or this \
         is no agent; move the agent's store.dir away and restart it"
    )]
    Jump {
        /// Its number.
        sequence: u64,
    },
    /// The collector is stopping.
    #[error("the collector is stopping")]
    Stopping,
}

struct Job {
    arrivals: Vec<Arrival>,
    reply: oneshot::Sender<Result<u64, IntakeError>>,
}

/// Gives batches to the writer.
#[derive(Debug, Clone)]
pub(crate) struct Intake {
    queue: mpsc::Sender<Job>,
}

/// The board, shared between the writer and the readers.
pub(crate) type SharedBoard = Arc<Mutex<Board>>;

/// Locks the board. A panic elsewhere must not silence the collector: the board stays usable between operations.
pub(crate) fn locked(board: &SharedBoard) -> std::sync::MutexGuard<'_, Board> {
    board.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Intake {
    /// Starts the writer's thread; it ends when the last `Intake` is dropped.
    pub(crate) fn start(
        store: SegmentStore,
        board: SharedBoard,
        stats: Arc<Stats>,
    ) -> std::io::Result<(Self, std::thread::JoinHandle<()>)> {
        let (queue, jobs) = mpsc::channel(QUEUE_BATCHES);
        let mut writer = Writer { store, board, stats };
        let thread = std::thread::Builder::new()
            .name("collector-writer".into())
            .spawn(move || writer.run(jobs))?;
        Ok((Self { queue }, thread))
    }

    /// Stores a batch; the highest sequence in it, once it is on disk.
    pub(crate) async fn store(&self, arrivals: Vec<Arrival>) -> Result<u64, IntakeError> {
        let (reply, answer) = oneshot::channel();
        self.queue
            .send(Job { arrivals, reply })
            .await
            .map_err(|_closed| IntakeError::Stopping)?;
        answer.await.map_err(|_dropped| IntakeError::Stopping)?
    }
}

struct Writer {
    store: SegmentStore,
    board: SharedBoard,
    stats: Arc<Stats>,
}

impl Writer {
    fn run(&mut self, mut jobs: mpsc::Receiver<Job>) {
        while let Some(first) = jobs.blocking_recv() {
            let mut round = vec![first];
            while round.len() < QUEUE_BATCHES
                && let Ok(job) = jobs.try_recv()
            {
                round.push(job);
            }
            self.store_round(round);
        }
    }

    fn store_round(&mut self, round: Vec<Job>) {
        let now_ns = realtime_ns();
        let mut fresh = Vec::new();
        let mut replies = Vec::new();
        let mut seen = BTreeMap::new();
        for Job { arrivals, reply } in round {
            let last_seq = arrivals
                .iter()
                .map(|arrival| arrival.envelope.sequence)
                .max()
                .unwrap_or(0);
            let outcome = self.append_new(arrivals, now_ns, &mut seen, &mut fresh);
            replies.push((reply, outcome.map(|()| last_seq)));
        }
        let synced = self.store.sync().map_err(|error| store_failed(&error));
        // A failed append takes what was appended before it in the round along: the segment was cut.
        let failed = replies.iter().find_map(|(_, outcome)| match outcome {
            Err(error @ IntakeError::Store(_)) => Some(error.clone()),
            Ok(_) | Err(_) => None,
        });
        let verdict = failed.map_or(synced, Err);
        let trouble = verdict.as_ref().err().map(IntakeError::to_string);
        locked(&self.board).note_store(now_ns, trouble.as_deref());
        if verdict.is_ok() {
            self.show(fresh, now_ns);
        }
        for (reply, outcome) in replies {
            // A connection that is gone needs no answer.
            let _ = reply.send(verdict.clone().and(outcome));
        }
    }

    fn append_new(
        &mut self,
        arrivals: Vec<Arrival>,
        now_ns: u64,
        seen: &mut BTreeMap<(String, u64), u64>,
        fresh: &mut Vec<v1::Envelope>,
    ) -> Result<(), IntakeError> {
        for Arrival { bytes, envelope } in arrivals {
            let (boot_id, sequence) = (envelope.agent_boot_id, envelope.sequence);
            let admission = locked(&self.board).admission(&envelope.node, boot_id, sequence);
            let in_round = seen.entry((envelope.node.clone(), boot_id)).or_insert(0);
            match admission {
                Admission::TooFarAhead => return Err(IntakeError::Jump { sequence }),
                Admission::TooManyNodes => return Err(IntakeError::TooManyNodes),
                Admission::New if sequence > *in_round => *in_round = sequence,
                Admission::New | Admission::Duplicate => {
                    Stats::add(&self.stats.duplicates, 1);
                    continue;
                }
            }
            if self.store.segment_is_full() {
                // The next segment begins with the state of all streams: what is on disk must be part of it.
                self.store.sync().map_err(|error| store_failed(&error))?;
                self.show(std::mem::take(fresh), now_ns);
            }
            let length = bytes.len() as u64;
            let board = &self.board;
            self.store
                .append(now_ns, bytes, || locked(board).states())
                .map_err(|error| store_failed(&error))?;
            Stats::add(&self.stats.stored_bytes, length);
            fresh.push(envelope);
        }
        Ok(())
    }

    fn show(&self, fresh: Vec<v1::Envelope>, now_ns: u64) {
        Stats::add(&self.stats.stored_messages, fresh.len() as u64);
        let mut board = locked(&self.board);
        for envelope in fresh {
            board.apply(now_ns, envelope);
        }
    }
}

fn store_failed(error: &StoreError) -> IntakeError {
    tracing::error!(%error, "nothing of this round is acknowledged");
    IntakeError::Store(error.to_string())
}
