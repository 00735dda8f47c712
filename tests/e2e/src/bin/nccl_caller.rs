//! Calls a real NCCL with arguments that a test can recognise.
//!
//! `nccl_caller LIBRARY` prints `ready`, then obeys one line of input per step and prints what it did: the addresses that the
//! probes must find. There is no GPU, so every call fails; none of them may crash, but the last, which is meant to.

use std::error::Error;
use std::ffi::{c_int, c_void};
use std::io::{self, BufRead as _, Write as _};
use std::ptr;

use libloading::{Library, Symbol};

/// `ncclUniqueId`
#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([u8; 128]);

type Comm = *mut c_void;
type Stream = *mut c_void;
type Buffer = *mut c_void;

/// Larger than any version's `ncclComm`, in words.
const COMM_WORDS: usize = 1 << 16;

fn say(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

fn wait() -> io::Result<bool> {
    Ok(io::stdin().lock().read_line(&mut String::new())? != 0)
}

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("the library is missing")?;
    // SAFETY: NCCL's initialisers have no preconditions.
    let library = unsafe { Library::new(path)? };
    say("ready")?;
    wait()?;
    constructors(&library)?;
    wait()?;
    collectives(&library)?;
    while wait()? {
        crash(&library)?;
    }
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Says `RESULT COMM ID` of a call that fails for want of a GPU.
fn constructors(library: &Library) -> Result<(), Box<dyn Error>> {
    let mut id = UniqueId([0x5a; 128]);
    let mut comm: Comm = ptr::null_mut();
    // SAFETY: the signatures are those of nccl.h, and the pointers outlive the calls.
    let (id_result, result) = unsafe {
        let get_id: Symbol<'_, unsafe extern "C" fn(*mut UniqueId) -> c_int> =
            library.get(b"ncclGetUniqueId")?;
        let init: Symbol<'_, unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int> =
            library.get(b"ncclCommInitRank")?;
        (get_id(&mut id), init(&mut comm, 7, id, 5))
    };
    say(&format!("{id_result} {result} {} {}", comm as u64, hex(&id.0)))?;
    Ok(())
}

/// Says the communicator, then one result per call.
fn collectives(library: &Library) -> Result<(), Box<dyn Error>> {
    // Zero, so that the library's check of its magic number fails; writable, because the error is noted in it.
    let comm = vec![0u64; COMM_WORDS].leak().as_mut_ptr().cast::<c_void>();
    let send = 0x5000_0000 as Buffer;
    let recv = 0x6000_0000 as Buffer;
    let stream = |number: u64| (0xabc0_0000 + number) as Stream;
    type Reducing = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, c_int, Comm, Stream) -> c_int;
    type Gathering = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, Comm, Stream) -> c_int;
    type Rooted = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, c_int, Comm, Stream) -> c_int;
    type Reduce = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, c_int, c_int, Comm, Stream) -> c_int;
    type InPlace = unsafe extern "C" fn(Buffer, usize, c_int, c_int, Comm, Stream) -> c_int;
    type Grouping = unsafe extern "C" fn() -> c_int;
    // SAFETY: the signatures are those of nccl.h; the communicator is readable and marked as none, so that the
    // library refuses every call before it looks at a buffer.
    let results = unsafe {
        let all_reduce: Symbol<'_, Reducing> = library.get(b"ncclAllReduce")?;
        let reduce_scatter: Symbol<'_, Reducing> = library.get(b"ncclReduceScatter")?;
        let all_gather: Symbol<'_, Gathering> = library.get(b"ncclAllGather")?;
        let broadcast: Symbol<'_, Rooted> = library.get(b"ncclBroadcast")?;
        let bcast: Symbol<'_, InPlace> = library.get(b"ncclBcast")?;
        let reduce: Symbol<'_, Reduce> = library.get(b"ncclReduce")?;
        let send_to: Symbol<'_, InPlace> = library.get(b"ncclSend")?;
        let receive: Symbol<'_, InPlace> = library.get(b"ncclRecv")?;
        let group_start: Symbol<'_, Grouping> = library.get(b"ncclGroupStart")?;
        let group_end: Symbol<'_, Grouping> = library.get(b"ncclGroupEnd")?;
        let destroy: Symbol<'_, unsafe extern "C" fn(Comm) -> c_int> = library.get(b"ncclCommDestroy")?;
        [
            all_reduce(send, recv, 1_000_001, 7, 0, comm, stream(1)),
            reduce_scatter(send, recv, 1_000_002, 9, 0, comm, stream(2)),
            all_gather(send, recv, 1_000_003, 6, comm, stream(3)),
            broadcast(send, recv, 1_000_004, 0, 3, comm, stream(4)),
            bcast(send, 1_000_005, 1, 2, comm, stream(5)),
            reduce(send, recv, 1_000_006, 8, 2, 4, comm, stream(6)),
            group_start(),
            group_start(),
            send_to(send, 1_000_007, 2, 6, comm, stream(7)),
            receive(recv, 1_000_008, 3, -1, comm, stream(8)),
            group_end(),
            group_end(),
            destroy(ptr::null_mut()),
        ]
    };
    say(&format!(
        "{} {}",
        comm as u64,
        results
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(" ")
    ))?;
    Ok(())
}

/// Dies inside of a call.
fn crash(library: &Library) -> Result<(), Box<dyn Error>> {
    type Reducing = unsafe extern "C" fn(Buffer, Buffer, usize, c_int, c_int, Comm, Stream) -> c_int;
    // SAFETY: none: reading this communicator ends the process, which is what is wanted.
    unsafe {
        let all_reduce: Symbol<'_, Reducing> = library.get(b"ncclAllReduce")?;
        all_reduce(
            ptr::null_mut(),
            ptr::null_mut(),
            424_242,
            7,
            0,
            0xdead_0000 as Comm,
            0xdead_beef as Stream,
        );
    }
    Ok(())
}
