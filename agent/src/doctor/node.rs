//! The agent's own parts: probes, NVML, network, store, stream.

use std::path::{Path, PathBuf};

use super::{Check, State};
use crate::config;
use crate::sources::net::NetSource;
use crate::sources::nvml::{GpuSummary, NvmlSource};
use crate::sources::probes::{Outcome, Probes, ProbesConfig};

/// The agent's own binary, for what it tries in a child.
const OWN_BINARY: &str = "/proc/self/exe";

const RW: rustix::fs::Access = rustix::fs::Access::WRITE_OK;

pub(super) fn probes(config: &config::Probes) -> Check {
    const NAME: &str = "probes";
    const LOST: &str =
        "the host side of every loss: collectives, launches, synchronisation, scheduling, files";
    let wanted = ProbesConfig {
        object: config.object.clone(),
        ..ProbesConfig::default()
    };
    let loaded = match Probes::load(&wanted) {
        Ok(loaded) => loaded,
        Err(error) => {
            let fix = "install the stallscope package whole, and run as root";
            return Check::bad(NAME, State::Missing, error.to_string(), LOST, fix).needed();
        }
    };
    let all = loaded.health.programs.len();
    let missing: Vec<String> = loaded
        .health
        .missing()
        .map(|program| {
            let (Outcome::Unsupported(why) | Outcome::Broken(why)) = &program.outcome else {
                return program.program.to_owned();
            };
            format!("{} ({why})", program.program)
        })
        .collect();
    let worlds = |world: &str| loaded.health.missing().any(|program| program.world == world);
    if missing.is_empty() {
        return Check::ok(NAME, format!("all {all} programs load")).needed();
    }
    let lost: Vec<&str> = loaded.health.missing().map(|program| program.intent).collect();
    let state = if worlds("nccl") || worlds("cuda") {
        State::Missing
    } else {
        State::Limited
    };
    let found = format!(
        "{} of {all} programs do not run: {}",
        missing.len(),
        missing.join(", ")
    );
    Check::bad(
        NAME,
        state,
        found,
        lost.join("; "),
        "see the kernel's checks above",
    )
    .needed()
}

/// The library, then one check per GPU.
pub(super) fn nvml(config: &config::Nvml) -> Vec<Check> {
    const NAME: &str = "nvml";
    const LOST: &str = "the GPU side of every loss: activity, clocks, power, who else computes";
    match NvmlSource::open_tried(Path::new(OWN_BINARY), config) {
        Err(error) => {
            let fix = "install the NVIDIA driver; in a container, mount its libraries";
            vec![Check::bad(NAME, State::Missing, error.to_string(), LOST, fix).needed()]
        }
        Ok(source) => {
            let gpus = source.summaries();
            let library = if gpus.is_empty() {
                let fix = "see whether nvidia-smi lists the devices";
                Check::bad(
                    NAME,
                    State::Missing,
                    format!("{}: no device", config.library),
                    LOST,
                    fix,
                )
            } else {
                let found = format!(
                    "{}, driver {}: {} devices",
                    config.library,
                    source.driver_version(),
                    gpus.len()
                );
                Check::ok(NAME, found)
            };
            std::iter::once(library.needed())
                .chain(gpus.iter().map(gpu))
                .collect()
        }
    }
}

fn gpu(gpu: &GpuSummary) -> Check {
    const NAME: &str = "nvml.gpu";
    let shown = format!("GPU {} {} {}", gpu.index, gpu.pci, gpu.name);
    match (&gpu.trouble, gpu.gpm) {
        (Some(trouble), _) => Check::bad(
            NAME,
            State::Limited,
            format!("{shown}: {trouble}"),
            "this GPU's activity and clocks",
            "see the kernel's log for Xid errors; drain and reset the GPU",
        ),
        (None, Some(true)) => Check::ok(NAME, format!("{shown}: with GPM counters")),
        (None, Some(false)) => Check::bad(
            NAME,
            State::Limited,
            format!("{shown}: no GPM counters"),
            "SM, tensor and memory activity; MFU is of low confidence",
            "nothing before Hopper; on newer devices update the driver",
        ),
        (None, None) => Check::bad(
            NAME,
            State::Limited,
            format!("{shown}: the device does not open"),
            "this GPU's activity and clocks",
            "see the kernel's log for Xid errors; drain and reset the GPU",
        ),
    }
}

/// Where the package's plugin may lie: where the packages put it, or beside a binary that was just built.
pub(super) fn plugin_places() -> Vec<PathBuf> {
    const NAME: &str = "libnccl-profiler-stallscope.so";
    let exe = std::env::current_exe().unwrap_or_default();
    let folders = exe.parent().into_iter().flat_map(|folder| {
        let installed = folder.parent().map(|prefix| prefix.join("lib/stallscope"));
        installed.into_iter().chain([folder.to_owned()])
    });
    folders.map(|folder| folder.join(NAME)).collect()
}

pub(super) fn nccl_profiler(config: &config::Nccl, places: &[PathBuf]) -> Check {
    const NAME: &str = "nccl-profiler";
    let plugin = places.iter().find(|path| path.exists());
    match (config.profiler, plugin) {
        (false, _) => Check {
            state: State::NotConfigured,
            ..Check::ok(
                NAME,
                "jobs are not asked for NCCL's own events: waits are read by probes",
            )
        },
        (true, Some(path)) => Check::ok(
            NAME,
            format!(
                "read in jobs started with NCCL_PROFILER_PLUGIN={}",
                path.display()
            ),
        ),
        (true, None) => Check::bad(
            NAME,
            State::Limited,
            "the plugin is not installed here",
            "NCCL's own events of jobs that do not bring the plugin themselves; probes tell their waits",
            "install the stallscope package whole, or set nccl.profiler = false",
        ),
    }
}

pub(super) fn flows(node: &str) -> Check {
    const NAME: &str = "network";
    const LOST: &str = "whether a slow step waits for the network, and where";
    let mut source = match NetSource::open(node) {
        Ok(source) => source,
        Err(error) => {
            return Check::bad(
                NAME,
                State::Limited,
                error.to_string(),
                LOST,
                "allow netlink sockets",
            );
        }
    };
    source.poll(1, 0, &[std::process::id()].into());
    match source.trouble() {
        None => Check::ok(
            NAME,
            "flows by INET_DIAG, ports and queues by rtnetlink, in this network namespace; not the kernel's own sockets (NFS, \
             Ceph, iSCSI, NVMe over TCP)",
        ),
        Some(trouble) => {
            let fix = "load the modules tcp_diag and inet_diag, or boot a kernel with CONFIG_INET_DIAG";
            Check::bad(NAME, State::Limited, trouble, LOST, fix)
        }
    }
}

pub(super) fn scope(config: &config::Scope) -> Check {
    const NAME: &str = "scope";
    match &config.cgroup {
        None => Check {
            state: State::NotConfigured,
            ..Check::ok(NAME, "every process of the node")
        },
        Some(cgroup) => Check::ok(NAME, format!("processes at or below {cgroup}")),
    }
}

pub(super) fn store(config: &config::Store) -> Check {
    const NAME: &str = "store";
    let existing = config
        .dir
        .ancestors()
        .find(|path| path.exists())
        .unwrap_or(Path::new("/"));
    match rustix::fs::access(existing, RW) {
        Ok(()) => Check::ok(NAME, format!("{} can be written", config.dir.display())),
        Err(error) => Check::bad(
            NAME,
            State::Limited,
            format!("{} cannot be written: {error}", existing.display()),
            "reports of the past, and what a collector missed",
            "set store.dir to a directory the agent may write",
        ),
    }
}

pub(super) fn stream(config: &config::Stream) -> Check {
    const NAME: &str = "stream";
    const LOST: &str = "the view across nodes: reports stay on the node";
    let target = match config.target() {
        Ok(None) => {
            return Check {
                state: State::NotConfigured,
                ..Check::ok(NAME, "no collector: local only")
            };
        }
        Ok(Some(target)) => target,
        Err(error) => return Check::bad(NAME, State::Limited, error.to_string(), LOST, "complete [stream]"),
    };
    let files = [("ca", &target.ca), ("cert", &target.cert), ("key", &target.key)];
    for (key, path) in files {
        let trouble = match std::fs::read_to_string(path) {
            Err(error) => Some(error.to_string()),
            Ok(text) if !text.contains("-----BEGIN ") => Some("holds no PEM".to_owned()),
            Ok(_) => None,
        };
        if let Some(trouble) = trouble {
            let found = format!("stream.{key} {}: {trouble}", path.display());
            return Check::bad(
                NAME,
                State::Limited,
                found,
                LOST,
                "put the PEM file there, readable by the agent",
            );
        }
    }
    Check::ok(
        NAME,
        format!("to {}:{} with readable certificates", target.host, target.port),
    )
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn missing_parts_are_needed_and_named() {
        let library = config::Nvml {
            library: "/nonexistent/nvml.so".to_owned(),
            ..config::Nvml::default()
        };
        let nvml = nvml(&library);
        assert_eq!(nvml.len(), 1);
        assert!(
            nvml[0].needed
                && nvml[0].state == State::Missing
                && nvml[0].found.contains("/nonexistent/nvml.so")
        );
        let object = config::Probes {
            object: Some("/nonexistent/x.bpf.o".into()),
        };
        let probes = probes(&object);
        assert!(
            probes.needed && probes.state == State::Missing && probes.found.contains("/nonexistent/x.bpf.o")
        );
    }

    #[test]
    fn certificates_are_looked_into() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let stream_config = config::Stream {
            collector: Some("c:1".to_owned()),
            ca: Some(path("ca")),
            cert: Some(path("cert")),
            key: Some(path("key")),
            ..config::Stream::default()
        };
        std::fs::write(path("ca"), "-----BEGIN CERTIFICATE-----\n").unwrap();
        std::fs::write(path("cert"), "nothing").unwrap();
        let bad = stream(&stream_config);
        assert!(
            bad.state == State::Limited && bad.found.starts_with("stream.cert"),
            "{bad:?}"
        );
        std::fs::write(path("cert"), "-----BEGIN CERTIFICATE-----\n").unwrap();
        assert!(stream(&stream_config).found.starts_with("stream.key"));
        std::fs::write(path("key"), "-----BEGIN PRIVATE KEY-----\n").unwrap();
        assert_eq!(stream(&stream_config).state, State::Ok);
        assert_eq!(stream(&config::Stream::default()).state, State::NotConfigured);
    }

    #[test]
    fn the_plugin_is_missed_only_where_it_was_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let place = dir.path().join("plugin.so");
        let asked = config::Nccl {
            profiler: true,
            ..config::Nccl::default()
        };
        let of = |config: &config::Nccl| nccl_profiler(config, std::slice::from_ref(&place)).state;
        assert_eq!(of(&config::Nccl::default()), State::NotConfigured);
        assert_eq!(of(&asked), State::Limited);
        std::fs::write(&place, "").unwrap();
        assert_eq!(of(&asked), State::Ok);
    }

    #[test]
    fn gpus_by_what_they_answer() {
        let summary = |trouble: Option<&str>, gpm| GpuSummary {
            index: 3,
            name: "H100".to_owned(),
            pci: "0000:18:00.0".to_owned(),
            gpm,
            trouble: trouble.map(str::to_owned),
        };
        assert_eq!(gpu(&summary(None, Some(true))).state, State::Ok);
        for limited in [
            summary(None, Some(false)),
            summary(None, None),
            summary(Some("hangs"), None),
        ] {
            let check = gpu(&limited);
            assert!(
                check.state == State::Limited && check.found.contains("GPU 3 0000:18:00.0 H100"),
                "{check:?}"
            );
        }
    }

    #[test]
    fn netlink_and_store_on_this_machine() {
        assert_eq!(flows("n").state, State::Ok);
        let dir = tempfile::tempdir().unwrap();
        let below = config::Store {
            dir: dir.path().join("a/b"),
            ..config::Store::default()
        };
        assert_eq!(store(&below).state, State::Ok);
    }
}
