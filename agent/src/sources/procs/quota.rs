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
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    const S: u64 = 1_000_000_000;
    const KEY: ProcessKey = ProcessKey {
        pid: 7,
        start_ticks: 1,
    };

    #[test]
    fn quotas() {
        assert_eq!(parse_v1_quota("-1\n", "100000\n"), Quota::None);
        assert_eq!(parse_v1_quota("50000\n", "100000\n"), Quota::Limited(500_000));
        assert!(matches!(parse_v1_quota("x", "100000"), Quota::Malformed(_)));
        assert!(matches!(parse_v1_quota("5", "0"), Quota::Malformed(_)));
        assert_eq!(parse_v2_quota("max 100000\n"), Quota::None);
        assert_eq!(parse_v2_quota("150000 100000\n"), Quota::Limited(1_500_000));
        for bad in ["", "150000", "x 100000", "1 0"] {
            assert!(matches!(parse_v2_quota(bad), Quota::Malformed(_)), "{bad}");
        }
    }

    #[test]
    fn throttled_times() {
        let v1 = "nr_periods 10\nnr_throttled 3\nthrottled_time 123456789\n";
        assert_eq!(parse_throttled(v1, Version::V1), Reading::Value(123_456_789));
        let v2 = "usage_usec 5\nnr_throttled 3\nthrottled_usec 42\n";
        assert_eq!(parse_throttled(v2, Version::V2), Reading::Value(42_000));
        assert_eq!(
            parse_throttled("usage_usec 5\n", Version::V2),
            Reading::Unsupported
        );
        assert!(matches!(
            parse_throttled("throttled_time x\n", Version::V1),
            Reading::Failed(_)
        ));
    }

    #[test]
    fn mounts() {
        let text = "30 25 0:26 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n\
                    31 25 0:27 /docker/x /a\\040b rw shared:1 - cgroup2 none rw\n\
                    32 25 0:28 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\nnonsense\n";
        let mounts = parse_mounts(text, Path::new("/proc/1/root"));
        let cpu = PathBuf::from("/proc/1/root/sys/fs/cgroup/cpu,cpuacct");
        assert_eq!(
            mounts.v1_cpu,
            Some(Mount {
                at: cpu,
                root: "/".to_owned()
            })
        );
        assert_eq!(
            mounts.v2,
            Some(Mount {
                at: "/proc/1/root/a b".into(),
                root: "/docker/x".to_owned()
            })
        );
    }

    struct Tree(tempfile::TempDir);

    impl Tree {
        fn new(kind: &str, options: &str, cgroup: &str) -> Self {
            let tree = Self(tempfile::tempdir().unwrap());
            tree.put(
                "proc/1/mountinfo",
                &format!("30 25 0:26 / /cg rw - {kind} cgroup {options}\n"),
            );
            std::os::unix::fs::symlink(tree.0.path(), tree.0.path().join("proc/1/root")).unwrap();
            tree.put("proc/7/cgroup", cgroup);
            tree
        }

        fn put(&self, path: &str, text: &str) {
            let path = self.0.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }

        fn reader(&self) -> QuotaReader {
            QuotaReader::new(self.0.path().join("proc"))
        }
    }

    fn only(observations: Vec<Observation>) -> (Window, Reading<u64>, Reading<u64>) {
        assert_eq!(observations.len(), 1, "{observations:?}");
        let Observation { window, fact } = observations.into_iter().next().unwrap();
        let Fact::CpuQuota {
            process: KEY,
            throttled_ns,
            quota_ppm,
        } = fact
        else {
            panic!("{fact:?}")
        };
        (window, throttled_ns, quota_ppm)
    }

    #[test]
    fn version_1_takes_the_nearest_group_with_a_quota() {
        let tree = Tree::new("cgroup", "rw,cpu", "1:cpu:/node/rank0\n0::/\n");
        for (group, quota) in [("", "-1"), ("/node", "40000"), ("/node/rank0", "-1")] {
            tree.put(&format!("cg{group}/cpu.cfs_quota_us"), quota);
            tree.put(&format!("cg{group}/cpu.cfs_period_us"), "100000");
            tree.put(&format!("cg{group}/cpu.stat"), "throttled_time 0\n");
        }
        tree.put("cg/node/cpu.stat", "nr_throttled 1\nthrottled_time 5000\n");
        let mut reader = tree.reader();
        assert_eq!(reader.poll(S, [KEY]), []);
        tree.put("cg/node/cpu.stat", "nr_throttled 9\nthrottled_time 700005000\n");
        assert_eq!(reader.poll(S + 1, [KEY]), []);
        let (window, throttled, quota) = only(reader.poll(2 * S, [KEY]));
        assert_eq!(window, Window::new(S, 2 * S).unwrap());
        assert_eq!(
            (throttled, quota),
            (Reading::Value(700_000_000), Reading::Value(400_000))
        );
        // Two CPUs throttled at once count twice in the kernel.
        tree.put("cg/node/cpu.stat", "throttled_time 2600005000\n");
        assert_eq!(only(reader.poll(3 * S, [KEY])).1, Reading::Value(S));
    }

    #[test]
    fn version_2_without_a_quota_is_a_measured_zero() {
        let tree = Tree::new("cgroup2", "rw", "0::/slice/job\n");
        tree.put("cg/slice/job/cpu.max", "max 100000\n");
        tree.put("cg/slice/job/cpu.stat", "usage_usec 1\nthrottled_usec 0\n");
        let mut reader = tree.reader();
        reader.poll(S, [KEY]);
        let (_, throttled, quota) = only(reader.poll(2 * S, [KEY]));
        assert_eq!((throttled, quota), (Reading::Value(0), Reading::Value(0)));
    }

    #[test]
    fn a_quota_set_meanwhile_starts_a_new_measurement() {
        let tree = Tree::new("cgroup2", "rw", "0::/job\n");
        tree.put("cg/job/cpu.max", "max 100000\n");
        let mut reader = tree.reader();
        reader.poll(S, [KEY]);
        tree.put("cg/job/cpu.max", "20000 100000\n");
        tree.put("cg/job/cpu.stat", "throttled_usec 900\n");
        let (_, throttled, quota) = only(reader.poll(2 * S, [KEY]));
        assert_eq!(
            (throttled, quota),
            (Reading::NotMeasured, Reading::Value(200_000))
        );
        tree.put("cg/job/cpu.stat", "throttled_usec 1000\n");
        assert_eq!(only(reader.poll(3 * S, [KEY])).1, Reading::Value(100_000));
    }

    #[test]
    fn groups_that_cannot_be_read_are_not_zero() {
        let unmounted = Tree::new("tmpfs", "rw", "0::/job\n");
        let mut reader = unmounted.reader();
        reader.poll(S, [KEY]);
        let (_, throttled, quota) = only(reader.poll(2 * S, [KEY]));
        assert_eq!((throttled, quota), (Reading::Unsupported, Reading::Unsupported));
        let gone = Tree::new("cgroup2", "rw", "0::/gone\n");
        gone.put("cg/cpu.stat", "");
        let mut reader = gone.reader();
        reader.poll(S, [KEY]);
        assert!(matches!(only(reader.poll(2 * S, [KEY])).1, Reading::Failed(_)));
        assert_eq!(
            reader.poll(
                9 * S,
                [ProcessKey {
                    pid: 99,
                    start_ticks: 1
                }]
            ),
            []
        );
    }
}
