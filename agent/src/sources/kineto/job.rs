//! The traces of the ranks of one job put together.

use std::collections::BTreeMap;

use stallscope_attribution::activity::{Declared, RankTrace, TraceJob, UNNAMED_NODE};
use stallscope_attribution::facts::RecordGap;

use super::Trace;

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
                UNNAMED_NODE.clone_into(&mut device.subject.node);
            }
        }
        for gap in &mut records.gaps {
            if gap.node.is_empty() {
                UNNAMED_NODE.clone_into(&mut gap.node);
            }
        }
        ranks.push((rank, records));
    }
    let apart = apart(&ranks);
    fold_gaps(&mut ranks);
    let mut ranks: Vec<RankTrace> = ranks.into_iter().map(|(_, records)| records).collect();
    if let Some(first) = ranks.first_mut() {
        first.gaps.extend(apart);
    }
    Ok(TraceJob {
        job: name.to_owned(),
        kind: "unknown".to_owned(),
        declared: Declared::default(),
        ranks,
    })
}

/// Says of what is missing in which ranks it is: once for all of them, as thousands of ranks tend to miss the same.
fn fold_gaps(ranks: &mut [(u32, RankTrace)]) {
    let mut folded: BTreeMap<(String, String), (Vec<u32>, u64)> = BTreeMap::new();
    for (rank, records) in ranks.iter_mut() {
        for gap in records.gaps.drain(..) {
            let (of, count) = folded.entry((gap.node, gap.what)).or_default();
            of.push(*rank);
            *count += gap.count;
        }
    }
    let Some((_, first)) = ranks.first_mut() else {
        return;
    };
    first.gaps = folded
        .into_iter()
        .map(|((node, what), (of, count))| RecordGap {
            node,
            window: None,
            what: format!("{}: {what}", names(&of)),
            count,
        })
        .collect();
}

/// Ranks whose records lie at another time than most others': another run, or another clock.
fn apart(ranks: &[(u32, RankTrace)]) -> Option<RecordGap> {
    let windows = ranks.iter().filter_map(|(rank, records)| {
        let records = || records.devices.iter().flat_map(|device| &device.records);
        let start = records().map(|record| record.window.start_ns()).min()?;
        let end = records().map(|record| record.window.end_ns()).max()?;
        Some((*rank, start, end))
    });
    let mut windows: Vec<(u32, u64, u64)> = windows.collect();
    windows.sort_unstable_by_key(|(_, start, _)| *start);
    let (_, start, end) = *windows.get(windows.len() / 2)?;
    windows.retain(|(_, other_start, other_end)| *other_start > end || *other_end < start);
    let furthest = windows.iter().map(|(_, other, _)| other.abs_diff(start)).max()?;
    let mut of: Vec<u32> = windows.iter().map(|(rank, ..)| *rank).collect();
    of.sort_unstable();
    let what = format!(
        "{} recorded at another time than most ranks, up to {} s away: either of another run, or of a clock that is \
         wrong; their waiting is only told where the ends of collectives align the clocks",
        names(&of),
        furthest / 1_000_000_000
    );
    Some(RecordGap {
        node: UNNAMED_NODE.to_owned(),
        window: None,
        what,
        count: of.len() as u64,
    })
}

/// `rank 3`, or `ranks 3, 5, 8 and 12 more`.
fn names(ranks: &[u32]) -> String {
    let shown: Vec<String> = ranks.iter().take(3).map(u32::to_string).collect();
    let (shown, more) = (shown.join(", "), ranks.len().saturating_sub(3));
    match (ranks.len(), more) {
        (1, _) => format!("rank {shown}"),
        (_, 0) => format!("ranks {shown}"),
        _ => format!("ranks {shown} and {more} more"),
    }
}
