//! The probes on the real NCCLs of the Python wheels, in live processes.

mod real {
    pub(crate) mod calls;
    pub(crate) mod plugin;
    pub(crate) mod waits;
}

use real::{calls, plugin, waits};

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use stallscope::observation::{Collective, Fact, Thread};
use stallscope::sources::probes::nccl::NcclVersion;
use stallscope::sources::probes::{Attached, Outcome, ProbesConfig};
use stallscope::sources::procs::LibraryKind;
use stallscope_e2e::privileged;
use stallscope_e2e::tracer::{Puppet, Tracer};

/// A real library and what is expected of it.
struct Real {
    version: NcclVersion,
    library: PathBuf,
}

/// Every library, or `None` and the reason said.
fn libraries(test: &str) -> Option<Vec<Real>> {
    if !privileged(test) {
        return None;
    }
    let named = std::env::var_os("STALLSCOPE_REAL_NCCLS").unwrap_or_default();
    let paths: Vec<PathBuf> = std::env::split_paths(&named).collect();
    let versions = [(2, 21, 5), (2, 27, 5), (2, 32, 3)];
    if paths.len() != versions.len() || !paths.iter().all(|path| path.exists()) {
        println!(
            "skipped: {test}: there are no real NCCLs; `cargo xtask setup` fetches them and STALLSCOPE_REAL_NCCLS names them"
        );
        return None;
    }
    let real = versions
        .iter()
        .zip(paths)
        .map(|((major, minor, patch), library)| Real {
            version: NcclVersion::new(*major, *minor, *patch),
            library,
        });
    Some(real.collect())
}

/// A caller of one library, traced.
struct Traced {
    puppet: Puppet,
    tracer: Tracer,
    attached: Attached,
    thread: Thread,
}

fn trace(library: &Path, log: &Path, config: ProbesConfig) -> Result<Traced> {
    let mut command = Command::new(env!("CARGO_BIN_EXE_nccl_caller"));
    command
        .arg(library)
        .env("NCCL_DEBUG", "INFO")
        .env("NCCL_DEBUG_SUBSYS", "INIT")
        .env("NCCL_DEBUG_FILE", log)
        .env("NCCL_SOCKET_IFNAME", "lo")
        .stderr(Stdio::null());
    let puppet = Puppet::start(&mut command)?;
    let mut tracer = Tracer::load(config)?;
    for program in &tracer.health.programs {
        ensure!(program.outcome == Outcome::Ok, "{program:?}");
    }
    let attached = tracer.attach(LibraryKind::Nccl, library, puppet.pid())?;
    println!("{attached:?}");
    ensure!(attached.failed.is_empty(), "{attached:?}");
    let process = tracer.trace(puppet.pid())?;
    let thread = Thread {
        process,
        tid: puppet.pid(),
    };
    Ok(Traced {
        puppet,
        tracer,
        attached,
        thread,
    })
}

fn collectives(tracer: &Tracer) -> Vec<&Collective> {
    tracer
        .observations
        .iter()
        .filter_map(|observation| match &observation.fact {
            Fact::Collective(collective) => Some(collective),
            _ => None,
        })
        .collect()
}

/// The number in a word that the caller said.
fn number<T: std::str::FromStr>(word: Option<&str>) -> Result<T> {
    let word = word.context("the caller said too little")?;
    word.parse()
        .ok()
        .with_context(|| format!("the caller said {word:?}"))
}

#[test]
fn every_argument_of_every_public_call_is_decoded_on_every_version() -> Result<()> {
    let Some(libraries) = libraries("every_argument_of_every_public_call_is_decoded_on_every_version") else {
        return Ok(());
    };
    libraries
        .iter()
        .try_for_each(|real| calls::one(real).with_context(|| format!("with NCCL {}", real.version)))
}

#[test]
fn a_call_that_kills_its_process_is_told_without_a_result() -> Result<()> {
    let Some(libraries) = libraries("a_call_that_kills_its_process_is_told_without_a_result") else {
        return Ok(());
    };
    calls::killed(&libraries[1])
}

#[test]
fn waits_are_timed_from_the_hooks_of_every_version_that_has_them() -> Result<()> {
    let Some(libraries) = libraries("waits_are_timed_from_the_hooks_of_every_version_that_has_them") else {
        return Ok(());
    };
    libraries
        .iter()
        .try_for_each(|real| waits::one(real).with_context(|| format!("with NCCL {}", real.version)))
}

#[test]
fn a_library_without_local_symbols_is_traced_by_its_public_calls() -> Result<()> {
    let Some(libraries) = libraries("a_library_without_local_symbols_is_traced_by_its_public_calls") else {
        return Ok(());
    };
    waits::without_symbols(&libraries[1])
}

#[test]
fn the_library_loads_the_plugin_and_obeys_its_mask() -> Result<()> {
    let Some(libraries) = libraries("the_library_loads_the_plugin_and_obeys_its_mask") else {
        return Ok(());
    };
    libraries
        .iter()
        .try_for_each(|real| plugin::one(real).with_context(|| format!("with NCCL {}", real.version)))
}
