//! A real NCCL made to believe in a GPU: the functions of the CUDA runtime inside of it are overwritten, and those that meet other
//! ranks. So it makes communicators, which are good for nothing but their names.

use std::error::Error;
use std::ffi::{c_char, c_int, c_void};
use std::ptr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::{COMM_WORDS, Comm, Config, Image, Outcome, UniqueId, refused_communicator};

/// `NCCL_MAGIC`, src/include/comm.h.
const MAGIC: u64 = 0x0280_0280_0280_0280;

/// Where the rank lies in a communicator, bytes.
static RANK_AT: AtomicUsize = AtomicUsize::new(0);
/// The word before the rank of the communicator that was made last.
static HASH: AtomicU64 = AtomicU64::new(0);

/// Where the library loads a profiler plugin and makes a communicator known to it; 0 when there is nothing of the kind, or no
/// plugin is asked for.
static PLUGIN_INIT: AtomicUsize = AtomicUsize::new(0);

/// Says `RANK_AT COUNT_AT DEVICE_AT USED`, then `NAME=RESULT:COMM:HASH` of every constructor: offsets are those from which the
/// exported accessors read; the used communicator has a made-up identity; a hash is what the library wrote into the one it made.
pub(crate) fn communicators(image: &Image) -> Outcome {
    overwrite_cuda(image)?;
    let [rank_at, count_at, device_at] =
        ["ncclCommUserRank", "ncclCommCount", "ncclCommCuDevice"].map(|name| offset_read_by(image, name));
    let rank_at = rank_at?;
    RANK_AT.store(rank_at, Ordering::Relaxed);
    if std::env::var_os("NCCL_PROFILER_PLUGIN").is_some() {
        let init = image.local("_Z22ncclProfilerPluginInitP8ncclComm");
        PLUGIN_INIT.store(init.unwrap_or(0), Ordering::Relaxed);
    }
    let made = construct(image)?;
    let used = use_one(image, rank_at)?;
    Ok(format!(
        "{rank_at} {} {} {used} {}",
        count_at?,
        device_at?,
        made.join(" ")
    ))
}

/// Calls every constructor that this version has.
fn construct(image: &Image) -> Result<Vec<String>, Box<dyn Error>> {
    type GetId = unsafe extern "C" fn(*mut UniqueId) -> c_int;
    type Init = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> c_int;
    type InitConfig = unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, Config) -> c_int;
    type InitScalable = unsafe extern "C" fn(*mut Comm, c_int, c_int, c_int, *mut UniqueId, Config) -> c_int;
    type InitAll = unsafe extern "C" fn(*mut Comm, c_int, *const c_int) -> c_int;
    type Split = unsafe extern "C" fn(Comm, c_int, c_int, *mut Comm, Config) -> c_int;
    type Shrink = unsafe extern "C" fn(Comm, *mut c_int, c_int, *mut Comm, Config, c_int) -> c_int;
    type Grow = unsafe extern "C" fn(Comm, c_int, *const UniqueId, c_int, *mut Comm, Config) -> c_int;
    let mut made = Vec::new();
    let mut note = |name: &str, result: c_int, comm: Comm| {
        let hash = HASH.swap(0, Ordering::Relaxed);
        made.push(format!("{name}={result}:{}:{hash}", comm as u64));
        comm
    };
    let none: Config = ptr::null_mut();
    let mut ids = [UniqueId([0; 128]); 3];
    let mut comm: Comm = none;
    // SAFETY: the signatures are those of nccl.h, and the pointers outlive the calls.
    unsafe {
        let get_id = image
            .exported::<GetId>("ncclGetUniqueId")
            .ok_or("no ncclGetUniqueId")?;
        for id in &mut ids {
            get_id(id);
        }
        let init = image
            .exported::<Init>("ncclCommInitRank")
            .ok_or("no ncclCommInitRank")?;
        let result = init(&mut comm, 3, ids[0], 1);
        let parent = note("ncclCommInitRank", result, comm);
        if let Some(init) = image.exported::<InitConfig>("ncclCommInitRankConfig") {
            let result = init(&mut comm, 11, ids[1], 4, none);
            note("ncclCommInitRankConfig", result, comm);
        }
        if let Some(init) = image.exported::<InitScalable>("ncclCommInitRankScalable") {
            let result = init(&mut comm, 9, 3, 2, ids[1..].as_mut_ptr(), none);
            note("ncclCommInitRankScalable", result, comm);
        }
        if let Some(init) = image.exported::<InitAll>("ncclCommInitAll") {
            let mut comms: [Comm; 2] = [none; 2];
            let result = init(comms.as_mut_ptr(), 2, [3, 1].as_ptr());
            note("ncclCommInitAll", result, comms[0]);
        }
        if let Some(split) = image.exported::<Split>("ncclCommSplit") {
            for color in [6, 6, 7] {
                let result = split(parent, color, 2, &mut comm, none);
                note("ncclCommSplit", result, comm);
            }
        }
        if let Some(shrink) = image.exported::<Shrink>("ncclCommShrink") {
            let result = shrink(parent, [2].as_mut_ptr(), 1, &mut comm, none, 0);
            note("ncclCommShrink", result, comm);
        }
        if let Some(grow) = image.exported::<Grow>("ncclCommGrow") {
            let result = grow(parent, 5, ptr::null(), -1, &mut comm, none);
            note("ncclCommGrow", result, comm);
            let result = grow(none, 12, &ids[2], 10, &mut comm, none);
            note("ncclCommGrow", result, comm);
        }
    }
    Ok(made)
}

/// A call with a communicator that has an identity and is refused all the same.
fn use_one(image: &Image, rank_at: usize) -> Result<usize, Box<dyn Error>> {
    let words = refused_communicator(MAGIC);
    let bytes = words.as_mut_ptr().cast::<u8>();
    let identity = [0x5566_7788u32, 0x1122_3344, 3, 8, 2];
    for (at, word) in (rank_at - 8..).step_by(4).zip(identity) {
        // SAFETY: the offset was read by an accessor from a buffer of this size.
        unsafe { bytes.add(at).cast::<u32>().write_unaligned(word) };
    }
    type AllReduce =
        unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    let all_reduce = image
        .exported::<AllReduce>("ncclAllReduce")
        .ok_or("no ncclAllReduce")?;
    for _ in 0..2 {
        // SAFETY: the library refuses the communicator, whose last word is no magic.
        unsafe {
            all_reduce(
                ptr::null_mut(),
                ptr::null_mut(),
                1,
                7,
                0,
                bytes.cast(),
                ptr::null_mut(),
            )
        };
    }
    Ok(bytes as usize)
}

/// Which 32 bits of a communicator an accessor reads: it is shown one in which a single word is not magic, until it gives
/// that word back.
fn offset_read_by(image: &Image, name: &str) -> Result<usize, Box<dyn Error>> {
    type Accessor = unsafe extern "C" fn(*const u64, *mut c_int) -> c_int;
    let accessor = image.exported::<Accessor>(name).ok_or("an accessor is missing")?;
    let comm = vec![MAGIC; COMM_WORDS].leak();
    let (low, high) = (0x1357_9bdf_i32, 0x2468_ace0_i32);
    for at in 1..COMM_WORDS {
        comm[at] = u64::from(high.cast_unsigned()) << 32 | u64::from(low.cast_unsigned());
        let mut value = 0;
        // SAFETY: the communicator is larger than the library's; the wait for it to be ready is overwritten.
        let result = unsafe { accessor(comm.as_ptr(), &mut value) };
        comm[at] = MAGIC;
        match value {
            _ if result != 0 => {}
            value if value == low => return Ok(8 * at),
            value if value == high => return Ok(8 * at + 4),
            _ => {}
        }
    }
    Err(format!("{name} reads no word").into())
}

extern "C" fn zero() -> c_int {
    0
}

extern "C" fn give_zero(out: *mut c_int) -> c_int {
    // SAFETY: the functions that this replaces give an integer through their first argument.
    unsafe { out.write(0) };
    0
}

extern "C" fn give_eight(out: *mut c_int) -> c_int {
    // SAFETY: as above.
    unsafe { out.write(8) };
    0
}

extern "C" fn give_attribute(out: *mut c_int, attribute: c_int) -> c_int {
    /// `cudaDevAttrMaxSharedMemoryPerBlockOptin`
    const SHARED_MEMORY: c_int = 97;
    // SAFETY: as above.
    unsafe { out.write(if attribute == SHARED_MEMORY { 232_448 } else { 8 }) };
    0
}

extern "C" fn give_memory(out: *mut *mut c_void, bytes: usize) -> c_int {
    // SAFETY: the functions that this replaces give a pointer to so many bytes.
    unsafe { out.write(libc::calloc(bytes.max(1), 1)) };
    0
}

extern "C" fn give_pci_address(out: *mut c_char, room: c_int) -> c_int {
    let address = c"0000:01:00.0";
    if usize::try_from(room).is_ok_and(|room| room > address.count_bytes()) {
        // SAFETY: the caller has so much room.
        unsafe { ptr::copy_nonoverlapping(address.as_ptr(), out, address.count_bytes() + 1) };
    }
    0
}

/// In the place of what follows once a communicator has its name.
extern "C" fn note_name(comm: *mut u8) -> c_int {
    // SAFETY: the offset was read by an accessor, and the hash lies before the rank.
    let hash = unsafe {
        comm.add(RANK_AT.load(Ordering::Relaxed) - 8)
            .cast::<u64>()
            .read_unaligned()
    };
    HASH.store(hash, Ordering::Relaxed);
    let init = PLUGIN_INIT.load(Ordering::Relaxed);
    if init != 0 {
        // SAFETY: the name carries the types; what was replaced calls it with the same communicator.
        unsafe { std::mem::transmute::<usize, extern "C" fn(*mut u8) -> c_int>(init)(comm) };
    }
    0
}

/// In the place of meeting the other ranks, in versions whose communicators can grow: keeps the magic of the id, from which those
/// that grow are named. It lies before the hash.
extern "C" fn meet(_ids: c_int, id: *const u64, comm: *mut u8) -> c_int {
    // SAFETY: an id has 128 bytes, and the offset was read by an accessor.
    if let Some(magic) = unsafe { id.as_ref() } {
        let at = RANK_AT.load(Ordering::Relaxed) - 16;
        // SAFETY: as above.
        unsafe { comm.add(at).cast::<u64>().write_unaligned(*magic) };
    }
    0
}

fn overwrite_cuda(image: &Image) -> Result<(), Box<dyn Error>> {
    let functions: Vec<(String, usize)> = ["cuda", "_Z"]
        .iter()
        .flat_map(|prefix| image.locals_with(prefix))
        .map(|(name, address)| (name.to_owned(), address))
        .collect();
    for (_, address) in image.locals_with("pfn_cu") {
        // SAFETY: these variables hold the driver's functions, and nobody calls any yet.
        unsafe { (address as *mut usize).write(zero as *const () as usize) };
    }
    for (name, address) in functions {
        let replacement = match name.as_str() {
            "cudaGetDevice" => give_zero as *const () as usize,
            "cudaDeviceGetAttribute" => give_attribute as *const () as usize,
            "cudaGetDeviceCount" => give_eight as *const () as usize,
            "cudaHostAlloc" | "cudaMalloc" | "cudaMallocHost" => give_memory as *const () as usize,
            "cudaDeviceGetPCIBusId" => give_pci_address as *const () as usize,
            name if name.starts_with("cuda") && !name.contains('.') => zero as *const () as usize,
            name if name.contains("ncclNvml") && !name.contains(".cold") => zero as *const () as usize,
            name if name.starts_with("_Z20ncclCudaContextTrackP") => zero as *const () as usize,
            "_Z13bootstrapInitiPvP8ncclCommS1_" => meet as *const () as usize,
            name if name.starts_with("_Z13bootstrapInit") => zero as *const () as usize,
            name if name.starts_with("_Z14bootstrapSplit") => zero as *const () as usize,
            name if name.starts_with("_Z18bootstrapAllGather") => zero as *const () as usize,
            name if name.starts_with("_Z19ncclCommEnsureReadyP") => zero as *const () as usize,
            name if name.starts_with("_ZL18initTransportsRankP") => note_name as *const () as usize,
            _ => continue,
        };
        overwrite(address, replacement)?;
    }
    Ok(())
}

/// Makes the function at `address` jump to another.
fn overwrite(address: usize, to: usize) -> Result<(), Box<dyn Error>> {
    // mov rax, TO; jmp rax
    let mut code = [0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xe0];
    code[2..10].copy_from_slice(&to.to_le_bytes());
    let page = address & !0xfff;
    // SAFETY: the pages are the library's code, which nobody executes meanwhile, and functions are aligned so that twelve
    // bytes are theirs.
    unsafe {
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        if libc::mprotect(page as *mut c_void, 0x2000, all) != 0 {
            return Err(std::io::Error::last_os_error().into());
        }
        ptr::copy_nonoverlapping(code.as_ptr(), address as *mut u8, code.len());
    }
    Ok(())
}
