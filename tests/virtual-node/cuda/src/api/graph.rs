//! Stream capture and graphs, as far as a trainer goes that replays parts of its step: kernels and copies of one stream.
//! Events, waits and collectives inside a capture are refused.

use std::ffi::{c_char, c_int, c_ulonglong, c_void};

use super::common::*;
use crate::engine::engine;

const CAPTURE_STATUS_NONE: c_int = 0;
const CAPTURE_STATUS_ACTIVE: c_int = 1;

fn begin(stream: Handle) -> Status {
    // The default stream cannot be captured.
    index(Tag::Stream, stream).map_or(CAPTURE_UNSUPPORTED, |stream| {
        if engine().capture_begin(stream) {
            SUCCESS
        } else {
            INVALID_VALUE
        }
    })
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture(stream: Handle) -> Status {
    begin(stream)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamBeginCapture_v2(stream: Handle, _mode: c_int) -> Status {
    begin(stream)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuThreadExchangeStreamCaptureMode(mode: *mut c_int) -> Status {
    if mode.is_null() {
        return INVALID_VALUE;
    }
    // No call of this library is unsafe during a capture, so the mode, here the default, changes nothing.
    // SAFETY: the caller's in- and out-pointer.
    unsafe { put(mode, 0) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamEndCapture(stream: Handle, graph: *mut Handle) -> Status {
    let Some(stream) = index(Tag::Stream, stream) else {
        return INVALID_HANDLE;
    };
    let Some(captured) = engine().capture_end(stream) else {
        return CAPTURE_UNMATCHED;
    };
    let mut objects = objects();
    objects.graphs.push(Some(captured));
    // SAFETY: the caller's out-pointer.
    unsafe { put(graph, handle(Tag::Graph, objects.graphs.len() - 1)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuStreamIsCapturing(stream: Handle, status: *mut c_int) -> Status {
    let capturing = match stream_index(stream) {
        Ok(stream) => engine().is_capturing(stream),
        Err(status) => return status,
    };
    let answer = match capturing {
        Some(true) => CAPTURE_STATUS_ACTIVE,
        Some(false) => CAPTURE_STATUS_NONE,
        None => return INVALID_HANDLE,
    };
    // SAFETY: the caller's out-pointer.
    unsafe { put(status, answer) }
}

/// # Safety
/// `executable` is null or valid for a write.
unsafe fn instantiate(executable: *mut Handle, graph: Handle) -> Status {
    let Some(graph) = index(Tag::Graph, graph) else {
        return INVALID_HANDLE;
    };
    let mut objects = objects();
    let Some(Some(found)) = objects.graphs.get(graph).cloned() else {
        return INVALID_HANDLE;
    };
    objects.executables.push(Some(found));
    // SAFETY: valid by the caller's contract.
    unsafe { put(executable, handle(Tag::GraphExec, objects.executables.len() - 1)) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut Handle,
    graph: Handle,
    _flags: c_ulonglong,
) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { instantiate(executable, graph) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiateWithParams(
    executable: *mut Handle,
    graph: Handle,
    _parameters: *mut c_void,
) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { instantiate(executable, graph) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphInstantiate_v2(
    executable: *mut Handle,
    graph: Handle,
    _error_node: *mut Handle,
    _log: *mut c_char,
    _log_bytes: usize,
) -> Status {
    // SAFETY: the caller's out-pointer.
    unsafe { instantiate(executable, graph) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn cuGraphGetNodes(graph: Handle, nodes: *mut Handle, count: *mut usize) -> Status {
    // Nodes have no handles of their own here, so only their number can be asked for.
    if !nodes.is_null() {
        return NOT_SUPPORTED;
    }
    let found = index(Tag::Graph, graph).and_then(|graph| objects().graphs.get(graph).cloned().flatten());
    match found {
        // SAFETY: the caller's out-pointer.
        Some(graph) => unsafe { put(count, graph.len()) },
        None => INVALID_HANDLE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphDestroy(graph: Handle) -> Status {
    let Some(graph) = index(Tag::Graph, graph) else {
        return INVALID_HANDLE;
    };
    let mut objects = objects();
    let slot = objects.graphs.get_mut(graph);
    check(slot.is_some_and(|slot| slot.take().is_some()))
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphExecDestroy(executable: Handle) -> Status {
    let Some(executable) = index(Tag::GraphExec, executable) else {
        return INVALID_HANDLE;
    };
    let mut objects = objects();
    let slot = objects.executables.get_mut(executable);
    check(slot.is_some_and(|slot| slot.take().is_some()))
}

fn launch(executable: Handle, stream: Handle) -> Status {
    let found = index(Tag::GraphExec, executable)
        .and_then(|executable| objects().executables.get(executable).cloned().flatten());
    match found {
        Some(graph) => on_stream(stream, |stream| engine().graph_launch(stream, &graph)),
        None => INVALID_HANDLE,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphLaunch(executable: Handle, stream: Handle) -> Status {
    launch(executable, stream)
}

#[unsafe(no_mangle)]
extern "C" fn cuGraphUpload(executable: Handle, stream: Handle) -> Status {
    let known = index(Tag::GraphExec, executable)
        .is_some_and(|executable| matches!(objects().executables.get(executable), Some(Some(_))));
    if known {
        on_stream(stream, |_| true)
    } else {
        INVALID_HANDLE
    }
}
