//! RDMA ports and PCI devices: what their files and events tell here.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use super::kernel::Roots;
use super::{Check, State};
use crate::sources::{pcie, rdma, xid};

/// How long the files of all devices may take together.
const DEADLINE: Duration = Duration::from_secs(5);
/// Ports shown.
const MOST_SHOWN: usize = 16;

pub(super) fn checks(roots: &Roots) -> Vec<Check> {
    vec![
        rdma(&roots.sys),
        pcie(&roots.sys),
        aer(&roots.sys),
        faults(&roots.sys, Path::new(xid::KERNEL_LOG)),
    ]
}

/// The answer, unless it takes too long: a file of a sick device may block for good.
fn in_time<T: Send + 'static>(
    look: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    let (send, answer) = mpsc::sync_channel(1);
    let looking = move || {
        // Nobody listens any more when this took too long.
        let _ = send.send(look());
    };
    std::thread::Builder::new()
        .name("doctor".to_owned())
        .spawn(looking)
        .map_err(|error| format!("no thread can be started: {error}"))?;
    answer
        .recv_timeout(DEADLINE)
        .unwrap_or_else(|_| Err(format!("a device has not answered for {} s", DEADLINE.as_secs())))
}

fn rdma(sys: &Path) -> Check {
    const NAME: &str = "rdma";
    const LOST: &str = "errors and congestion of RDMA ports";
    let root = sys.to_owned();
    match in_time(move || rdma::summary(&root)) {
        Ok(ports) if ports.is_empty() => Check {
            state: State::NotConfigured,
            ..Check::ok(
                NAME,
                "no RDMA device is visible in this network namespace (`rdma system` tells whether others have theirs)",
            )
        },
        Ok(ports) => {
            let more = ports.len().saturating_sub(MOST_SHOWN);
            let mut found = ports.into_iter().take(MOST_SHOWN).collect::<Vec<_>>().join("; ");
            if more > 0 {
                found.push_str(&format!("; and {more} more"));
            }
            Check::ok(NAME, format!("{found}; of this network namespace only"))
        }
        Err(why) => Check::bad(
            NAME,
            State::Limited,
            why,
            LOST,
            "see the kernel's log for the device's driver",
        ),
    }
}

fn pcie(sys: &Path) -> Check {
    const NAME: &str = "pcie";
    const LOST: &str = "PCIe links below what they could be, and their errors";
    let root = sys.to_owned();
    let seen = match in_time(move || pcie::summary(&root)) {
        Ok(seen) => seen,
        Err(why) => {
            return Check::bad(
                NAME,
                State::Limited,
                why,
                LOST,
                "see the kernel's log for the device's driver",
            );
        }
    };
    let mut found = format!(
        "{} GPUs, network and storage devices, {} with a PCIe link, {} devices count errors",
        seen.devices, seen.with_link, seen.with_errors
    );
    if !seen.narrow.is_empty() {
        found = format!("{found}; narrow: {}", seen.narrow.join(", "));
    }
    if seen.devices > 0 && seen.with_link == 0 {
        let fix = "nothing inside a virtual machine that hides its links; else boot a kernel with CONFIG_PCI";
        return Check::bad(NAME, State::Limited, found, LOST, fix);
    }
    Check::ok(NAME, found)
}

fn aer(sys: &Path) -> Check {
    const NAME: &str = "pcie.errors";
    let places = ["kernel/tracing", "kernel/debug/tracing"].map(|place| sys.join(place));
    let has = |event: &str| places.iter().any(|place: &PathBuf| place.join(event).exists());
    if has("events/ras/aer_event") {
        return Check::ok(NAME, "ras:aer_event can be traced");
    }
    Check::bad(
        NAME,
        State::Limited,
        "this kernel has no tracepoint ras:aer_event, or tracefs is not mounted",
        "the moment of PCIe errors; their counts are read where devices have them",
        "mount tracefs; boot a kernel with CONFIG_PCIEAER and CONFIG_RAS",
    )
}

/// Who tells of faults of GPUs here, beside NVML.
fn faults(sys: &Path, log: &Path) -> Check {
    const NAME: &str = "gpu.faults";
    let event = ["kernel/tracing", "kernel/debug/tracing"]
        .iter()
        .any(|place| sys.join(place).join("events/nvidia/nvidia_dev_xid").exists());
    let unread = std::fs::File::open(log).err();
    match (event, unread) {
        (true, None) => Check::ok(NAME, "told by the driver's tracepoint, the kernel's log and NVML"),
        (true, Some(_)) => Check::ok(NAME, "told by the driver's tracepoint and NVML"),
        (false, None) => Check::ok(
            NAME,
            "told by the kernel's log and NVML; this driver has no tracepoint",
        ),
        (false, Some(error)) => Check::bad(
            NAME,
            State::Limited,
            format!(
                "told by NVML only: this driver has no tracepoint, and {}: {error}",
                log.display()
            ),
            "faults of GPUs (XIDs) of a burst: NVML may drop the first, which is the cause of the others",
            "use a driver with the tracepoint nvidia:nvidia_dev_xid, or let the agent read the kernel's log (CAP_SYSLOG)",
        ),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn roots(dir: &Path, files: &[(&str, &str)]) -> Roots {
        for (path, text) in files {
            let path = dir.join("sys").join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        Roots {
            proc: dir.join("proc"),
            sys: dir.join("sys"),
        }
    }

    #[test]
    fn what_is_there_is_named_and_what_is_not_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let bare = roots(dir.path(), &[]);
        let states: Vec<State> = checks(&bare).iter().take(3).map(|check| check.state).collect();
        assert_eq!(states, [State::NotConfigured, State::Ok, State::Limited]);
        let log = dir.path().join("kmsg");
        assert_eq!(faults(&bare.sys, &log).state, State::Limited);
        std::fs::write(&log, "").unwrap();
        assert_eq!(faults(&bare.sys, &log).state, State::Ok);
        let full = roots(
            dir.path(),
            &[
                ("class/infiniband/mlx5_0/ports/1/state", "4: ACTIVE\n"),
                ("class/infiniband/mlx5_0/ports/1/link_layer", "InfiniBand\n"),
                ("bus/pci/devices/0000:01:00.0/class", "0x020000\n"),
                ("bus/pci/devices/0000:01:00.0/max_link_speed", "16.0 GT/s PCIe\n"),
                ("bus/pci/devices/0000:01:00.0/max_link_width", "16\n"),
                (
                    "bus/pci/devices/0000:01:00.0/current_link_speed",
                    "16.0 GT/s PCIe\n",
                ),
                ("bus/pci/devices/0000:01:00.0/current_link_width", "8\n"),
                ("kernel/tracing/events/ras/aer_event/id", "1\n"),
            ],
        );
        let checks = checks(&full);
        assert!(
            checks[..3].iter().all(|check| check.state == State::Ok),
            "{checks:?}"
        );
        assert!(
            checks[0]
                .found
                .starts_with("mlx5_0/1 - InfiniBand active, 0 counters"),
            "{checks:?}"
        );
        assert!(
            checks[1].found.ends_with("narrow: 0000:01:00.0 : 8 of 16 lanes"),
            "{checks:?}"
        );
    }
}
