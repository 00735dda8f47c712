//! What virtual nodes need of this machine, tried out rather than asked for: containers and lean kernels lack parts that
//! look present.

use std::fmt;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use test_cgroups::Tree;

/// Programs the lab starts, most of them in `/usr/sbin`.
const PROGRAMS: [&str; 10] = [
    "ip",
    "tc",
    "nft",
    "mkfs.ext4",
    "mount",
    "umount",
    "losetup",
    "findmnt",
    "nsenter",
    "setpriv",
];

/// The first Linux on which one program attaches to many places and can tell them apart.
const LEAST_LINUX: (u32, u32) = (5, 15);

/// Files of the kernel that must be there, what is lost without, and what brings it.
const FILES: [(&str, &str, &str); 3] = [
    (
        "/sys/kernel/btf/vmlinux",
        "the kernel has no BTF, so no probe can be loaded",
        "boot a kernel with CONFIG_DEBUG_INFO_BTF (Debian's own has it)",
    ),
    (
        "/sys/bus/event_source/devices/uprobe/type",
        "the kernel has no uprobes, so no library can be watched",
        "boot a kernel with CONFIG_UPROBE_EVENTS (Debian's own has it)",
    ),
    (
        "/sys/kernel/tracing/events/sched/sched_switch/id",
        "the kernel's tracepoints are not there",
        "mount -t tracefs nodev /sys/kernel/tracing; in a container, share the host's",
    ),
];

/// Something the lab lacks.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Lack {
    what: String,
    fix: String,
}

impl Lack {
    fn new(what: impl Into<String>, fix: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            fix: fix.into(),
        }
    }
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\n    fix: {}", self.what, self.fix)
    }
}

/// Everything the lab lacks here.
pub(super) fn lacks() -> Vec<Lack> {
    if !rustix::process::geteuid().is_root() {
        return vec![Lack::new(
            "this is not root, and virtual nodes need network namespaces, control groups, mounts and probes",
            "run it as root",
        )];
    }
    let programs = PROGRAMS.iter().filter_map(|program| missing_program(program));
    let mut lacks: Vec<Lack> = programs.collect();
    lacks.extend(old_kernel(
        &fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default(),
    ));
    lacks.extend(missing_files(Path::new("/")));
    lacks.extend(groups());
    lacks.extend(network());
    lacks.extend(disk());
    lacks
}

fn missing_program(program: &str) -> Option<Lack> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&path).any(|folder| folder.join(program).is_file());
    (!found).then(|| {
        Lack::new(
            format!("{program} is not on the PATH"),
            "export PATH=$PATH:/usr/sbin:/sbin (`su` without `-` leaves them out)",
        )
    })
}

/// `release` as `uname -r` prints it. One that cannot be read is left to the probes to refuse.
fn old_kernel(release: &str) -> Option<Lack> {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next()?, numbers.next()?);
    let (major, minor) = LEAST_LINUX;
    (version < LEAST_LINUX).then(|| {
        Lack::new(
            format!(
                "Linux {} is too old for the probes, which need {major}.{minor}",
                release.trim()
            ),
            "boot a newer kernel",
        )
    })
}

fn missing_files(root: &Path) -> Vec<Lack> {
    let missing = |(file, _, _): &&(&str, &str, &str)| !root.join(file.trim_start_matches('/')).exists();
    FILES
        .iter()
        .filter(missing)
        .map(|(_, what, fix)| Lack::new(*what, *fix))
        .collect()
}

/// Makes a group with its limits, and removes it.
fn groups() -> Option<Lack> {
    let run = format!("/stallscope-setup-{}", std::process::id());
    let tried = Tree::find().and_then(|tree| {
        let group = format!("{run}/node");
        let made = tree.create(&group).and_then(|()| tree.check(&group));
        made.and(tree.remove(&run))
    });
    // The errors of the tree say themselves what helps, but for refused rights.
    tried.err().map(|error| {
        Lack::new(
            format!("control groups cannot be made: {error}"),
            "as above; in a container, mount /sys/fs/cgroup writable (for instance `--privileged --cgroupns=host`)",
        )
    })
}

/// Builds a node's network in small, and takes it down.
fn network() -> Option<Lack> {
    let space = format!("stallscope-setup-{}", std::process::id());
    let steps = [
        (
            format!("ip netns add {space}"),
            "CONFIG_NET_NS; in a container, --privileged",
        ),
        (
            format!("ip -n {space} link add br0 type bridge"),
            "modprobe bridge (CONFIG_BRIDGE)",
        ),
        (
            format!("ip -n {space} link add port0 type veth peer name eth0"),
            "modprobe veth (CONFIG_VETH)",
        ),
        (
            format!("tc -n {space} qdisc add dev eth0 root tbf rate 1mbit burst 96kb limit 4mb"),
            "modprobe sch_tbf (CONFIG_NET_SCH_TBF)",
        ),
    ];
    let lack = steps.iter().find_map(|(line, fix)| fails(line, fix));
    // Where it was never made there is nothing to delete, which has been told already.
    let _gone = fails(&format!("ip netns del {space}"), "");
    lack
}

fn disk() -> Option<Lack> {
    fails(
        "losetup --find",
        "modprobe loop (CONFIG_BLK_DEV_LOOP); in a container, --device /dev/loop-control and --privileged",
    )
}

fn fails(line: &str, fix: &str) -> Option<Lack> {
    let mut words = line.split(' ');
    let mut command = Command::new(words.next()?);
    command.args(words).stdin(Stdio::null());
    let said = match command.output() {
        Ok(output) if output.status.success() => return None,
        Ok(output) => String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        Err(error) => error.to_string(),
    };
    Some(Lack::new(format!("`{line}` fails: {said}"), fix))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn kernels_are_told_apart_by_number() {
        for old in ["5.10.0-28-amd64\n", "4.19.0\n", "5.14.21\n"] {
            assert!(old_kernel(old).is_some(), "{old}");
        }
        for fit in ["5.15.0\n", "6.1.0-18-amd64\n", "10.0\n", ""] {
            assert_eq!(old_kernel(fit), None, "{fit}");
        }
    }

    #[test]
    fn each_missing_file_is_named_with_its_fix() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(missing_files(root.path()).len(), FILES.len());
        for (file, _, _) in FILES {
            let path = root.path().join(file.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        assert_eq!(missing_files(root.path()), []);
    }

    #[test]
    fn a_command_that_fails_is_quoted_with_what_it_said() {
        let lack = fails("ls /nonexistent/folder", "make it").unwrap();
        let text = lack.to_string();
        assert!(
            text.contains("`ls /nonexistent/folder` fails") && text.contains("No such file"),
            "{text}"
        );
        assert!(text.ends_with("fix: make it"), "{text}");
        assert_eq!(fails("true", "x"), None);
        assert!(missing_program("no-such-program-here").is_some());
        assert_eq!(missing_program("sh"), None);
    }
}
