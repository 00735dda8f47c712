//! The one clock, and the one way to sleep.

fn read(clock: libc::clockid_t) -> u64 {
    let mut spec = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `spec` is a valid timespec for the kernel to fill.
    unsafe { libc::clock_gettime(clock, &raw mut spec) };
    spec.tv_sec.unsigned_abs() * 1_000_000_000 + spec.tv_nsec.unsigned_abs()
}

/// `CLOCK_MONOTONIC` now, ns.
#[must_use]
pub fn now_ns() -> u64 {
    read(libc::CLOCK_MONOTONIC)
}

/// `CLOCK_REALTIME` now, ns since the epoch.
#[must_use]
pub fn unix_ns() -> u64 {
    read(libc::CLOCK_REALTIME)
}

/// Processor time of the calling thread, ns.
#[must_use]
pub fn thread_cpu_ns() -> u64 {
    read(libc::CLOCK_THREAD_CPUTIME_ID)
}

/// Sleeps until `at_ns`; returns at once when that has passed.
pub fn sleep_until(at_ns: u64) {
    let spec = libc::timespec {
        tv_sec: i64::try_from(at_ns / 1_000_000_000).unwrap_or(i64::MAX),
        tv_nsec: i64::try_from(at_ns % 1_000_000_000).unwrap_or(0),
    };
    // SAFETY: `spec` is valid and the remaining-time argument may be null for an absolute sleep.
    while unsafe {
        libc::clock_nanosleep(
            libc::CLOCK_MONOTONIC,
            libc::TIMER_ABSTIME,
            &raw const spec,
            std::ptr::null_mut(),
        )
    } == libc::EINTR
    {}
}

/// Keeps the calling thread on a processor until it has used `cpu_ns` more of it, as an interpreter would.
pub fn burn(cpu_ns: u64) {
    // Reading the thread's processor time is a system call on most hosts, so count in strides of pure arithmetic.
    let end = thread_cpu_ns() + cpu_ns;
    let mut word = cpu_ns | 1;
    while thread_cpu_ns() < end {
        for _ in 0..400 {
            word = word
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
        }
        std::hint::black_box(word);
    }
}
