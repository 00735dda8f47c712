//! A report from a collector.

use std::time::Duration;

use stallscope_proto::v1::{ReportRequest, ReportResponse, report_response};
use stallscope_report::document::Document;

use super::{AnswerError, Question, since_realtime_ns};
use crate::config::StreamTarget;
use crate::stream::query;

pub(super) fn ask(
    target: &StreamTarget,
    question: &Question,
    within: Duration,
) -> Result<Document, AnswerError> {
    let request = ReportRequest {
        job: question.job.clone().unwrap_or_default(),
        since_realtime_ns: question.since.map_or(0, since_realtime_ns),
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    document(runtime.block_on(query(target, request, within))?)
}

fn document(response: ReportResponse) -> Result<Document, AnswerError> {
    match response.result {
        Some(report_response::Result::DocumentJson(json)) => {
            Ok(Document::from_json(&String::from_utf8_lossy(&json))?)
        }
        Some(report_response::Result::NothingRecorded(why)) => Err(AnswerError::NothingRecorded(why)),
        Some(report_response::Result::Failed(why)) => Err(AnswerError::Refused(why)),
        None => Err(AnswerError::Unexpected("the collector")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(result: Option<report_response::Result>) -> Result<Document, AnswerError> {
        document(ReportResponse { result })
    }

    #[test]
    fn each_answer_is_told_apart() {
        let json = Document::from_analyses([])
            .to_json()
            .unwrap_or_default()
            .into_bytes();
        assert!(answered(Some(report_response::Result::DocumentJson(json.into()))).is_ok());
        let broken = answered(Some(report_response::Result::DocumentJson(
            b"{\xff".to_vec().into(),
        )));
        assert!(matches!(broken, Err(AnswerError::Document(_))));
        let nothing = answered(Some(report_response::Result::NothingRecorded(
            "no job".to_owned(),
        )));
        assert!(matches!(nothing, Err(AnswerError::NothingRecorded(_))));
        assert!(matches!(answered(None), Err(AnswerError::Unexpected(_))));
    }

    #[test]
    fn an_absurd_since_still_asks_for_a_time() {
        assert_eq!(since_realtime_ns(Duration::MAX), 1);
        assert!(since_realtime_ns(Duration::from_secs(60)) > 1_700_000_000_000_000_000);
    }
}
