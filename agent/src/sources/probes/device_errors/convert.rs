//! Records of the kernel's events to what they tell. Pure.

use stallscope_attribution::facts::AerSeverity;
use stallscope_records::Field as _;
use stallscope_records::device::{self, kind};

/// An error of a device, as the kernel told it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DeviceError {
    /// The PCI Express error handler reported one.
    Pcie {
        /// PCI address.
        pci: String,
        /// When, ns.
        at_ns: u64,
        /// How bad.
        severity: AerSeverity,
        /// Bits of the status register.
        status: u32,
    },
    /// The GPU's driver reported a fault.
    Xid {
        /// PCI address.
        pci: String,
        /// When, ns.
        at_ns: u64,
        /// Its code.
        code: u32,
        /// Its text.
        message: String,
    },
}

/// What a record tells; `None` when it is not one.
pub(super) fn decode(record: &[u8]) -> Option<DeviceError> {
    let error = device::DeviceError::read(record)?;
    let pci = text(&error.device);
    let at_ns = error.at_ns;
    match error.kind {
        kind::PCIE => Some(DeviceError::Pcie {
            pci,
            at_ns,
            severity: severity(error.severity)?,
            status: error.code,
        }),
        kind::XID => Some(DeviceError::Xid {
            pci,
            at_ns,
            code: error.code,
            message: text(&error.message),
        }),
        _ => None,
    }
}

/// The number and not the text of the event: some kernels print another than they mean.
const fn severity(number: u32) -> Option<AerSeverity> {
    match number {
        0 => Some(AerSeverity::NonFatal),
        1 => Some(AerSeverity::Fatal),
        2 => Some(AerSeverity::Correctable),
        _ => None,
    }
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(bytes.get(..end).unwrap_or_default());
    text.chars()
        .map(|char| if char.is_control() { ' ' } else { char })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u32, code: u32, severity: u32) -> Vec<u8> {
        let mut bytes = vec![0; 184];
        bytes[..12].copy_from_slice(b"0000:3b:00.0");
        bytes[32..44].copy_from_slice(b"fell off\x1b[2J");
        bytes[160..168].copy_from_slice(&77_u64.to_ne_bytes());
        for (at, value) in [(168, kind), (172, code), (176, severity)] {
            bytes[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn errors_by_number() {
        let pci = "0000:3b:00.0".to_owned();
        let all = [
            AerSeverity::NonFatal,
            AerSeverity::Fatal,
            AerSeverity::Correctable,
        ];
        for (number, severity) in (0..).zip(all) {
            let expected = DeviceError::Pcie {
                pci: pci.clone(),
                at_ns: 77,
                severity,
                status: 0x40,
            };
            assert_eq!(decode(&record(1, 0x40, number)), Some(expected));
        }
        assert_eq!(decode(&record(1, 0x40, 3)), None);
        let expected = DeviceError::Xid {
            pci,
            at_ns: 77,
            code: 79,
            message: "fell off [2J".to_owned(),
        };
        assert_eq!(decode(&record(2, 79, 0)), Some(expected));
        assert_eq!(decode(&record(3, 79, 0)), None);
        assert_eq!(decode(&record(1, 0, 0)[..183]), None);
    }
}
