//! Where the ranks of one node meet: a ring of slots in shared memory, with futexes to sleep on.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use virtual_node_state::map::{Shareable, Shared};

use crate::gpu::End;

const SLOTS: usize = 256;

#[repr(C)]
#[derive(Debug)]
struct Slot {
    /// Arrivals counted over all uses of the slot; never reset.
    arrived: AtomicU32,
    /// Uses of the slot that have ended.
    ended: AtomicU32,
    /// Latest arrival; a later use's arrivals are always later.
    last_arrival_ns: AtomicU64,
    all_arrived_ns: AtomicU64,
    moved_ns: AtomicU64,
    end_ns: AtomicU64,
}

/// The slots of one communicator on one node.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Meeting {
    slots: [Slot; SLOTS],
}

// SAFETY: `repr(C)` and atomics throughout.
unsafe impl Shareable for Meeting {}

/// Why a wait ended without what was waited for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Aborted;

impl Meeting {
    /// Opens or creates the meeting place.
    pub(crate) fn open(path: &Path) -> io::Result<Shared<Self>> {
        Shared::open_or_create(path)
    }

    fn slot(&self, sequence: u64) -> (&Slot, u32) {
        let slots = SLOTS as u64;
        let slot = &self.slots[usize::try_from(sequence % slots).unwrap_or(0)];
        (
            slot,
            u32::try_from(sequence / slots % u64::from(u32::MAX)).unwrap_or(0),
        )
    }

    /// Says that a rank of this node has arrived at a collective.
    pub(crate) fn arrive(&self, sequence: u64, at_ns: u64) {
        let (slot, _) = self.slot(sequence);
        slot.last_arrival_ns.fetch_max(at_ns, SeqCst);
        slot.arrived.fetch_add(1, SeqCst);
        wake(&slot.arrived);
    }

    /// Waits for all `ranks` of this node; returns the last arrival.
    pub(crate) fn wait_arrivals(
        &self,
        sequence: u64,
        ranks: u32,
        aborted: &dyn Fn() -> bool,
    ) -> Result<u64, Aborted> {
        let (slot, turn) = self.slot(sequence);
        wait_until(&slot.arrived, (turn + 1).wrapping_mul(ranks), aborted)?;
        Ok(slot.last_arrival_ns.load(SeqCst))
    }

    /// Says how a collective ended.
    pub(crate) fn finish(&self, sequence: u64, end: &End) {
        let (slot, _) = self.slot(sequence);
        slot.all_arrived_ns.store(end.all_arrived_ns, SeqCst);
        slot.moved_ns.store(end.moved_ns, SeqCst);
        slot.end_ns.store(end.end_ns, SeqCst);
        slot.ended.fetch_add(1, SeqCst);
        wake(&slot.ended);
    }

    /// Waits for a collective's end.
    pub(crate) fn wait_end(&self, sequence: u64, aborted: &dyn Fn() -> bool) -> Result<End, Aborted> {
        let (slot, turn) = self.slot(sequence);
        wait_until(&slot.ended, turn + 1, aborted)?;
        Ok(End {
            arrived_ns: 0,
            all_arrived_ns: slot.all_arrived_ns.load(SeqCst),
            moved_ns: slot.moved_ns.load(SeqCst),
            end_ns: slot.end_ns.load(SeqCst),
        })
    }
}

fn wake(word: &AtomicU32) {
    // SAFETY: wakes sleepers on a live word; no memory is written.
    unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, i32::MAX) };
}

/// Sleeps until the counter reaches `target`, looking every half second whether the communicator was aborted.
fn wait_until(word: &AtomicU32, target: u32, aborted: &dyn Fn() -> bool) -> Result<(), Aborted> {
    loop {
        let seen = word.load(SeqCst);
        // Counters wrap; a difference below half the range means "not behind".
        if seen.wrapping_sub(target) < u32::MAX / 2 {
            return Ok(());
        }
        if aborted() {
            return Err(Aborted);
        }
        let pause = libc::timespec {
            tv_sec: 0,
            tv_nsec: 500_000_000,
        };
        // SAFETY: sleeps while the live word still holds `seen`; the timeout is a live local.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                word.as_ptr(),
                libc::FUTEX_WAIT,
                seen,
                &raw const pause,
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_serves_again_and_again() {
        let path = std::env::temp_dir().join(format!("meeting-{}", std::process::id()));
        let meeting = Meeting::open(&path).expect("meeting");
        let other = Meeting::open(&path).expect("second view");
        for sequence in 0..600 {
            meeting.arrive(sequence, 10 + sequence);
            other.arrive(sequence, 20 + sequence);
            assert_eq!(meeting.wait_arrivals(sequence, 2, &|| false), Ok(20 + sequence));
            let end = End {
                arrived_ns: 0,
                all_arrived_ns: sequence,
                moved_ns: sequence + 1,
                end_ns: sequence + 2,
            };
            meeting.finish(sequence, &end);
            assert_eq!(other.wait_end(sequence, &|| false), Ok(end));
        }
        assert_eq!(
            meeting.wait_end(600, &|| true),
            Err(Aborted),
            "nobody has finished it"
        );
        std::fs::remove_file(path).expect("remove");
    }
}
