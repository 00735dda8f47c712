//! The control socket: short questions to the running agent.
//!
//! A client connects to the agent's Unix socket, writes one request as a line of JSON, and reads one answer as a line
//! of JSON; then the agent closes. Both lines are bounded ([`MAX_REQUEST_BYTES`], [`MAX_ANSWER_BYTES`]). Fields may be
//! added; neither side minds what it does not know.
//!
//! ```text
//! {"check":{"gpu":0}}                        {"check":{"fitness":"fit","reasons":["..."]}}
//! {"report":{"job":"llama","since_ms":600000}}   {"report":{"document":{"schema":"stallscope.report/1",...}}}
//! "status"                                   {"status":{"node":"n1","uptime_ms":93000,...}}
//! ```

pub mod client;
pub mod fitness;
pub mod server;

use serde::{Deserialize, Serialize};
use stallscope_report::document::Document;

pub use fitness::{Check, Fitness};

/// Longest request line, bytes.
pub const MAX_REQUEST_BYTES: u64 = 4 << 10;
/// Longest answer line, bytes: a report of some ten thousand GPUs.
pub const MAX_ANSWER_BYTES: u64 = 128 << 20;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Is the node, or one GPU, fit to run a job?
    Check {
        /// Index on the node; every GPU when absent.
        #[serde(default)]
        gpu: Option<u32>,
    },
    /// The root-cause report of what the agent remembers.
    Report {
        /// Only this job; every job when absent.
        #[serde(default)]
        job: Option<String>,
        /// Only what ended in the last so many milliseconds; everything remembered when absent.
        #[serde(default)]
        since_ms: Option<u64>,
    },
    /// How the agent itself is.
    Status,
}

/// What the agent answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// To [`Request::Check`].
    Check(Check),
    /// To [`Request::Report`].
    Report {
        /// The report.
        document: Box<Document>,
    },
    /// To [`Request::Report`], when nothing fits; says what is recorded.
    NothingRecorded {
        /// A sentence.
        why: String,
    },
    /// To [`Request::Status`].
    Status(AgentStatus),
    /// The request was not understood or could not be served.
    Failed {
        /// Why, and what to do.
        why: String,
    },
}

/// How the agent itself is.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct AgentStatus {
    /// Version of the agent.
    pub version: String,
    /// Node name.
    pub node: String,
    /// Since the agent started, ms.
    pub uptime_ms: u64,
    /// Since anything was last updated, ms.
    pub idle_ms: u64,
    /// GPUs that are read.
    pub gpus: Vec<u32>,
    /// Jobs remembered.
    pub jobs: Vec<String>,
    /// Parts of the agent.
    pub parts: Vec<Part>,
    /// What the agent costs.
    pub own: Own,
}

/// One part of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Which: `probes`, `nvml`, `stream`, ...
    pub part: String,
    /// `works`, `degraded`, `missing`, `starting` or `off`.
    pub condition: String,
    /// What is lost and what to do; empty when nothing is.
    #[serde(default)]
    pub why: String,
}

/// What the agent itself costs and loses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Own {
    /// CPU time since start, ms.
    pub cpu_ms: u64,
    /// CPU over the last update interval, parts per million of one core.
    pub cpu_ppm: u64,
    /// Resident memory, bytes.
    pub resident_bytes: u64,
    /// Observations handled since start.
    pub observations: u64,
    /// Kernel records lost since start.
    pub lost_records: u64,
    /// Observations dropped between sources and timeline since start.
    pub dropped_observations: u64,
    /// Observations that came too late to be sorted in.
    pub late_observations: u64,
    /// Messages dropped from the store before a collector had them.
    pub dropped_messages: u64,
}
