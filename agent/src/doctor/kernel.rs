//! What the kernel offers, and what this process may use of it. Everything is read below roots that tests can build.

use std::path::{Path, PathBuf};

use super::{Check, State};

/// Where the kernel's file systems are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Roots {
    /// `/proc`
    pub proc: PathBuf,
    /// `/sys`
    pub sys: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        Self {
            proc: "/proc".into(),
            sys: "/sys".into(),
        }
    }
}

/// Attach cookies, which tell one program which function it stands at, came with 5.15.
const OLDEST: (u32, u32) = (5, 15);

/// Capabilities by bit, capabilities(7); and what each is for.
const CAPABILITIES: [(u32, &str, &str); 4] = [
    (39, "CAP_BPF", "loading probes"),
    (38, "CAP_PERFMON", "attaching probes"),
    (19, "CAP_SYS_PTRACE", "reading other users' processes"),
    (2, "CAP_DAC_READ_SEARCH", "opening libraries in containers"),
];
/// Stands for the first two on every kernel.
const CAP_SYS_ADMIN: u32 = 21;

pub(super) fn checks(roots: &Roots) -> Vec<Check> {
    vec![
        privileges(&roots.proc),
        version(&roots.proc),
        uprobes(&roots.sys),
        tracefs(&roots.sys),
        sched(&roots.sys),
        btf(&roots.sys),
        cgroups(&roots.proc),
    ]
}

fn privileges(proc: &Path) -> Check {
    const NAME: &str = "privileges";
    let status = std::fs::read_to_string(proc.join("self/status")).unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(effective) = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()) else {
        return Check::bad(
            NAME,
            State::Missing,
            "/proc/self/status cannot be read",
            "processes cannot be found",
            "mount /proc",
        )
        .needed();
    };
    let has = |bit: u32| effective >> bit & 1 == 1;
    let stands_in = |bit: u32| bit >= 38 && has(CAP_SYS_ADMIN);
    let lacking: Vec<String> = CAPABILITIES
        .iter()
        .filter(|(bit, ..)| !has(*bit) && !stands_in(*bit))
        .map(|(_, name, purpose)| format!("{name} ({purpose})"))
        .collect();
    if lacking.is_empty() {
        return Check::ok(NAME, "all capabilities that are needed").needed();
    }
    Check::bad(
        NAME,
        State::Missing,
        format!("lacks {}", lacking.join(", ")),
        "the host side of every loss",
        "run as root, or by the packaged systemd unit",
    )
    .needed()
}

fn version(proc: &Path) -> Check {
    const NAME: &str = "kernel.version";
    let release = std::fs::read_to_string(proc.join("sys/kernel/osrelease")).unwrap_or_default();
    let release = release.trim();
    match parse_version(release) {
        Some(version) if version >= OLDEST => {
            Check::ok(NAME, format!("{release}: has ring buffers")).needed()
        }
        Some(_) => Check::bad(
            NAME,
            State::Missing,
            format!("{release} has no ring buffers"),
            "the host side of every loss",
            format!("boot a kernel from {}.{} on", OLDEST.0, OLDEST.1),
        )
        .needed(),
        None => Check::bad(
            NAME,
            State::Limited,
            format!("unknown ({release:?})"),
            "nothing, if it is recent",
            "mount /proc",
        ),
    }
}

fn parse_version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn uprobes(sys: &Path) -> Check {
    const NAME: &str = "kernel.uprobes";
    if sys.join("bus/event_source/devices/uprobe/type").exists() {
        return Check::ok(NAME, "the kernel can probe user functions").needed();
    }
    Check::bad(
        NAME,
        State::Missing,
        "/sys/bus/event_source/devices/uprobe is not there",
        "collectives, launches and synchronisations",
        "mount sysfs, or boot a kernel with CONFIG_UPROBE_EVENTS",
    )
    .needed()
}

fn tracefs(sys: &Path) -> Check {
    const NAME: &str = "kernel.tracefs";
    let places = ["kernel/tracing/events", "kernel/debug/tracing/events"];
    if places.iter().any(|place| sys.join(place).exists()) {
        return Check::ok(NAME, "mounted");
    }
    Check::bad(
        NAME,
        State::Limited,
        "not mounted, or not readable",
        "scheduling, files and storage, unless the agent may mount it itself",
        "mount -t tracefs tracefs /sys/kernel/tracing",
    )
}

fn sched(sys: &Path) -> Check {
    const NAME: &str = "kernel.sched";
    let place = |name: &str| {
        ["kernel/tracing", "kernel/debug/tracing"]
            .iter()
            .any(|root| sys.join(root).join("events/sched").join(name).exists())
    };
    if place("sched_switch") && place("sched_wakeup") {
        return Check::ok(NAME, "sched_switch and sched_wakeup can be traced");
    }
    Check::bad(
        NAME,
        State::Limited,
        "sched_switch or sched_wakeup is not visible",
        "time without a CPU and waiting of data loaders",
        "mount tracefs; boot a kernel with CONFIG_FTRACE",
    )
}

fn btf(sys: &Path) -> Check {
    const NAME: &str = "kernel.btf";
    if sys.join("kernel/btf/vmlinux").exists() {
        return Check::ok(NAME, "/sys/kernel/btf/vmlinux");
    }
    Check::bad(
        NAME,
        State::Limited,
        "the kernel has no type information",
        "probes that read kernel structures",
        "boot a kernel with CONFIG_DEBUG_INFO_BTF",
    )
}

fn cgroups(proc: &Path) -> Check {
    const NAME: &str = "cgroups";
    let read = |file: &str| std::fs::read_to_string(proc.join(file)).ok();
    let mounts = read("1/mountinfo")
        .or_else(|| read("self/mountinfo"))
        .unwrap_or_default();
    let of_type = |kind: &str, option: &str| {
        mounts
            .lines()
            .filter_map(|line| line.split_once(" - "))
            .any(|(_, after)| {
                let mut fields = after.split(' ');
                fields.next() == Some(kind)
                    && (option.is_empty()
                        || after
                            .rsplit(' ')
                            .next()
                            .is_some_and(|options| options.split(',').any(|name| name == option)))
            })
    };
    if of_type("cgroup", "cpu") {
        Check::ok(NAME, "version 1 with the cpu controller")
    } else if of_type("cgroup2", "") {
        Check::ok(NAME, "version 2")
    } else {
        Check::bad(
            NAME,
            State::Limited,
            "no hierarchy with CPU limits is mounted",
            "throttling by CPU quota",
            "mount cgroup2 at /sys/fs/cgroup",
        )
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn roots(dir: &Path, files: &[(&str, &str)]) -> Roots {
        for (path, text) in files {
            let path = dir.join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Roots {
            proc: dir.join("proc"),
            sys: dir.join("sys"),
        }
    }

    fn states(roots: &Roots) -> Vec<(&'static str, State)> {
        checks(roots)
            .iter()
            .map(|check| (check.name, check.state))
            .collect()
    }

    #[test]
    fn a_bare_root_misses_everything_and_says_how_to_fix_it() {
        let dir = tempfile::tempdir().unwrap();
        let all = checks(&roots(dir.path(), &[]));
        assert!(all.iter().all(|check| check.state != State::Ok), "{all:?}");
        assert!(
            all.iter()
                .all(|check| !check.lost.is_empty() && !check.fix.is_empty()),
            "{all:?}"
        );
        assert!(
            all.iter()
                .any(|check| check.needed && check.state == State::Missing)
        );
    }

    #[test]
    fn a_full_node_misses_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let files = [
            ("proc/self/status", "Name:\tx\nCapEff:\t000001ffffffffff\n"),
            ("proc/sys/kernel/osrelease", "6.1.0-18-amd64\n"),
            (
                "proc/1/mountinfo",
                "30 25 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n",
            ),
            ("sys/bus/event_source/devices/uprobe/type", "9\n"),
            ("sys/kernel/tracing/events/sched/sched_switch/id", "1\n"),
            ("sys/kernel/tracing/events/sched/sched_wakeup/id", "2\n"),
            ("sys/kernel/btf/vmlinux", ""),
        ];
        let states = states(&roots(dir.path(), &files));
        assert!(states.iter().all(|(_, state)| *state == State::Ok), "{states:?}");
    }

    #[test]
    fn lacking_capabilities_are_named_and_sys_admin_stands_in() {
        let dir = tempfile::tempdir().unwrap();
        let of = |bits: &[u32]| {
            let mask: u64 = bits.iter().map(|bit| 1 << bit).sum();
            privileges(
                &roots(
                    dir.path(),
                    &[("proc/self/status", &format!("CapEff:\t{mask:016x}\n"))],
                )
                .proc,
            )
        };
        assert_eq!(of(&[39, 38, 19, 2]).state, State::Ok);
        assert_eq!(of(&[21, 19, 2]).state, State::Ok);
        let some = of(&[39, 38, 2]);
        assert!(some.needed && some.state == State::Missing);
        assert_eq!(
            some.found,
            "lacks CAP_SYS_PTRACE (reading other users' processes)"
        );
    }

    #[test]
    fn versions() {
        assert_eq!(parse_version("6.18.0-rc1+"), Some((6, 18)));
        assert_eq!(parse_version("5.8"), Some((5, 8)));
        assert_eq!(parse_version(""), None);
        assert_eq!(parse_version("five.eight"), None);
        let dir = tempfile::tempdir().unwrap();
        let old = version(&roots(dir.path(), &[("proc/sys/kernel/osrelease", "4.18.0-513.el8\n")]).proc);
        assert!(old.needed && old.state == State::Missing);
    }
}
