//! The traces of the ranks of one job put together.

use std::collections::BTreeMap;

use stallscope_attribution::activity::{Declared, TraceJob};

use super::Trace;

/// The node of a trace that does not name its host.
const UNNAMED: &str = "unnamed";

/// Why traces are not of one job.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// Two files of one rank.
    #[error("rank {rank} is in both {first} and {second}; give one trace per rank, of one run")]
    SameRank {
        /// Which rank.
        rank: u32,
        /// One file.
        first: String,
        /// The other.
        second: String,
    },
    /// Jobs of different size.
    #[error(
        "{first} is of a job of {first_world} ranks, {second} of one of {second_world}; give traces of one run"
    )]
    OtherWorld {
        /// One file.
        first: String,
        /// Its number of ranks.
        first_world: u32,
        /// The other.
        second: String,
        /// Its number of ranks.
        second_world: u32,
    },
    /// Some files tell their rank and some do not.
    #[error("{file} does not say its rank and other files do; give traces of one run")]
    NoRank {
        /// Which file.
        file: String,
    },
}

/// One job from the traces of its ranks, each with the name of its file. Files that do not tell their rank are
/// numbered in the order given.
///
/// # Errors
/// When the files cannot be of one run.
pub fn job(name: &str, traces: Vec<(String, Trace)>) -> Result<TraceJob, JobError> {
    let ranked = traces.iter().any(|(_, trace)| trace.rank.is_some());
    let world = traces.iter().find(|(_, trace)| trace.world > 0);
    let world = world.map(|(file, trace)| (file.clone(), trace.world));
    let mut files: BTreeMap<u32, String> = BTreeMap::new();
    let mut ranks = Vec::new();
    for (at, (file, trace)) in traces.into_iter().enumerate() {
        if let Some((first, first_world)) = &world
            && trace.world > 0
            && trace.world != *first_world
        {
            return Err(JobError::OtherWorld {
                first: first.clone(),
                first_world: *first_world,
                second: file,
                second_world: trace.world,
            });
        }
        let rank = match trace.rank {
            Some(rank) => rank,
            None if ranked => return Err(JobError::NoRank { file }),
            None => u32::try_from(at).unwrap_or(u32::MAX),
        };
        if let Some(first) = files.insert(rank, file.clone()) {
            return Err(JobError::SameRank {
                rank,
                first,
                second: file,
            });
        }
        let mut records = trace.records;
        for device in &mut records.devices {
            device.subject.job = name.to_owned();
            device.subject.rank = rank;
            if device.subject.node.is_empty() {
                UNNAMED.clone_into(&mut device.subject.node);
            }
        }
        for gap in &mut records.gaps {
            if gap.node.is_empty() {
                UNNAMED.clone_into(&mut gap.node);
            }
            gap.what = format!("rank {rank}: {}", gap.what);
        }
        ranks.push(records);
    }
    Ok(TraceJob {
        job: name.to_owned(),
        kind: "unknown".to_owned(),
        declared: Declared::default(),
        ranks,
    })
}
