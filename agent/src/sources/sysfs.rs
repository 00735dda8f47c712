//! Small files that the kernel's drivers answer, below a root that tests can build.
//!
//! Any of them may block for as long as firmware takes, vanish between two reads, or hold what nobody expects. So
//! lengths and numbers of names are bounded, and why a file has no value is kept apart.

use std::fs::File;
use std::io::{ErrorKind, Read as _};
use std::path::Path;

use rustix::io::Errno;
use stallscope_attribution::reading::Reading;

/// The kernel gives at most a page of such a file.
const MOST_BYTES: u64 = 4096;
/// The kernel's own names are shorter.
const MOST_NAME: usize = 128;

/// Why a file has no value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Lack {
    /// There is no such file: this device or driver does not have it.
    Absent,
    /// The driver says that it cannot tell.
    Unsupported,
    /// The device is no longer there.
    Gone,
    /// Anything else.
    Failed(String),
}

impl Lack {
    fn of(error: &std::io::Error) -> Self {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::INVAL | Errno::OPNOTSUPP | Errno::NOTTY | Errno::NOSYS) => Self::Unsupported,
            Some(Errno::NODEV | Errno::NXIO) => Self::Gone,
            _ if error.kind() == ErrorKind::NotFound => Self::Absent,
            _ => Self::Failed(error.to_string()),
        }
    }

    /// The lack, as a reading.
    pub(super) fn reading<T>(self) -> Reading<T> {
        match self {
            Self::Absent | Self::Unsupported => Reading::Unsupported,
            Self::Gone => Reading::Failed("the device is no longer there".to_owned()),
            Self::Failed(why) => Reading::Failed(why),
        }
    }
}

/// The text of a file without white space around it.
pub(super) fn text(path: &Path) -> Result<String, Lack> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MOST_BYTES).read_to_end(&mut bytes))
        .map_err(|error| Lack::of(&error))?;
    Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// A file that holds one number, decimal or hexadecimal.
pub(super) fn number(path: &Path) -> Result<u64, Lack> {
    let text = text(path)?;
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| Lack::Failed(format!("{:?} is no number", shown(&text))))
}

/// Text of a device as it may be shown: short, and without control characters.
pub(super) fn shown(text: &str) -> String {
    const MOST_SHOWN: usize = 64;
    text.chars()
        .take(MOST_SHOWN)
        .map(|char| if char.is_control() { ' ' } else { char })
        .collect()
}

/// Names in a folder, sorted; how many were left out because they are too long, strange, or too many.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Names {
    pub(super) names: Vec<String>,
    pub(super) left_out: usize,
}

/// The names in a folder, at most `most` of them.
pub(super) fn names(folder: &Path, most: usize) -> Result<Names, Lack> {
    let mut found = Names::default();
    for entry in std::fs::read_dir(folder).map_err(|error| Lack::of(&error))? {
        let entry = entry.map_err(|error| Lack::of(&error))?;
        match entry.file_name().into_string() {
            Ok(name) if name.len() <= MOST_NAME && !name.chars().any(char::is_control) => {
                found.names.push(name);
            }
            _ => found.left_out += 1,
        }
        // What follows would be left out anyway; a folder without end must not keep the thread.
        if found.names.len() + found.left_out > 16 * most {
            break;
        }
    }
    found.names.sort();
    found.left_out += found.names.len().saturating_sub(most);
    found.names.truncate(most);
    Ok(found)
}

/// `dddd:bb:dd.f`, as the kernel names PCI devices; domains of more than four digits are allowed.
pub(super) fn is_pci_address(name: &str) -> bool {
    let hex = |text: &str, digits: std::ops::RangeInclusive<usize>| {
        digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
    };
    let parts: Vec<&str> = name.split([':', '.']).collect();
    let [domain, bus, device, function] = parts.as_slice() else {
        return false;
    };
    name.contains('.') && hex(domain, 4..=8) && hex(bus, 2..=2) && hex(device, 2..=2) && hex(function, 1..=1)
}

/// The PCI address of what a class's entry stands for; empty when it has none, as devices made of software.
pub(super) fn pci_of(entry: &Path) -> String {
    let Ok(path) = entry.join("device").canonicalize() else {
        return String::new();
    };
    let mut parts = path.iter().rev().filter_map(|part| part.to_str());
    parts
        .find(|part| is_pci_address(part))
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn values_and_why_there_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, bytes: &[u8]| {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        assert_eq!(number(&write("a", b"17\n")), Ok(17));
        assert_eq!(number(&write("b", b"0x030200\n")), Ok(0x03_0200));
        assert!(matches!(
            number(&write("c", b"N/A (no PMA)\n")),
            Err(Lack::Failed(_))
        ));
        assert!(matches!(number(&write("d", b"")), Err(Lack::Failed(_))));
        assert!(matches!(number(&write("e", b"-1\n")), Err(Lack::Failed(_))));
        assert_eq!(number(&dir.path().join("none")), Err(Lack::Absent));
        assert_eq!(text(&write("long", &[b'9'; 100_000])).unwrap().len(), 4096);
        let hostile = number(&write("f", &[b'\x1b'; 5000])).unwrap_err();
        assert!(
            matches!(&hostile, Lack::Failed(why) if why.len() < 100 && !why.contains('\x1b')),
            "{hostile:?}"
        );
        // What a driver answers that cannot tell: a socket's option asked of a file gives the same.
        let refused = std::io::Error::from_raw_os_error(22);
        assert_eq!(Lack::of(&refused), Lack::Unsupported);
        assert_eq!(Lack::of(&std::io::Error::from_raw_os_error(19)), Lack::Gone);
        // A folder can be opened and not be read.
        assert!(matches!(text(dir.path()), Err(Lack::Failed(_))));
    }

    #[test]
    fn names_are_bounded() {
        let dir = tempfile::tempdir().unwrap();
        for index in 0..40 {
            std::fs::write(dir.path().join(format!("n{index:02}")), "").unwrap();
        }
        std::fs::write(dir.path().join("x".repeat(200)), "").unwrap();
        let names = names(dir.path(), 10).unwrap();
        assert_eq!((names.names.len(), names.left_out), (10, 31));
        assert_eq!(names.names[0], "n00");
    }

    #[test]
    fn addresses() {
        for good in ["0000:3b:00.0", "0001:ff:1f.7", "10000:e1:00.0"] {
            assert!(is_pci_address(good), "{good}");
        }
        for bad in [
            "",
            "pci0000:3b",
            "0000:3b:00",
            "0000:3b:00.00",
            "0000:3g:00.0",
            "0000.3b.00.0.1",
            "eth0",
        ] {
            assert!(!is_pci_address(bad), "{bad}");
        }
    }
}
