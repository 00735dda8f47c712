//! NCCL's descriptors, by version (`profiler_v2.h` .. `profiler_v6.h`).

use std::ffi::{c_char, c_int, c_void};

use stallscope_records::profiler::{Event, function, kind};

/// Most bytes of a function's name that are looked at.
const NAME_BYTES: usize = 16;

/// What a descriptor tells, by any version.
pub(crate) struct Start {
    /// The event, as far as the descriptor tells it.
    pub(crate) event: Event,
    /// The process of the parent, where told.
    pub(crate) pid: Option<libc::pid_t>,
}

/// A descriptor of one version.
pub(crate) trait Descriptor {
    /// What it tells; `None` for a kind that the version does not have.
    ///
    /// # Safety
    /// The fields of its kind are set, and the pointers among them are null or lead to what the header says.
    unsafe fn read(&self) -> Option<Start>;
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ProxyOp {
    pid: libc::pid_t,
    channel: u8,
    peer: c_int,
    steps: c_int,
    chunk_bytes: c_int,
    is_send: c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct ProxyStep {
    step: c_int,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct KernelChannel3 {
    channel: u8,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct KernelChannel {
    channel: u8,
    timer: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct NetPlugin {
    id: i64,
    data: *const c_void,
}

/// `coll` of versions 2 and 3 up to what is used of it.
#[repr(C)]
#[derive(Clone, Copy)]
struct NamedColl {
    name: *const c_char,
    comm_hash: u64,
    seq: u64,
    function: *const c_char,
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
}

/// `p2p` of versions 2 and 3.
#[repr(C)]
#[derive(Clone, Copy)]
struct NamedP2p {
    name: *const c_char,
    comm_hash: u64,
    function: *const c_char,
    buffer: *mut c_void,
    datatype: *const c_char,
    count: usize,
    peer: c_int,
}

/// `coll` from version 4 up to what is used of it; `ceColl` of version 6 begins the same.
#[repr(C)]
#[derive(Clone, Copy)]
struct Coll {
    seq: u64,
    function: *const c_char,
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
}

/// `p2p` from version 4 up to what is used of it.
#[repr(C)]
#[derive(Clone, Copy)]
struct P2p {
    function: *const c_char,
    buffer: *mut c_void,
    datatype: *const c_char,
    count: usize,
    peer: c_int,
}

/// `collApi` and `p2pApi` from version 5 up to what is used of them.
#[repr(C)]
#[derive(Clone, Copy)]
struct Api {
    function: *const c_char,
    count: usize,
}

/// `ceCollBatch` of version 6.
#[repr(C)]
#[derive(Clone, Copy)]
struct CopyBatch {
    operations: c_int,
    bytes: usize,
}

/// A version's descriptor: its size, the kinds it has (those below an end), the fields of its union, and what each kind tells
/// beside network operations and their steps, which every version has alike.
macro_rules! descriptor {
    (
        $(#[$meta:meta])*
        $name:ident, $union:ident, $type:ty, $bytes:literal, $end:expr,
        { $($field:ident: $of:ty,)* }
        |$event:ident, $own:ident| { $($kind:pat => $read:expr,)* }
    ) => {
        $(#[$meta])*
        #[repr(C)]
        pub(crate) struct $name {
            kind: $type,
            parent: *mut c_void,
            rank: c_int,
            of: $union,
        }

        #[repr(C)]
        union $union {
            $($field: $of,)*
            /// The union's whole size.
            _whole: [u64; ($bytes - 24) / 8],
        }

        const _: () = assert!(
            size_of::<$name>() == $bytes
                && std::mem::offset_of!($name, parent) == 8
                && std::mem::offset_of!($name, rank) == 16
                && std::mem::offset_of!($name, of) == 24
        );

        impl Descriptor for $name {
            unsafe fn read(&self) -> Option<Start> {
                let mut event = head(self.kind.into(), $end, self.parent, self.rank)?;
                let ($event, $own) = (&mut event, &self.of);
                let mut pid = None;
                // SAFETY: the kind tells which field is set.
                unsafe {
                    match $event.kind {
                        kind::PROXY_OP => pid = Some(proxy_op($event, $own.proxy_op)),
                        kind::PROXY_STEP => proxy_step($event, $own.proxy_step),
                        $($kind => $read,)*
                        _ => {}
                    }
                }
                Some(Start { event, pid })
            }
        }
    };
}

descriptor!(
    /// `ncclProfilerEventDescr_v2_t`
    Descriptor2, Union2, u8, 128, kind::PROXY_CTRL + 1,
    {
        coll: NamedColl,
        p2p: NamedP2p,
        proxy_op: ProxyOp,
        proxy_step: ProxyStep,
    }
    |event, own| {
        kind::COLL => named_coll(event, own.coll),
        kind::P2P => named_p2p(event, own.p2p),
    }
);
descriptor!(
    /// `ncclProfilerEventDescr_v3_t`
    Descriptor3, Union3, u8, 120, kind::NET_PLUGIN + 1,
    {
        coll: NamedColl,
        p2p: NamedP2p,
        proxy_op: ProxyOp,
        proxy_step: ProxyStep,
        kernel_channel: KernelChannel3,
        net_plugin: NetPlugin,
    }
    |event, own| {
        kind::COLL => named_coll(event, own.coll),
        kind::P2P => named_p2p(event, own.p2p),
        kind::KERNEL_CHANNEL => event.channel = own.kernel_channel.channel,
        kind::NET_PLUGIN => net_plugin(event, own.net_plugin),
    }
);
descriptor!(
    /// `ncclProfilerEventDescr_v4_t`
    Descriptor4, Union4, u8, 104, kind::NET_PLUGIN + 1,
    {
        coll: Coll,
        p2p: P2p,
        proxy_op: ProxyOp,
        proxy_step: ProxyStep,
        kernel_channel: KernelChannel,
        net_plugin: NetPlugin,
    }
    |event, own| {
        kind::COLL => coll(event, own.coll),
        kind::P2P => p2p(event, own.p2p),
        kind::KERNEL_CHANNEL => kernel_channel(event, own.kernel_channel),
        kind::NET_PLUGIN => net_plugin(event, own.net_plugin),
    }
);
descriptor!(
    /// `ncclProfilerEventDescr_v5_t`
    Descriptor5, Union5, u64, 112, KERNEL_LAUNCH + 1,
    {
        coll: Coll,
        p2p: P2p,
        api: Api,
        proxy_op: ProxyOp,
        proxy_step: ProxyStep,
        kernel_channel: KernelChannel,
        net_plugin: NetPlugin,
    }
    |event, own| {
        kind::COLL => coll(event, own.coll),
        kind::P2P => p2p(event, own.p2p),
        COLL_API | P2P_API => api(event, own.api),
        kind::KERNEL_CHANNEL => kernel_channel(event, own.kernel_channel),
        kind::NET_PLUGIN => net_plugin(event, own.net_plugin),
    }
);
descriptor!(
    /// `ncclProfilerEventDescr_v6_t`
    Descriptor6, Union6, u64, 112, kind::END,
    {
        coll: Coll,
        p2p: P2p,
        api: Api,
        proxy_op: ProxyOp,
        proxy_step: ProxyStep,
        kernel_channel: KernelChannel,
        net_plugin: NetPlugin,
        batch: CopyBatch,
    }
    |event, own| {
        kind::COLL | COPY_COLL => coll(event, own.coll),
        kind::P2P => p2p(event, own.p2p),
        COLL_API | P2P_API => api(event, own.api),
        kind::KERNEL_CHANNEL => kernel_channel(event, own.kernel_channel),
        kind::NET_PLUGIN => net_plugin(event, own.net_plugin),
        COPY_BATCH => copy_batch(event, own.batch),
    }
);

/// Kinds from version 5 on.
const COLL_API: u8 = 9;
const P2P_API: u8 = 10;
const KERNEL_LAUNCH: u8 = 11;
const COPY_COLL: u8 = 12;
const COPY_BATCH: u8 = 14;

fn named_coll(event: &mut Event, coll: NamedColl) {
    event.comm = coll.comm_hash;
    event.seq = coll.seq;
    event.amount = coll.count as u64;
    event.function = function_number(coll.function);
}

fn named_p2p(event: &mut Event, p2p: NamedP2p) {
    event.comm = p2p.comm_hash;
    event.amount = p2p.count as u64;
    event.peer = p2p.peer;
    event.function = function_number(p2p.function);
}

fn coll(event: &mut Event, coll: Coll) {
    event.seq = coll.seq;
    event.amount = coll.count as u64;
    event.function = function_number(coll.function);
}

fn p2p(event: &mut Event, p2p: P2p) {
    event.amount = p2p.count as u64;
    event.peer = p2p.peer;
    event.function = function_number(p2p.function);
}

fn api(event: &mut Event, api: Api) {
    event.amount = api.count as u64;
    event.function = function_number(api.function);
}

fn proxy_op(event: &mut Event, op: ProxyOp) -> libc::pid_t {
    event.channel = op.channel;
    event.peer = op.peer;
    event.seq = u64::from(op.steps.cast_unsigned());
    event.amount = u64::from(op.chunk_bytes.cast_unsigned());
    event.sends = u8::from(op.is_send != 0);
    op.pid
}

fn proxy_step(event: &mut Event, step: ProxyStep) {
    event.seq = u64::from(step.step.cast_unsigned());
}

/// The part that all versions have: `None` when the kind is not one bit of those below `end`.
fn head(kind: u64, end: u8, parent: *mut c_void, rank: c_int) -> Option<Event> {
    let number = u8::try_from(kind.trailing_zeros()).ok()?;
    (kind.is_power_of_two() && number < end).then(|| Event {
        kind: number,
        channel: u8::MAX,
        sends: 2,
        peer: -1,
        parent: parent as u64,
        rank: rank.cast_unsigned(),
        ..Event::default()
    })
}

fn kernel_channel(event: &mut Event, kernel: KernelChannel) {
    event.channel = kernel.channel;
    event.detail = kernel.timer;
}

fn copy_batch(event: &mut Event, batch: CopyBatch) {
    event.seq = u64::from(batch.operations.cast_unsigned());
    event.amount = batch.bytes as u64;
}

/// A network plugin's own descriptor: what it is begins where the union does.
#[repr(C)]
struct Net<Of> {
    kind: u8,
    of: Of,
}

/// `qp` of `ncclProfilerNetIbDescr_v1_t`
#[repr(C)]
struct QueuePair {
    device: c_int,
    request: u64,
    opcode: c_int,
    number: c_int,
    bytes: usize,
}

/// `sock` of `ncclProfilerNetSockDescr_v1_t`
#[repr(C)]
struct Socket {
    descriptor: c_int,
    operation: c_int,
    bytes: usize,
}

const _: () = assert!(size_of::<Net<QueuePair>>() == 40 && size_of::<Net<Socket>>() == 24);

const INFINIBAND_1: i64 = 1 << 16 | 1;
const SOCKET_1: i64 = 2 << 16 | 1;

/// # Safety
/// The data is null or what the id says.
unsafe fn net_plugin(event: &mut Event, plugin: NetPlugin) {
    event.detail = u64::from(plugin.id as u32);
    if plugin.data.is_null() || !plugin.data.addr().is_multiple_of(align_of::<u64>()) {
        return;
    }
    match plugin.id {
        INFINIBAND_1 => {
            // SAFETY: by the contract, and it is aligned.
            let data = unsafe { &(*plugin.data.cast::<Net<QueuePair>>()).of };
            event.peer = data.device;
            event.more = data.request;
            event.function = data.opcode as u8;
            event.detail |= u64::from(data.number.cast_unsigned()) << 32;
            event.amount = data.bytes as u64;
        }
        SOCKET_1 => {
            // SAFETY: by the contract, and it is aligned.
            let data = unsafe { &(*plugin.data.cast::<Net<Socket>>()).of };
            event.function = data.operation as u8;
            event.detail |= u64::from(data.descriptor.cast_unsigned()) << 32;
            event.amount = data.bytes as u64;
        }
        _ => {}
    }
}

/// The number of a function by its name. The pointer is null or leads to a text with an end.
fn function_number(name: *const c_char) -> u8 {
    if name.is_null() {
        return function::UNKNOWN;
    }
    let mut text = [0u8; NAME_BYTES];
    let mut length = 0;
    for (at, byte) in text.iter_mut().enumerate() {
        // SAFETY: no byte before this one ended the text.
        let read = unsafe { name.add(at).read() }.cast_unsigned();
        if read == 0 {
            break;
        }
        *byte = read;
        length = at + 1;
    }
    let mut number = 0;
    for known in function::NAMES {
        number += 1;
        if text.iter().take(length).eq(known.iter()) {
            return number;
        }
    }
    function::UNKNOWN
}

/// What came with a change of state: the first eight bytes of the union, which every version has.
#[repr(C)]
pub(crate) struct Arguments {
    /// Bytes of a step, or the GPU's time, or a pointer.
    pub(crate) first: u64,
}
