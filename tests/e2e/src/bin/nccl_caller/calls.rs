//! Public calls.

use std::ffi::c_int;
use std::ptr;

use super::{Buffer, Comm, Config, Image, Outcome, Stream, refused_communicator, told};

type Reducing = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, c_int, Comm, Stream) -> c_int;
type Gathering = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, Comm, Stream) -> c_int;
type Rooted = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, c_int, Comm, Stream) -> c_int;
type Reduce = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, c_int, c_int, Comm, Stream) -> c_int;
type InPlace = unsafe extern "C" fn(Buffer, usize, c_int, c_int, Comm, Stream) -> c_int;
type ReducingConfig =
    unsafe extern "C" fn(Buffer, Buffer, usize, c_int, c_int, Comm, Stream, Config) -> c_int;
type GatheringConfig = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, Comm, Stream, Config) -> c_int;
type ReduceConfig =
    unsafe extern "C" fn(Buffer, Buffer, usize, c_int, c_int, c_int, Comm, Stream, Config) -> c_int;

/// Calls a function if this version has it, and keeps its result under its name.
macro_rules! call {
    ($image:expr, $results:expr, $type:ty, $name:literal, $($argument:expr),*) => {
        if let Some(function) = $image.exported::<$type>($name) {
            // SAFETY: the signatures are those of nccl.h; what a call looks at before it fails is readable.
            $results.push(($name, unsafe { function($($argument),*) }));
        }
    };
}

/// Says the communicator, then `NAME=RESULT` of each call that this version has.
pub(crate) fn collectives(image: &Image) -> Outcome {
    // Zeros, so that the library's check of its magic number fails; writable, because the error is noted in it.
    let comm: Comm = refused_communicator(0).as_mut_ptr().cast();
    let (send, recv) = (0x5000_0000 as Buffer, 0x6000_0000 as Buffer);
    let stream = |number: u64| (0xabc0_0000 + number) as Stream;
    let none: Config = ptr::null_mut();
    type Bare = unsafe extern "C" fn() -> c_int;
    type Ending = unsafe extern "C" fn(Comm) -> c_int;
    let mut of = Vec::new();
    call!(
        image,
        of,
        Reducing,
        "ncclAllReduce",
        send,
        recv,
        1_000_001,
        7,
        0,
        comm,
        stream(1)
    );
    call!(
        image,
        of,
        Reducing,
        "ncclReduceScatter",
        send,
        recv,
        1_000_002,
        9,
        0,
        comm,
        stream(2)
    );
    call!(
        image,
        of,
        Gathering,
        "ncclAllGather",
        send,
        recv,
        1_000_003,
        6,
        comm,
        stream(3)
    );
    call!(
        image,
        of,
        Rooted,
        "ncclBroadcast",
        send,
        recv,
        1_000_004,
        0,
        3,
        comm,
        stream(4)
    );
    call!(
        image,
        of,
        InPlace,
        "ncclBcast",
        send,
        1_000_005,
        1,
        2,
        comm,
        stream(5)
    );
    call!(
        image,
        of,
        Reduce,
        "ncclReduce",
        send,
        recv,
        1_000_006,
        8,
        2,
        4,
        comm,
        stream(6)
    );
    call!(image, of, Bare, "ncclGroupStart",);
    call!(image, of, Bare, "ncclGroupStart",);
    call!(
        image,
        of,
        InPlace,
        "ncclSend",
        send,
        1_000_007,
        2,
        6,
        comm,
        stream(7)
    );
    call!(
        image,
        of,
        InPlace,
        "ncclRecv",
        recv,
        1_000_008,
        3,
        -1,
        comm,
        stream(8)
    );
    call!(image, of, Bare, "ncclGroupEnd",);
    call!(image, of, Bare, "ncclGroupEnd",);
    call!(
        image,
        of,
        Gathering,
        "ncclAlltoAll",
        send,
        recv,
        1_000_009,
        5,
        comm,
        stream(9)
    );
    call!(
        image,
        of,
        Rooted,
        "ncclGather",
        send,
        recv,
        1_000_010,
        4,
        5,
        comm,
        stream(10)
    );
    call!(
        image,
        of,
        Rooted,
        "ncclScatter",
        send,
        recv,
        1_000_011,
        3,
        1,
        comm,
        stream(11)
    );
    call!(
        image,
        of,
        ReducingConfig,
        "ncclAllReduceConfig",
        send,
        recv,
        1_000_012,
        7,
        0,
        comm,
        stream(12),
        none
    );
    call!(
        image,
        of,
        ReducingConfig,
        "ncclReduceScatterConfig",
        send,
        recv,
        1_000_013,
        9,
        0,
        comm,
        stream(13),
        none
    );
    call!(
        image,
        of,
        GatheringConfig,
        "ncclAllGatherConfig",
        send,
        recv,
        1_000_014,
        6,
        comm,
        stream(14),
        none
    );
    call!(
        image,
        of,
        GatheringConfig,
        "ncclAlltoAllConfig",
        send,
        recv,
        1_000_015,
        5,
        comm,
        stream(15),
        none
    );
    call!(
        image,
        of,
        ReducingConfig,
        "ncclBroadcastConfig",
        send,
        recv,
        1_000_016,
        0,
        3,
        comm,
        stream(16),
        none
    );
    call!(
        image,
        of,
        ReduceConfig,
        "ncclReduceConfig",
        send,
        recv,
        1_000_017,
        8,
        2,
        4,
        comm,
        stream(17),
        none
    );
    call!(
        image,
        of,
        ReducingConfig,
        "ncclGatherConfig",
        send,
        recv,
        1_000_018,
        4,
        5,
        comm,
        stream(18),
        none
    );
    call!(
        image,
        of,
        ReducingConfig,
        "ncclScatterConfig",
        send,
        recv,
        1_000_019,
        3,
        1,
        comm,
        stream(19),
        none
    );
    call!(image, of, Ending, "ncclCommDestroy", ptr::null_mut());
    Ok(format!("{} {}", comm as u64, told(&of)))
}

/// Dies inside of a call.
pub(crate) fn crash(image: &Image) -> Outcome {
    let all_reduce = image
        .exported::<Reducing>("ncclAllReduce")
        .ok_or("no ncclAllReduce")?;
    let none = ptr::null_mut();
    // SAFETY: none: reading this communicator ends the process, which is what is wanted.
    unsafe {
        all_reduce(
            none,
            none,
            424_242,
            7,
            0,
            0xdead_0000 as Comm,
            0xdead_beef as Stream,
        )
    };
    Err("the call came back".into())
}
