//! Settings written by the agent before loading; the kernel freezes them, so the verifier sees constants.

use core::ptr;

/// A setting: readable here, written by the loader.
#[repr(transparent)]
pub(crate) struct Setting<T>(T);

impl<T: Copy> Setting<T> {
    pub(crate) const fn new(default: T) -> Self {
        Self(default)
    }

    #[inline(always)]
    pub(crate) fn get(&self) -> T {
        // SAFETY: the reference is valid and nobody writes after loading; volatile because the compiler must not
        // assume that the default is what the program will find.
        unsafe { ptr::read_volatile(&raw const self.0) }
    }
}

/// A launch later than this after the last one starts a new run, ns.
#[unsafe(no_mangle)]
pub(crate) static LAUNCH_GAP_NS: Setting<u64> = Setting::new(500_000);
/// A run never grows longer than this, ns.
#[unsafe(no_mangle)]
pub(crate) static LAUNCH_RUN_NS: Setting<u64> = Setting::new(10_000_000);
/// Shorter times off the CPU are not recorded, ns.
#[unsafe(no_mangle)]
pub(crate) static OFF_CPU_MIN_NS: Setting<u64> = Setting::new(50_000);
/// Shorter file calls are only counted, ns.
#[unsafe(no_mangle)]
pub(crate) static FILE_CALL_MIN_NS: Setting<u64> = Setting::new(200_000);
/// The reader is woken when this much lies unread in a ring, bytes; else it comes by itself.
#[unsafe(no_mangle)]
pub(crate) static WAKE_BYTES: Setting<u64> = Setting::new(64 << 10);

/// Offsets of tracepoint fields, from this kernel's `format` files. The defaults are those of mainline x86-64.
#[unsafe(no_mangle)]
pub(crate) static SWITCH_PREV_STATE: Setting<u32> = Setting::new(32);
#[unsafe(no_mangle)]
pub(crate) static SWITCH_NEXT_PID: Setting<u32> = Setting::new(56);
#[unsafe(no_mangle)]
pub(crate) static WAKEUP_PID: Setting<u32> = Setting::new(24);
#[unsafe(no_mangle)]
pub(crate) static NEWTASK_PID: Setting<u32> = Setting::new(8);
#[unsafe(no_mangle)]
pub(crate) static NEWTASK_FLAGS: Setting<u32> = Setting::new(32);
/// 0 where this kernel does not tell.
#[unsafe(no_mangle)]
pub(crate) static EXIT_GROUP_DEAD: Setting<u32> = Setting::new(0);
#[unsafe(no_mangle)]
pub(crate) static ISSUE_DEV: Setting<u32> = Setting::new(8);
#[unsafe(no_mangle)]
pub(crate) static ISSUE_SECTOR: Setting<u32> = Setting::new(16);
#[unsafe(no_mangle)]
pub(crate) static ISSUE_BYTES: Setting<u32> = Setting::new(28);
#[unsafe(no_mangle)]
pub(crate) static COMPLETE_DEV: Setting<u32> = Setting::new(8);
#[unsafe(no_mangle)]
pub(crate) static COMPLETE_SECTOR: Setting<u32> = Setting::new(16);
/// First argument of every `sys_enter_*`; the others follow 8 bytes apart.
#[unsafe(no_mangle)]
pub(crate) static SYSCALL_ARGS: Setting<u32> = Setting::new(16);
/// `ret` of every `sys_exit_*`.
#[unsafe(no_mangle)]
pub(crate) static SYSCALL_RET: Setting<u32> = Setting::new(16);
/// `ras:aer_event`.
#[unsafe(no_mangle)]
pub(crate) static AER_DEVICE: Setting<u32> = Setting::new(8);
#[unsafe(no_mangle)]
pub(crate) static AER_STATUS: Setting<u32> = Setting::new(12);
#[unsafe(no_mangle)]
pub(crate) static AER_SEVERITY: Setting<u32> = Setting::new(16);
/// `nvidia:nvidia_dev_xid`.
#[unsafe(no_mangle)]
pub(crate) static XID_DEVICE: Setting<u32> = Setting::new(8);
#[unsafe(no_mangle)]
pub(crate) static XID_CODE: Setting<u32> = Setting::new(12);
#[unsafe(no_mangle)]
pub(crate) static XID_MESSAGE: Setting<u32> = Setting::new(16);
