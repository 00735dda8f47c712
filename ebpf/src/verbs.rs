//! RDMA queue pairs: what a traced process gives each to send, and to whom it is connected.
//!
//! `ibv_post_send` is no function of the library: programs call the provider's through a pointer in the device's context. The
//! control calls, which are functions, lead to that pointer; the agent is told of it once and puts a probe where it leads.
//! Nothing is attached to `ibv_poll_cq`, which spins.

use core::arch::asm;

use aya_ebpf::{
    helpers::bpf_ktime_get_ns,
    macros::{map, uprobe, uretprobe},
    maps::{HashMap, LruHashMap},
    programs::{ProbeContext, RetProbeContext},
};
use stallscope_records::{
    Head, Kind, Ring,
    verbs::{
        Element, MOST_PARTS, MOST_REQUESTS, NAME_BYTES, Posting, PostsThrough, Qp, QpGone, QpKey, VerbsEvent,
        first_argument, is_fatal, mask, offset, posts_by, qp_flag, state,
    },
};

use crate::{
    call::{cookie, read_user, register_argument},
    emit::{count_lost, emit, emit_now},
    filter::{Task, traced},
    nccl::{head, returned},
};

/// Queue pairs; what is posted to one that finds no room is counted as lost.
const QPS: u32 = 16384;
/// Functions through which processes post: one per process and provider.
const POSTINGS: u32 = 4096;
/// Threads that wait for events: one per process and device.
const WAITERS: u32 = 1024;

#[map]
static VERBS_QPS: HashMap<QpKey, Qp> = HashMap::with_max_entries(QPS, 0);
/// Those that the agent was told of. It takes out what it has to be told again.
#[map]
static VERBS_POSTINGS: HashMap<Posting, u32> = HashMap::with_max_entries(POSTINGS, 0);
#[map]
static VERBS_WAITERS: LruHashMap<u64, Waiter> = LruHashMap::with_max_entries(WAITERS, 0);

/// A thread inside `ibv_get_async_event`: its arguments.
#[derive(Clone, Copy)]
#[repr(C)]
struct Waiter {
    context: u64,
    event: u64,
    begin_ns: u64,
}

/// A control call that comes before the first queue pair, and again and again while memory is registered; the cookie is a
/// [`first_argument`].
#[uprobe]
fn verbs_control(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let first = register_argument::<0>(&ctx);
        let context = if cookie(&ctx) == first_argument::HOLDS_CONTEXT {
            read_user(first + offset::CONTEXT).unwrap_or(0)
        } else {
            first
        };
        announce_context(task, context);
    }
    0
}

/// `ibv_create_qp` gives a queue pair.
#[uretprobe]
fn verbs_qp_made(ctx: RetProbeContext) -> u32 {
    if let Some(task) = traced() {
        let qp: u64 = ctx.ret();
        if qp != 0 {
            // An older one of this address went unseen: its program was replaced.
            tell_gone(task, qp);
            make(task, qp);
        }
    }
    0
}

/// `ibv_qp_to_qp_ex(qp)`: the queue pair will be posted to by the functions of an `ibv_qp_ex`.
#[uprobe]
fn verbs_qp_extended(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let at = register_argument::<0>(&ctx);
        if let Some(qp) = known(task, at) {
            extend(task, at, qp);
        }
    }
    0
}

/// `ibv_modify_qp(qp, attributes, mask)`.
#[uprobe]
fn verbs_qp_changed(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced()
        && let Some(qp) = known(task, register_argument::<0>(&ctx))
    {
        change(
            qp,
            register_argument::<1>(&ctx),
            register_argument::<2>(&ctx) as u32,
        );
    }
    0
}

/// `ibv_destroy_qp(qp)`.
#[uprobe]
fn verbs_qp_gone(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        tell_gone(task, register_argument::<0>(&ctx));
    }
    0
}

/// The provider's `post_send(qp, requests, bad_request)`.
#[uprobe]
fn verbs_post_send(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        match known(task, register_argument::<0>(&ctx)) {
            Some(qp) => post(qp, register_argument::<1>(&ctx)),
            None => count_lost(Ring::Verbs),
        }
    }
    0
}

/// One of the functions of an `ibv_qp_ex` that give a request its parts; the cookie is one of [`posts_by`]. Every request that
/// moves data has one such call.
#[uprobe]
fn verbs_post_part(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let at = register_argument::<0>(&ctx);
        match known(task, at) {
            Some(qp) => {
                if qp.flags & qp_flag::EXTENDED == 0 {
                    extend(task, at, qp);
                }
                post_parts(&ctx, qp);
            }
            None => count_lost(Ring::Verbs),
        }
    }
    0
}

/// `ibv_get_async_event(context, event)` waits.
#[uprobe]
fn verbs_event_wait(ctx: ProbeContext) -> u32 {
    if let Some(task) = traced() {
        let waiter = Waiter {
            context: register_argument::<0>(&ctx),
            event: register_argument::<1>(&ctx),
            // SAFETY: the helper has no preconditions.
            begin_ns: unsafe { bpf_ktime_get_ns() },
        };
        announce_context(task, waiter.context);
        let _ = VERBS_WAITERS.insert(task.0, waiter, 0);
    }
    0
}

/// It has an event, or failed.
#[uretprobe]
fn verbs_event_got(ctx: RetProbeContext) -> u32 {
    if let Some(task) = traced()
        && let Some(waiter) = VERBS_WAITERS.get_ptr(task.0)
    {
        // SAFETY: the entry belongs to this thread, which is here.
        let waiter = unsafe { *waiter };
        let _ = VERBS_WAITERS.remove(task.0);
        let result: i32 = ctx.ret();
        if result == 0 {
            tell_event(task, &waiter);
        }
    }
    0
}

/// Tells the agent, once, where the posts of this context go. Gives that address, or 0.
#[inline(always)]
fn announce_context(task: Task, context: u64) -> u64 {
    let address = read_user(context + offset::POST_SEND).unwrap_or(0);
    announce(task, address, posts_by::REQUESTS)
}

#[inline(always)]
fn announce(task: Task, address: u64, by: u32) -> u64 {
    let posting = Posting {
        address,
        tgid: task.tgid(),
        by,
    };
    if address == 0 || VERBS_POSTINGS.get_ptr(posting).is_some() {
        return address;
    }
    if VERBS_POSTINGS.insert(posting, 1, 0).is_err() {
        count_lost(Ring::Verbs);
    } else {
        let head = now(Kind::PostsThrough, task);
        let record = PostsThrough {
            head,
            address,
            by,
            reserved: 0,
        };
        emit_now(Ring::Verbs, &record);
    }
    address
}

#[inline(always)]
fn now(kind: Kind, task: Task) -> Head {
    // SAFETY: the helper has no preconditions.
    head(kind, task, unsafe { bpf_ktime_get_ns() })
}

#[inline(always)]
fn key(task: Task, qp: u64) -> QpKey {
    QpKey {
        qp,
        tgid: task.tgid(),
        reserved: 0,
    }
}

/// The queue pair, made known now if it is older than the agent; `None` when it cannot be read or finds no room.
#[inline(always)]
fn known(task: Task, qp: u64) -> Option<&'static mut Qp> {
    let key = key(task, qp);
    let found = match VERBS_QPS.get_ptr_mut(key) {
        Some(found) => found,
        None => {
            make(task, qp);
            VERBS_QPS.get_ptr_mut(key)?
        }
    };
    // SAFETY: entries live as long as the map; what several threads count is counted atomically.
    Some(unsafe { &mut *found })
}

/// What the programs read of an `ibv_qp`: its context; its number and type, each in the upper half of its word.
const QP_NUM_WORD: usize = (offset::QP_NUM / 8) as usize;
const QP_TYPE_WORD: usize = (offset::QP_TYPE / 8) as usize;

// Not inlined: two programs and the verifier walk it, and its stack is its own.
#[inline(never)]
fn make(task: Task, at: u64) {
    let Some(words) = read_user::<[u64; QP_TYPE_WORD + 1]>(at) else {
        return;
    };
    let context = words[0];
    let qp = Qp {
        // SAFETY: the helper has no preconditions.
        born_ns: unsafe { bpf_ktime_get_ns() },
        posts: 0,
        bytes: 0,
        cut: 0,
        post_send: announce_context(task, context),
        number: (words[QP_NUM_WORD] >> 32) as u32,
        kind: (words[QP_TYPE_WORD] >> 32) as u32,
        peer_number: 0,
        port: 0,
        flags: 0,
        changes: 0,
        peer: [0; 16],
        device: device_name(context),
    };
    if VERBS_QPS.insert(key(task, at), &qp, 0).is_err() {
        count_lost(Ring::Verbs);
    }
}

/// Where posts by the functions of an `ibv_qp_ex` go.
#[inline(always)]
fn extend(task: Task, at: u64, qp: &mut Qp) {
    qp.flags |= qp_flag::EXTENDED;
    if let Some([inline, inline_list, part, part_list]) = read_user::<[u64; 4]>(at + offset::EXTENDED_SETTERS)
    {
        qp.post_send = announce(task, part, posts_by::PART);
        announce(task, part_list, posts_by::PART_LIST);
        announce(task, inline, posts_by::INLINE);
        announce(task, inline_list, posts_by::INLINE_LIST);
    }
}

#[inline(always)]
fn device_name(context: u64) -> [u8; NAME_BYTES] {
    read_user::<u64>(context + offset::DEVICE)
        .and_then(|device| read_user(device + offset::DEVICE_NAME))
        .unwrap_or([0; NAME_BYTES])
}

#[inline(always)]
fn change(qp: &mut Qp, attributes: u64, set: u32) {
    qp.changes += 1;
    if set & mask::STATE != 0
        && let Some(now) = read_user::<u32>(attributes + offset::ATTR_STATE)
    {
        match now {
            state::RESET => {
                qp.flags &= !(qp_flag::ERROR | qp_flag::GID | qp_flag::LID);
                qp.peer_number = 0;
            }
            state::ERROR => qp.flags |= qp_flag::ERROR,
            _ => qp.flags &= !qp_flag::ERROR,
        }
    }
    if set & mask::PORT != 0
        && let Some(port) = read_user::<u8>(attributes + offset::ATTR_PORT)
    {
        qp.port = u32::from(port);
    }
    if set & mask::PEER_NUMBER != 0
        && let Some(number) = read_user::<u32>(attributes + offset::ATTR_PEER_NUMBER)
    {
        qp.peer_number = number;
    }
    if set & mask::ADDRESS != 0 {
        change_address(qp, attributes);
    }
}

#[inline(always)]
fn change_address(qp: &mut Qp, attributes: u64) {
    qp.flags &= !(qp_flag::GID | qp_flag::LID);
    let is_global = read_user::<u8>(attributes + offset::ATTR_IS_GLOBAL);
    if is_global.is_some_and(|global| global != 0) {
        if let Some(gid) = read_user::<[u8; 16]>(attributes + offset::ATTR_ADDRESS) {
            qp.peer = gid;
            qp.flags |= qp_flag::GID;
        }
    } else if let Some(lid) = read_user::<[u8; 2]>(attributes + offset::ATTR_PEER_LID) {
        [qp.peer[0], qp.peer[1]] = lid;
        qp.flags |= qp_flag::LID;
    }
}

const NEXT_WORD: usize = (offset::WR_NEXT / 8) as usize;
const SGES_WORD: usize = (offset::WR_SGES / 8) as usize;
const SGE_COUNT_WORD: usize = (offset::WR_SGE_COUNT / 8) as usize;
const LENGTH_HALF_WORD: usize = (offset::SGE_LENGTH / 4) as usize;

/// Counts a chain of work requests. What lies beyond the bounds is not followed, and said to be missing.
#[inline(always)]
fn post(qp: &Qp, first: u64) {
    let (mut posts, mut bytes, mut cut) = (0u64, 0u64, false);
    let mut request = first;
    for _ in 0..MOST_REQUESTS {
        if request == 0 {
            break;
        }
        let Some(words) = read_user::<[u64; SGE_COUNT_WORD + 1]>(request) else {
            cut = true;
            request = 0;
            break;
        };
        posts += 1;
        // A negative number is none to the provider.
        let parts = (words[SGE_COUNT_WORD] as i32).max(0) as u32;
        cut |= parts > MOST_PARTS;
        for part in 0..MOST_PARTS {
            if part >= parts {
                break;
            }
            match read_user::<[u32; 4]>(words[SGES_WORD] + offset::SGE_BYTES * u64::from(part)) {
                Some(sge) => bytes += u64::from(sge[LENGTH_HALF_WORD]),
                None => cut = true,
            }
        }
        request = words[NEXT_WORD];
    }
    cut |= request != 0;
    add(&qp.posts, posts);
    add(&qp.bytes, bytes);
    if cut {
        add(&qp.cut, 1);
    }
}

/// Counts a request by the call that gives it its parts.
#[inline(always)]
fn post_parts(ctx: &ProbeContext, qp: &Qp) {
    let (second, third) = (register_argument::<1>(ctx), register_argument::<2>(ctx));
    let (mut bytes, mut cut) = (0u64, false);
    let by = cookie(ctx) as u32;
    match by {
        posts_by::PART => bytes = register_argument::<3>(ctx) & 0xffff_ffff,
        posts_by::INLINE => bytes = third,
        _ => {
            // Lengths are of 4 bytes in one kind of list, of 8 in the other.
            let length = if by == posts_by::PART_LIST {
                0xffff_ffff
            } else {
                u64::MAX
            };
            cut = second > u64::from(MOST_PARTS);
            for part in 0..MOST_PARTS {
                if u64::from(part) >= second {
                    break;
                }
                match read_user::<[u64; 2]>(third + offset::SGE_BYTES * u64::from(part)) {
                    Some(words) => bytes += words[(offset::SGE_LENGTH / 8) as usize] & length,
                    None => cut = true,
                }
            }
        }
    }
    add(&qp.posts, 1);
    add(&qp.bytes, bytes);
    if cut {
        add(&qp.cut, 1);
    }
}

/// Threads may post to one queue pair at a time. In the machine's own words: the compiler offers no atomic addition for a target
/// without compare-and-swap, which older BPF machines are.
#[inline(always)]
fn add(counter: &u64, count: u64) {
    // SAFETY: the counter lies in a map and is aligned; every program that changes it does so by this function.
    unsafe {
        asm!(
            "lock *(u64 *)({counter} + 0) += {count}",
            counter = in(reg) &raw const *counter,
            count = in(reg) count,
        );
    }
}

/// Tells the last of a queue pair and forgets it.
// Not inlined: older kernels count the stack of a caller and of what it calls together, 512 bytes at most.
#[inline(never)]
fn tell_gone(task: Task, qp: u64) {
    let key = key(task, qp);
    if let Some(last) = VERBS_QPS.get_ptr(key) {
        let gone = QpGone {
            head: now(Kind::QpGone, task),
            qp: key.qp,
            // SAFETY: entries live as long as the map.
            last: unsafe { *last },
        };
        let _ = VERBS_QPS.remove(key);
        emit(Ring::Verbs, &gone);
    }
}

#[inline(always)]
fn tell_event(task: Task, waiter: &Waiter) {
    let Some([element, kind]) = read_user::<[u64; (offset::EVENT_TYPE / 8) as usize + 1]>(waiter.event)
    else {
        return;
    };
    let event = kind as u32;
    let number = match Element::of(event) {
        Element::QueuePair => {
            if is_fatal(event)
                && let Some(qp) = VERBS_QPS.get_ptr_mut(key(task, element))
            {
                // SAFETY: entries live as long as the map. Another change in the same instant may undo this one.
                unsafe { (*qp).flags |= qp_flag::ERROR };
            }
            read_user(element + offset::QP_NUM).unwrap_or(0)
        }
        Element::Port => element as u32,
        Element::Other => 0,
    };
    let mut head = head(Kind::VerbsEvent, task, waiter.begin_ns);
    // SAFETY: the helper has no preconditions.
    returned(&mut head, 0, unsafe { bpf_ktime_get_ns() });
    let record = VerbsEvent {
        head,
        event,
        element: number,
        device: device_name(waiter.context),
    };
    emit(Ring::Verbs, &record);
}
