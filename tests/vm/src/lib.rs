//! The words between a virtual machine of the tests and the host that drives it: one JSON object per line, over a
//! virtio serial port.
//!
//! The guest decides nothing. It mounts what a Linux system has, runs what it is told and says how that ended; what is
//! right or wrong is the host's to say.
#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Name of the serial port that carries requests and replies.
pub const PORT: &str = "stallscope.requests";

/// Tag of the file system that host and guest both write.
pub const SHARED_TAG: &str = "shared";

/// Where the guest mounts it.
pub const SHARED_FOLDER: &str = "/run/shared";

/// What the guest says first, once: it is up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Release of its kernel.
    pub kernel: String,
}

/// What the host asks for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Chosen by the host; the reply carries it.
    pub id: u64,
    /// What to do.
    pub job: Job,
}

/// One thing to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Job {
    /// Run a program to its end; it is killed when that takes too long.
    Run {
        /// What to run.
        program: Program,
        /// For how long at most, s.
        at_most_s: u64,
    },
    /// Start a program and leave it running.
    Start {
        /// What to run.
        program: Program,
        /// The file in the shared folder that takes its output.
        log: String,
    },
    /// Wait for a started program.
    Finish {
        /// The process, as the reply to its start named it.
        pid: u32,
        /// Ask it to stop first.
        terminate: bool,
        /// For how long at most, s; then it is killed.
        at_most_s: u64,
    },
}

/// A program with its arguments.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Program {
    /// Its path or name, then its arguments.
    pub words: Vec<String>,
    /// Variables added to its environment.
    pub variables: Vec<(String, String)>,
}

/// How a request went.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Of the request.
    pub id: u64,
    /// What came of it, or why nothing did.
    pub result: Result<Outcome, String>,
}

/// What came of a request.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// The process.
    pub pid: u32,
    /// What it exited with; none while it runs, or when a signal ended it.
    pub code: Option<i32>,
    /// What it printed, unless that went to a log.
    pub stdout: String,
    /// What it complained, unless that went to a log.
    pub stderr: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line() -> Result<(), serde_json::Error> {
        let request = Request {
            id: 7,
            job: Job::Run {
                program: Program {
                    words: vec!["echo".into(), "two\nlines".into()],
                    variables: vec![("A".into(), "b".into())],
                },
                at_most_s: 3,
            },
        };
        let line = serde_json::to_string(&request)?;
        assert!(!line.contains('\n'), "{line}");
        assert_eq!(serde_json::from_str::<Request>(&line)?, request);
        Ok(())
    }
}
