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

#[test]
fn a_live_quota_shows_as_throttled_time() {
    const GROUP: &str = "/stallscope-quota-test";
    if std::env::var_os("STALLSCOPE_PRIVILEGED").is_none() {
        println!("skipped: a_live_quota_shows_as_throttled_time: STALLSCOPE_PRIVILEGED is not set");
        return;
    }
    let groups = test_cgroups::Tree::find().unwrap();
    groups.create(GROUP).unwrap();
    groups.limit_cpu(GROUP, Some(20_000)).unwrap();
    let join = |folder: &PathBuf| format!("echo $$ > {}/cgroup.procs", folder.display());
    let joins: Vec<String> = groups.folders(GROUP).iter().map(join).collect();
    let script = format!("{}; while :; do :; done", joins.join("; "));
    let mut burner = std::process::Command::new("sh")
        .args(["-c", &script])
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(300));
    let mut reader = QuotaReader::new("/proc");
    let key = ProcessKey {
        pid: burner.id(),
        start_ticks: 1,
    };
    let begin = crate::sources::clock::monotonic_ns();
    reader.poll(begin, [key]);
    std::thread::sleep(std::time::Duration::from_millis(1100));
    let end = crate::sources::clock::monotonic_ns();
    let facts = reader.poll(end, [key]);
    burner.kill().unwrap();
    burner.wait().unwrap();
    groups.remove(GROUP).unwrap();
    let Fact::CpuQuota {
        throttled_ns,
        quota_ppm,
        ..
    } = &facts[0].fact
    else {
        panic!("{facts:?}")
    };
    assert_eq!(*quota_ppm, Reading::Value(200_000));
    assert!(
        matches!(throttled_ns, Reading::Value(ns) if *ns > (end - begin) / 5),
        "{throttled_ns:?}"
    );
}
