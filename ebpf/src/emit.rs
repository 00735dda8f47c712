//! Records into rings.

use aya_ebpf::{
    macros::map,
    maps::{PerCpuArray, RingBuf},
};
use stallscope_records::Ring;

use crate::settings::WAKE_BYTES;

#[map]
static RING_NCCL: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
#[map]
static RING_CUDA: RingBuf = RingBuf::with_byte_size(2 << 20, 0);
#[map]
static RING_SCHED: RingBuf = RingBuf::with_byte_size(2 << 20, 0);
#[map]
static RING_BLOCK: RingBuf = RingBuf::with_byte_size(1 << 20, 0);
#[map]
static RING_PROCS: RingBuf = RingBuf::with_byte_size(1 << 18, 0);
#[map]
static RING_VERBS: RingBuf = RingBuf::with_byte_size(1 << 18, 0);

/// Records that found their ring full, by [`Ring`].
#[map]
static DROPS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Ring::ALL.len() as u32, 0);

const AVAILABLE_BYTES: u64 = 0;
/// What the kernel puts before every record of a ring.
const RECORD_HEADER_BYTES: u64 = 8;
const NO_WAKEUP: u64 = 1;
const FORCE_WAKEUP: u64 = 2;

/// Writes `record` into `ring`, or counts it as lost.
///
/// The reader is woken by bytes, not by record; else it comes by itself.
#[inline(always)]
pub(crate) fn emit<T>(ring: Ring, record: &T) {
    let buffer = buffer(ring);
    let unread = buffer.query(AVAILABLE_BYTES);
    let then_unread = unread + RECORD_HEADER_BYTES + size_of::<T>() as u64;
    // Once, on the record that crosses the mark: a wake-up costs more than a record.
    let crosses = unread < WAKE_BYTES.get() && then_unread >= WAKE_BYTES.get();
    let flags = if crosses { FORCE_WAKEUP } else { NO_WAKEUP };
    if buffer.output::<T>(record, flags).is_err() {
        count_lost(ring);
    }
}

/// Writes `record` into `ring` and wakes the reader: for what the agent has to act on, not for what is frequent.
#[inline(always)]
pub(crate) fn emit_now<T>(ring: Ring, record: &T) {
    if buffer(ring).output::<T>(record, FORCE_WAKEUP).is_err() {
        count_lost(ring);
    }
}

/// Something of this world is missing from what the agent reads.
#[inline(always)]
pub(crate) fn count_lost(ring: Ring) {
    if let Some(drops) = DROPS.get_ptr_mut(ring as u32) {
        // SAFETY: the slot belongs to this CPU, and a program that interrupts this one loses at most one count.
        unsafe { *drops += 1 };
    }
}

#[inline(always)]
fn buffer(ring: Ring) -> &'static RingBuf {
    match ring {
        Ring::Nccl => &RING_NCCL,
        Ring::Cuda => &RING_CUDA,
        Ring::Sched => &RING_SCHED,
        Ring::Block => &RING_BLOCK,
        Ring::Procs => &RING_PROCS,
        Ring::Verbs => &RING_VERBS,
    }
}

/// Says something to the agent's log; only in builds with the feature `log`.
#[cfg(feature = "log")]
macro_rules! note {
    ($context:expr, $($argument:tt)*) => {
        aya_log_ebpf::debug!($context, $($argument)*)
    };
}

#[cfg(not(feature = "log"))]
macro_rules! note {
    ($context:expr, $($argument:tt)*) => {};
}

pub(crate) use note;
