//! One account of what several tell. Pure.

use std::collections::VecDeque;

/// Who told of an XID.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Teller {
    /// The driver's tracepoint.
    Tracepoint = 0,
    /// The kernel's log.
    Log = 1,
    /// NVML.
    Nvml = 2,
}

const TELLERS: usize = 3;
/// All of them tell of the same fault within this time, ns.
const TOGETHER_NS: u64 = 5_000_000_000;
/// Faults remembered: of a node with many GPUs, a burst of many codes.
const MOST: usize = 1024;

/// A fault of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xid {
    /// PCI address `dddd:bb:dd.f`.
    pub pci: String,
    /// Its code.
    pub code: u32,
    /// What is said beside it; may be empty.
    pub message: String,
}

/// Remembers who told what.
#[derive(Debug, Default)]
pub(super) struct Merger {
    faults: VecDeque<Fault>,
}

/// One kind of fault of one GPU while it goes on.
#[derive(Debug)]
struct Fault {
    pci: String,
    code: u32,
    last_ns: u64,
    /// How often each told it.
    by: [u32; TELLERS],
}

impl Merger {
    /// Whether nobody has told this one before. Of one that several tell many times, the most any of them told are new.
    pub(super) fn is_new(&mut self, teller: Teller, xid: &Xid, at_ns: u64) -> bool {
        self.faults
            .retain(|fault| at_ns.saturating_sub(fault.last_ns) <= TOGETHER_NS);
        let same = |fault: &&mut Fault| fault.code == xid.code && fault.pci == xid.pci;
        if let Some(fault) = self.faults.iter_mut().find(same) {
            let told = fault.by.iter().copied().max().unwrap_or(0);
            fault.last_ns = fault.last_ns.max(at_ns);
            let by = &mut fault.by[teller as usize];
            *by = by.saturating_add(1);
            return *by > told;
        }
        if self.faults.len() >= MOST {
            self.faults.pop_front();
        }
        let mut by = [0; TELLERS];
        by[teller as usize] = 1;
        self.faults.push_back(Fault {
            pci: xid.pci.clone(),
            code: xid.code,
            last_ns: at_ns,
            by,
        });
        true
    }
}

#[cfg(test)]
mod tests {
    use super::Teller::{Log, Nvml, Tracepoint};
    use super::*;

    const S: u64 = 1_000_000_000;

    fn xid(pci: &str, code: u32) -> Xid {
        Xid {
            pci: pci.to_owned(),
            code,
            message: String::new(),
        }
    }

    /// Those that are new of (teller, device, code, second).
    fn told(all: &[(Teller, &str, u32, u64)]) -> Vec<bool> {
        let mut merger = Merger::default();
        all.iter()
            .map(|(teller, pci, code, second)| merger.is_new(*teller, &xid(pci, *code), second * S))
            .collect()
    }

    #[test]
    fn one_fault_told_by_three_is_one() {
        assert_eq!(
            told(&[(Tracepoint, "a", 79, 1), (Log, "a", 79, 1), (Nvml, "a", 79, 2)]),
            [true, false, false]
        );
        assert_eq!(
            told(&[(Nvml, "a", 79, 1), (Log, "a", 79, 1)]),
            [true, false],
            "whoever is first"
        );
    }

    #[test]
    fn a_burst_is_as_long_as_the_most_any_told() {
        let all = [
            (Log, "a", 31, 1),
            (Log, "a", 31, 1),
            (Nvml, "a", 31, 1),
            (Log, "a", 31, 1),
            (Nvml, "a", 31, 2),
            (Nvml, "a", 31, 2),
            (Nvml, "a", 31, 2),
        ];
        assert_eq!(told(&all), [true, true, false, true, false, false, true]);
    }

    #[test]
    fn other_codes_devices_and_later_ones_are_others() {
        let all = [
            (Log, "a", 79, 1),
            (Log, "a", 48, 1),
            (Log, "b", 79, 1),
            (Nvml, "a", 79, 60),
            (Log, "a", 79, 60),
        ];
        assert_eq!(told(&all), [true, true, true, true, false]);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut merger = Merger::default();
        for code in 0..5000 {
            assert!(merger.is_new(Log, &xid("a", code), S));
        }
        assert!(merger.faults.len() <= MOST);
    }
}
