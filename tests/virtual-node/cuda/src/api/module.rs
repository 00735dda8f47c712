//! Modules and launches.

use std::ffi::{CStr, c_char, c_uint, c_void};
use std::sync::Arc;

use super::common::*;
use crate::engine::engine;
use crate::module::parse;

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleLoadData(module: *mut Handle, image: *const c_void) -> Status {
    if image.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: images are texts ended by zero (as PTX is); the caller vouches for that.
    let image = unsafe { CStr::from_ptr(image.cast()) };
    let Some(kernels) = image.to_str().ok().and_then(parse) else {
        return NO_BINARY_FOR_GPU;
    };
    let mut objects = objects();
    objects
        .modules
        .push(Some(kernels.into_iter().map(Arc::new).collect()));
    // SAFETY: the caller's out-pointer.
    unsafe { put(module, handle(Tag::Module, objects.modules.len() - 1)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuModuleUnload(module: Handle) -> Status {
    let Some(module) = index(Tag::Module, module) else {
        return INVALID_HANDLE;
    };
    check(
        objects()
            .modules
            .get_mut(module)
            .is_some_and(|slot| slot.take().is_some()),
    )
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuModuleGetFunction(
    function: *mut Handle,
    module: Handle,
    name: *const c_char,
) -> Status {
    let Some(module) = index(Tag::Module, module) else {
        return INVALID_HANDLE;
    };
    if name.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: the caller's text, ended by zero.
    let name = unsafe { CStr::from_ptr(name) };
    let mut objects = objects();
    let Some(Some(kernels)) = objects.modules.get(module) else {
        return INVALID_HANDLE;
    };
    let Some(found) = kernels
        .iter()
        .find(|kernel| kernel.name.as_bytes() == name.to_bytes())
        .cloned()
    else {
        return NOT_FOUND;
    };
    objects.functions.push(found);
    // SAFETY: the caller's out-pointer.
    unsafe { put(function, handle(Tag::Function, objects.functions.len() - 1)) }
}

#[unsafe(no_mangle)]
extern "C" fn cuLaunchKernel(
    function: Handle,
    _grid_x: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    _block_x: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared_bytes: c_uint,
    stream: Handle,
    _params: *mut Handle,
    _extra: *mut Handle,
) -> Status {
    launch(function, stream)
}

/// `CUlaunchConfig` of cuda.h.
#[repr(C)]
struct LaunchConfig {
    grid: [c_uint; 3],
    block: [c_uint; 3],
    shared_bytes: c_uint,
    stream: Handle,
    attributes: *mut c_void,
    attribute_count: c_uint,
}

const _: () = assert!(std::mem::offset_of!(LaunchConfig, stream) == 32);

#[unsafe(no_mangle)]
unsafe extern "C" fn cuLaunchKernelEx(
    config: *const LaunchConfig,
    function: Handle,
    _params: *mut Handle,
    _extra: *mut Handle,
) -> Status {
    if config.is_null() {
        return INVALID_VALUE;
    }
    // SAFETY: not null, and the caller passes a live configuration.
    let stream = unsafe { (*config).stream };
    launch(function, stream)
}

fn launch(function: Handle, stream: Handle) -> Status {
    let Some(function) = index(Tag::Function, function) else {
        return INVALID_HANDLE;
    };
    let Some(kernel) = objects().functions.get(function).cloned() else {
        return INVALID_HANDLE;
    };
    on_stream(stream, |stream| engine().launch(stream, kernel))
}
