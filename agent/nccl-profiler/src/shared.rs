//! The memory that the agent reads.

use std::ffi::CStr;
use std::ptr;
use std::slice;
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering};

use stallscope_records::profiler::{
    BYTES, EVENT_BYTES, MAGIC, NAME, OPEN_AT, RING_AT, VERSION, WORDS, header,
};

/// The first word; null before it is set up, and in children made by `fork`.
static MEMORY: AtomicPtr<AtomicU64> = AtomicPtr::new(ptr::null_mut());

/// [`NAME`] as the kernel wants it.
const C_NAME: &CStr = c"stallscope-nccl";
const _: () = assert!(C_NAME.to_bytes().len() == NAME.len());

/// Words of everything.
const ALL: usize = BYTES as usize / 8;

/// The memory, once it is there.
#[derive(Clone, Copy)]
pub(crate) struct Memory(&'static [AtomicU64]);

impl Memory {
    /// The memory of this process, if it was set up.
    pub(crate) fn get() -> Option<Self> {
        let first = MEMORY.load(Ordering::Acquire);
        // SAFETY: the pointer comes from `set_up`, which mapped so many words for as long as the process lives.
        (!first.is_null()).then(|| Self(unsafe { slice::from_raw_parts(first, ALL) }))
    }

    /// Makes it. All of it is touched here, so that no later write enters the kernel, and the job pays for it.
    pub(crate) fn set_up() -> Option<Self> {
        let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
        // SAFETY: the name has an end.
        let file = unsafe { libc::memfd_create(C_NAME.as_ptr(), flags) };
        if file < 0 {
            return None;
        }
        let first = Self::map(file);
        if first.is_null() {
            // SAFETY: the descriptor was made above; it stays open otherwise, since by it the agent finds the memory.
            unsafe { libc::close(file) };
            return None;
        }
        MEMORY.store(first, Ordering::Release);
        let memory = Self::get()?;
        // SAFETY: no arguments.
        let pid = unsafe { libc::getpid() };
        let layout = u64::from(VERSION) | u64::from(pid.cast_unsigned()) << 32;
        memory.header(header::LAYOUT).store(layout, Ordering::Relaxed);
        memory.header(header::MAGIC).store(MAGIC, Ordering::Release);
        Some(memory)
    }

    fn map(file: libc::c_int) -> *mut AtomicU64 {
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: the descriptor is open; a new mapping touches nothing that exists.
        unsafe {
            if libc::ftruncate(file, BYTES as libc::off_t) != 0
                || libc::fcntl(file, libc::F_ADD_SEALS, seals) != 0
            {
                return ptr::null_mut();
            }
            let access = libc::PROT_READ | libc::PROT_WRITE;
            let how = libc::MAP_SHARED | libc::MAP_POPULATE;
            let first = libc::mmap(ptr::null_mut(), BYTES as usize, access, how, file, 0);
            if first == libc::MAP_FAILED {
                ptr::null_mut()
            } else {
                first.cast()
            }
        }
    }

    /// The process that this one was forked from owns the memory.
    pub(crate) fn disown() {
        MEMORY.store(ptr::null_mut(), Ordering::Release);
    }

    /// A word of the header.
    pub(crate) fn header(self, index: usize) -> &'static AtomicU64 {
        // A word that nobody reads, for an index that does not exist.
        static NOWHERE: AtomicU64 = AtomicU64::new(0);
        self.0.get(index).unwrap_or(&NOWHERE)
    }

    /// Counts something in the header.
    pub(crate) fn count(self, index: usize) {
        self.header(index).fetch_add(1, Ordering::Relaxed);
    }

    /// An entry of the table of events under way.
    pub(crate) fn open(self, index: u64) -> Option<&'static [AtomicU64; WORDS]> {
        self.entry(OPEN_AT + index * EVENT_BYTES)
    }

    /// A slot of the ring.
    pub(crate) fn slot(self, index: u64) -> Option<&'static [AtomicU64; WORDS]> {
        self.entry(RING_AT + index * EVENT_BYTES)
    }

    fn entry(self, at: u64) -> Option<&'static [AtomicU64; WORDS]> {
        self.0.get(at as usize / 8..)?.first_chunk()
    }
}
