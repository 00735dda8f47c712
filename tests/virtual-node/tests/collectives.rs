//! Every collective, sends and receives, splits and shrinks, between processes on three nodes.
//!
//! Each rank is this test program once more, in the part of `rank_process`.

use std::ffi::{c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::ptr::null_mut;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libloading::Library;
use virtual_node_state::gpu::Gpu;
use virtual_node_state::log::{self, Kind, Record};

mod built;

type Handle = *mut c_void;

/// Node and GPU of each rank.
const RANKS: [(&str, u32); 4] = [("a", 0), ("a", 1), ("b", 0), ("c", 0)];
const MIB: usize = 1 << 20;
const FLOAT: c_int = 7;

/// Calls a function of a library by name; its status must be 0.
macro_rules! call {
    ($library:expr, $name:literal, $($arg:expr => $kind:ty),*) => {{
        // SAFETY: the signature is that of the library's public header, and every pointer is live.
        let status = unsafe {
            let function: libloading::Symbol<'_, unsafe extern "C" fn($($kind),*) -> c_int> =
                $library.get(concat!($name, "\0").as_bytes())?;
            function($($arg),*)
        };
        ensure!(status == 0, "{} failed with {status}", $name);
    }};
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

/// Bytes of each collective, in the order in which `play` runs them on the first communicator.
const PAYLOADS: [usize; 5] = [6 * MIB, 2 * MIB, 3 * MIB, 4 * MIB, 4 * MIB];

fn play(rank: usize, folder: &Path) -> Result<()> {
    // SAFETY: the stand-ins run no initialiser that could break this process; they are never unloaded.
    let (cuda, nccl) = unsafe { (Library::new("libcuda.so.1")?, Library::new("libnccl.so.2")?) };
    let (cuda, nccl) = (Box::leak(Box::new(cuda)), Box::leak(Box::new(nccl)));
    let (mut context, mut stream, mut comm) = (null_mut(), null_mut(), null_mut());
    call!(cuda, "cuInit", 0 => u32);
    call!(cuda, "cuCtxCreate_v2", &raw mut context => *mut Handle, 0 => u32, RANKS[rank].1.cast_signed() => c_int);
    call!(cuda, "cuStreamCreate", &raw mut stream => *mut Handle, 1 => u32);
    let id = shared_id(rank, folder, nccl)?;
    let (own, all) = (c_int::try_from(rank)?, c_int::try_from(RANKS.len())?);
    call!(nccl, "ncclCommInitRank", &raw mut comm => *mut Handle, all => c_int, id => UniqueId, own => c_int);
    let nothing = null_mut::<c_void>();
    let count = |bytes: usize| bytes / 4;
    call!(nccl, "ncclAllReduce", nothing => Handle, nothing => Handle, count(PAYLOADS[0]) => usize, FLOAT => c_int,
        0 => c_int, comm => Handle, stream => Handle);
    call!(nccl, "ncclBroadcast", nothing => Handle, nothing => Handle, count(PAYLOADS[1]) => usize, FLOAT => c_int,
        2 => c_int, comm => Handle, stream => Handle);
    call!(nccl, "ncclReduce", nothing => Handle, nothing => Handle, count(PAYLOADS[2]) => usize, FLOAT => c_int,
        0 => c_int, 1 => c_int, comm => Handle, stream => Handle);
    call!(nccl, "ncclAllGather", nothing => Handle, nothing => Handle, count(PAYLOADS[3]) / 4 => usize, FLOAT => c_int,
        comm => Handle, stream => Handle);
    call!(nccl, "ncclReduceScatter", nothing => Handle, nothing => Handle, count(PAYLOADS[4]) / 4 => usize,
        FLOAT => c_int, 0 => c_int, comm => Handle, stream => Handle);
    call!(nccl, "ncclGroupStart",);
    let (next, previous) = ((own + 1) % all, (own + all - 1) % all);
    call!(nccl, "ncclSend", nothing => Handle, count(MIB) => usize, FLOAT => c_int, next => c_int, comm => Handle,
        stream => Handle);
    call!(nccl, "ncclRecv", nothing => Handle, count(MIB) => usize, FLOAT => c_int, previous => c_int,
        comm => Handle, stream => Handle);
    call!(nccl, "ncclGroupEnd",);
    call!(cuda, "cuStreamSynchronize", stream => Handle);
    for child in [split(nccl, comm, own)?, shrink(nccl, comm, own)?] {
        if !child.is_null() {
            call!(nccl, "ncclAllReduce", nothing => Handle, nothing => Handle, 1_000 => usize, FLOAT => c_int,
                0 => c_int, child => Handle, stream => Handle);
            call!(cuda, "cuStreamSynchronize", stream => Handle);
            call!(nccl, "ncclCommDestroy", child => Handle);
        }
    }
    call!(nccl, "ncclCommDestroy", comm => Handle);
    Ok(())
}

/// Ranks by parity; in each half the order is turned round.
fn split(nccl: &Library, comm: Handle, own: c_int) -> Result<Handle> {
    let (mut child, mut rank, mut count) = (null_mut(), 0, 0);
    call!(nccl, "ncclCommSplit", comm => Handle, own % 2 => c_int, -own => c_int, &raw mut child => *mut Handle,
        null_mut() => Handle);
    call!(nccl, "ncclCommUserRank", child => Handle, &raw mut rank => *mut c_int);
    call!(nccl, "ncclCommCount", child => Handle, &raw mut count => *mut c_int);
    ensure!(
        count == 2 && rank == c_int::from(own < 2),
        "rank {rank} of {count}"
    );
    Ok(child)
}

/// Everyone but the last rank.
fn shrink(nccl: &Library, comm: Handle, own: c_int) -> Result<Handle> {
    let (excluded, mut child) = ([3], null_mut());
    if own != 3 {
        call!(nccl, "ncclCommShrink", comm => Handle, excluded.as_ptr() => *const c_int, 1 => c_int,
            &raw mut child => *mut Handle, null_mut() => Handle, 0 => c_int);
    }
    Ok(child)
}

fn shared_id(rank: usize, folder: &Path, nccl: &Library) -> Result<UniqueId> {
    let path = folder.join("id");
    let mut id = UniqueId([0; 128]);
    if rank == 0 {
        call!(nccl, "ncclGetUniqueId", &raw mut id => *mut UniqueId);
        std::fs::write(folder.join("id.partial"), id.0)?;
        std::fs::rename(folder.join("id.partial"), path)?;
        return Ok(id);
    }
    for _ in 0..1_000 {
        if let Ok(bytes) = std::fs::read(&path) {
            id.0.copy_from_slice(&bytes);
            return Ok(id);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("rank 0 made no id")
}

#[test]
fn rank_process() -> Result<()> {
    let Ok(rank) = std::env::var("VIRTUAL_NODE_TEST_RANK") else {
        return Ok(());
    };
    let folder = PathBuf::from(std::env::var_os("VIRTUAL_NODE_TEST_FOLDER").context("no folder")?);
    play(rank.parse()?, &folder)
}

fn start(rank: usize, folder: &Path) -> Result<Child> {
    let node = folder.join(RANKS[rank].0);
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--exact", "rank_process", "--nocapture"]);
    command
        .env("VIRTUAL_NODE_TEST_RANK", rank.to_string())
        .env("VIRTUAL_NODE_TEST_FOLDER", folder);
    command
        .env("RANK", rank.to_string())
        .env("STALLSCOPE_VNODE", &node)
        .env("LD_LIBRARY_PATH", node.join("lib"));
    // Its own lines about tests would be taken for this test's.
    command.stdout(std::process::Stdio::null());
    command.spawn().context("failed to start a rank")
}

fn wait(mut ranks: Vec<Child>) -> Result<()> {
    let begun = Instant::now();
    while let Some(mut rank) = ranks.pop() {
        let status = loop {
            if let Some(status) = rank.try_wait()? {
                break status;
            }
            if begun.elapsed() > Duration::from_secs(60) {
                for mut hung in ranks.drain(..).chain([rank]) {
                    hung.kill()?;
                }
                bail!("the ranks hang");
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        ensure!(status.success(), "a rank failed: {status}");
    }
    Ok(())
}

#[test]
fn every_collective_runs_between_three_nodes() -> Result<()> {
    let libraries = built::folder()?;
    let folder = tempfile::tempdir()?;
    for (node, gpu) in RANKS {
        let node = folder.path().join(node);
        std::fs::create_dir_all(node.join("lib"))?;
        std::fs::copy(
            libraries.join("libvirtual_cuda.so"),
            node.join("lib/libcuda.so.1"),
        )?;
        std::fs::copy(
            libraries.join("libvirtual_nccl.so"),
            node.join("lib/libnccl.so.2"),
        )?;
        Gpu::create(&node, gpu, &format!("GPU-{gpu}"))?;
    }
    wait(
        (0..RANKS.len())
            .map(|rank| start(rank, folder.path()))
            .collect::<Result<_>>()?,
    )?;
    let mut logs = Vec::new();
    for (rank, (node, _)) in RANKS.iter().enumerate() {
        let records = log::read(&folder.path().join(node).join(format!("activity-rank{rank}.bin")))?;
        ensure!(
            records.len() == if rank == 3 { 7 } else { 8 },
            "rank {rank}: {records:#?}"
        );
        logs.push(records);
    }
    for records in &logs {
        records.iter().try_for_each(sound)?;
        let payloads: Vec<u64> = records[..5].iter().map(|record| record.bytes).collect();
        ensure!(payloads == PAYLOADS.map(|bytes| bytes as u64), "{payloads:?}");
        ensure!(
            records[0].wire_bytes == 8 * MIB as u64,
            "2 (n - 1) / n of 6 MiB over three nodes"
        );
        ensure!(
            records[5].bytes == 2 * MIB as u64,
            "a send and a receive make one kernel"
        );
    }
    for sequence in 0..5 {
        let arrivals = logs.iter().map(|records| records[sequence].arrived_ns);
        let last = arrivals.max().context("no ranks")?;
        for records in &logs {
            ensure!(
                records[sequence].all_arrived_ns == last,
                "ranks disagree on the last arrival of {sequence}"
            );
            ensure!(records[sequence].ranks_nodes == 3 << 32 | 4);
        }
    }
    Ok(())
}

fn sound(record: &Record) -> Result<()> {
    ensure!(record.kind == Kind::Collective);
    let times = [
        record.start_ns,
        record.all_arrived_ns,
        record.moved_ns,
        record.end_ns,
    ];
    ensure!(times.is_sorted(), "{record:#?}");
    Ok(())
}
