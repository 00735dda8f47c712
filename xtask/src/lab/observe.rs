//! One whole run: a scenario from its first step to the report.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::cluster::{Agent, Cluster};
use super::virtual_nodes::Event;
use crate::judge::{self, Accusation, Truth};
use crate::overhead::{Meter, Overhead, Watched};
use crate::progress::Progress;

/// How often the live report is asked for.
const POLL: Duration = Duration::from_secs(1);

/// The longest a run may take.
const LONGEST: Duration = Duration::from_secs(600);

/// How long the last steps may take from the nodes to the collector's report.
const DRAIN: Duration = Duration::from_secs(10);

/// What a run showed.
#[derive(Debug)]
pub struct Run {
    /// What really happened.
    pub truth: Truth,
    /// The report after the job's end.
    pub report: Value,
    /// From the fault to the first live report with the right cause and place, ms; `None` when there was none.
    pub onset_to_verdict_ms: Option<u64>,
    /// Mean length of a step between the first and the last that was told, ns; `None` when only one was.
    pub mean_step_ns: Option<u64>,
    /// What the agents cost; `None` in a run without agents.
    pub overhead: Option<Overhead>,
}

/// What the live report said at some time.
#[derive(Debug)]
struct Sighting {
    at_unix_ns: u64,
    top: Option<Accusation>,
}

/// Follows a run to its end, polling the live report. `at_step` is called with every step the job reports, and may
/// disturb the cluster.
///
/// # Errors
/// Something ended early, the run took too long, or a signal came.
pub fn observe(
    cluster: &mut Cluster,
    progress: &mut Progress,
    mut at_step: impl FnMut(&mut Cluster, u64) -> Result<()>,
) -> Result<Run> {
    let meter = start_meter(cluster);
    let deadline = Instant::now() + LONGEST;
    let mut follow = Follow::default();
    let mut next_poll = Instant::now() + POLL;
    let truth = loop {
        if Instant::now() > deadline {
            bail!("the run did not end within {LONGEST:?}");
        }
        cluster.check_running()?;
        match cluster.nodes().next_event(Duration::from_millis(200))? {
            Some(Event::Done { truth }) => break truth,
            Some(Event::Progress { step, at_ns }) => {
                follow.progressed(step, at_ns);
                at_step(cluster, step)?;
            }
            Some(event) => follow.note(&event, progress),
            // Only when nothing waits to be read: asking takes time, and what the job does must be heard when it happens.
            None if Instant::now() >= next_poll && cluster.can_report() => {
                next_poll = Instant::now() + POLL;
                follow.poll(cluster);
                progress.status(&follow.status());
            }
            None => {}
        }
    };
    let overhead = meter.map(|meter| meter.read());
    finish(cluster, progress, &follow, &truth, overhead)
}

fn start_meter(cluster: &Cluster) -> Option<Meter> {
    let agents: Vec<Watched> = cluster.agents().iter().filter_map(Agent::watched).collect();
    (!agents.is_empty()).then(|| Meter::start(agents))
}

fn finish(
    cluster: &Cluster,
    progress: &mut Progress,
    follow: &Follow,
    truth: &Path,
    overhead: Option<Overhead>,
) -> Result<Run> {
    progress.event("job done; waiting for its last steps to arrive");
    let truth = Truth::read(truth)?;
    let report = if cluster.agents().is_empty() {
        Value::Null
    } else {
        settled_report(cluster)?
    };
    Ok(Run {
        onset_to_verdict_ms: follow.onset_to_verdict_ms(&truth),
        mean_step_ns: follow.mean_step_ns(),
        truth,
        report,
        overhead,
    })
}

/// The report once it no longer changes.
fn settled_report(cluster: &Cluster) -> Result<Value> {
    let deadline = Instant::now() + DRAIN;
    let mut last = None;
    loop {
        let now = live_report(cluster);
        match (now, last.take()) {
            (Ok(now), Some(before)) if now == before => return Ok(now),
            (Ok(now), _) if Instant::now() >= deadline => return Ok(now),
            (Err(error), _) if Instant::now() >= deadline => return Err(error),
            (now, _) => last = now.ok(),
        }
        std::thread::sleep(POLL);
    }
}

fn live_report(cluster: &Cluster) -> Result<Value> {
    serde_json::from_str(&cluster.report("json")?).context("the report is not JSON")
}

/// What was seen so far.
#[derive(Debug, Default)]
struct Follow {
    step: u64,
    first_step: Option<(u64, u64)>,
    last_step: Option<(u64, u64)>,
    onset_unix_ns: Option<u64>,
    fault: Option<String>,
    sightings: Vec<Sighting>,
}

impl Follow {
    fn note(&mut self, event: &Event, progress: &mut Progress) {
        match event {
            Event::Started => progress.event("job started"),
            Event::Fault { name, on, at_unix_ns } => {
                progress.event(&format!("fault {name} {}", if *on { "on" } else { "off" }));
                if *on {
                    self.onset_unix_ns.get_or_insert(*at_unix_ns);
                }
                self.fault = on.then(|| name.clone());
            }
            Event::Ready(_) | Event::Progress { .. } | Event::Done { .. } | Event::Other => {}
        }
    }

    fn progressed(&mut self, step: u64, at_ns: u64) {
        self.step = step;
        self.first_step.get_or_insert((step, at_ns));
        self.last_step = Some((step, at_ns));
    }

    fn mean_step_ns(&self) -> Option<u64> {
        let ((first, begin), (last, end)) = (self.first_step?, self.last_step?);
        end.checked_sub(begin)?.checked_div(last.checked_sub(first)?)
    }

    /// A report that is not there yet is no error: the first steps take their time.
    fn poll(&mut self, cluster: &Cluster) {
        if let Ok(report) = live_report(cluster) {
            let top = judge::accusations(&report).into_iter().next();
            self.sightings.push(Sighting {
                at_unix_ns: unix_ns(),
                top,
            });
        }
    }

    fn status(&self) -> String {
        let fault = self.fault.as_deref().unwrap_or("no fault");
        let verdict = self.sightings.last().and_then(|sighting| sighting.top.as_ref());
        let verdict = verdict.map_or_else(|| "no verdict yet".to_owned(), describe);
        format!("step {}, {fault} on; verdict: {verdict}", self.step)
    }

    fn onset_to_verdict_ms(&self, truth: &Truth) -> Option<u64> {
        let onset = self.onset_unix_ns?;
        let right = |sighting: &&Sighting| sighting.top.as_ref().is_some_and(|top| truth.is_met_by(top));
        let after = self
            .sightings
            .iter()
            .filter(|sighting| sighting.at_unix_ns >= onset);
        after
            .filter(right)
            .map(|sighting| (sighting.at_unix_ns - onset) / 1_000_000)
            .next()
    }
}

/// An accusation in a few words.
#[must_use]
pub fn describe(accusation: &Accusation) -> String {
    let part = |name: &str| match &accusation.place[name] {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(format!("{name} {other}")),
    };
    let place: Vec<String> = ["node", "gpu", "rank"].into_iter().filter_map(part).collect();
    if place.is_empty() {
        accusation.cause.clone()
    } else {
        format!("{} at {}", accusation.cause, place.join(", "))
    }
}

fn unix_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// A folder for a run's files, short enough for socket paths in it; deleted unless it is to be kept.
///
/// # Errors
/// It cannot be created.
pub fn run_folder(keep: bool) -> Result<(PathBuf, Option<tempfile::TempDir>)> {
    let dir = tempfile::Builder::new()
        .prefix("stallscope-")
        .tempdir()
        .context("failed to create a folder for the run")?;
    if keep {
        return Ok((dir.keep(), None));
    }
    Ok((dir.path().to_owned(), Some(dir)))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use serde_json::json;

    use super::*;

    fn sighting(at_ms: u64, cause: &str) -> Sighting {
        let top = Accusation {
            cause: cause.into(),
            place: json!({"node": "n0"}),
            confidence: "high".into(),
        };
        Sighting {
            at_unix_ns: at_ms * 1_000_000,
            top: Some(top),
        }
    }

    #[test]
    fn the_verdict_counts_from_the_onset() {
        let truth: Truth =
            serde_json::from_value(json!({"cause": "host.cpu", "where": {"node": "n0"}, "leaves": {}}))
                .unwrap();
        let mut follow = Follow {
            onset_unix_ns: Some(2_000_000_000),
            ..Follow::default()
        };
        follow.sightings = vec![
            sighting(1_500, "host.cpu"),
            sighting(2_500, "none"),
            sighting(5_500, "host.cpu"),
        ];
        assert_eq!(follow.onset_to_verdict_ms(&truth), Some(3_500));
        follow.sightings.truncate(2);
        assert_eq!(follow.onset_to_verdict_ms(&truth), None);
    }

    #[test]
    fn steps_are_timed_from_first_to_last() {
        let mut follow = Follow::default();
        assert_eq!(follow.mean_step_ns(), None);
        follow.progressed(3, 1_000);
        assert_eq!(follow.mean_step_ns(), None);
        follow.progressed(5, 1_500);
        follow.progressed(13, 2_000);
        assert_eq!(follow.mean_step_ns(), Some(100));
    }

    #[test]
    fn an_accusation_reads_as_words() {
        let place = json!({"node": "n0", "gpu": 1, "rank": null});
        let accusation = Accusation {
            cause: "device.thermal".into(),
            place,
            confidence: "high".into(),
        };
        assert_eq!(describe(&accusation), "device.thermal at n0, gpu 1");
    }
}
