//! What the agents cost: CPU and memory of their processes, run time of their programs in the kernel.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use crate::shell;

/// The kernel's switch for per-program run times.
const STATS_SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// Ticks of `/proc/PID/stat` per second: fixed in the kernel's interface to user space.
const TICKS_PER_S: f64 = 100.0;

/// What was measured over a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct Overhead {
    /// CPU time of the busiest agent as a share of one core.
    pub agent_cpu_share: f64,
    /// Peak resident memory of the largest agent, bytes.
    pub agent_rss_bytes: u64,
    /// Observations that the agents handled, per second of the run.
    pub records_per_s: f64,
    /// Records and messages lost anywhere on the way.
    pub lost: u64,
    /// Runs of all programs, per second of the run.
    pub probe_hits_per_s: f64,
    /// CPU time of all programs, as a share of one core.
    pub probe_cpu_share: f64,
    /// Per program.
    pub bpf: BTreeMap<String, ProgramCost>,
    /// What could not be measured, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub not_measured: Vec<String>,
}

/// One program, summed over the agents.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct ProgramCost {
    /// Runs.
    pub hits: u64,
    /// Mean run time, ns; 0 hits have none.
    pub mean_ns: Option<u64>,
}

/// An agent to measure.
#[derive(Debug, Clone)]
pub struct Watched {
    /// Its process.
    pub pid: u32,
    /// Its control socket.
    pub socket: PathBuf,
}

/// A measurement that is under way. Dropping it turns the kernel's statistics off again.
#[derive(Debug)]
pub struct Meter {
    started: Instant,
    agents: Vec<(Watched, Reading)>,
    stats: Result<StatsSwitch, String>,
}

/// The counters of one agent at some time.
#[derive(Debug, Clone, Copy, Default)]
struct Reading {
    cpu_s: f64,
    records: u64,
    lost: u64,
    peak_resident_bytes: u64,
}

impl Meter {
    /// Starts measuring these agents.
    #[must_use]
    pub fn start(agents: Vec<Watched>) -> Self {
        let before = |agent: &Watched| Reading {
            cpu_s: cpu_seconds(agent.pid).unwrap_or(0.0),
            ..Reading::default()
        };
        Self {
            started: Instant::now(),
            agents: agents
                .into_iter()
                .map(|agent| (agent.clone(), before(&agent)))
                .collect(),
            stats: StatsSwitch::on().map_err(|error| format!("{error:#}")),
        }
    }

    /// Reads what it cost so far. The agents must still run.
    #[must_use]
    pub fn read(&self) -> Overhead {
        let seconds = self.started.elapsed().as_secs_f64().max(f64::EPSILON);
        let mut overhead = Overhead::default();
        let mut records = 0;
        for (agent, before) in &self.agents {
            match Reading::of(agent) {
                Ok(now) => {
                    overhead.agent_cpu_share =
                        overhead.agent_cpu_share.max((now.cpu_s - before.cpu_s) / seconds);
                    overhead.agent_rss_bytes = overhead.agent_rss_bytes.max(now.peak_resident_bytes);
                    overhead.lost += now.lost;
                    records += now.records;
                }
                Err(error) => overhead
                    .not_measured
                    .push(format!("agent {}: {error:#}", agent.pid)),
            }
        }
        let costs = match &self.stats {
            Ok(_) => program_costs(&self.agents).map_err(|error| format!("{error:#}")),
            Err(error) => Err(error.clone()),
        };
        let costs = costs.unwrap_or_else(|error| {
            overhead.not_measured.push(format!("programs: {error}"));
            Vec::new()
        });
        overhead.records_per_s = per_second(records, seconds);
        overhead.probe_hits_per_s = per_second(costs.iter().map(|cost| cost.hits).sum(), seconds);
        overhead.probe_cpu_share = per_second(costs.iter().map(|cost| cost.run_ns).sum(), seconds) / 1e9;
        overhead.bpf = by_name(&costs);
        overhead
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "rates need no more than a double's 52 bits"
)]
fn per_second(count: u64, seconds: f64) -> f64 {
    count as f64 / seconds
}

impl Reading {
    fn of(agent: &Watched) -> Result<Self> {
        let own = own_account(&agent.socket)
            .with_context(|| format!("no answer from {}", agent.socket.display()))?;
        let count = |name: &str| own[name].as_u64().unwrap_or(0);
        Ok(Self {
            cpu_s: cpu_seconds(agent.pid)?,
            records: count("observations"),
            lost: count("lost_records") + count("dropped_observations") + count("dropped_messages"),
            peak_resident_bytes: peak_resident_bytes(agent.pid)?,
        })
    }
}

/// What the agent says about itself.
fn own_account(socket: &Path) -> Result<serde_json::Value> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"\"status\"\n")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    let mut answer: serde_json::Value = serde_json::from_str(&answer)?;
    let own = answer["status"]["own"].take();
    ensure!(own.is_object(), "the agent answered something else: {answer}");
    Ok(own)
}

/// Turns the kernel's statistics on, and off again when dropped, if they were off.
#[derive(Debug)]
struct StatsSwitch {
    before: String,
}

impl StatsSwitch {
    fn on() -> Result<Self> {
        let before =
            fs::read_to_string(STATS_SWITCH).with_context(|| format!("failed to read {STATS_SWITCH}"))?;
        fs::write(STATS_SWITCH, "1").with_context(|| format!("failed to write {STATS_SWITCH}"))?;
        Ok(Self { before })
    }
}

impl Drop for StatsSwitch {
    fn drop(&mut self) {
        if let Err(error) = fs::write(STATS_SWITCH, self.before.trim()) {
            eprintln!("BPF statistics stay on: failed to write {STATS_SWITCH}: {error}");
        }
    }
}

struct RawCost {
    name: String,
    hits: u64,
    run_ns: u64,
}

/// Costs of the programs that these processes hold.
fn program_costs(agents: &[(Watched, Reading)]) -> Result<Vec<RawCost>> {
    let held: BTreeSet<u64> = agents
        .iter()
        .flat_map(|(agent, _)| program_ids(agent.pid))
        .collect();
    let listing = shell::output(Command::new("bpftool").args(["--json", "prog", "show"]))?;
    let listing: Vec<serde_json::Value> =
        serde_json::from_str(&listing).context("bpftool printed no JSON")?;
    Ok(listing
        .iter()
        .filter(|program| program["id"].as_u64().is_some_and(|id| held.contains(&id)))
        .map(|program| RawCost {
            name: program["name"].as_str().unwrap_or("unnamed").to_owned(),
            hits: program["run_cnt"].as_u64().unwrap_or(0),
            run_ns: program["run_time_ns"].as_u64().unwrap_or(0),
        })
        .collect())
}

/// Program ids behind the descriptors of a process.
fn program_ids(pid: u32) -> BTreeSet<u64> {
    let entries = fs::read_dir(format!("/proc/{pid}/fdinfo"))
        .into_iter()
        .flatten()
        .flatten();
    entries
        .filter_map(|entry| fs::read_to_string(entry.path()).ok())
        .filter_map(|info| field(&info, "prog_id:"))
        .collect()
}

fn by_name(costs: &[RawCost]) -> BTreeMap<String, ProgramCost> {
    let mut sums: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
    for cost in costs {
        let sum = sums.entry(&cost.name).or_default();
        sum.0 += cost.hits;
        sum.1 += cost.run_ns;
    }
    let cost = |(hits, ns): (u64, u64)| ProgramCost {
        hits,
        mean_ns: ns.checked_div(hits),
    };
    sums.into_iter()
        .map(|(name, sum)| (name.to_owned(), cost(sum)))
        .collect()
}

fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_cpu_seconds(&stat).context("a stat line without CPU times")
}

/// User and system time, fields 14 and 15; the name in field 2 may hold spaces.
fn parse_cpu_seconds(stat: &str) -> Option<f64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ').skip(11);
    let user: u32 = fields.next()?.parse().ok()?;
    let system: u32 = fields.next()?.parse().ok()?;
    Some((f64::from(user) + f64::from(system)) / TICKS_PER_S)
}

fn peak_resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    field(&status, "VmHWM:")
        .map(|kib| kib * 1024)
        .context("a status without VmHWM")
}

fn field(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn cpu_time_is_read_past_a_name_with_spaces() {
        let stat = "7 (a) b c) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 1 0 5 0 0";
        assert_eq!(parse_cpu_seconds(stat), Some(2.0));
        assert_eq!(parse_cpu_seconds("nonsense"), None);
    }

    #[test]
    fn this_process_has_memory_and_time() {
        let pid = std::process::id();
        assert!(peak_resident_bytes(pid).unwrap() > 100_000);
        assert!(cpu_seconds(pid).unwrap() >= 0.0);
        assert!(cpu_seconds(u32::MAX).is_err());
    }

    #[test]
    fn an_agent_that_is_gone_is_named() {
        let gone = Watched {
            pid: u32::MAX,
            socket: "/nonexistent/socket".into(),
        };
        let error = format!("{:#}", Reading::of(&gone).unwrap_err());
        assert!(error.contains("/nonexistent/socket"), "{error}");
    }

    #[test]
    fn programs_of_one_name_are_summed() {
        let of = |name: &str, hits, run_ns| RawCost {
            name: name.into(),
            hits,
            run_ns,
        };
        let costs = by_name(&[of("a", 1, 100), of("a", 3, 500), of("b", 0, 0)]);
        assert_eq!(
            costs["a"],
            ProgramCost {
                hits: 4,
                mean_ns: Some(150)
            }
        );
        assert_eq!(costs["b"].mean_ns, None);
    }
}
