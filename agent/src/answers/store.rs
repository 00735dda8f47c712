//! A report from the store on this node's disk; an agent may be writing to it.

use std::path::Path;
use std::time::Duration;

use stallscope_attribution::facts::RecordGap;
use stallscope_report::document::Document;

use super::{AnswerError, Question, select, since_realtime_ns};
use crate::store::{Scope, read_back};

pub(super) fn ask(dir: &Path, question: &Question) -> Result<Document, AnswerError> {
    let since = question.since.unwrap_or(Duration::MAX);
    let scope = Scope {
        since_realtime_ns: i64::try_from(since_realtime_ns(since)).unwrap_or(i64::MAX),
        ..Scope::default()
    };
    let stored = read_back(dir, scope).map_err(|source| AnswerError::Store {
        dir: dir.to_owned(),
        source,
    })?;
    let missing = [
        (
            stored.damaged_segments,
            "the store is damaged: the rest of each damaged segment is missing",
        ),
        (
            stored.refused,
            "messages in the store that this version does not understand",
        ),
    ];
    let mut facts = stored.into_job_facts();
    for (count, what) in missing.into_iter().filter(|(count, _)| *count > 0) {
        for facts in &mut facts {
            let node = facts
                .gpus
                .first()
                .map(|gpu| gpu.subject.node.clone())
                .unwrap_or_default();
            facts.gaps.push(RecordGap {
                node,
                window: None,
                what: what.to_owned(),
                count,
            });
        }
    }
    select::document(facts, question.job.as_deref()).map_err(AnswerError::NothingRecorded)
}
