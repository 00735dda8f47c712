//! Attaching to what libraries come to in practice: damaged, foreign, replaced, gone, used again.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use stallscope::observation::Fact;
use stallscope::sources::probes::{AttachError, ProbesConfig};
use stallscope::sources::procs::{Library, LibraryId, LibraryKind};
use stallscope_e2e::privileged;
use stallscope_e2e::tracer::{Puppet, Tracer, compile};

fn library(path: &Path, inode: u64) -> Library {
    let id = LibraryId { device: 1, inode };
    Library {
        id,
        kind: LibraryKind::Cuda,
        path: path.to_owned(),
        shown: path.display().to_string(),
        pid: 1,
    }
}

/// Syncs seen while the job takes its next step.
fn syncs_of_a_step(tracer: &mut Tracer, puppet: &mut Puppet) -> Result<usize> {
    tracer.observations.clear();
    puppet.go()?;
    puppet.line()?;
    let syncs = |tracer: &Tracer| {
        tracer
            .observations
            .iter()
            .filter(|seen| matches!(seen.fact, Fact::Sync { .. }))
            .count()
    };
    tracer.drain_until(|tracer| syncs(tracer) > 0)?;
    Ok(syncs(tracer))
}

#[test]
fn what_cannot_be_traced_is_named_and_the_rest_goes_on() -> Result<()> {
    if !privileged("what_cannot_be_traced_is_named_and_the_rest_goes_on") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let path = |name: &str| folder.path().join(name);
    compile(
        "cuda.c",
        &["-shared".as_ref(), "-fPIC".as_ref()],
        &path("libcuda.so.1"),
    )?;
    compile(
        "nccl.c",
        &["-shared".as_ref(), "-fPIC".as_ref()],
        &path("libother.so"),
    )?;
    let whole = fs::read(path("libcuda.so.1"))?;
    fs::write(path("libcut.so"), &whole[..whole.len() / 2])?;
    fs::write(path("libtext.so"), "GROUP ( libcuda.so.1 )\n")?;
    fs::write(path("libempty.so"), "")?;

    let mut tracer = Tracer::load(ProbesConfig::default())?;
    let inode = |name: &str| fs::metadata(path(name)).map_or(1, |metadata| metadata.ino());
    let mut refusal = |name: &str| -> Result<String> {
        let refused = tracer
            .probes
            .attach_library(&library(&path(name), inode(name)))
            .err();
        let error = refused.with_context(|| format!("{name} was attached"))?;
        let fits = match name {
            "libgone.so" => matches!(error, AttachError::Open { .. }),
            "libother.so" => matches!(error, AttachError::Nothing { .. }),
            _ => matches!(error, AttachError::Symbols { .. }),
        };
        ensure!(fits, "{name}: {error:?}");
        Ok(error.to_string())
    };
    for name in [
        "libgone.so",
        "libother.so",
        "libcut.so",
        "libtext.so",
        "libempty.so",
    ] {
        let message = refusal(name)?;
        println!("{message}");
        ensure!(
            message.contains(name) && message.contains("stay unseen"),
            "{message}"
        );
    }
    let cuda = path("libcuda.so.1");
    let replaced = tracer.probes.attach_library(&library(&cuda, 9)).err();
    ensure!(matches!(replaced, Some(AttachError::Open { .. })), "{replaced:?}");
    let attached = tracer
        .probes
        .attach_library(&library(&cuda, inode("libcuda.so.1")))?;
    ensure!(attached.functions > 0 && !attached.inode_differs, "{attached:?}");
    Ok(())
}

#[test]
fn a_library_can_be_released_attached_again_and_deleted_meanwhile() -> Result<()> {
    if !privileged("a_library_can_be_released_attached_again_and_deleted_meanwhile") {
        return Ok(());
    }
    let folder = tempfile::tempdir()?;
    let (cuda, job) = (folder.path().join("libcuda.so.1"), folder.path().join("cuda_job"));
    compile("cuda.c", &["-shared".as_ref(), "-fPIC".as_ref()], &cuda)?;
    compile("cuda_job.c", &[cuda.as_os_str()], &job)?;
    let mut puppet = Puppet::start(Command::new(job).env("LD_LIBRARY_PATH", folder.path()))?;
    let mut tracer = Tracer::load(ProbesConfig::default())?;
    let pid = puppet.pid();
    tracer.trace(pid)?;
    let first = tracer.attach(LibraryKind::Cuda, &cuda, pid)?;
    let again = tracer.attach(LibraryKind::Cuda, &cuda, pid)?;
    ensure!(first == again, "{first:?} became {again:?}");
    ensure!(
        syncs_of_a_step(&mut tracer, &mut puppet)? == 1,
        "attached twice, seen twice"
    );

    tracer.probes.release_library(first.id);
    fs::remove_file(&cuda)?;
    let mapped = mapped_file(pid, "libcuda.so.1")?;
    let deleted = Library {
        id: first.id,
        path: mapped,
        ..library(&cuda, 0)
    };
    let attached = tracer.probes.attach_library(&deleted)?;
    ensure!(
        attached.functions == first.functions && !attached.inode_differs,
        "{attached:?}"
    );
    ensure!(
        syncs_of_a_step(&mut tracer, &mut puppet)? == 1,
        "attached again, but not seen once"
    );
    Ok(())
}

/// The path through which a mapped file can be opened even when it was deleted.
fn mapped_file(pid: u32, name: &str) -> Result<PathBuf> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let line = maps
        .lines()
        .find(|line| line.contains(name))
        .context("it is not mapped")?;
    let range = line.split(' ').next().context("a line without a range")?;
    Ok(PathBuf::from(format!("/proc/{pid}/map_files/{range}")))
}
