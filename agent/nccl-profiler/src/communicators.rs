//! Communicators that NCCL made known, and the masks of the libraries they belong to.

use std::ffi::c_int;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crate::switch;

/// Most communicators at a time; of further ones the events do not tell which they belong to.
const MOST: usize = 1024;
/// Most copies of NCCL in a process.
const LIBRARIES: usize = 4;

struct Slot {
    taken: AtomicU32,
    hash: AtomicU64,
    rank: AtomicU32,
    ranks: AtomicU32,
}

static SLOTS: [Slot; MOST] = [const {
    Slot {
        taken: AtomicU32::new(0),
        hash: AtomicU64::new(0),
        rank: AtomicU32::new(0),
        ranks: AtomicU32::new(0),
    }
}; MOST];

/// A copy of NCCL: where its mask is, and how many communicators it has. The count leads: 0 is nobody's.
struct Library {
    mask: AtomicPtr<c_int>,
    communicators: AtomicU32,
}

static LIBRARIES_SEEN: [Library; LIBRARIES] = [const {
    Library {
        mask: AtomicPtr::new(ptr::null_mut()),
        communicators: AtomicU32::new(0),
    }
}; LIBRARIES];

/// What is known of a communicator.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Communicator {
    /// `commHash`; 0 when unknown.
    pub(crate) hash: u64,
    /// The rank of this process in it.
    pub(crate) rank: u32,
    /// Ranks; 0 when unknown.
    pub(crate) ranks: u32,
}

/// Bits of a context: the library's place, the slot, and the process, since contexts travel to the processes of other ranks.
const SLOT_BITS: u32 = 12;
const LIBRARY_BITS: u32 = 3;

/// Keeps a communicator; gives NCCL's name for it, which is not 0, or 0 when there is no room for another library's mask.
pub(crate) fn add(communicator: Communicator, mask: *mut c_int) -> usize {
    let Some(library) = add_mask(mask) else { return 0 };
    let slot = SLOTS.iter().position(|slot| {
        slot.taken
            .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    });
    if let Some(slot) = slot.and_then(|at| SLOTS.get(at)) {
        slot.hash.store(communicator.hash, Ordering::Relaxed);
        slot.rank.store(communicator.rank, Ordering::Relaxed);
        slot.ranks.store(communicator.ranks, Ordering::Relaxed);
    }
    let number = slot.unwrap_or(MOST);
    (switch::own_pid() as usize) << (SLOT_BITS + LIBRARY_BITS) | (library + 1) << SLOT_BITS | number
}

/// The communicator of a context; `None` for those of other processes and those without a slot.
pub(crate) fn find(context: usize) -> Option<Communicator> {
    let slot = SLOTS.get(context & ((1 << SLOT_BITS) - 1))?;
    if context >> (SLOT_BITS + LIBRARY_BITS) != switch::own_pid() as usize {
        return None;
    }
    Some(Communicator {
        hash: slot.hash.load(Ordering::Relaxed),
        rank: slot.rank.load(Ordering::Relaxed),
        ranks: slot.ranks.load(Ordering::Relaxed),
    })
}

/// Forgets a communicator, and with a library's last one its mask: the library may be unloaded next.
pub(crate) fn remove(context: usize) {
    if context >> (SLOT_BITS + LIBRARY_BITS) != switch::own_pid() as usize {
        return;
    }
    let taken = match SLOTS.get(context & ((1 << SLOT_BITS) - 1)) {
        Some(slot) => slot.taken.swap(0, Ordering::AcqRel) == 1,
        None => true,
    };
    let library = (context >> SLOT_BITS) & ((1 << LIBRARY_BITS) - 1);
    let library = library.checked_sub(1).and_then(|at| LIBRARIES_SEEN.get(at));
    if let Some(library) = library.filter(|_| taken) {
        let left = library
            .communicators
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |count| count.checked_sub(1));
        if left == Ok(1) {
            library.mask.store(ptr::null_mut(), Ordering::SeqCst);
            switch::wait_until_unused();
        }
    }
}

fn add_mask(mask: *mut c_int) -> Option<usize> {
    // Which library it is counts only when it is found again; a mask that is null is nobody's.
    let known = LIBRARIES_SEEN
        .iter()
        .position(|library| !mask.is_null() && library.mask.load(Ordering::SeqCst) == mask);
    let at = known.or_else(|| {
        LIBRARIES_SEEN.iter().position(|library| {
            let free = ptr::null_mut();
            library
                .mask
                .compare_exchange(free, mask, Ordering::SeqCst, Ordering::Relaxed)
                .is_ok()
        })
    })?;
    LIBRARIES_SEEN
        .get(at)?
        .communicators
        .fetch_add(1, Ordering::AcqRel);
    Some(at)
}

/// Writes the mask of every library that has communicators.
pub(crate) fn switch_all(mask: u32) {
    for library in &LIBRARIES_SEEN {
        let pointer = library.mask.load(Ordering::SeqCst);
        if !pointer.is_null() {
            set(pointer, mask);
        }
    }
}

/// Writes one mask. NCCL reads it with a relaxed load.
pub(crate) fn set(pointer: *mut c_int, mask: u32) {
    // SAFETY: NCCL gave the pointer for this, and keeps the variable while it has communicators.
    let atomic = unsafe { AtomicU32::from_ptr(pointer.cast()) };
    atomic.store(mask, Ordering::Relaxed);
}
