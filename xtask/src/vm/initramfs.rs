//! The initial file system: enough to reach the host's own files, which are the guest's, read-only.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::modules;
use crate::setup::Kernel;

/// Modules without which nothing else is reached. The network is here too: a guest's own modules come over 9p.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "virtio_net"];

/// Where Debian's package `busybox-static` puts its program.
const BUSYBOX: &str = "/bin/busybox";

/// What the init script prints when the kernel runs programs.
pub(super) const ALIVE: &str = "initramfs: alive";

/// Mode bits of a folder and of a program, as `stat` has them.
const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;

/// Writes the initial file system for a kernel as one archive.
pub(super) fn write(kernel: &Kernel, to: &Path) -> Result<()> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "host", "modules", "proc", "sys"] {
        archive.entry(folder, FOLDER, &[])?;
    }
    let busybox = fs::read(BUSYBOX).with_context(|| format!("failed to read {BUSYBOX}"))?;
    archive.entry("bin/busybox", PROGRAM, &busybox)?;
    let mut load = String::new();
    for path in modules::in_load_order(kernel, &MODULES)? {
        let name = path
            .file_name()
            .context("a module has a name")?
            .to_string_lossy()
            .into_owned();
        let bytes = fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        archive.entry(&format!("modules/{name}"), PROGRAM, &bytes)?;
        load.push_str(&format!("$b insmod /modules/{name}\n"));
    }
    archive.entry("init", PROGRAM, init(&load).as_bytes())?;
    fs::write(to, archive.finish()?).with_context(|| format!("failed to write {}", to.display()))
}

/// The first script. `guest=PATH` on the kernel's command line names the program to hand over to, in the host's tree;
/// without it the machine only shows that it runs.
fn init(load: &str) -> String {
    format!(
        r#"#!/bin/busybox sh
b=/bin/busybox
echo "{ALIVE}"
$b mount -t proc nodev /proc
guest=$($b sed -n 's/.*guest=\([^ ]*\).*/\1/p' /proc/cmdline)
[ -n "$guest" ] || $b poweroff -f
$b mount -t sysfs nodev /sys
$b mount -t devtmpfs nodev /dev
{load}
$b mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=524288,cache=loose host /host || $b poweroff -f
for d in proc sys dev; do $b mount -o move /$d /host/$d; done
for d in tmp run; do $b mount -t tmpfs nodev /host/$d; done
exec $b switch_root /host "$guest"
"#
    )
}

/// An archive in the format the kernel unpacks (`cpio`, "newc").
#[derive(Debug, Default)]
struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).with_context(|| format!("{name} is too large"))?;
        let name_size = u32::try_from(name.len() + 1)?;
        // magic, inode, mode, user, group, links, time, size, device and special device, size of the name, check sum
        write!(
            self.bytes,
            "070701{:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}{:08x}{:08x}{:08x}{:08x}{name_size:08x}{:08x}",
            self.entries, 0, 0, 1, 0, 0, 0, 0, 0, 0
        )?;
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        ensure!(self.entries > 0, "an empty archive boots nothing");
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn busybox_reads_what_was_packed() {
        if !Path::new(BUSYBOX).exists() {
            println!("skipped: busybox_reads_what_was_packed: there is no {BUSYBOX}");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let mut archive = Archive::default();
        archive.entry("d", FOLDER, &[]).unwrap();
        archive.entry("d/odd", PROGRAM, b"12345").unwrap();
        archive.entry("empty", PROGRAM, b"").unwrap();
        fs::write(folder.path().join("a.cpio"), archive.finish().unwrap()).unwrap();
        let status = Command::new(BUSYBOX)
            .args(["cpio", "-i", "-F", "a.cpio"])
            .current_dir(folder.path())
            .stderr(Stdio::null())
            .status()
            .unwrap();
        assert!(status.success());
        assert_eq!(fs::read(folder.path().join("d/odd")).unwrap(), b"12345");
        assert_eq!(fs::read(folder.path().join("empty")).unwrap(), b"");
    }
}
