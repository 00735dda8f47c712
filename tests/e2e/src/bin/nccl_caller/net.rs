//! The library's own InfiniBand transport, driven as its proxy thread drives it, between two processes and from memory of
//! the host.
//!
//! Members and arguments are those of version 10 of the interface between NCCL and its networks, which 2.27 has inside.

use std::error::Error;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt as _;
use std::ptr::{null, null_mut};
use std::time::{Duration, Instant};

use super::{Image, Outcome};

/// The transport's table, a local variable of the library.
const TABLE: &str = "ncclNetIb";
/// Size of what one side tells the other so that it can connect.
const HANDLE_BYTES: usize = 128;
/// Memory of the host, as the interface numbers kinds of memory.
const HOST_MEMORY: c_int = 1;
/// What marks a message; both sides name the same.
const TAG: c_int = 7;
/// How long a connection or a message may take; emulated machines are slow.
const PATIENCE: Duration = Duration::from_secs(100);
/// Where the receiver tells its handle.
const PORT: u16 = 18516;

type Comm = *mut c_void;
type Handle = *mut c_void;
type Memory = *mut c_void;
type Operation = *mut c_void;
type Log = Option<unsafe extern "C" fn(c_int, u64, *const c_char, c_int, *const c_char, ...)>;

/// `ncclNet_v10_t`; members that nobody here calls are plain addresses.
#[repr(C)]
struct Table {
    name: *const c_char,
    init: unsafe extern "C" fn(Log, *const c_void) -> c_int,
    devices: unsafe extern "C" fn(*mut c_int) -> c_int,
    get_properties: *const c_void,
    listen: unsafe extern "C" fn(c_int, *mut c_void, *mut Comm) -> c_int,
    connect: unsafe extern "C" fn(c_int, *const c_void, *mut c_void, *mut Comm, *mut Handle) -> c_int,
    accept: unsafe extern "C" fn(Comm, *mut Comm, *mut Handle) -> c_int,
    register: unsafe extern "C" fn(Comm, *mut c_void, usize, c_int, *mut Memory) -> c_int,
    register_dma_buf: *const c_void,
    deregister: unsafe extern "C" fn(Comm, Memory) -> c_int,
    send: unsafe extern "C" fn(Comm, *mut c_void, usize, c_int, Memory, *mut c_void, *mut Operation) -> c_int,
    receive: unsafe extern "C" fn(
        Comm,
        c_int,
        *mut *mut c_void,
        *mut usize,
        *mut c_int,
        *mut Memory,
        *mut *mut c_void,
        *mut Operation,
    ) -> c_int,
    flush: *const c_void,
    test: unsafe extern "C" fn(Operation, *mut c_int, *mut c_int) -> c_int,
    close_send: unsafe extern "C" fn(Comm) -> c_int,
    close_receive: unsafe extern "C" fn(Comm) -> c_int,
    close_listen: unsafe extern "C" fn(Comm) -> c_int,
}

/// What to move: `serve ADDRESS COUNT SIZE` on the side that receives, `send ADDRESS COUNT SIZE` on the other; the address
/// is the receiver's, for the talk before there is a connection.
pub(crate) fn run(image: &Image, words: &[String]) -> Outcome {
    let [role, address, count, size] = words else {
        return Err("serve|send ADDRESS COUNT SIZE".into());
    };
    let (count, size): (u64, usize) = (count.parse()?, size.parse()?);
    let at = image
        .local(TABLE)
        .ok_or("the library has no InfiniBand transport")?;
    // SAFETY: the symbol is a table of this layout in the version that the caller names, and lives as long as the library.
    let table: &Table = unsafe { &*(at as *const Table) };
    // SAFETY: the first member is the transport's name in every version.
    let name = unsafe { CStr::from_ptr(table.name) }.to_string_lossy();
    let mut devices = 0;
    // SAFETY: no log and no profiler are allowed; the number is ours.
    unsafe {
        check("init", (table.init)(None, null()))?;
        check("devices", (table.devices)(&raw mut devices))?;
    }
    if devices < 1 {
        return Err(format!("the transport {name} found no device").into());
    }
    let mut transfer = Transfer {
        table,
        buffer: vec![0u8; size],
        deadline: Instant::now() + PATIENCE,
    };
    let moved = match role.as_str() {
        "serve" => transfer.receive_all(address, count)?,
        "send" => transfer.send_all(address, count)?,
        role => return Err(format!("no such role: {role}").into()),
    };
    Ok(format!("{name} devices={devices} messages={count} bytes={moved}"))
}

struct Transfer<'a> {
    table: &'a Table,
    buffer: Vec<u8>,
    deadline: Instant,
}

impl Transfer<'_> {
    fn receive_all(&mut self, address: &str, count: u64) -> Result<u64, Box<dyn Error>> {
        let mut handle = [0u8; HANDLE_BYTES];
        let mut listening: Comm = null_mut();
        // SAFETY: the handle has the size the interface fixes; the rest is ours.
        check("listen", unsafe {
            (self.table.listen)(0, handle.as_mut_ptr().cast(), &raw mut listening)
        })?;
        let mut peer = TcpListener::bind((address, PORT))?.accept()?.0;
        peer.write_all(&handle)?;
        let mut comm: Comm = null_mut();
        self.until("accept", || {
            let mut device: Handle = null_mut();
            // SAFETY: the listener is live; a connection that is not there yet leaves null.
            check("accept", unsafe {
                (self.table.accept)(listening, &raw mut comm, &raw mut device)
            })?;
            Ok(!comm.is_null())
        })?;
        let memory = self.register(comm)?;
        self.until_watched()?;
        let mut moved = 0;
        for number in 0..count {
            let mut data: *mut c_void = self.buffer.as_mut_ptr().cast();
            let mut size = self.buffer.len();
            let (mut tag, mut memory, mut context) = (TAG, memory, null_mut());
            let mut operation: Operation = null_mut();
            self.until("irecv", || {
                // SAFETY: one buffer of the named size, registered for this connection; what is not begun leaves null.
                check("irecv", unsafe {
                    (self.table.receive)(
                        comm,
                        1,
                        &raw mut data,
                        &raw mut size,
                        &raw mut tag,
                        &raw mut memory,
                        &raw mut context,
                        &raw mut operation,
                    )
                })?;
                Ok(!operation.is_null())
            })?;
            moved += self.finished(operation)?;
            if self.buffer.iter().any(|&byte| byte != mark(number)) {
                return Err(format!("message {number} arrived damaged").into());
            }
        }
        // The sender closes first: it must not find the connection gone.
        peer.read_exact(&mut [0])?;
        // SAFETY: nothing is under way on either.
        unsafe {
            check("deregMr", (self.table.deregister)(comm, memory))?;
            check("closeRecv", (self.table.close_receive)(comm))?;
            check("closeListen", (self.table.close_listen)(listening))?;
        }
        Ok(moved)
    }

    fn send_all(&mut self, address: &str, count: u64) -> Result<u64, Box<dyn Error>> {
        let mut peer = self.reached(address)?;
        let mut handle = [0u8; HANDLE_BYTES];
        peer.read_exact(&mut handle)?;
        let mut comm: Comm = null_mut();
        let config = [0u64; 8];
        self.until("connect", || {
            let mut device: Handle = null_mut();
            // SAFETY: the handle is one that `listen` made; the configuration is larger than the one of any version.
            check("connect", unsafe {
                (self.table.connect)(
                    0,
                    config.as_ptr().cast(),
                    handle.as_mut_ptr().cast(),
                    &raw mut comm,
                    &raw mut device,
                )
            })?;
            Ok(!comm.is_null())
        })?;
        let memory = self.register(comm)?;
        self.until_watched()?;
        let mut moved = 0;
        for number in 0..count {
            self.buffer.fill(mark(number));
            let (data, size) = (self.buffer.as_mut_ptr().cast(), self.buffer.len());
            let mut operation: Operation = null_mut();
            self.until("isend", || {
                // SAFETY: the buffer is registered for this connection and stays until the operation ends; null means that
                // the receiver has given no credit yet.
                check("isend", unsafe {
                    (self.table.send)(comm, data, size, TAG, memory, null_mut(), &raw mut operation)
                })?;
                Ok(!operation.is_null())
            })?;
            self.finished(operation)?;
            moved += size as u64;
        }
        // SAFETY: nothing is under way.
        unsafe {
            check("deregMr", (self.table.deregister)(comm, memory))?;
            check("closeSend", (self.table.close_send)(comm))?;
        }
        peer.write_all(&[1])?;
        Ok(moved)
    }

    fn reached(&self, address: &str) -> Result<TcpStream, Box<dyn Error>> {
        loop {
            match TcpStream::connect((address, PORT)) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() >= self.deadline => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Where `WAIT_FOR_PROBE` is set, waits until somebody watches what is posted: what is sent before that goes uncounted.
    fn until_watched(&self) -> Result<(), Box<dyn Error>> {
        if std::env::var_os("WAIT_FOR_PROBE").is_none() {
            return Ok(());
        }
        self.until("a probe in the device's library", || Ok(is_provider_probed()?))
    }

    fn register(&mut self, comm: Comm) -> Result<Memory, Box<dyn Error>> {
        let mut memory: Memory = null_mut();
        let (data, size) = (self.buffer.as_mut_ptr().cast(), self.buffer.len());
        // SAFETY: the buffer lives until it is deregistered.
        check("regMr", unsafe {
            (self.table.register)(comm, data, size, HOST_MEMORY, &raw mut memory)
        })?;
        Ok(memory)
    }

    /// Waits for an operation's end and hands back how many bytes it moved.
    fn finished(&self, operation: Operation) -> Result<u64, Box<dyn Error>> {
        let (mut done, mut size) = (0, 0);
        self.until("test", || {
            // SAFETY: the operation is under way until `done`.
            check("test", unsafe {
                (self.table.test)(operation, &raw mut done, &raw mut size)
            })?;
            Ok(done != 0)
        })?;
        Ok(u64::try_from(size)?)
    }

    fn until(
        &self,
        what: &str,
        mut done: impl FnMut() -> Result<bool, Box<dyn Error>>,
    ) -> Result<(), Box<dyn Error>> {
        while !done()? {
            if Instant::now() >= self.deadline {
                return Err(format!("{what} is not done after {PATIENCE:?}").into());
            }
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }
}

/// Whether the code of a device's library is no longer what its file has: a probe is a breakpoint in it.
fn is_provider_probed() -> std::io::Result<bool> {
    let memory = File::open("/proc/self/mem")?;
    for line in std::fs::read_to_string("/proc/self/maps")?.lines() {
        let columns: Vec<&str> = line.split_whitespace().collect();
        let [range, "r-xp", offset, _, _, path] = columns.as_slice() else {
            continue;
        };
        let address = |text: &str| u64::from_str_radix(text, 16).ok();
        let span = range
            .split_once('-')
            .and_then(|(start, end)| address(start).zip(address(end)));
        let (Some((start, end)), Some(offset)) = (span, address(offset)) else {
            continue;
        };
        if !path.contains("-rdmav") {
            continue;
        }
        let file = File::open(path)?;
        let mut mapped = vec![0; usize::try_from(end - start).unwrap_or_default()];
        memory.read_exact_at(&mut mapped, start)?;
        let mut original = vec![0; mapped.len()];
        let there = file.read_at(&mut original, offset)?;
        if mapped[..there] != original[..there] {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What a message is filled with.
fn mark(number: u64) -> u8 {
    u8::try_from(number % 251).unwrap_or_default() + 1
}

fn check(call: &str, result: c_int) -> Result<(), Box<dyn Error>> {
    if result == 0 {
        return Ok(());
    }
    Err(format!("{call} of the transport failed with {result}").into())
}
