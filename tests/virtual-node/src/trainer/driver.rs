//! The driver and communication libraries as a training framework binds them: by name, at run time.
#![expect(unsafe_code, reason = "calls C libraries")]
#![expect(non_snake_case, reason = "fields have the libraries' names")]

use std::ffi::{CString, c_int, c_void};
use std::ptr::null_mut;

use anyhow::{Context, bail};
use libloading::{Library, Symbol};

type Handle = *mut c_void;

/// A stream, an event, a kernel or a communicator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Object(Handle);

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

const BFLOAT16: c_int = 9;
const SUM: c_int = 0;

macro_rules! bind {
    ($table:ident { $($name:ident: fn($($arg:ty),*) $(-> $out:ty)?;)+ }) => {
        struct $table { $($name: unsafe extern "C" fn($($arg),*) $(-> $out)?,)+ }

        impl $table {
            fn load(library: &Library) -> anyhow::Result<Self> {
                // SAFETY: the signatures are those of the libraries' public headers.
                unsafe {
                    $(let $name: Symbol<'_, unsafe extern "C" fn($($arg),*) $(-> $out)?> =
                        library.get(concat!(stringify!($name), "\0").as_bytes())?;)+
                    Ok(Self { $($name: *$name,)+ })
                }
            }
        }
    };
}

bind!(Cuda {
    cuInit: fn(u32) -> c_int;
    cuDeviceGet: fn(*mut c_int, c_int) -> c_int;
    cuDevicePrimaryCtxRetain: fn(*mut Handle, c_int) -> c_int;
    cuCtxSetCurrent: fn(Handle) -> c_int;
    cuStreamCreate: fn(*mut Handle, u32) -> c_int;
    cuStreamSynchronize: fn(Handle) -> c_int;
    cuStreamWaitEvent: fn(Handle, Handle, u32) -> c_int;
    cuEventCreate: fn(*mut Handle, u32) -> c_int;
    cuEventRecord: fn(Handle, Handle) -> c_int;
    cuEventSynchronize: fn(Handle) -> c_int;
    cuMemAlloc_v2: fn(*mut u64, usize) -> c_int;
    cuMemAllocHost_v2: fn(*mut Handle, usize) -> c_int;
    cuMemcpyHtoDAsync_v2: fn(u64, *const c_void, usize, Handle) -> c_int;
    cuMemcpyDtoHAsync_v2: fn(*mut c_void, u64, usize, Handle) -> c_int;
    cuModuleLoadData: fn(*mut Handle, *const c_void) -> c_int;
    cuModuleUnload: fn(Handle) -> c_int;
    cuModuleGetFunction: fn(*mut Handle, Handle, *const i8) -> c_int;
    cuLaunchKernel: fn(Handle, u32, u32, u32, u32, u32, u32, u32, Handle, *mut Handle, *mut Handle) -> c_int;
    cuCtxSynchronize: fn() -> c_int;
    cuStreamBeginCapture_v2: fn(Handle, c_int) -> c_int;
    cuStreamEndCapture: fn(Handle, *mut Handle) -> c_int;
    cuGraphInstantiateWithFlags: fn(*mut Handle, Handle, u64) -> c_int;
    cuGraphDestroy: fn(Handle) -> c_int;
    cuGraphExecDestroy: fn(Handle) -> c_int;
    cuGraphLaunch: fn(Handle, Handle) -> c_int;
});

bind!(Nccl {
    ncclGetUniqueId: fn(*mut UniqueId) -> c_int;
    ncclCommInitRank: fn(*mut Handle, c_int, UniqueId, c_int) -> c_int;
    ncclAllReduce: fn(*const c_void, *mut c_void, usize, c_int, c_int, Handle, Handle) -> c_int;
    ncclCommDestroy: fn(Handle) -> c_int;
});

/// A GPU with a context on the calling thread.
pub(crate) struct Device {
    cuda: Cuda,
}

fn done(status: c_int, what: &str) -> anyhow::Result<()> {
    if status != 0 {
        bail!("{what} failed with status {status}");
    }
    Ok(())
}

impl Device {
    /// Opens GPU `ordinal` and makes its primary context current.
    pub(crate) fn open(ordinal: u32) -> anyhow::Result<Self> {
        // SAFETY: loading the driver runs no initialiser that could break this process.
        let library = unsafe { Library::new("libcuda.so.1") }.context("failed to load libcuda.so.1")?;
        let cuda = Cuda::load(&library).context("libcuda.so.1 lacks a function")?;
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: out-pointers are live locals.
        unsafe {
            done((cuda.cuInit)(0), "cuInit")?;
            done(
                (cuda.cuDeviceGet)(&raw mut device, ordinal.cast_signed()),
                "cuDeviceGet",
            )?;
            done(
                (cuda.cuDevicePrimaryCtxRetain)(&raw mut context, device),
                "cuDevicePrimaryCtxRetain",
            )?;
            done((cuda.cuCtxSetCurrent)(context), "cuCtxSetCurrent")?;
        }
        // The driver's own threads run to the end of the process, so it is never unloaded.
        std::mem::forget(library);
        Ok(Self { cuda })
    }

    pub(crate) fn stream(&self) -> anyhow::Result<Object> {
        let mut stream = null_mut();
        // SAFETY: the out-pointer is a live local; 1 is CU_STREAM_NON_BLOCKING.
        let status = unsafe { (self.cuda.cuStreamCreate)(&raw mut stream, 1) };
        done(status, "cuStreamCreate")?;
        Ok(Object(stream))
    }

    pub(crate) fn event(&self) -> anyhow::Result<Object> {
        let mut event = null_mut();
        // SAFETY: the out-pointer is a live local; 2 is CU_EVENT_DISABLE_TIMING.
        let status = unsafe { (self.cuda.cuEventCreate)(&raw mut event, 2) };
        done(status, "cuEventCreate")?;
        Ok(Object(event))
    }

    pub(crate) fn record(&self, event: Object, stream: Object) -> anyhow::Result<()> {
        // SAFETY: handles made by this library.
        done(
            unsafe { (self.cuda.cuEventRecord)(event.0, stream.0) },
            "cuEventRecord",
        )
    }

    pub(crate) fn wait(&self, stream: Object, event: Object) -> anyhow::Result<()> {
        // SAFETY: handles made by this library.
        done(
            unsafe { (self.cuda.cuStreamWaitEvent)(stream.0, event.0, 0) },
            "cuStreamWaitEvent",
        )
    }

    /// Blocks until the event's last recording has happened.
    pub(crate) fn wait_for(&self, event: Object) -> anyhow::Result<()> {
        // SAFETY: a handle made by this library.
        done(
            unsafe { (self.cuda.cuEventSynchronize)(event.0) },
            "cuEventSynchronize",
        )
    }

    pub(crate) fn synchronize(&self, stream: Object) -> anyhow::Result<()> {
        // SAFETY: a handle made by this library.
        done(
            unsafe { (self.cuda.cuStreamSynchronize)(stream.0) },
            "cuStreamSynchronize",
        )
    }

    pub(crate) fn synchronize_all(&self) -> anyhow::Result<()> {
        // SAFETY: the context of this thread is current.
        done(unsafe { (self.cuda.cuCtxSynchronize)() }, "cuCtxSynchronize")
    }

    pub(crate) fn allocate(&self, bytes: usize) -> anyhow::Result<u64> {
        let mut address = 0;
        // SAFETY: the out-pointer is a live local.
        let status = unsafe { (self.cuda.cuMemAlloc_v2)(&raw mut address, bytes) };
        done(status, "cuMemAlloc")?;
        Ok(address)
    }

    pub(crate) fn allocate_pinned(&self, bytes: usize) -> anyhow::Result<Object> {
        let mut at = null_mut();
        // SAFETY: the out-pointer is a live local.
        let status = unsafe { (self.cuda.cuMemAllocHost_v2)(&raw mut at, bytes) };
        done(status, "cuMemAllocHost")?;
        Ok(Object(at))
    }

    /// Copies from pinned memory of at least `bytes`.
    pub(crate) fn copy_to_device(
        &self,
        to: u64,
        from: Object,
        bytes: usize,
        stream: Object,
    ) -> anyhow::Result<()> {
        // SAFETY: the buffers were allocated above with at least `bytes`.
        done(
            unsafe { (self.cuda.cuMemcpyHtoDAsync_v2)(to, from.0, bytes, stream.0) },
            "cuMemcpyHtoDAsync",
        )
    }

    /// Copies to pinned memory of at least `bytes`.
    pub(crate) fn copy_to_host(
        &self,
        to: Object,
        from: u64,
        bytes: usize,
        stream: Object,
    ) -> anyhow::Result<()> {
        // SAFETY: the buffers were allocated above with at least `bytes`.
        done(
            unsafe { (self.cuda.cuMemcpyDtoHAsync_v2)(to.0, from, bytes, stream.0) },
            "cuMemcpyDtoHAsync",
        )
    }

    pub(crate) fn module(&self, image: &str) -> anyhow::Result<Object> {
        let image = CString::new(image)?;
        let mut module = null_mut();
        // SAFETY: the image is a live text ended by zero.
        let status = unsafe { (self.cuda.cuModuleLoadData)(&raw mut module, image.as_ptr().cast()) };
        done(status, "cuModuleLoadData")?;
        Ok(Object(module))
    }

    pub(crate) fn unload(&self, module: Object) -> anyhow::Result<()> {
        // SAFETY: a handle made by this library; its kernels are not launched again.
        done(unsafe { (self.cuda.cuModuleUnload)(module.0) }, "cuModuleUnload")
    }

    pub(crate) fn kernel(&self, module: Object, name: &str) -> anyhow::Result<Object> {
        let text = CString::new(name)?;
        let mut function = null_mut();
        // SAFETY: the name is a live text ended by zero.
        let status = unsafe { (self.cuda.cuModuleGetFunction)(&raw mut function, module.0, text.as_ptr()) };
        done(status, "cuModuleGetFunction")?;
        Ok(Object(function))
    }

    pub(crate) fn launch(&self, kernel: Object, stream: Object) -> anyhow::Result<()> {
        let no_args = null_mut();
        // SAFETY: a kernel of a loaded module that takes no parameters.
        let status = unsafe {
            (self.cuda.cuLaunchKernel)(kernel.0, 264, 1, 1, 256, 1, 1, 0, stream.0, no_args, no_args)
        };
        done(status, "cuLaunchKernel")
    }

    /// Records what is launched on a stream from now on instead of running it.
    pub(crate) fn begin_capture(&self, stream: Object) -> anyhow::Result<()> {
        // SAFETY: a handle made by this library; 1 is CU_STREAM_CAPTURE_MODE_THREAD_LOCAL.
        let status = unsafe { (self.cuda.cuStreamBeginCapture_v2)(stream.0, 1) };
        done(status, "cuStreamBeginCapture")
    }

    /// Ends the recording and makes what was recorded launchable.
    pub(crate) fn end_capture(&self, stream: Object) -> anyhow::Result<Object> {
        let (mut graph, mut executable) = (null_mut(), null_mut());
        // SAFETY: handles made by this library, and out-pointers that are live locals.
        unsafe {
            done(
                (self.cuda.cuStreamEndCapture)(stream.0, &raw mut graph),
                "cuStreamEndCapture",
            )?;
            done(
                (self.cuda.cuGraphInstantiateWithFlags)(&raw mut executable, graph, 0),
                "cuGraphInstantiateWithFlags",
            )?;
            done((self.cuda.cuGraphDestroy)(graph), "cuGraphDestroy")?;
        }
        Ok(Object(executable))
    }

    pub(crate) fn launch_graph(&self, graph: Object, stream: Object) -> anyhow::Result<()> {
        // SAFETY: handles made by this library.
        let status = unsafe { (self.cuda.cuGraphLaunch)(graph.0, stream.0) };
        done(status, "cuGraphLaunch")
    }

    pub(crate) fn destroy_graph(&self, graph: Object) -> anyhow::Result<()> {
        // SAFETY: a handle made by this library, not launched again.
        let status = unsafe { (self.cuda.cuGraphExecDestroy)(graph.0) };
        done(status, "cuGraphExecDestroy")
    }
}

/// A communicator over all ranks of the job.
pub(crate) struct Communicator {
    nccl: Nccl,
    comm: Handle,
}

/// The communication library before a communicator exists.
pub(crate) struct Collectives(Library);

impl Collectives {
    pub(crate) fn load() -> anyhow::Result<Self> {
        // SAFETY: loading the library runs no initialiser that could break this process.
        unsafe { Library::new("libnccl.so.2") }
            .map(Self)
            .context("failed to load libnccl.so.2")
    }

    /// An id for a new communicator.
    pub(crate) fn unique_id(&self) -> anyhow::Result<[u8; 128]> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the out-pointer is a live local of the size the header gives.
        let status = unsafe { (Nccl::load(&self.0)?.ncclGetUniqueId)(&raw mut id) };
        done(status, "ncclGetUniqueId")?;
        Ok(id.0)
    }

    /// Joins the communicator; blocks until all ranks have.
    pub(crate) fn join(self, ranks: u32, id: [u8; 128], rank: u32) -> anyhow::Result<Communicator> {
        let nccl = Nccl::load(&self.0)?;
        let mut comm = null_mut();
        // SAFETY: the out-pointer is a live local; the id is passed by value.
        let status = unsafe {
            (nccl.ncclCommInitRank)(
                &raw mut comm,
                ranks.cast_signed(),
                UniqueId(id),
                rank.cast_signed(),
            )
        };
        done(status, "ncclCommInitRank")?;
        // Its threads may outlive the communicator, so it is never unloaded.
        std::mem::forget(self.0);
        Ok(Communicator { nccl, comm })
    }
}

impl Communicator {
    /// Sums `bytes` of bfloat16 gradients in place over all ranks.
    pub(crate) fn all_reduce(&self, buffer: u64, bytes: u64, stream: Object) -> anyhow::Result<()> {
        let at = buffer as *mut c_void;
        let count = usize::try_from(bytes / 2)?;
        // SAFETY: a device buffer of at least `bytes`, a live communicator and a live stream.
        let status = unsafe { (self.nccl.ncclAllReduce)(at, at, count, BFLOAT16, SUM, self.comm, stream.0) };
        done(status, "ncclAllReduce")
    }

    pub(crate) fn destroy(self) -> anyhow::Result<()> {
        // SAFETY: a live communicator, not used again.
        done(
            unsafe { (self.nccl.ncclCommDestroy)(self.comm) },
            "ncclCommDestroy",
        )
    }
}
