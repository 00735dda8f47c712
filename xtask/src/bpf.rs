//! Builds the eBPF programs into one object.

pub mod toolchain;
pub mod verifier;

use std::ffi::OsStr;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::paths::{self, Paths};
use crate::shell;
use toolchain::{TARGET, Toolchain};

/// Flags of the build. Line tables make verifier logs readable and `--btf` keeps type information in the object.
const RUSTFLAGS: &[&str] = &[
    "-Clinker=bpf-linker",
    "-Clinker-plugin-lto",
    "-Cdebuginfo=2",
    "-Clink-arg=--btf",
    "-Cpanic=abort",
];

/// Builds the object unless nothing changed since the last time, and puts it beside the binaries.
///
/// # Errors
/// No compiler or linker for BPF, or the programs do not build.
pub fn build(paths: &Paths, debug: bool) -> Result<PathBuf> {
    let toolchain = Toolchain::find()?;
    let object = paths.bpf_object();
    let stamp = object.with_extension("o.inputs");
    let inputs = inputs(paths, &toolchain, debug)?;
    if object.exists() && fs::read_to_string(&stamp).is_ok_and(|last| last == inputs) {
        copy_beside_binaries(paths, &object)?;
        return Ok(object);
    }
    eprintln!("build-bpf: building with {toolchain}");
    let built = compile(paths, &toolchain, debug)?;
    replace(&built, &object)?;
    fs::write(&stamp, inputs).with_context(|| format!("failed to write {}", stamp.display()))?;
    copy_beside_binaries(paths, &object)?;
    eprintln!(
        "build-bpf: {} ({} bytes)",
        object.display(),
        fs::metadata(&object)?.len()
    );
    Ok(object)
}

fn compile(paths: &Paths, toolchain: &Toolchain, debug: bool) -> Result<PathBuf> {
    let linker = paths.tool("bpf-linker");
    if !toolchain::linker_runs(&linker) {
        bail!(
            "{} does not run: `cargo xtask setup` installs it",
            linker.display()
        );
    }
    let mut command = toolchain.build_command();
    command
        .current_dir(paths.root.join("ebpf"))
        .args([
            "--release",
            "--target",
            TARGET,
            "--message-format",
            "json-render-diagnostics",
        ])
        .env("CARGO_TARGET_DIR", paths.target.join("bpf-build"))
        .env("CARGO_ENCODED_RUSTFLAGS", rustflags().join("\u{1f}"))
        .env("PATH", paths::path_with_tools(paths)?);
    if debug {
        command.args(["--features", "log"]);
    }
    executable(&shell::output(&mut command).context("the eBPF programs do not build")?)
}

fn rustflags() -> Vec<String> {
    let architecture = format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH);
    RUSTFLAGS
        .iter()
        .map(|flag| (*flag).to_owned())
        .chain([architecture])
        .collect()
}

/// The one executable in cargo's messages.
fn executable(messages: &str) -> Result<PathBuf> {
    let mut found = messages
        .lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter_map(|message| message["executable"].as_str().map(PathBuf::from));
    match (found.next(), found.next()) {
        (Some(object), None) => Ok(object),
        (None, _) => bail!("the build of ebpf/ made no object"),
        (Some(_), Some(second)) => bail!(
            "the build of ebpf/ made more than one object: {}",
            second.display()
        ),
    }
}

/// What the object depends on, as one line: sources, manifests, compiler, linker and mode.
fn inputs(paths: &Paths, toolchain: &Toolchain, debug: bool) -> Result<String> {
    let mut files = Vec::new();
    collect_sources(&paths.root.join("ebpf"), &mut files)?;
    files.sort();
    let mut hasher = DefaultHasher::new();
    for file in &files {
        file.strip_prefix(&paths.root).unwrap_or(file).hash(&mut hasher);
        fs::read(file)
            .with_context(|| format!("failed to read {}", file.display()))?
            .hash(&mut hasher);
    }
    let linker = fs::metadata(paths.tool("bpf-linker"))
        .and_then(|linker| linker.modified())
        .ok();
    linker.hash(&mut hasher);
    Ok(format!(
        "{:016x} {toolchain} {} debug={debug}\n",
        hasher.finish(),
        rustflags().join(" ")
    ))
}

fn collect_sources(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("failed to read {}", folder.display()))?;
    for entry in entries {
        let path = entry?.path();
        let extension = path.extension().and_then(OsStr::to_str);
        if path.is_dir() {
            if path.file_name() != Some(OsStr::new("target")) {
                collect_sources(&path, files)?;
            }
        } else if matches!(extension, Some("rs" | "toml" | "lock")) {
            files.push(path);
        }
    }
    Ok(())
}

/// Puts the object where the binaries of every profile built so far look for it first.
pub(crate) fn copy_beside_binaries(paths: &Paths, object: &Path) -> Result<()> {
    for profile in ["debug", "release"] {
        let folder = paths.target.join(profile);
        if folder.is_dir() {
            replace(object, &folder.join("stallscope.bpf.o"))?;
        }
    }
    Ok(())
}

/// Copies a file so that readers see the old one or the new one, never half of it.
fn replace(from: &Path, to: &Path) -> Result<()> {
    let folder = to.parent().context("a file has a folder")?;
    fs::create_dir_all(folder)?;
    let copy = tempfile::NamedTempFile::new_in(folder)?;
    fs::copy(from, copy.path()).with_context(|| format!("failed to copy {}", from.display()))?;
    copy.persist(to)
        .with_context(|| format!("failed to write {}", to.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn exactly_one_object_is_accepted() {
        let artifact = |path: &str| format!("{{\"reason\":\"compiler-artifact\",\"executable\":{path}}}\n");
        assert_eq!(executable(&artifact("\"/t/a\"")).unwrap(), Path::new("/t/a"));
        assert!(executable(&artifact("null")).is_err());
        assert!(executable(&(artifact("\"/t/a\"") + &artifact("\"/t/b\""))).is_err());
    }

    #[test]
    fn a_changed_source_changes_the_inputs() {
        let root = tempfile::tempdir().unwrap();
        let paths = Paths {
            root: root.path().into(),
            cache: root.path().into(),
            target: root.path().into(),
        };
        let toolchain = Toolchain::NightlySource { version: "x".into() };
        fs::create_dir_all(root.path().join("ebpf/src")).unwrap();
        fs::write(root.path().join("ebpf/src/main.rs"), "a").unwrap();
        let first = inputs(&paths, &toolchain, false).unwrap();
        fs::write(root.path().join("ebpf/notes.txt"), "ignored").unwrap();
        assert_eq!(inputs(&paths, &toolchain, false).unwrap(), first);
        assert_ne!(inputs(&paths, &toolchain, true).unwrap(), first);
        fs::write(root.path().join("ebpf/src/main.rs"), "b").unwrap();
        assert_ne!(inputs(&paths, &toolchain, false).unwrap(), first);
    }
}
