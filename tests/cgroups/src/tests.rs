#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;

/// Mounts of a host, with version 2's folder where the test has its tree.
fn v2_only(root: &Path) -> String {
    format!(
        "30 25 0:26 / {} rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n",
        root.display()
    )
}

fn put(path: PathBuf, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn read(path: PathBuf) -> String {
    fs::read_to_string(path).unwrap()
}

#[test]
fn version_1_wins_where_it_has_the_controller() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path().join("cgroup.controllers"), "io memory\n");
    let cpu = "31 25 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n";
    let mixed = format!("{}{cpu}", v2_only(dir.path()));
    let tree = Tree::from_mounts(&mixed).unwrap();
    assert_eq!(tree.cpu.root, Path::new("/sys/fs/cgroup/cpu,cpuacct"));
    assert_eq!((tree.cpu.version, tree.io.version), (Version::V1, Version::V2));
    assert_eq!(tree.io.root, dir.path());
}

#[test]
fn a_controller_that_is_nowhere_is_named() {
    let dir = tempfile::tempdir().unwrap();
    put(dir.path().join("cgroup.controllers"), "cpuset cpu memory pids\n");
    let error = Tree::from_mounts(&v2_only(dir.path())).unwrap_err();
    assert!(matches!(error, Error::NoController("io")), "{error}");
    assert!(matches!(Tree::from_mounts(""), Err(Error::NoController("cpu"))));
}

#[test]
fn version_2_enables_controllers_above_a_group_and_not_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    put(at("cgroup.controllers"), "cpu io memory\n");
    put(at("cgroup.subtree_control"), "cpu io memory\n");
    let tree = Tree::from_mounts(&v2_only(dir.path())).unwrap();
    tree.create("/run/node0/rank0").unwrap();
    // Each is written by itself, and a plain file keeps the last.
    assert_eq!(read(at("run/cgroup.subtree_control")), "+memory");
    assert_eq!(read(at("run/node0/cgroup.subtree_control")), "+memory");
    assert!(at("run/node0/rank0").is_dir() && !at("run/node0/rank0/cgroup.subtree_control").exists());
    assert_eq!(
        read(at("cgroup.subtree_control")),
        "cpu io memory\n",
        "what is enabled stays untouched"
    );
}

#[test]
fn limits_as_each_version_writes_them() {
    let dir = tempfile::tempdir().unwrap();
    let at = |path: &str| dir.path().join(path);
    let of = |version| Hierarchy {
        root: dir.path().to_owned(),
        version,
    };
    fs::create_dir(at("g")).unwrap();
    let v1 = Tree {
        cpu: of(Version::V1),
        io: of(Version::V1),
    };
    v1.limit_cpu("/g", Some(5_000)).unwrap();
    assert_eq!(read(at("g/cpu.cfs_quota_us")), "5000");
    v1.limit_cpu("/g", None).unwrap();
    assert_eq!(read(at("g/cpu.cfs_quota_us")), "-1");
    v1.limit_disk("/g", Transfer::Read, "7:1", Some(9)).unwrap();
    assert_eq!(read(at("g/blkio.throttle.read_bps_device")), "7:1 9");
    let v2 = Tree {
        cpu: of(Version::V2),
        io: of(Version::V2),
    };
    v2.limit_cpu("/g", Some(5_000)).unwrap();
    assert_eq!(read(at("g/cpu.max")), "5000 100000");
    v2.limit_cpu("/g", None).unwrap();
    assert_eq!(read(at("g/cpu.max")), "max 100000");
    v2.limit_disk("/g", Transfer::Write, "7:1", Some(9)).unwrap();
    assert_eq!(read(at("g/io.max")), "7:1 wbps=9");
    v2.limit_disk("/g", Transfer::Write, "7:1", None).unwrap();
    assert_eq!(read(at("g/io.max")), "7:1 wbps=max");

    put(
        at("g/cpu.stat"),
        "nr_throttled 2\nthrottled_time 41\nthrottled_usec 7\n",
    );
    assert_eq!(
        (v1.throttled_ns("/g"), v2.throttled_ns("/g")),
        (Some(41), Some(7_000))
    );
    assert_eq!(v2.throttled_ns("/gone"), None);
}

/// On the real kernel, with whichever version this host has.
#[test]
fn a_quota_throttles_its_group_and_the_group_can_be_removed() {
    let name = "a_quota_throttles_its_group_and_the_group_can_be_removed";
    if std::env::var_os("STALLSCOPE_PRIVILEGED").is_none() {
        println!("skipped: {name}: it needs root, and STALLSCOPE_PRIVILEGED is not set");
        return;
    }
    let tree = Tree::find().unwrap();
    let run = format!("/test-cgroups-{}", std::process::id());
    let group = format!("{run}/a/b");
    tree.create(&group).unwrap();
    tree.limit_cpu(&group, Some(5_000)).unwrap();
    let procs: Vec<String> = tree
        .folders(&group)
        .iter()
        .map(|folder| format!("echo $$ > {}/cgroup.procs", folder.display()))
        .collect();
    let script = format!("{} && while :; do :; done", procs.join(" && "));
    let mut burner = std::process::Command::new("sh")
        .args(["-c", &script])
        .spawn()
        .unwrap();
    std::thread::sleep(std::time::Duration::from_millis(600));
    let shown = fs::read_to_string(format!("/proc/{}/cgroup", burner.id())).unwrap();
    let throttled = tree.throttled_ns(&group);
    let reaper = std::thread::spawn(move || burner.wait());
    let removed = tree.remove(&run);
    reaper.join().unwrap().unwrap();
    assert!(
        shown.lines().any(|line| line.ends_with(&format!(":{group}"))),
        "{shown}"
    );
    assert!(throttled > Some(200_000_000), "{throttled:?}");
    removed.unwrap();
    assert_eq!(tree.folders(&run), Vec::<PathBuf>::new());
}
