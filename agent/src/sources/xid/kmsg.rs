//! XIDs in the kernel's log.
//!
//! What stands there may be hostile: a process chooses its own name, which others print. So only records of the kernel
//! itself are read, the line must begin as the driver's do, and everything is bounded.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::super::sysfs::is_pci_address;
use super::merge::Xid;

/// The kernel's longest record, with what may be added to it.
const RECORD_BYTES: usize = 8192;
/// Records read at once: a flood is read on the next time, and what is overwritten meanwhile is counted.
const MOST_RECORDS: usize = 4096;
/// Text kept of a message.
const MOST_TEXT: usize = 256;

/// `/dev/kmsg`, read from when it was opened.
#[derive(Debug)]
pub(super) struct KernelLog {
    file: File,
    buffer: Vec<u8>,
    overruns: u64,
}

impl KernelLog {
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        let flags = OFlags::NONBLOCK.bits().cast_signed();
        let open = || -> std::io::Result<File> {
            let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
            file.seek(SeekFrom::End(0))?;
            Ok(file)
        };
        let file = open().map_err(|error| format!("{} cannot be read: {error}", path.display()))?;
        Ok(Self {
            file,
            buffer: vec![0; RECORD_BYTES],
            overruns: 0,
        })
    }

    /// XIDs among the records that are new.
    pub(super) fn read(&mut self) -> Vec<Xid> {
        let mut found = Vec::new();
        for _ in 0..MOST_RECORDS {
            match self.file.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(length) => found.extend(self.buffer.get(..length).and_then(xid_of)),
                Err(error) => match error.raw_os_error().map(Errno::from_raw_os_error) {
                    // Records were overwritten; the next read goes on with the oldest there is.
                    Some(Errno::PIPE) => self.overruns += 1,
                    // A record longer than any should be is skipped.
                    Some(Errno::INVAL | Errno::INTR) => {}
                    _ => break,
                },
            }
        }
        found
    }

    pub(super) fn take_overruns(&mut self) -> u64 {
        std::mem::take(&mut self.overruns)
    }
}

/// The XID in a record: `priority,sequence,time,flags;message`, and lines of properties.
fn xid_of(record: &[u8]) -> Option<Xid> {
    let end = record
        .iter()
        .position(|&byte| byte == b'\n')
        .unwrap_or(record.len());
    let line = std::str::from_utf8(record.get(..end)?).ok()?;
    let (head, message) = line.split_once(';')?;
    let priority: u32 = head.split(',').next()?.parse().ok()?;
    // The upper bits tell who wrote it; 0 is the kernel.
    if priority >> 3 != 0 {
        return None;
    }
    xid_in(message)
}

/// `NVRM: Xid (PCI:0000:b3:00): 79, pid=1234, name=python, GPU has fallen off the bus.`
fn xid_in(message: &str) -> Option<Xid> {
    let (place, rest) = message.strip_prefix("NVRM: Xid (")?.split_once("): ")?;
    let pci = address(place.strip_prefix("PCI:").unwrap_or(place))?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    let (code, text) = rest.split_at_checked(digits)?;
    Some(Xid {
        pci,
        code: code.parse().ok()?,
        message: clean(text.trim_start_matches([',', ' '])),
    })
}

/// The driver leaves out the function, and may give the domain eight digits.
pub(super) fn address(text: &str) -> Option<String> {
    let mut text = text.to_ascii_lowercase();
    if !text.contains('.') {
        text.push_str(".0");
    }
    if !is_pci_address(&text) {
        return None;
    }
    let (domain, _) = text.split_once(':')?;
    let spare = domain.len().saturating_sub(4);
    let (zeros, short) = text.split_at_checked(spare)?;
    Some(if zeros.bytes().all(|byte| byte == b'0') {
        short.to_owned()
    } else {
        text
    })
}

fn clean(text: &str) -> String {
    text.chars()
        .take(MOST_TEXT)
        .map(|char| if char.is_control() { ' ' } else { char })
        .collect()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn of(message: &str) -> Option<(String, u32, String)> {
        let record = format!("4,1234,5678901,-;{message}\n SUBSYSTEM=pci\n DEVICE=+pci:0000:b3:00.0\n");
        xid_of(record.as_bytes()).map(|xid| (xid.pci, xid.code, xid.message))
    }

    #[test]
    fn lines_as_drivers_print_them() {
        let found = |pci: &str, code, message: &str| Some((pci.to_owned(), code, message.to_owned()));
        assert_eq!(
            of("NVRM: Xid (PCI:0000:b3:00): 79, pid=1234, name=python, GPU has fallen off the bus."),
            found(
                "0000:b3:00.0",
                79,
                "pid=1234, name=python, GPU has fallen off the bus."
            )
        );
        assert_eq!(
            of("NVRM: Xid (PCI:0000:B3:00): 48, pid='<unknown>', name=<unknown>, DBE (double bit error)"),
            found(
                "0000:b3:00.0",
                48,
                "pid='<unknown>', name=<unknown>, DBE (double bit error)"
            )
        );
        assert_eq!(
            of("NVRM: Xid (0000:03:00): 6, PE0001"),
            found("0000:03:00.0", 6, "PE0001")
        );
        assert_eq!(
            of("NVRM: Xid (PCI:00000001:1a:00): 31"),
            found("0001:1a:00.0", 31, "")
        );
        assert_eq!(
            of("NVRM: Xid (PCI:10000:1a:00): 31,"),
            found("10000:1a:00.0", 31, "")
        );
    }

    #[test]
    fn what_only_looks_like_one_is_none() {
        for message in [
            "",
            "NVRM: GPU at PCI:0000:b3:00: GPU-abc",
            "NVRM: Xid (PCI:0000:b3:00): , pid=1",
            "NVRM: Xid (PCI:0000:b3:00): 99999999999, x",
            "NVRM: Xid (PCI:../../etc): 79, x",
            "NVRM: Xid (PCI:0000:b3:00) 79",
            "NVRM: Xid (PCI[123]: segfault at 0 ip 0): 79",
            "python[9]: NVRM: Xid (PCI:0000:b3:00): 79, forged in a process's name",
        ] {
            assert_eq!(of(message), None, "{message}");
        }
        // Written by a process into the log, not by the kernel.
        assert_eq!(xid_of(b"12,1,2,-;NVRM: Xid (PCI:0000:b3:00): 79, forged"), None);
        let long = of(&format!(
            "NVRM: Xid (PCI:0000:b3:00): 79, \x1b{}",
            "x".repeat(5000)
        ))
        .unwrap();
        assert!(long.2.len() == MOST_TEXT && !long.2.contains('\x1b'));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = xid_of(&bytes);
        }

        #[test]
        fn damaged_lines_are_survived(at in 0_usize..70, byte: u8) {
            let mut line = b"4,1,2,-;NVRM: Xid (PCI:0000:b3:00): 79, pid=1, GPU has fallen off".to_vec();
            if let Some(damaged) = line.get_mut(at) {
                *damaged = byte;
            }
            if let Some(xid) = xid_of(&line) {
                proptest::prop_assert!(is_pci_address(&xid.pci));
            }
        }
    }

    #[test]
    fn this_machines_log_or_why_not() {
        match KernelLog::open(Path::new("/dev/kmsg")) {
            Ok(mut log) => assert_eq!(log.read(), [], "nothing but what is written from now on"),
            Err(why) => println!("skipped: this_machines_log_or_why_not: {why}"),
        }
        assert!(KernelLog::open(Path::new("/nonexistent")).is_err());
    }
}
