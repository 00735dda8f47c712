//! Debian's stock kernel for virtual machines: unpacked into the cache, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::{Scope, apt};
use crate::paths::Paths;
use crate::shell;

/// The package whose first dependency is the current kernel.
const META: &str = "linux-image-amd64";

/// An unpacked kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// Its release: `6.1.0-56-amd64`.
    pub release: String,
    /// What a boot loader loads.
    pub image: PathBuf,
    /// The folder that holds `lib/modules`, as `modprobe --dirname` wants it.
    pub root: PathBuf,
}

impl Kernel {
    /// The folder of its modules.
    #[must_use]
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }
}

/// The kernel that setup unpacked.
///
/// # Errors
/// There is none.
pub fn stock_kernel(paths: &Paths) -> Result<Kernel> {
    find(&paths.kernel())?.with_context(|| {
        format!(
            "there is no kernel in {}: `cargo xtask setup` fetches it",
            paths.kernel().display()
        )
    })
}

/// The kernel below `root`, if a whole one is there: the index of its modules is written last.
fn find(root: &Path) -> Result<Option<Kernel>> {
    let modules = root.join("lib/modules");
    if !modules.is_dir() {
        return Ok(None);
    }
    for entry in fs::read_dir(&modules).with_context(|| format!("failed to read {}", modules.display()))? {
        let entry = entry?;
        let release = entry.file_name().to_string_lossy().into_owned();
        let image = root.join("boot").join(format!("vmlinuz-{release}"));
        if image.exists() && entry.path().join("modules.dep").exists() {
            return Ok(Some(Kernel {
                release,
                image,
                root: root.to_owned(),
            }));
        }
    }
    Ok(None)
}

/// Whether the scope needs a kernel and none is there. Debian builds this one for x86-64 alone.
pub(super) fn is_missing(paths: &Paths, scope: Scope) -> bool {
    scope == Scope::All && cfg!(target_arch = "x86_64") && !matches!(find(&paths.kernel()), Ok(Some(_)))
}

/// The installation as a person would type it.
pub(super) fn command_line(paths: &Paths) -> String {
    let root = paths.kernel();
    let root = root.display();
    format!(
        "apt-get download $(apt-cache depends --important {META} | sed -n 's/.*Depends: //p') && dpkg-deb --extract \
         linux-image-*.deb {root} && depmod --basedir {root} $(ls {root}/lib/modules)"
    )
}

/// Downloads and unpacks it.
pub(super) fn install(paths: &Paths) -> Result<()> {
    fs::create_dir_all(&paths.cache)?;
    let work = tempfile::tempdir_in(&paths.cache)?;
    let package = current_package()?;
    eprintln!("setup: unpacking {package}");
    let download = || {
        shell::run(
            Command::new("apt-get")
                .args(["download", "--quiet=2", &package])
                .current_dir(work.path()),
        )
    };
    if download().is_err() {
        // Lists that are older than the mirror name a version that is gone.
        shell::run(&mut apt::update_command())?;
        download()?;
    }
    let unpacked = work.path().join("root");
    shell::run(
        Command::new("dpkg-deb")
            .arg("--extract")
            .arg(package_file(work.path())?)
            .arg(&unpacked),
    )?;
    let release = package
        .strip_prefix("linux-image-")
        .context("the kernel's package has another name")?;
    shell::run(
        Command::new("depmod")
            .arg("--basedir")
            .arg(&unpacked)
            .arg(release),
    )?;
    ensure!(
        find(&unpacked)?.is_some(),
        "{package} holds no kernel {release} with modules"
    );
    let root = paths.kernel();
    if root.exists() {
        fs::remove_dir_all(&root)?;
    }
    fs::rename(&unpacked, &root).with_context(|| format!("failed to create {}", root.display()))
}

/// The package of the kernel that Debian has now.
fn current_package() -> Result<String> {
    let text = shell::output(
        Command::new("apt-cache")
            .args(["depends", "--important", META])
            .env("LC_ALL", "C"),
    )?;
    dependency(&text).with_context(|| format!("apt does not say which kernel {META} stands for"))
}

/// The first dependency in the answer of `apt-cache depends`.
fn dependency(text: &str) -> Option<String> {
    text.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
}

fn package_file(folder: &Path) -> Result<PathBuf> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            return Ok(path);
        }
    }
    bail!("apt-get left no package in {}", folder.display())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn the_kernel_behind_the_name_is_found() {
        let answer = "linux-image-amd64\n  Depends: linux-image-6.1.0-9-amd64\n";
        assert_eq!(dependency(answer).as_deref(), Some("linux-image-6.1.0-9-amd64"));
        assert_eq!(dependency("linux-image-amd64\n"), None);
    }

    #[test]
    fn half_a_kernel_is_none() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(find(root.path()).unwrap(), None);
        let modules = root.path().join("lib/modules/6.1.0-9-amd64");
        fs::create_dir_all(&modules).unwrap();
        fs::create_dir_all(root.path().join("boot")).unwrap();
        fs::write(root.path().join("boot/vmlinuz-6.1.0-9-amd64"), "").unwrap();
        assert_eq!(find(root.path()).unwrap(), None);
        fs::write(modules.join("modules.dep"), "").unwrap();
        let kernel = find(root.path()).unwrap().unwrap();
        assert_eq!(kernel.release, "6.1.0-9-amd64");
        assert_eq!(kernel.modules(), modules);
    }
}
