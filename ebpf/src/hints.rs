//! Bytes that tell at once that a thread is certainly not in a map.
//!
//! Programs on the path of every context switch mostly meet threads that are not traced. A load from a table is several
//! times cheaper than the hash and the walk that find nothing.

use core::cell::UnsafeCell;

/// No two threads share a byte on a node with as few process ids as that; `kernel.pid_max` may allow more.
const SLOTS: usize = 1 << 16;

/// A byte per thread id. Where two traced threads share one and one of them ends, what the other does at that moment is
/// missed, until it leaves the CPU again and sets the byte anew.
pub(crate) struct Hints(UnsafeCell<[u8; SLOTS]>);

// SAFETY: bytes are read and written whole, and any value is valid.
unsafe impl Sync for Hints {}

impl Hints {
    pub(crate) const fn new() -> Self {
        Self(UnsafeCell::new([0; SLOTS]))
    }

    #[inline(always)]
    pub(crate) fn is_set(&self, tid: u32) -> bool {
        // SAFETY: the pointer is into the table.
        unsafe { self.slot(tid).read_volatile() != 0 }
    }

    #[inline(always)]
    pub(crate) fn set(&self, tid: u32) {
        // SAFETY: the pointer is into the table.
        unsafe { self.slot(tid).write_volatile(1) };
    }

    #[inline(always)]
    pub(crate) fn clear(&self, tid: u32) {
        // SAFETY: the pointer is into the table.
        unsafe { self.slot(tid).write_volatile(0) };
    }

    #[inline(always)]
    fn slot(&self, tid: u32) -> *mut u8 {
        // SAFETY: the index is below the table's length.
        unsafe { self.0.get().cast::<u8>().add(tid as usize & (SLOTS - 1)) }
    }
}
