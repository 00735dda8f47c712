//! The protocol without sockets and without a clock: events and the time go in, actions come out.
//!
//! Everything sent comes from the [`Spool`] and stays there until it is acknowledged, so a lost connection, a
//! collector that crashed and an agent that crashed all end the same way: resume after what the collector has.

use std::collections::VecDeque;

use bytes::Bytes;
use prost::Message;
use stallscope_proto::v1::{self, client_message, server_message};
use stallscope_proto::{SCHEMA, close, frame};

use crate::store::Spool;

/// Bounds and paces of the stream. Times in ns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Most bytes of envelopes in one batch; default 64 KiB.
    pub batch_bytes: usize,
    /// Most messages in one batch; default 1024.
    pub batch_messages: usize,
    /// Most bytes sent and not acknowledged; the collector may ask for less. Default 512 KiB.
    pub window_bytes: u64,
    /// Bytes per second sent in the long run; default 4 MiB.
    pub bytes_per_s: u64,
    /// Least time between two batches that are not full, so that small messages travel together and
    /// wake both ends seldom; default 500 ms.
    pub gather_ns: u64,
    /// Silence after which a heartbeat is sent; default 2 s.
    pub heartbeat_ns: u64,
    /// Time after which a collector that does not answer is given up; default 15 s.
    pub answer_ns: u64,
    /// First wait before connecting again; default 250 ms.
    pub backoff_min_ns: u64,
    /// Longest wait; default 15 s.
    pub backoff_max_ns: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            batch_bytes: 64 << 10,
            batch_messages: 1024,
            window_bytes: 512 << 10,
            bytes_per_s: 4 << 20,
            gather_ns: 500_000_000,
            heartbeat_ns: 2_000_000_000,
            answer_ns: 15_000_000_000,
            backoff_min_ns: 250_000_000,
            backoff_max_ns: 15_000_000_000,
        }
    }
}

/// Who streams.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sender {
    /// Node name.
    pub node: String,
    /// Version of the agent.
    pub agent_version: String,
    /// Drawn anew whenever the agent starts.
    pub boot_id: u64,
}

/// What the driver must do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Make a connection and say how it went: [`Core::connected`] or [`Core::disconnected`].
    Connect,
    /// Send this frame.
    Send(Bytes),
    /// Close the connection; the core is waiting to connect again already.
    Disconnect {
        /// Code to close with.
        code: u32,
        /// Why.
        why: String,
    },
    /// Nothing until this time, or until something happens.
    WaitUntil(u64),
}

/// What the stream did so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StreamCounts {
    /// Connections on which the collector answered Hello.
    pub connections: u64,
    /// Messages sent, resent ones counted again.
    pub sent_messages: u64,
    /// Bytes of frames sent.
    pub sent_bytes: u64,
    /// Messages acknowledged.
    pub acked_messages: u64,
    /// Messages longer than the collector takes: never sent.
    pub oversize_messages: u64,
    /// Messages recorded when the node had another name: never sent.
    pub renamed_messages: u64,
    /// Reads of the spool that failed; each is tried again.
    pub spool_errors: u64,
}

#[derive(Debug)]
enum State {
    /// Not connected; the next try is at this time.
    Waiting { until_ns: u64 },
    /// The driver connects.
    Connecting { since_ns: u64 },
    /// Hello is sent, or to be sent.
    Greeting { since_ns: u64, sent: bool },
    /// Batches flow.
    Streaming(Streaming),
}

#[derive(Debug)]
struct Streaming {
    /// Last sequence sent.
    cursor: u64,
    /// Last sequence and bytes of every batch not acknowledged.
    in_flight: VecDeque<(u64, u64)>,
    in_flight_bytes: u64,
    window_bytes: u64,
    max_frame_bytes: usize,
    /// When the collector last answered, or had nothing to answer.
    answered_ns: u64,
    sent_ns: u64,
    /// No batch before this, to gather and to keep the rate.
    next_batch_ns: u64,
}

/// Why a message of the collector ends the connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CollectorError {
    /// A kind of message that has no place here.
    #[error("the collector sent {0} out of turn")]
    Unexpected(&'static str),
    /// It acknowledges what was not sent.
    #[error("the collector acknowledges message {acked}, the last sent is {sent}")]
    AckAhead {
        /// What it acknowledges.
        acked: u64,
        /// What was sent.
        sent: u64,
    },
}

/// The agent's side of the stream.
#[derive(Debug)]
pub struct Core {
    sender: Sender,
    pace: Pace,
    state: State,
    /// Tries since the collector last acknowledged something.
    failures: u32,
    pending_disconnect: Option<(u32, String)>,
    counts: StreamCounts,
}

impl Core {
    /// Not connected, and about to.
    #[must_use]
    pub fn new(sender: Sender, pace: Pace) -> Self {
        Self {
            sender,
            pace,
            state: State::Waiting { until_ns: 0 },
            failures: 0,
            pending_disconnect: None,
            counts: StreamCounts::default(),
        }
    }

    /// What the stream did so far.
    #[must_use]
    pub const fn counts(&self) -> StreamCounts {
        self.counts
    }

    /// Whether the collector answered on this connection.
    #[must_use]
    pub const fn is_streaming(&self) -> bool {
        matches!(self.state, State::Streaming(_))
    }

    /// Whether everything in the spool is acknowledged.
    #[must_use]
    pub fn is_drained(&self, spool: &dyn Spool) -> bool {
        match &self.state {
            State::Streaming(streaming) => {
                streaming.in_flight.is_empty() && streaming.cursor >= *spool.watch_last().borrow()
            }
            State::Waiting { .. } | State::Connecting { .. } | State::Greeting { .. } => false,
        }
    }

    /// What to do now. Call again after every action until it is [`Action::WaitUntil`].
    pub fn poll(&mut self, now_ns: u64, spool: &dyn Spool) -> Action {
        if let Some((code, why)) = self.pending_disconnect.take() {
            return Action::Disconnect { code, why };
        }
        let answer_ns = self.pace.answer_ns;
        match &mut self.state {
            State::Waiting { until_ns } if now_ns < *until_ns => Action::WaitUntil(*until_ns),
            State::Waiting { .. } => {
                self.state = State::Connecting { since_ns: now_ns };
                Action::Connect
            }
            State::Connecting { since_ns } if now_ns < *since_ns + answer_ns => {
                Action::WaitUntil(*since_ns + answer_ns)
            }
            State::Greeting { sent, .. } if !*sent => {
                *sent = true;
                self.hello(spool)
            }
            State::Greeting { since_ns, .. } if now_ns < *since_ns + answer_ns => {
                Action::WaitUntil(*since_ns + answer_ns)
            }
            State::Connecting { .. } | State::Greeting { .. } => self.give_up(now_ns),
            State::Streaming(_) => self.poll_streaming(now_ns, spool),
        }
    }

    fn hello(&self, spool: &dyn Spool) -> Action {
        let hello = v1::Hello {
            schema: SCHEMA,
            node: self.sender.node.clone(),
            agent_version: self.sender.agent_version.clone(),
            agent_boot_id: self.sender.boot_id,
            last_seq: *spool.watch_last().borrow(),
        };
        Action::Send(framed(client_message::Kind::Hello(hello)))
    }

    fn poll_streaming(&mut self, now_ns: u64, spool: &dyn Spool) -> Action {
        let pace = self.pace;
        let State::Streaming(streaming) = &mut self.state else {
            return Action::WaitUntil(u64::MAX);
        };
        if !streaming.in_flight.is_empty() && now_ns >= streaming.answered_ns + pace.answer_ns {
            return self.give_up(now_ns);
        }
        let last_seq = *spool.watch_last().borrow();
        let room = streaming.window_bytes.saturating_sub(streaming.in_flight_bytes);
        let may_send = streaming.cursor < last_seq && (room > 0 || streaming.in_flight.is_empty());
        if may_send
            && now_ns >= streaming.next_batch_ns
            && let Some(frame) = next_batch(
                streaming,
                &self.sender.node,
                &pace,
                &mut self.counts,
                now_ns,
                spool,
            )
        {
            return Action::Send(frame);
        }
        let State::Streaming(streaming) = &mut self.state else {
            return Action::WaitUntil(u64::MAX);
        };
        if now_ns >= streaming.sent_ns + pace.heartbeat_ns {
            streaming.sent_ns = now_ns;
            let beat = v1::Heartbeat {
                spooled_messages: last_seq.saturating_sub(spool.last_acked()),
                dropped_messages: spool.dropped_unacked(),
            };
            return Action::Send(framed(client_message::Kind::Heartbeat(beat)));
        }
        let mut until_ns = streaming.sent_ns + pace.heartbeat_ns;
        if may_send {
            until_ns = until_ns.min(streaming.next_batch_ns.max(now_ns + 1));
        }
        if !streaming.in_flight.is_empty() {
            until_ns = until_ns.min(streaming.answered_ns + pace.answer_ns);
        }
        Action::WaitUntil(until_ns)
    }

    fn give_up(&mut self, now_ns: u64) -> Action {
        let seconds = self.pace.answer_ns / 1_000_000_000;
        self.back_off(now_ns);
        Action::Disconnect {
            code: close::DONE,
            why: format!("no answer for {seconds} s"),
        }
    }

    /// The connection is made; Hello comes next.
    pub fn connected(&mut self, now_ns: u64) {
        if matches!(self.state, State::Connecting { .. }) {
            self.state = State::Greeting {
                since_ns: now_ns,
                sent: false,
            };
        }
    }

    /// The connection is gone, or could not be made. `code` is what the collector closed it with, if it did.
    /// Returns when the next try is.
    pub fn disconnected(&mut self, now_ns: u64, code: Option<u64>) -> u64 {
        if code.is_some_and(|code| code == u64::from(close::SUPERSEDED) || code == u64::from(close::SCHEMA)) {
            // Trying again soon cannot help.
            self.failures = self.failures.max(16);
        }
        match self.state {
            State::Waiting { until_ns } => until_ns,
            State::Connecting { .. } | State::Greeting { .. } | State::Streaming(_) => self.back_off(now_ns),
        }
    }

    fn back_off(&mut self, now_ns: u64) -> u64 {
        let until_ns = now_ns + backoff_ns(&self.pace, self.sender.boot_id, self.failures);
        self.failures = self.failures.saturating_add(1);
        self.state = State::Waiting { until_ns };
        until_ns
    }

    /// A message of the collector.
    ///
    /// # Errors
    /// When it breaks the protocol; the core is waiting to connect again then, and asks to disconnect.
    pub fn receive(
        &mut self,
        now_ns: u64,
        message: server_message::Kind,
        spool: &dyn Spool,
    ) -> Result<(), CollectorError> {
        let result = self.take(now_ns, message, spool);
        if let Err(error) = &result {
            self.back_off(now_ns);
            self.pending_disconnect = Some((close::PROTOCOL, error.to_string()));
        }
        result
    }

    fn take(
        &mut self,
        now_ns: u64,
        message: server_message::Kind,
        spool: &dyn Spool,
    ) -> Result<(), CollectorError> {
        match (message, &mut self.state) {
            (server_message::Kind::HelloAck(ack), State::Greeting { sent: true, .. }) => {
                self.counts.connections += 1;
                let cursor = resume_after(&ack.resume, spool);
                let theirs = if ack.window_bytes == 0 {
                    u64::MAX
                } else {
                    ack.window_bytes
                };
                let max_frame = usize::try_from(ack.max_frame_bytes).unwrap_or(usize::MAX);
                if cursor > spool.last_acked() {
                    spool.acked(cursor);
                }
                self.state = State::Streaming(Streaming {
                    cursor,
                    in_flight: VecDeque::new(),
                    in_flight_bytes: 0,
                    window_bytes: self.pace.window_bytes.min(theirs),
                    max_frame_bytes: max_frame.clamp(1 << 10, frame::MAX_BODY_BYTES),
                    answered_ns: now_ns,
                    sent_ns: now_ns,
                    next_batch_ns: now_ns,
                });
                Ok(())
            }
            (server_message::Kind::Ack(ack), State::Streaming(streaming)) => {
                if ack.last_seq > streaming.cursor {
                    return Err(CollectorError::AckAhead {
                        acked: ack.last_seq,
                        sent: streaming.cursor,
                    });
                }
                streaming.answered_ns = now_ns;
                while let Some((last_seq, bytes)) = streaming.in_flight.front().copied()
                    && last_seq <= ack.last_seq
                {
                    streaming.in_flight.pop_front();
                    streaming.in_flight_bytes -= bytes;
                }
                self.failures = 0;
                let before = spool.last_acked();
                if ack.last_seq > before {
                    self.counts.acked_messages += ack.last_seq - before;
                    spool.acked(ack.last_seq);
                }
                Ok(())
            }
            (server_message::Kind::HelloAck(_), _) => Err(CollectorError::Unexpected("HelloAck")),
            (server_message::Kind::Ack(_), _) => Err(CollectorError::Unexpected("Ack")),
            (server_message::Kind::Report(_), _) => Err(CollectorError::Unexpected("ReportResponse")),
        }
    }
}

/// The frame of the next batch; `None` when the spool gives nothing to send now.
fn next_batch(
    streaming: &mut Streaming,
    node: &str,
    pace: &Pace,
    counts: &mut StreamCounts,
    now_ns: u64,
    spool: &dyn Spool,
) -> Option<Bytes> {
    // A message's own frame needs a few bytes around it.
    let longest = streaming.max_frame_bytes - 64;
    let messages = match spool.next_after(
        streaming.cursor,
        pace.batch_messages,
        pace.batch_bytes.min(longest / 2),
    ) {
        Ok(messages) => messages,
        Err(error) => {
            counts.spool_errors += 1;
            streaming.next_batch_ns = now_ns + pace.backoff_min_ns;
            tracing::warn!(%error, "stream waits for the store");
            return None;
        }
    };
    let mut batch = v1::Batch::default();
    let mut batch_bytes = 0;
    let renamed_before = counts.renamed_messages;
    for (sequence, bytes) in messages {
        // The collector takes a node's messages from nobody else, and would refuse the whole batch each time.
        if v1::Envelope::decode(bytes.clone()).is_ok_and(|envelope| envelope.node != node) {
            if counts.renamed_messages == 0 {
                tracing::warn!(
                    sequence,
                    "messages recorded when this node had another name than {node} stay on this node only"
                );
            }
            counts.renamed_messages += 1;
            streaming.cursor = sequence;
            continue;
        }
        if bytes.len() > longest {
            counts.oversize_messages += 1;
            tracing::error!(
                sequence,
                bytes = bytes.len(),
                limit = longest,
                "message is too long for the collector: it stays on this node only"
            );
            streaming.cursor = sequence;
            continue;
        }
        // The spool may give a little more than asked for; what does not fit comes with the next batch.
        if batch_bytes + bytes.len() + 16 > longest {
            break;
        }
        batch_bytes += bytes.len() + 16;
        streaming.cursor = sequence;
        batch.envelopes.push(bytes);
    }
    if batch.envelopes.is_empty() {
        // The newest messages can be damaged on disk: asking again at once would give the same.
        if counts.renamed_messages == renamed_before {
            streaming.next_batch_ns = now_ns + pace.backoff_min_ns;
        }
        return None;
    }
    counts.sent_messages += batch.envelopes.len() as u64;
    let is_full = batch_bytes >= pace.batch_bytes / 2 || batch.envelopes.len() >= pace.batch_messages;
    let frame = framed(client_message::Kind::Batch(batch));
    let length = frame.len() as u64;
    counts.sent_bytes += length;
    let rate_ns = length.saturating_mul(1_000_000_000) / pace.bytes_per_s.max(1);
    streaming.next_batch_ns = now_ns
        + if is_full {
            rate_ns
        } else {
            rate_ns.max(pace.gather_ns)
        };
    if streaming.in_flight.is_empty() {
        streaming.answered_ns = now_ns;
    }
    streaming.sent_ns = now_ns;
    streaming.in_flight.push_back((streaming.cursor, length));
    streaming.in_flight_bytes += length;
    Some(frame)
}

/// The newest message of the collector's list that this spool does not contradict.
///
/// A spool that lost its tail in a crash gives the numbers of lost messages to new ones, of another boot; those the
/// collector has not.
fn resume_after(resume: &[v1::Resume], spool: &dyn Spool) -> u64 {
    let last_seq = *spool.watch_last().borrow();
    let confirmed = resume.iter().filter(|entry| {
        if entry.last_seq == 0 || entry.last_seq > last_seq {
            return false;
        }
        match spool.next_after(entry.last_seq - 1, 1, 1).as_deref() {
            Ok([(sequence, bytes), ..]) if *sequence == entry.last_seq => v1::Envelope::decode(bytes.clone())
                .is_ok_and(|envelope| envelope.agent_boot_id == entry.agent_boot_id),
            // Dropped from the ring already: what is left is newer.
            Ok(_) => true,
            Err(_) => false,
        }
    });
    confirmed.map(|entry| entry.last_seq).max().unwrap_or(0)
}

/// Doubling waits with a quarter of jitter, so that the agents of a cluster do not come back all at once.
fn backoff_ns(pace: &Pace, boot_id: u64, failures: u32) -> u64 {
    let doubled = pace
        .backoff_min_ns
        .saturating_mul(1 << failures.min(20))
        .min(pace.backoff_max_ns);
    // splitmix64 over the boot and the try.
    let mut mixed = boot_id.wrapping_add(u64::from(failures).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    doubled - (mixed ^ (mixed >> 31)) % (doubled / 4).max(1)
}

fn framed(kind: client_message::Kind) -> Bytes {
    let body = v1::ClientMessage { kind: Some(kind) }.encode_to_vec();
    let mut out = bytes::BytesMut::new();
    // Batches are cut to the bound before, and nothing else is long.
    match frame::encode(&body, &mut out) {
        Ok(()) => out.freeze(),
        Err(error) => {
            tracing::error!(%error, "frame not sent");
            Bytes::new()
        }
    }
}
