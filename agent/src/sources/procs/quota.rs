//! CPU quotas: how long the control group of a traced process was throttled.
//!
//! The group that counts is the nearest one, from the process upwards, that has a quota. Control groups are read
//! through the mounts of process 1, because an agent that was started inside a network namespace by `ip netns exec`
//! has a fresh `/sys` without them.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use super::cgroup::CgroupPaths;
use super::proc_fs::{ProcFs, read_text};
use crate::observation::{Fact, Observation, ProcessKey};

const PPM: u64 = 1_000_000;
/// How often groups are read.
const INTERVAL_NS: u64 = 1_000_000_000;

/// Reads quotas once a second.
#[derive(Debug)]
pub struct QuotaReader {
    proc_fs: ProcFs,
    mounts: Option<Mounts>,
    before: BTreeMap<ProcessKey, (u64, Group)>,
    next_ns: u64,
}

/// Where the hierarchies that carry CPU limits are mounted.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Mounts {
    v1_cpu: Option<Mount>,
    v2: Option<Mount>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Mount {
    at: PathBuf,
    /// The control group that is mounted there; `/` but in containers.
    root: String,
}

/// The group that limits a process, as read once.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Group {
    /// The governing directory; `None` when no group has a quota, or none can be read.
    limit: Option<PathBuf>,
    quota_ppm: Reading<u64>,
    throttled_total_ns: Reading<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V1,
    V2,
}

impl QuotaReader {
    /// A reader over `proc_root` (`/proc`).
    #[must_use]
    pub fn new(proc_root: impl Into<PathBuf>) -> Self {
        Self {
            proc_fs: ProcFs::new(proc_root),
            mounts: None,
            before: BTreeMap::new(),
            next_ns: 0,
        }
    }

    /// Once a second, one fact per process given: its group's throttled time between this call and the one before.
    ///
    /// Throttled time is counted per CPU by the kernel; it is cut at the window's length.
    pub fn poll(&mut self, now_ns: u64, processes: impl IntoIterator<Item = ProcessKey>) -> Vec<Observation> {
        if now_ns < self.next_ns {
            return Vec::new();
        }
        self.next_ns = now_ns + INTERVAL_NS;
        let mounts = self
            .mounts
            .get_or_insert_with(|| Mounts::find(&self.proc_fs))
            .clone();
        let mut cache = HashMap::new();
        let mut after = BTreeMap::new();
        let mut observations = Vec::new();
        for process in processes {
            let Some(paths) = self.proc_fs.cgroups(process.pid) else {
                continue;
            };
            let group = mounts.group(&paths, &mut cache);
            if let Some((before_ns, before)) = self.before.get(&process)
                && let Some(window) = Window::new(*before_ns, now_ns)
            {
                observations.push(observation(process, window, before, &group));
            }
            after.insert(process, (now_ns, group));
        }
        self.before = after;
        observations
    }
}

fn observation(process: ProcessKey, window: Window, before: &Group, now: &Group) -> Observation {
    let throttled_ns = match (&before.throttled_total_ns, &now.throttled_total_ns) {
        _ if before.limit != now.limit => Reading::NotMeasured,
        (Reading::Value(before), Reading::Value(now)) => {
            Reading::Value(now.saturating_sub(*before).min(window.len_ns()))
        }
        (_, Reading::Value(_)) => Reading::NotMeasured,
        (_, lack) => lack.clone(),
    };
    let fact = Fact::CpuQuota {
        process,
        throttled_ns,
        quota_ppm: now.quota_ppm.clone(),
    };
    Observation { window, fact }
}

impl Mounts {
    /// From process 1's mounts where the agent may look through them, else its own.
    fn find(proc_fs: &ProcFs) -> Self {
        let of_init = parse_mounts(
            &proc_fs.text("1/mountinfo").unwrap_or_default(),
            &proc_fs.at("1/root"),
        );
        let visible = [&of_init.v1_cpu, &of_init.v2]
            .into_iter()
            .flatten()
            .any(|mount| mount.at.is_dir());
        if visible {
            return of_init;
        }
        parse_mounts(
            &proc_fs.text("self/mountinfo").unwrap_or_default(),
            Path::new("/"),
        )
    }

    fn group(&self, paths: &CgroupPaths, cache: &mut HashMap<PathBuf, Group>) -> Group {
        let v1 = self
            .v1_cpu
            .as_ref()
            .and_then(|mount| Some((mount, paths.v1("cpu")?, Version::V1)));
        let v2 = || {
            self.v2
                .as_ref()
                .and_then(|mount| Some((mount, paths.v2()?, Version::V2)))
        };
        let Some((mount, path, version)) = v1.or_else(v2) else {
            return Group {
                limit: None,
                quota_ppm: Reading::Unsupported,
                throttled_total_ns: Reading::Unsupported,
            };
        };
        let below = path
            .strip_prefix(mount.root.trim_end_matches('/'))
            .unwrap_or(path);
        let leaf = mount.at.join(below.trim_start_matches('/'));
        cache
            .entry(leaf.clone())
            .or_insert_with(|| limiting_group(&mount.at, &leaf, version))
            .clone()
    }
}

/// The nearest group with a quota, from `leaf` up to the mount.
fn limiting_group(mount: &Path, leaf: &Path, version: Version) -> Group {
    if !leaf.is_dir() {
        let why = || format!("{} is gone", leaf.display());
        return Group {
            limit: None,
            quota_ppm: Reading::Failed(why()),
            throttled_total_ns: Reading::Failed(why()),
        };
    }
    for directory in leaf
        .ancestors()
        .take_while(|directory| directory.starts_with(mount))
    {
        match quota_of(directory, version) {
            Quota::Limited(ppm) => {
                return Group {
                    limit: Some(directory.to_owned()),
                    quota_ppm: Reading::Value(ppm),
                    throttled_total_ns: throttled_total(directory, version),
                };
            }
            Quota::Malformed(why) => {
                return Group {
                    limit: Some(directory.to_owned()),
                    quota_ppm: Reading::Failed(why.clone()),
                    throttled_total_ns: Reading::Failed(why),
                };
            }
            Quota::None => {}
        }
    }
    // Without any quota nothing can be throttled.
    Group {
        limit: None,
        quota_ppm: Reading::Value(0),
        throttled_total_ns: Reading::Value(0),
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Quota {
    /// Parts per million of one CPU.
    Limited(u64),
    None,
    Malformed(String),
}

fn quota_of(directory: &Path, version: Version) -> Quota {
    match version {
        Version::V1 => {
            let file = |name| read_text(&directory.join(name));
            match (file("cpu.cfs_quota_us"), file("cpu.cfs_period_us")) {
                (Some(quota), Some(period)) => parse_v1_quota(&quota, &period),
                _ => Quota::None,
            }
        }
        // The root has no cpu.max.
        Version::V2 => {
            read_text(&directory.join("cpu.max")).map_or(Quota::None, |text| parse_v2_quota(&text))
        }
    }
}

fn parse_v1_quota(quota: &str, period: &str) -> Quota {
    match (quota.trim().parse::<i64>(), period.trim().parse::<u64>()) {
        (Ok(..=0), Ok(_)) => Quota::None,
        (Ok(quota), Ok(period @ 1..)) => Quota::Limited(share_ppm(quota.unsigned_abs(), period)),
        _ => Quota::Malformed(format!(
            "cpu.cfs_quota_us is {:?} and cpu.cfs_period_us is {:?}",
            quota.trim(),
            period.trim()
        )),
    }
}

/// `max 100000` or `150000 100000`.
fn parse_v2_quota(text: &str) -> Quota {
    let mut words = text.split_ascii_whitespace();
    match (words.next(), words.next().map(str::parse::<u64>)) {
        (Some("max"), _) => Quota::None,
        (Some(quota), Some(Ok(period @ 1..))) => match quota.parse() {
            Ok(quota) => Quota::Limited(share_ppm(quota, period)),
            Err(_) => Quota::Malformed(format!("cpu.max is {:?}", text.trim())),
        },
        _ => Quota::Malformed(format!("cpu.max is {:?}", text.trim())),
    }
}

fn share_ppm(quota_us: u64, period_us: u64) -> u64 {
    let ppm = u128::from(quota_us) * u128::from(PPM) / u128::from(period_us.max(1));
    u64::try_from(ppm).unwrap_or(u64::MAX)
}

fn throttled_total(directory: &Path, version: Version) -> Reading<u64> {
    match read_text(&directory.join("cpu.stat")) {
        Some(text) => parse_throttled(&text, version),
        None => Reading::Failed(format!("{}/cpu.stat cannot be read", directory.display())),
    }
}

/// `throttled_time` in ns in version 1, `throttled_usec` in version 2.
fn parse_throttled(text: &str, version: Version) -> Reading<u64> {
    let (key, unit_ns) = match version {
        Version::V1 => ("throttled_time", 1),
        Version::V2 => ("throttled_usec", 1000),
    };
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    match value.map(|value| value.trim().parse::<u64>()) {
        Some(Ok(value)) => Reading::Value(value.saturating_mul(unit_ns)),
        Some(Err(_)) => Reading::Failed(format!("cpu.stat's {key} is not a number")),
        None => Reading::Unsupported,
    }
}

/// proc_pid_mountinfo(5): `id parent dev root mount-point options [tags] - type source super-options`.
fn parse_mounts(mountinfo: &str, prefix: &Path) -> Mounts {
    let mut mounts = Mounts::default();
    for line in mountinfo.lines() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let before: Vec<&str> = before.split(' ').collect();
        let after: Vec<&str> = after.split(' ').collect();
        let (Some(root), Some(point), Some(kind)) = (before.get(3), before.get(4), after.first()) else {
            continue;
        };
        let mount = || Mount {
            at: prefix.join(unescape(point).trim_start_matches('/')),
            root: unescape(root),
        };
        match *kind {
            "cgroup2" => mounts.v2 = mounts.v2.or_else(|| Some(mount())),
            "cgroup"
                if after
                    .get(2)
                    .is_some_and(|options| options.split(',').any(|option| option == "cpu")) =>
            {
                mounts.v1_cpu = mounts.v1_cpu.or_else(|| Some(mount()));
            }
            _ => {}
        }
    }
    mounts
}

/// The kernel writes spaces, tabs, newlines and backslashes as `\ooo`.
fn unescape(text: &str) -> String {
    [("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")]
        .into_iter()
        .fold(text.to_owned(), |text, (escaped, plain)| {
            text.replace(escaped, plain)
        })
}

#[cfg(test)]
mod tests;
