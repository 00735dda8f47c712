//! Asking a collector for a report.

use std::time::Duration;

use prost::Message;
use stallscope_proto::v1::{self, client_message, server_message};
use stallscope_proto::{close, frame};
use tokio::time::timeout;

use super::link::{Link, LinkError};
use crate::config::StreamTarget;

/// Longest report taken, bytes.
const MAX_REPORT_BYTES: usize = 64 << 20;

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum QueryError {
    /// The connection.
    #[error("no report from the collector: {0}; {advice}", advice = .0.advice())]
    Link(#[from] LinkError),
    /// The question is longer than a frame.
    #[error("question too long: {0}")]
    TooLong(#[from] frame::FrameError),
    /// Something else than a report came.
    #[error("the collector sent no report but another message: are agent and collector of the same version?")]
    Unexpected,
}

/// Asks the collector and waits for its answer, at most `within`.
///
/// # Errors
/// When the collector cannot be reached, refuses, or does not answer in time.
pub async fn query(
    target: &StreamTarget,
    request: v1::ReportRequest,
    within: Duration,
) -> Result<v1::ReportResponse, QueryError> {
    timeout(within, ask(target, request))
        .await
        .map_err(|_late| LinkError::Late(within))?
}

async fn ask(target: &StreamTarget, request: v1::ReportRequest) -> Result<v1::ReportResponse, QueryError> {
    let mut link = Link::open(target, MAX_REPORT_BYTES).await?;
    let message = v1::ClientMessage {
        kind: Some(client_message::Kind::Report(request)),
    };
    let mut framed = bytes::BytesMut::new();
    frame::encode(&message.encode_to_vec(), &mut framed)?;
    link.send(&framed.freeze()).await?;
    let answer = link.receive().await?;
    link.close(close::DONE, "report received").await;
    match answer {
        server_message::Kind::Report(response) => Ok(response),
        server_message::Kind::HelloAck(_) | server_message::Kind::Ack(_) => Err(QueryError::Unexpected),
    }
}
