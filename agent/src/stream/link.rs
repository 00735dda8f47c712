//! One QUIC connection to a collector, frames in and out.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use prost::Message;
use quinn::{
    ConnectError, Connection, ConnectionError, Endpoint, RecvStream, SendStream, TransportConfig, VarInt,
};
use stallscope_collector::tls::{Identity, IdentityError, IdentityFiles};
use stallscope_proto::close;
use stallscope_proto::frame::{Decoder, FrameError};
use stallscope_proto::v1::{self, server_message};

use crate::config::StreamTarget;

const READ_BYTES: usize = 64 << 10;
/// Between two packets that keep an idle connection alive.
const KEEP_ALIVE: Duration = Duration::from_millis(1500);
/// A collector that is silent for this long is gone.
const IDLE: Duration = Duration::from_secs(5);
/// Base of the codes with which TLS alerts travel in QUIC (RFC 9001, section 4.8).
const CRYPTO_ERRORS: std::ops::Range<u64> = 0x100..0x200;

/// Why there is no connection, or no longer one.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// Certificates or key.
    #[error("{0}")]
    Identity(#[from] IdentityError),
    /// The name of the collector.
    #[error("{host} has no address: {why}")]
    Resolve {
        /// The name.
        host: String,
        /// Why.
        why: String,
    },
    /// The local socket.
    #[error("no local UDP socket: {0}")]
    Socket(std::io::Error),
    /// The connection could not be begun.
    #[error("{0}")]
    Begin(#[from] ConnectError),
    /// The connection ended or was never made.
    #[error("{}", describe(.0))]
    Connection(#[from] ConnectionError),
    /// The stream in it ended.
    #[error("stream ended: {0}")]
    Stream(String),
    /// What came is not frames.
    #[error("the collector sent damaged data: {0}")]
    Frame(#[from] FrameError),
    /// What came is not a message.
    #[error("the collector sent what is no message: {0}")]
    Message(#[from] prost::DecodeError),
    /// A message of a kind this version does not know.
    #[error("the collector sent a message of a kind not known here: it is newer")]
    Unknown,
    /// Nothing happened in time.
    #[error("no answer within {} s", .0.as_secs())]
    Late(Duration),
}

fn describe(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ApplicationClosed(closed) => {
            let meaning = close::meaning(closed.error_code.into_inner());
            format!(
                "the collector closed the connection: {meaning}: {}",
                String::from_utf8_lossy(&closed.reason)
            )
        }
        ConnectionError::TimedOut => "no answer".to_owned(),
        other => other.to_string(),
    }
}

impl LinkError {
    /// The code with which the collector closed the connection, if it did.
    #[must_use]
    pub fn close_code(&self) -> Option<u64> {
        match self {
            Self::Connection(ConnectionError::ApplicationClosed(closed)) => {
                Some(closed.error_code.into_inner())
            }
            _ => None,
        }
    }

    /// What a person can do about it.
    #[must_use]
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Identity(_) => "repair the PEM files named in [stream]",
            Self::Resolve { .. } => "check the host in [stream] collector, and name resolution on this node",
            Self::Socket(_) => "check the limits on open files and the network of this node",
            Self::Begin(_) => "check [stream] collector and server_name",
            Self::Connection(ConnectionError::TransportError(error)) if is_crypto(error.code.into()) => {
                "the collector's certificate is not trusted here: check [stream] ca and server_name"
            }
            Self::Connection(ConnectionError::ConnectionClosed(closed))
                if is_crypto(closed.error_code.into()) =>
            {
                "the collector does not trust this node: check [stream] cert and key against the collector's --ca"
            }
            Self::Connection(ConnectionError::ApplicationClosed(_)) => "see the log of the collector",
            Self::Connection(_) | Self::Late(_) => {
                "check that the collector runs and that its UDP port can be reached from this node"
            }
            Self::Stream(_) => "the stream is made anew",
            Self::Frame(_) | Self::Message(_) | Self::Unknown => {
                "check that agent and collector are of the same version"
            }
        }
    }
}

fn is_crypto(code: u64) -> bool {
    CRYPTO_ERRORS.contains(&code)
}

/// One connection with its one stream.
pub(super) struct Link {
    endpoint: Endpoint,
    connection: Connection,
    send: SendStream,
    recv: RecvStream,
    decoder: Decoder,
}

impl Link {
    /// Connects and opens the stream. Reads the PEM files anew, so that replaced ones count from the next try.
    pub(super) async fn open(target: &StreamTarget, max_answer_bytes: usize) -> Result<Self, LinkError> {
        let files = IdentityFiles {
            ca: target.ca.clone(),
            cert: target.cert.clone(),
            key: target.key.clone(),
        };
        let mut config = Identity::load(&files)?.client()?;
        config.transport_config(std::sync::Arc::new(transport()));
        let address = resolve(target).await?;
        let local: SocketAddr = if address.is_ipv6() {
            (Ipv6Addr::UNSPECIFIED, 0).into()
        } else {
            (Ipv4Addr::UNSPECIFIED, 0).into()
        };
        let endpoint = Endpoint::client(local).map_err(LinkError::Socket)?;
        let connection = endpoint
            .connect_with(config, address, &target.server_name)?
            .await?;
        let (send, recv) = connection.open_bi().await?;
        Ok(Self {
            endpoint,
            connection,
            send,
            recv,
            decoder: Decoder::new(max_answer_bytes),
        })
    }

    /// Sends one frame; waits while the collector's window is full.
    pub(super) async fn send(&mut self, framed: &Bytes) -> Result<(), LinkError> {
        match self.send.write_all(framed).await {
            Ok(()) => Ok(()),
            Err(quinn::WriteError::ConnectionLost(error)) => Err(error.into()),
            Err(error) => Err(self.reason(error.to_string())),
        }
    }

    /// The next message. May be dropped while it waits and called again.
    pub(super) async fn receive(&mut self) -> Result<server_message::Kind, LinkError> {
        loop {
            if let Some(body) = self.decoder.next_body()? {
                return v1::ServerMessage::decode(body)?.kind.ok_or(LinkError::Unknown);
            }
            match self.recv.read_chunk(READ_BYTES, true).await {
                Ok(Some(chunk)) => self.decoder.push(&chunk.bytes),
                Ok(None) => return Err(self.reason("the collector ended it".to_owned())),
                Err(quinn::ReadError::ConnectionLost(error)) => return Err(error.into()),
                Err(error) => return Err(self.reason(error.to_string())),
            }
        }
    }

    /// The connection's own end says more than the stream's.
    fn reason(&self, stream: String) -> LinkError {
        self.connection
            .close_reason()
            .map_or(LinkError::Stream(stream), LinkError::Connection)
    }

    /// Says goodbye and waits until it is on its way.
    pub(super) async fn close(mut self, code: u32, why: &str) {
        let _ = self.send.finish();
        self.connection.close(VarInt::from_u32(code), why.as_bytes());
        let _ = tokio::time::timeout(Duration::from_millis(500), self.endpoint.wait_idle()).await;
    }
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(1 << 20))
        .receive_window(VarInt::from_u32(1 << 20))
        .send_window(1 << 20)
        .datagram_receive_buffer_size(None)
        .keep_alive_interval(Some(KEEP_ALIVE))
        .max_idle_timeout(IDLE.try_into().ok());
    transport
}

async fn resolve(target: &StreamTarget) -> Result<SocketAddr, LinkError> {
    let failed = |why: String| LinkError::Resolve {
        host: target.host.clone(),
        why,
    };
    let mut found = tokio::net::lookup_host((target.host.as_str(), target.port))
        .await
        .map_err(|error| failed(error.to_string()))?;
    found
        .next()
        .ok_or_else(|| failed("the name has no addresses".to_owned()))
}
