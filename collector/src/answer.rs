//! Reports on demand, and the live verdicts.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use stallscope_attribution::facts::{JobFacts, RecordGap};
use stallscope_attribution::job::analyse;
use stallscope_proto::v1::{self, report_response};
use stallscope_report::document::Document;

use crate::board::{Board, BoardLimits};
use crate::clock::realtime_ns;
use crate::intake::{SharedBoard, locked};
use crate::stats::Stats;
use crate::store::{SegmentReader, StoredItem};
use crate::verdicts::VerdictHistory;

/// Between two live analyses.
const LIVE_PERIOD: Duration = Duration::from_secs(1);
/// How far back a live analysis looks, ns.
const LIVE_WINDOW_NS: u64 = 60_000_000_000;
/// A job that told nothing for this long is not live, ns.
const LIVE_SILENCE_NS: u64 = 30_000_000_000;

/// Answers questions about jobs.
#[derive(Debug)]
pub(crate) struct Answers {
    pub(crate) board: SharedBoard,
    pub(crate) history: Mutex<VerdictHistory>,
    pub(crate) store_dir: PathBuf,
    pub(crate) limits: BoardLimits,
    pub(crate) stats: Arc<Stats>,
}

impl Answers {
    /// The answer to a report's question. Slow when it must read back from disk: run it off the event loop.
    pub(crate) fn answer(&self, request: &v1::ReportRequest) -> v1::ReportResponse {
        Stats::add(&self.stats.reports, 1);
        let result = match self.facts(request) {
            Some(facts) => self.document(&facts),
            None => report_response::Result::NothingRecorded(self.what_is_recorded(&request.job)),
        };
        v1::ReportResponse { result: Some(result) }
    }

    fn document(&self, facts: &JobFacts) -> report_response::Result {
        let analysis = analyse(facts);
        let mut document = Document::from(&analysis);
        let history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        // The document lists the verdicts in the order of the analysis.
        for (shown, verdict) in document
            .jobs
            .iter_mut()
            .flat_map(|job| &mut job.verdicts)
            .zip(&analysis.verdicts)
        {
            let held = history.held(&facts.job, verdict.cause, &verdict.place);
            shown.first_seen_unix_ns = held.map(|held| held.first_seen_ns);
        }
        drop(history);
        match document.to_json() {
            Ok(json) => report_response::Result::DocumentJson(json.into()),
            Err(error) => {
                report_response::Result::Failed(format!("report cannot be written as JSON: {error}"))
            }
        }
    }

    /// The facts asked for: from memory when it reaches back far enough, else from disk.
    fn facts(&self, request: &v1::ReportRequest) -> Option<JobFacts> {
        let now_ns = realtime_ns();
        let since_ns = request.since_realtime_ns;
        {
            let board = locked(&self.board);
            let job = self.job_asked_for(&board, &request.job);
            if let Some(job) = job
                && board.complete_since(&job) <= since_ns
                && let Some(facts) = board.facts(&job, since_ns, now_ns)
                && !facts.gpus.is_empty()
            {
                return Some(facts);
            }
        }
        let (stored, damage) = self.read_back();
        let job = self.job_asked_for(&stored, &request.job)?;
        let mut facts = stored.facts(&job, since_ns, now_ns)?;
        let forgotten_ns = stored.complete_since(&job);
        if forgotten_ns > since_ns {
            facts.gaps.push(RecordGap {
                node: String::new(),
                window: stallscope_attribution::time::Window::new(since_ns, forgotten_ns),
                what: "more steps than one report holds: the oldest are left out; ask for less with --since"
                    .into(),
                count: 0,
            });
        }
        facts.gaps.extend(damage);
        (!facts.gpus.is_empty()).then_some(facts)
    }

    fn job_asked_for(&self, board: &Board, job: &str) -> Option<String> {
        if job.is_empty() {
            board.main_job()
        } else {
            Some(job.to_owned())
        }
    }

    /// Everything on disk, as far as one report may hold it.
    fn read_back(&self) -> (Board, Vec<RecordGap>) {
        let mut board = Board::new(BoardLimits {
            window_ns: u64::MAX,
            ..self.limits
        });
        let mut damage = Vec::new();
        load(&self.store_dir, &mut board, &mut damage);
        board.adopt_presence(&locked(&self.board));
        (board, damage)
    }

    fn what_is_recorded(&self, job: &str) -> String {
        let known = locked(&self.board).jobs_since(0);
        match (known.is_empty(), job.is_empty()) {
            (true, _) => "the collector has received no steps of any job".to_owned(),
            (false, true) => format!("nothing in the time asked for; known jobs: {}", known.join(", ")),
            (false, false) => {
                format!(
                    "nothing of job {job:?} in the time asked for; known jobs: {}",
                    known.join(", ")
                )
            }
        }
    }

    /// Analyses every live job once a second; never returns.
    pub(crate) async fn keep_watching(self: Arc<Self>) {
        let mut ticks = tokio::time::interval(LIVE_PERIOD);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let answers = Arc::clone(&self);
            if let Err(error) = tokio::task::spawn_blocking(move || answers.watch_once(realtime_ns())).await {
                tracing::error!(%error, "live analysis failed; stored data and reports are not affected");
            }
        }
    }

    /// One live analysis of every live job.
    pub(crate) fn watch_once(&self, now_ns: u64) {
        let live: Vec<JobFacts> = {
            let board = locked(&self.board);
            let jobs = board.jobs_since(now_ns.saturating_sub(LIVE_SILENCE_NS));
            let since_ns = now_ns.saturating_sub(LIVE_WINDOW_NS);
            jobs.iter()
                .filter_map(|job| board.facts(job, since_ns, now_ns))
                .collect()
        };
        for facts in live.iter().filter(|facts| !facts.gpus.is_empty()) {
            let analysis = analyse(facts);
            let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
            for (cause, place) in history.note(&analysis, now_ns) {
                tracing::info!(job = %facts.job, cause = cause.name(), ?place, "verdict seen for the first time");
            }
        }
    }
}

/// Reads all segments of a store into a board; what cannot be read is told as gaps of no node in particular.
pub(crate) fn load(dir: &std::path::Path, board: &mut Board, damage: &mut Vec<RecordGap>) {
    let unreadable = |what: String| RecordGap {
        node: String::new(),
        window: None,
        what,
        count: 0,
    };
    let mut reader = match SegmentReader::open(dir) {
        Ok(reader) => reader,
        Err(error) => {
            damage.push(unreadable(format!(
                "the collector's store cannot be listed: {error}"
            )));
            return;
        }
    };
    let mut each = |item| match item {
        StoredItem::State(state) => board.apply_state(state),
        StoredItem::Envelope {
            received_realtime_ns,
            bytes,
        } => {
            // What cannot be parsed was never acknowledged: only whole envelopes are appended.
            if let Ok(envelope) = <v1::Envelope as prost::Message>::decode(bytes) {
                board.apply(received_realtime_ns, envelope);
            }
        }
    };
    while let Some(result) = reader.next_segment(&mut each) {
        if let Err(at) = result {
            let name = at
                .path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            tracing::warn!(segment = %name, from_byte = at.from_byte, why = %at.why, "segment is damaged");
            damage.push(unreadable(format!(
                "segment {name} of the collector's store is damaged from byte {}: {}",
                at.from_byte, at.why
            )));
        }
    }
}
