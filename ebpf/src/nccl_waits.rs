//! What the network steps of NCCL's proxy threads wait for.
//!
//! NCCL tells each change of a step's state to the hooks of its profiler, whether a profiler is there or not. One hook is
//! called over and over while the receiver gives no credit; only the first of those calls changes anything here.

use core::ptr;

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{map, uprobe},
    maps::{Array, HashMap},
    programs::ProbeContext,
};
use stallscope_records::waits::{CLOCKS, Clock, Step, StepKey, Wait, Waits};

use crate::{
    call::{cookie, register_argument},
    filter::{Task, traced},
};

/// Steps under way; one that finds no room is not timed.
const STEPS: u32 = 16384;
/// Proxy threads.
const THREADS: u32 = 1024;

#[map]
static NCCL_STEPS: HashMap<StepKey, Step> = HashMap::with_max_entries(STEPS, 0);
#[map]
static NCCL_WAITS: HashMap<u64, Waits> = HashMap::with_max_entries(THREADS, 0);
/// The epoch: grows each time the agent attaches these programs.
#[map]
static NCCL_WAIT_EPOCH: Array<u64> = Array::with_max_entries(1, 0);

/// What a thread starts with; too large for the stack.
static NONE: Waits = Waits::NONE;

/// A step enters a state; the cookie is the index of the argument that holds it, 3 or 4.
#[uprobe]
fn nccl_step_state(ctx: ProbeContext) -> u32 {
    if let Some((task, epoch, waits)) = hit() {
        let (fourth, fifth) = (register_argument::<3>(&ctx), register_argument::<4>(&ctx));
        let state = if cookie(&ctx) == 4 { fifth } else { fourth };
        match Wait::from_nccl(state as u32) {
            Some(wait) => enter(&ctx, task, epoch, waits, wait),
            None => waits.unknown += 1,
        }
    }
    0
}

/// A step is over.
#[uprobe]
fn nccl_step_stop(ctx: ProbeContext) -> u32 {
    if let Some((task, epoch, waits)) = hit() {
        let key = step(&ctx, task);
        if let Some(old) = NCCL_STEPS.get_ptr(key) {
            // SAFETY: only this thread makes, changes and removes the steps of its operations.
            let old = unsafe { *old };
            let _ = NCCL_STEPS.remove(key);
            if old.epoch == epoch && leave(waits, old.wait) {
                if old.wait >= Wait::ReceiveWire as u32 {
                    waits.received += 1;
                } else {
                    waits.sent += 1;
                }
            }
        }
    }
    0
}

/// The traced thread's waits, in this epoch.
#[inline(always)]
fn hit() -> Option<(Task, u64, &'static mut Waits)> {
    let task = traced()?;
    let epoch = *NCCL_WAIT_EPOCH.get(0)?;
    let waits = match NCCL_WAITS.get_ptr_mut(task.0) {
        Some(waits) => waits,
        None => {
            NCCL_WAITS.insert(task.0, &NONE, 0).ok()?;
            NCCL_WAITS.get_ptr_mut(task.0)?
        }
    };
    // SAFETY: the entry belongs to this thread, which is here; the agent only reads.
    let waits = unsafe { &mut *waits };
    if waits.epoch != epoch {
        waits.epoch = epoch;
        for clock in &mut waits.clocks {
            clock.present = 0;
        }
    }
    waits.hits += 1;
    Some((task, epoch, waits))
}

#[inline(always)]
fn step(ctx: &ProbeContext, task: Task) -> StepKey {
    StepKey {
        args: register_argument::<1>(ctx),
        step: register_argument::<2>(ctx) & 0xffff_ffff,
        tgid: task.tgid(),
        sub: register_argument::<0>(ctx) as u32,
    }
}

#[inline(always)]
fn enter(ctx: &ProbeContext, task: Task, epoch: u64, waits: &mut Waits, wait: Wait) {
    let key = step(ctx, task);
    let now = Step {
        wait: wait as u32,
        reserved: 0,
        epoch,
    };
    if let Some(old) = NCCL_STEPS.get_ptr_mut(key) {
        // SAFETY: only this thread makes, changes and removes the steps of its operations.
        let old = unsafe { &mut *old };
        if *old == now {
            return;
        }
        if old.epoch == epoch {
            leave(waits, old.wait);
        }
        *old = now;
    } else if NCCL_STEPS.insert(key, now, 0).is_err() {
        return;
    }
    let clock = clock(waits, now.wait);
    clock.present += 1;
    clock.entered += 1;
}

/// Whether a step was there to leave.
#[inline(always)]
fn leave(waits: &mut Waits, wait: u32) -> bool {
    let clock = clock(waits, wait);
    let was_there = clock.present > 0;
    clock.present -= u64::from(was_there);
    was_there
}

/// The clock of a wait, set to the present.
#[inline(always)]
fn clock(waits: &mut Waits, wait: u32) -> &mut Clock {
    // SAFETY: the reference is valid. Volatile, because the compiler knows the numbers of waits and would leave out the mask,
    // but the verifier does not.
    let index = unsafe { ptr::read_volatile(&raw const wait) } as usize & (CLOCKS - 1);
    let clock = &mut waits.clocks[index];
    // SAFETY: the helper has no preconditions.
    *clock = clock.at(unsafe { bpf_ktime_get_ns() });
    clock
}
