//! The commands' end of the control socket.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Answer, MAX_ANSWER_BYTES, Request};

/// Why the agent gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// Nobody listens.
    #[error(
        "no agent answers on {}: {source}; start it with `systemctl start stallscope`, or name its socket with \
         --socket",
        path.display()
    )]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The agent hung up, or took too long.
    #[error("the agent on {} did not answer: {source}", path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The answer is not one.
    #[error("the agent on {} answered what this version does not understand: {why}", path.display())]
    NotUnderstood {
        /// The socket.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// Asks the agent that listens on `path`; waits at most `timeout` for each part of the answer.
///
/// # Errors
/// When nobody listens, nothing comes in time, or what comes is no answer.
pub fn ask(path: &Path, request: &Request, timeout: Duration) -> Result<Answer, AskError> {
    let no_answer = |source| AskError::NoAnswer {
        path: path.to_owned(),
        source,
    };
    let not_understood = |why: String| AskError::NotUnderstood {
        path: path.to_owned(),
        why,
    };
    let mut stream = UnixStream::connect(path).map_err(|source| AskError::Unreachable {
        path: path.to_owned(),
        source,
    })?;
    stream.set_read_timeout(Some(timeout)).map_err(no_answer)?;
    stream.set_write_timeout(Some(timeout)).map_err(no_answer)?;
    let mut line = serde_json::to_vec(request).map_err(|error| not_understood(error.to_string()))?;
    line.push(b'\n');
    match stream.write_all(&line) {
        // An agent with its hands full answers before it hears the question, and hangs up.
        Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => {}
        sent => sent.map_err(|error| no_answer(late(error, timeout)))?,
    }
    let mut answer = Vec::new();
    BufReader::new(stream.take(MAX_ANSWER_BYTES))
        .read_until(b'\n', &mut answer)
        .map_err(|error| no_answer(late(error, timeout)))?;
    if !answer.ends_with(b"\n") {
        let cut = format!("it broke off after {} bytes", answer.len());
        return Err(no_answer(std::io::Error::new(ErrorKind::UnexpectedEof, cut)));
    }
    serde_json::from_slice(&answer).map_err(|error| not_understood(error.to_string()))
}

/// The system's word for a time that is over says nothing of time.
fn late(error: std::io::Error, timeout: Duration) -> std::io::Error {
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::TimedOut => {
            let why = format!("nothing came within {timeout:?}: it is stopped, or starved of processor time");
            std::io::Error::new(ErrorKind::TimedOut, why)
        }
        _ => error,
    }
}
