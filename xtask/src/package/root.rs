//! A Debian root to install into.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::paths::Paths;
use crate::shell;

/// The release that packages are tried on.
const RELEASE: &str = "bookworm";

/// Where dpkg itself keeps notes; these files change with every package.
const DPKG_NOTES: &[&str] = &["var/lib/dpkg/", "var/log/", "var/cache/"];

/// Files of a root with their sizes; folders and links have none.
type Snapshot = BTreeMap<PathBuf, Option<u64>>;

/// A root folder that is deleted at the end.
pub(super) struct Root {
    dir: tempfile::TempDir,
}

impl Root {
    /// A fresh root from the cached archive; the first call makes that with debootstrap.
    pub(super) fn unpack(paths: &Paths) -> Result<Self> {
        let archive = paths.cache.join(format!("{RELEASE}-minbase.tar.gz"));
        if !archive.exists() {
            make_archive(&archive)?;
        }
        let dir = tempfile::tempdir()?;
        shell::run(
            Command::new("tar")
                .args(["--numeric-owner", "-xzf"])
                .arg(&archive)
                .arg("-C")
                .arg(dir.path()),
        )?;
        Ok(Self { dir })
    }

    /// Installs, runs, removes and purges; the files afterwards must be those from before.
    pub(super) fn try_package(&self, deb: &Path, files: &[&str]) -> Result<()> {
        let before = self.snapshot()?;
        let inside = self.dir.path().join("tmp/stallscope.deb");
        fs::copy(deb, &inside).with_context(|| format!("failed to copy {}", deb.display()))?;
        shell::run(&mut self.command("dpkg", &["--install", "/tmp/stallscope.deb"]))?;
        fs::remove_file(&inside)?;
        for file in files {
            ensure!(
                self.dir.path().join(file.trim_start_matches('/')).exists(),
                "the package did not install {file}"
            );
        }
        self.run_there()?;
        shell::run(&mut self.command("dpkg", &["--remove", "stallscope"]))?;
        let config = self.dir.path().join("etc/stallscope/stallscope.toml");
        ensure!(
            config.exists(),
            "removing the package removed the configuration; only purging may"
        );
        shell::run(&mut self.command("dpkg", &["--purge", "stallscope"]))?;
        let left = difference(&before, &self.snapshot()?);
        ensure!(
            left.is_empty(),
            "the package left or changed:\n  {}",
            left.join("\n  ")
        );
        Ok(())
    }

    /// The program starts, takes its own default configuration, and says what a root without kernel and GPU cannot show.
    fn run_there(&self) -> Result<()> {
        shell::run(&mut self.command("/usr/bin/stallscope", &["--version"]))?;
        shell::run(&mut self.command("/usr/bin/stallscope", &["config", "check"]))?;
        let known = self.command("/sbin/ldconfig", &["-p"]).output()?;
        let known = String::from_utf8_lossy(&known.stdout).into_owned();
        ensure!(
            known.contains("libc.so.6") && !known.contains("nccl-profiler"),
            "the loader knows of the plugin for NCCL:\n{known}"
        );
        let doctor = self
            .command("/usr/bin/stallscope", &["doctor"])
            .output()
            .context("doctor did not start")?;
        let text = String::from_utf8_lossy(&doctor.stdout);
        ensure!(
            matches!(doctor.status.code(), Some(0 | 1)) && !text.trim().is_empty(),
            "doctor ended with {} and printed: {text}{}",
            doctor.status,
            String::from_utf8_lossy(&doctor.stderr)
        );
        ensure!(
            !text.contains("object was not found"),
            "doctor misses the installed BPF object:\n{text}"
        );
        eprintln!("package: doctor in the fresh root says:\n{text}");
        Ok(())
    }

    /// A command inside the root, with a `/proc` that only it sees.
    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-ec"])
            .arg("mount -t proc proc \"$1/proc\"; exec chroot \"$@\"")
            .arg("chroot")
            .arg(self.dir.path())
            .arg(program)
            .args(arguments);
        command
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn snapshot(&self) -> Result<Snapshot> {
        let mut files = Snapshot::new();
        walk(self.dir.path(), self.dir.path(), &mut files)?;
        files.retain(|path, _| !DPKG_NOTES.iter().any(|notes| path.starts_with(notes)));
        Ok(files)
    }
}

fn walk(root: &Path, folder: &Path, files: &mut Snapshot) -> Result<()> {
    for entry in fs::read_dir(folder).with_context(|| format!("failed to read {}", folder.display()))? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let name = entry.path().strip_prefix(root)?.to_owned();
        files.insert(name, metadata.is_file().then_some(metadata.len()));
        if metadata.is_dir() {
            walk(root, &entry.path(), files)?;
        }
    }
    Ok(())
}

fn difference(before: &Snapshot, after: &Snapshot) -> Vec<String> {
    let changed = after
        .iter()
        .filter(|(path, size)| before.get(*path) != Some(size))
        .map(|(path, _)| path);
    let gone = before.keys().filter(|path| !after.contains_key(*path));
    changed
        .map(|path| format!("+ /{}", path.display()))
        .chain(gone.map(|path| format!("- /{}", path.display())))
        .collect()
}

fn make_archive(archive: &Path) -> Result<()> {
    eprintln!("package: making a {RELEASE} root with debootstrap (minutes, once)");
    let dir = tempfile::tempdir()?;
    let root = dir.path().join("root");
    shell::run(
        Command::new("debootstrap")
            .args(["--variant=minbase", RELEASE])
            .arg(&root),
    )?;
    for unneeded in ["var/cache/apt/archives", "var/lib/apt/lists"] {
        let folder = root.join(unneeded);
        fs::remove_dir_all(&folder)?;
        fs::create_dir_all(&folder)?;
    }
    let partial = archive.with_extension("partial");
    shell::run(
        Command::new("tar")
            .args(["--numeric-owner", "-czf"])
            .arg(&partial)
            .arg("-C")
            .arg(&root)
            .arg("."),
    )?;
    Ok(fs::rename(partial, archive)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leftovers_changes_and_losses_are_named() {
        let of = |entries: &[(&str, Option<u64>)]| -> Snapshot {
            entries
                .iter()
                .map(|&(path, size)| (PathBuf::from(path), size))
                .collect()
        };
        let before = of(&[("etc", None), ("etc/a", Some(1)), ("etc/b", Some(2))]);
        let after = of(&[("etc", None), ("etc/a", Some(3)), ("etc/new", None)]);
        assert_eq!(
            difference(&before, &after),
            ["+ /etc/a", "+ /etc/new", "- /etc/b"]
        );
        assert!(difference(&before, &before).is_empty());
    }
}
