//! Where a report comes from: the store on this node, the running agent, or a collector.

mod collector;
pub mod recordings;
mod render;
pub(crate) mod select;
mod store;

use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use stallscope_report::document::{Document, DocumentError};

use crate::config::StreamTarget;
use crate::control::client::{self, AskError};
use crate::control::{Answer, Request};
use crate::stream::QueryError;

pub use render::{Format, render};

/// An agent analyses a day of steps in less; a collector a day of a thousand GPUs.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Who is asked.
#[derive(Debug, Clone)]
pub enum Source {
    /// The agent that listens on this control socket.
    Agent {
        /// The socket.
        socket: PathBuf,
    },
    /// The store in this directory.
    Store {
        /// The directory.
        dir: PathBuf,
    },
    /// What this node has: its store, which reaches back furthest, else its running agent.
    Node {
        /// The store.
        dir: PathBuf,
        /// The agent's socket.
        socket: PathBuf,
    },
    /// A collector.
    Collector {
        /// Its address and the certificates to use.
        target: Box<StreamTarget>,
    },
}

/// What is asked.
#[derive(Debug, Clone, Default)]
pub struct Question {
    /// Only this job; else every job an agent remembers, or the one a collector heard of last.
    pub job: Option<String>,
    /// Only what ended in the last so long.
    pub since: Option<Duration>,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// Nothing fits the question.
    #[error("nothing recorded: {0}")]
    NothingRecorded(String),
    /// The store could not be read.
    #[error("failed to read the store in {}: {source}; nothing recorded there can be reported", dir.display())]
    Store {
        /// Its directory.
        dir: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The agent could not be asked.
    #[error(transparent)]
    Agent(#[from] AskError),
    /// The collector could not be asked.
    #[error(transparent)]
    Collector(#[from] QueryError),
    /// It answered that it could not.
    #[error("no report: {0}")]
    Refused(String),
    /// The report that came does not hold.
    #[error("the report that came is not usable: {0}")]
    Document(#[from] DocumentError),
    /// This process could not ask.
    #[error("failed to start asking the collector: {0}")]
    Runtime(#[from] std::io::Error),
    /// The answer came from something else.
    #[error("{0} answered a report request with something else: are both of the same version?")]
    Unexpected(&'static str),
}

/// Asks for a report.
///
/// # Errors
/// When nothing is recorded, nobody answers, or the answer does not hold.
pub fn ask(source: &Source, question: &Question) -> Result<Document, AnswerError> {
    match source {
        Source::Store { dir } => store::ask(dir, question),
        Source::Node { dir, socket } => store::ask(dir, question).or_else(|of_store| {
            let agent = Source::Agent {
                socket: socket.clone(),
            };
            ask(&agent, question).map_err(|of_agent| neither(&of_store, of_agent))
        }),
        Source::Agent { socket } => {
            let since_ms = question
                .since
                .map(|since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX));
            let request = Request::Report {
                job: question.job.clone(),
                since_ms,
            };
            from_agent(client::ask(socket, &request, TIMEOUT)?)
        }
        Source::Collector { target } => collector::ask(target, question, TIMEOUT),
    }
}

/// A node without a store and without an agent has recorded nothing; an agent that fails is another matter.
fn neither(of_store: &AnswerError, of_agent: AnswerError) -> AnswerError {
    match of_agent {
        AnswerError::Agent(AskError::Unreachable { .. }) => {
            let of_store = match of_store {
                AnswerError::NothingRecorded(why) => why.clone(),
                other => other.to_string(),
            };
            AnswerError::NothingRecorded(format!("{of_store}; {of_agent}"))
        }
        other => other,
    }
}

/// The moment `since` ago; never 0, which would ask for everything.
fn since_realtime_ns(since: Duration) -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(now.saturating_sub(since).as_nanos())
        .unwrap_or(u64::MAX)
        .max(1)
}

fn from_agent(answer: Answer) -> Result<Document, AnswerError> {
    match answer {
        Answer::Report { document } => {
            document.check()?;
            Ok(*document)
        }
        Answer::NothingRecorded { why } => Err(AnswerError::NothingRecorded(why)),
        Answer::Failed { why } => Err(AnswerError::Refused(why)),
        Answer::Check(_) | Answer::Status(_) => Err(AnswerError::Unexpected("the agent")),
    }
}

#[cfg(test)]
mod tests;
