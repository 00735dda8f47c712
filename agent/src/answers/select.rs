//! Which of the recorded jobs a report is about, and its document.

use std::collections::BTreeMap;

use stallscope_attribution::facts::{GpuHistory, JobFacts, RecordGap};
use stallscope_attribution::job::analyse;
use stallscope_attribution::links::{self, Unseen};
use stallscope_attribution::time::Window;
use stallscope_report::document::Document;

/// The report of one job, or of all with the one heard of last first; of no job in particular and without any, what the
/// devices told.
///
/// # Errors
/// A sentence saying what is recorded, when nothing fits.
pub(crate) fn document(facts: Vec<JobFacts>, job: Option<&str>) -> Result<Document, String> {
    let named = facts.iter().map(|facts| facts.job.clone());
    let known: Vec<String> = named.filter(|name| !name.is_empty()).collect();
    let devices = if job.is_none() { of_devices(&facts) } else { None };
    let mut wanted: Vec<JobFacts> = facts
        .into_iter()
        .filter(|facts| job.is_none_or(|job| facts.job == job))
        .collect();
    for facts in &mut wanted {
        facts.gpus.retain(|gpu| last_ns(gpu).is_some());
        leave_out_earlier_runs(facts);
    }
    wanted.retain(|facts| !facts.gpus.is_empty());
    if wanted.is_empty() {
        return devices.ok_or_else(|| nothing_recorded(&known, job));
    }
    wanted.sort_by_key(|facts| std::cmp::Reverse(facts.gpus.iter().filter_map(last_ns).max()));
    let analyses: Vec<_> = wanted.iter().map(analyse).collect();
    Ok(Document::from_analyses(&analyses))
}

/// What the devices told, where any did: a node whose jobs took no step on a GPU has ports and links too. What the record
/// lacks is said with it.
fn of_devices(facts: &[JobFacts]) -> Option<Document> {
    let told = facts.iter().find(|facts| !facts.hardware.is_empty())?;
    let mut links = links::examine(&told.hardware, &told.ports, &[]);
    links.unseen.extend(told.gaps.iter().map(|gap| Unseen {
        node: gap.node.clone(),
        what: gap.what.clone(),
    }));
    Document::of_links(&links)
}

fn nothing_recorded(known: &[String], job: Option<&str>) -> String {
    match (job, known) {
        (_, []) => "no job has been seen on this node".to_owned(),
        (Some(job), _) if !known.iter().any(|known| known == job) => {
            format!(
                "no job {job:?} has been seen on this node; known are {}",
                known.join(", ")
            )
        }
        _ => format!("nothing was recorded in that time of {}", known.join(", ")),
    }
}

/// A rank that ran as several processes restarted: only its last run is one job with the others' last runs.
fn leave_out_earlier_runs(facts: &mut JobFacts) {
    let mut newest: BTreeMap<u32, GpuHistory> = BTreeMap::new();
    let mut earlier: Vec<GpuHistory> = Vec::new();
    for gpu in std::mem::take(&mut facts.gpus) {
        let rank = gpu.subject.rank;
        match newest.remove(&rank) {
            Some(other) if last_ns(&other) > last_ns(&gpu) => {
                newest.insert(rank, other);
                earlier.push(gpu);
            }
            other => {
                newest.insert(rank, gpu);
                earlier.extend(other);
            }
        }
    }
    facts.gpus = newest.into_values().collect();
    facts.gaps.extend(earlier.iter().map(earlier_run));
}

fn earlier_run(gpu: &GpuHistory) -> RecordGap {
    let (rank, pid) = (gpu.subject.rank, gpu.subject.pid);
    RecordGap {
        node: gpu.subject.node.clone(),
        window: first_ns(gpu)
            .zip(last_ns(gpu))
            .and_then(|(first, last)| Window::new(first, last)),
        what: format!(
            "the job restarted: steps of rank {rank} as process {pid} belong to an earlier run and are left out"
        ),
        count: (gpu.steps.len() + gpu.spans.len()) as u64,
    }
}

/// When anything of the GPU was last recorded, `CLOCK_REALTIME` ns: the one clock that goes on over reboots.
fn last_ns(gpu: &GpuHistory) -> Option<u64> {
    let steps = gpu
        .steps
        .iter()
        .map(|step| realtime(step.window.end_ns(), step.realtime_offset_ns));
    let spans = gpu
        .spans
        .iter()
        .map(|span| realtime(span.window.end_ns(), span.realtime_offset_ns));
    steps.chain(spans).max()
}

fn first_ns(gpu: &GpuHistory) -> Option<u64> {
    let steps = gpu
        .steps
        .iter()
        .map(|step| realtime(step.window.start_ns(), step.realtime_offset_ns));
    let spans = gpu
        .spans
        .iter()
        .map(|span| realtime(span.window.start_ns(), span.realtime_offset_ns));
    steps.chain(spans).min()
}

const fn realtime(at_ns: u64, offset_ns: i64) -> u64 {
    at_ns.saturating_add_signed(offset_ns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use stallscope_attribution::budget::Budget;
    use stallscope_attribution::facts::{GpuSubject, HardwareFact, HardwareFacts, RdmaPort, Span, SpanKind};
    use stallscope_attribution::leaf::Leaf;

    fn gpu(rank: u32, pid: u32, start_ns: u64, realtime_offset_ns: i64) -> GpuHistory {
        let mut leaves = [0; Leaf::COUNT];
        leaves[Leaf::IdleUnknown.index()] = 1_000;
        let subject = GpuSubject {
            job: "llama".to_owned(),
            node: "node1".to_owned(),
            gpu: rank,
            pci: String::new(),
            device: String::new(),
            rank,
            world: 2,
            pid,
        };
        let span = Span {
            kind: SpanKind::Other,
            window: Window::new(start_ns, start_ns + 1_000).expect("a window"),
            realtime_offset_ns,
            budget: Budget::from_leaves(1_000, leaves, 0, Vec::new()).expect("a budget"),
        };
        GpuHistory {
            subject,
            steps: Vec::new(),
            spans: vec![span],
        }
    }

    fn job(name: &str, gpus: Vec<GpuHistory>) -> JobFacts {
        JobFacts {
            job: name.to_owned(),
            gpus,
            ..JobFacts::default()
        }
    }

    #[test]
    fn the_last_run_of_each_rank_is_reported_and_the_earlier_one_named() {
        // The second run began after a reboot: its monotonic clock started anew.
        let runs = vec![
            gpu(0, 100, 900_000, 0),
            gpu(0, 200, 5_000, 1_000_000),
            gpu(1, 101, 900_000, 200_000),
        ];
        let document = document(vec![job("llama", runs)], None).expect("a report");
        let job = &document.jobs[0];
        assert_eq!(job.gpus.len(), 2);
        assert_eq!(job.gaps.len(), 1, "{:?}", job.gaps);
        assert!(
            job.gaps[0].what.contains("rank 0 as process 100"),
            "{:?}",
            job.gaps
        );
        document.check().expect("sums hold");
    }

    #[test]
    fn the_job_heard_of_last_comes_first() {
        let jobs = vec![
            job("a", vec![gpu(0, 1, 5_000, 0)]),
            job("b", vec![gpu(0, 2, 1_000, 1_000_000)]),
        ];
        let names = |document: Document| document.jobs.into_iter().map(|job| job.job).collect::<Vec<_>>();
        assert_eq!(
            document(jobs.clone(), None).map(names),
            Ok(vec!["b".to_owned(), "a".to_owned()])
        );
        assert_eq!(document(jobs, Some("a")).map(names), Ok(vec!["a".to_owned()]));
    }

    #[test]
    fn without_steps_the_devices_speak() {
        let port = RdmaPort {
            device: "mlx5_0".to_owned(),
            port: 1,
            ..RdmaPort::default()
        };
        let facts = JobFacts {
            hardware: vec![HardwareFacts {
                node: "node1".to_owned(),
                window: Window::new(0, 1_000).expect("a window"),
                realtime_offset_ns: 0,
                fact: HardwareFact::RdmaPort(port),
            }],
            ..JobFacts::default()
        };
        let report = document(vec![facts.clone()], None).expect("a report");
        assert!(report.jobs.is_empty());
        let not_seen = report.links.expect("links").not_seen;
        assert!(
            not_seen.iter().any(|line| line.what.starts_with("mlx5_0:1")),
            "{not_seen:?}"
        );
        assert_eq!(
            document(vec![facts], Some("x")),
            Err("no job has been seen on this node".to_owned())
        );
    }

    #[test]
    fn without_anything_that_fits_it_says_what_there_is() {
        let why = |facts, job| document(facts, job).err().unwrap_or_default();
        assert_eq!(why(Vec::new(), Some("x")), "no job has been seen on this node");
        assert!(why(vec![job("a", vec![gpu(0, 1, 0, 0)])], Some("x")).contains("known are a"));
        assert!(why(vec![job("a", Vec::new())], None).contains("nothing was recorded in that time of a"));
    }
}
