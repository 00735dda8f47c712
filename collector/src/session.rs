//! One client: a handshake, then batches and acknowledgements, or one report.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use quinn::{Connection, ConnectionError, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use stallscope_proto::frame::{self, Decoder, FrameError};
use stallscope_proto::v1::{self, client_message, server_message};
use stallscope_proto::{SCHEMA, close};
use tokio::time::{Instant, timeout};

use crate::board::Absence;
use crate::clock::realtime_ns;
use crate::intake::{Arrival, IntakeError, locked};
use crate::server::Shared;
use crate::stats::Stats;
use crate::tls::certifies;

/// A client that has not said what it wants by then is closed.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// A report is given up when its reader does not take it within this time.
const REPORT_TAKEN: Duration = Duration::from_secs(60);
/// Longest report sent, bytes.
pub(crate) const MAX_REPORT_BYTES: usize = 64 << 20;
const READ_BYTES: usize = 64 << 10;
const MAX_NODE_BYTES: usize = 255;

/// Why a client's connection was closed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// The bytes are not frames.
    #[error("{0}")]
    Frame(#[from] FrameError),
    /// A frame is not a message.
    #[error("not a message: {0}")]
    Message(#[from] prost::DecodeError),
    /// A message came that has no place here.
    #[error("{0}")]
    Unexpected(&'static str),
    /// The client speaks another version.
    #[error("schema {theirs} is not spoken here (this collector speaks {SCHEMA}): upgrade the older side")]
    Schema {
        /// The client's version.
        theirs: u32,
    },
    /// The client speaks for a node that its certificate does not name.
    #[error(
        "the client's certificate does not name node {node:?}: on the node, set `node` to a name in the certificate or issue a \
         certificate with that subject alternative name; on the collector, --any-name takes fleets that share one certificate"
    )]
    Name {
        /// What it calls itself.
        node: String,
    },
    /// The client said nothing in time.
    #[error("no message within {} s", FIRST_MESSAGE.as_secs())]
    Silent,
    /// Nothing could be stored.
    #[error("{0}")]
    Intake(#[from] IntakeError),
    /// The connection ended by itself.
    #[error("{0}")]
    Connection(#[from] ConnectionError),
    /// The stream ended by itself.
    #[error("stream ended: {0}")]
    Stream(String),
}

impl SessionError {
    /// The code with which the connection is closed; `None` when it is closed already.
    const fn close_code(&self) -> Option<u32> {
        match self {
            Self::Frame(FrameError::TooLong { .. }) => Some(close::LIMIT),
            Self::Frame(_) | Self::Message(_) | Self::Unexpected(_) | Self::Name { .. } | Self::Silent => {
                Some(close::PROTOCOL)
            }
            Self::Intake(IntakeError::Jump { .. }) => Some(close::PROTOCOL),
            Self::Schema { .. } => Some(close::SCHEMA),
            Self::Intake(IntakeError::Store(_) | IntakeError::TooManyNodes) => Some(close::STORE),
            Self::Intake(IntakeError::Stopping) => Some(close::STOPPING),
            Self::Connection(_) | Self::Stream(_) => None,
        }
    }

    /// Whether the client is to blame.
    const fn is_violation(&self) -> bool {
        matches!(
            self.close_code(),
            Some(close::PROTOCOL | close::LIMIT | close::SCHEMA)
        )
    }
}

/// Serves one connection to its end.
pub(crate) async fn serve(shared: Arc<Shared>, connection: Connection) {
    let peer = connection.remote_address();
    match run(&shared, &connection).await {
        Ok(()) => connection.close(VarInt::from_u32(close::DONE), b"done"),
        Err(error) => {
            if error.is_violation() {
                Stats::add(&shared.stats.protocol_errors, 1);
            }
            if matches!(error, SessionError::Intake(IntakeError::Store(_))) {
                Stats::add(&shared.stats.store_errors, 1);
            }
            if let Some(code) = error.close_code() {
                tracing::warn!(%peer, %error, "closing a client; others are not affected");
                connection.close(VarInt::from_u32(code), error.to_string().as_bytes());
            } else {
                tracing::debug!(%peer, %error, "client gone");
            }
        }
    }
}

async fn run(shared: &Arc<Shared>, connection: &Connection) -> Result<(), SessionError> {
    let first = async {
        let (send, recv) = connection.accept_bi().await?;
        let mut messages = Messages::new(recv, shared);
        let message = messages
            .next()
            .await?
            .ok_or(SessionError::Unexpected("stream ended before its first message"))?;
        Ok::<_, SessionError>((send, messages, message))
    };
    let (send, messages, message) = timeout(FIRST_MESSAGE, first)
        .await
        .map_err(|_late| SessionError::Silent)??;
    match message {
        client_message::Kind::Hello(hello) => agent(shared, connection, hello, messages, send).await,
        client_message::Kind::Report(request) => report(shared, request, send).await,
        client_message::Kind::Batch(_) | client_message::Kind::Heartbeat(_) => Err(SessionError::Unexpected(
            "the first message must be Hello or ReportRequest",
        )),
    }
}

async fn agent(
    shared: &Arc<Shared>,
    connection: &Connection,
    hello: v1::Hello,
    mut messages: Messages,
    mut send: SendStream,
) -> Result<(), SessionError> {
    if hello.schema != SCHEMA {
        return Err(SessionError::Schema { theirs: hello.schema });
    }
    if hello.node.is_empty() || hello.node.len() > MAX_NODE_BYTES || hello.node.chars().any(char::is_control)
    {
        return Err(SessionError::Unexpected(
            "the node's name is empty, too long or holds control characters",
        ));
    }
    let node = hello.node;
    if !shared.any_name && !is_named(connection, &node) {
        return Err(SessionError::Name { node });
    }
    shared.enter(&node, connection);
    tracing::info!(%node, peer = %connection.remote_address(), agent = %hello.agent_version, "agent connected");
    let result = agent_messages(shared, &node, &mut messages, &mut send).await;
    let absence = match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(reason))
            if reason.error_code == VarInt::from_u32(close::DONE) =>
        {
            Absence::Stopped
        }
        None if result.is_ok() => Absence::Stopped,
        Some(_) | None => Absence::Lost,
    };
    shared.leave(&node, connection, absence);
    tracing::info!(%node, ?absence, "agent disconnected");
    result
}

/// Whether the client's own certificate names the node: any other of the same authority is another node's.
fn is_named(connection: &Connection, node: &str) -> bool {
    let chain = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok());
    chain
        .as_deref()
        .and_then(|chain| chain.first())
        .is_some_and(|own| certifies(own, node))
}

async fn agent_messages(
    shared: &Arc<Shared>,
    node: &str,
    messages: &mut Messages,
    send: &mut SendStream,
) -> Result<(), SessionError> {
    let resume = locked(&shared.board).resume(node);
    let hello_ack = v1::HelloAck {
        resume,
        window_bytes: u64::from(shared.limits.window_bytes),
        max_frame_bytes: shared.limits.max_frame_bytes,
    };
    reply(
        send,
        server_message::Kind::HelloAck(hello_ack),
        frame::MAX_BODY_BYTES,
    )
    .await?;
    while let Some(message) = messages.next().await? {
        match message {
            client_message::Kind::Batch(batch) => {
                let arrivals = arrivals(node, batch)?;
                let last_seq = shared.intake.store(arrivals).await?;
                reply(
                    send,
                    server_message::Kind::Ack(v1::Ack { last_seq }),
                    frame::MAX_BODY_BYTES,
                )
                .await?;
            }
            client_message::Kind::Heartbeat(beat) => {
                tracing::trace!(%node, spooled = beat.spooled_messages, dropped = beat.dropped_messages, "heartbeat");
            }
            client_message::Kind::Hello(_) | client_message::Kind::Report(_) => {
                return Err(SessionError::Unexpected(
                    "after Hello only Batch and Heartbeat may come",
                ));
            }
        }
        locked(&shared.board).heard(node, realtime_ns());
    }
    Ok(())
}

fn arrivals(node: &str, batch: v1::Batch) -> Result<Vec<Arrival>, SessionError> {
    if batch.envelopes.is_empty() {
        return Err(SessionError::Unexpected(
            "a batch must hold at least one envelope",
        ));
    }
    let mut last_seq = 0;
    let mut arrivals = Vec::with_capacity(batch.envelopes.len());
    for bytes in batch.envelopes {
        let envelope = v1::Envelope::decode(bytes.clone())?;
        if envelope.node != node {
            return Err(SessionError::Unexpected(
                "an envelope names another node than Hello did",
            ));
        }
        if envelope.sequence <= last_seq {
            return Err(SessionError::Unexpected(
                "the envelopes of a batch must be in ascending order",
            ));
        }
        last_seq = envelope.sequence;
        arrivals.push(Arrival { bytes, envelope });
    }
    Ok(arrivals)
}

async fn report(
    shared: &Arc<Shared>,
    request: v1::ReportRequest,
    mut send: SendStream,
) -> Result<(), SessionError> {
    // Closed only with the collector itself.
    let Ok(_permit) = shared.reports.acquire().await else {
        return Err(IntakeError::Stopping.into());
    };
    let answers = Arc::clone(&shared.answers);
    let computed = tokio::task::spawn_blocking(move || answers.answer(&request)).await;
    let response = computed.unwrap_or_else(|error| {
        tracing::error!(%error, "report failed");
        let failed = v1::report_response::Result::Failed("the collector failed to compute the report".into());
        v1::ReportResponse { result: Some(failed) }
    });
    let sent = async {
        reply(
            &mut send,
            server_message::Kind::Report(response),
            MAX_REPORT_BYTES,
        )
        .await?;
        send.finish()
            .map_err(|error| SessionError::Stream(error.to_string()))?;
        // Closing the connection now would cut off what is still on its way.
        send.stopped()
            .await
            .map_err(|error| SessionError::Stream(error.to_string()))
    };
    timeout(REPORT_TAKEN, sent)
        .await
        .map_err(|_late| SessionError::Silent)?
        .map(|_stopped| ())
}

async fn reply(
    send: &mut SendStream,
    kind: server_message::Kind,
    max_bytes: usize,
) -> Result<(), SessionError> {
    let body = v1::ServerMessage { kind: Some(kind) }.encode_to_vec();
    let mut framed = bytes::BytesMut::new();
    frame::encode_bounded(&body, max_bytes, &mut framed)?;
    send.write_all(&framed)
        .await
        .map_err(|error| SessionError::Stream(error.to_string()))
}

/// The messages of one stream, taken at a bounded rate.
struct Messages {
    recv: RecvStream,
    decoder: Decoder,
    bytes_per_s: u64,
    /// How far ahead of the rate the client is: the time at which it would be even.
    even_at: Instant,
}

impl Messages {
    fn new(recv: RecvStream, shared: &Shared) -> Self {
        Self {
            recv,
            decoder: Decoder::new(shared.limits.max_frame_bytes as usize),
            bytes_per_s: shared.limits.bytes_per_s.max(1),
            even_at: Instant::now(),
        }
    }

    /// The next message; `None` when the client finished its stream between two messages.
    async fn next(&mut self) -> Result<Option<client_message::Kind>, SessionError> {
        loop {
            if let Some(body) = self.decoder.next_body()? {
                let kind = v1::ClientMessage::decode(body)?.kind;
                return kind
                    .map(Some)
                    .ok_or(SessionError::Unexpected("a message of a kind not known here"));
            }
            self.keep_rate().await;
            match self.recv.read_chunk(READ_BYTES, true).await {
                Ok(Some(chunk)) => {
                    self.charge(chunk.bytes.len() as u64);
                    self.decoder.push(&chunk.bytes);
                }
                Ok(None) if self.decoder.pending_bytes() > 0 => {
                    return Err(SessionError::Unexpected("the stream ends within a frame"));
                }
                Ok(None) => return Ok(None),
                Err(quinn::ReadError::ConnectionLost(error)) => return Err(error.into()),
                Err(error) => return Err(SessionError::Stream(error.to_string())),
            }
        }
    }

    fn charge(&mut self, bytes: u64) {
        let cost_ns = bytes.saturating_mul(1_000_000_000) / self.bytes_per_s;
        self.even_at = self.even_at.max(Instant::now()) + Duration::from_nanos(cost_ns);
    }

    /// Waits when the client is more than a second ahead of its rate; QUIC's flow control then slows it down.
    async fn keep_rate(&self) {
        const BURST: Duration = Duration::from_secs(1);
        if self.even_at > Instant::now() + BURST {
            tokio::time::sleep_until(self.even_at - BURST).await;
        }
    }
}
