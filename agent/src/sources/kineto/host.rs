//! What an operator, an annotation, a Python function or a runtime call means for the GPU, by its name.

use stallscope_attribution::activity::Doing;

/// What a thread does in a runtime or driver call, NVIDIA's or AMD's.
pub(super) fn of_call(name: &str) -> Doing {
    const PARTS: [(&str, Doing); 17] = [
        ("Synchronize", Doing::Sync),
        ("Malloc", Doing::Alloc),
        ("HostAlloc", Doing::Alloc),
        ("HostRegister", Doing::Alloc),
        ("MemCreate", Doing::Alloc),
        ("MemAlloc", Doing::Alloc),
        ("MemMap", Doing::Alloc),
        ("MemUnmap", Doing::Alloc),
        ("MemRelease", Doing::Alloc),
        ("Free", Doing::Alloc),
        ("ModuleLoad", Doing::Compile),
        ("LibraryLoad", Doing::Compile),
        ("cuLink", Doing::Compile),
        ("rtcCompile", Doing::Compile),
        ("GraphInstantiate", Doing::Compile),
        ("StreamBeginCapture", Doing::Compile),
        ("StreamEndCapture", Doing::Compile),
    ];
    named(name, &PARTS).unwrap_or(Doing::Issue)
}

/// What a thread does in an operator, an annotation or a Python function.
pub(super) fn of_operator(name: &str) -> Doing {
    const PARTS: [(&str, Doing); 14] = [
        ("enumerate(DataLoader)#", Doing::Data),
        ("save_checkpoint", Doing::Checkpoint),
        ("state_dict_saver.py(", Doing::Checkpoint),
        ("gc.collect", Doing::Gc),
        ("<built-in function collect>", Doing::Gc),
        ("<built-in method collect of module", Doing::Gc),
        ("Python GC", Doing::Gc),
        ("_dynamo/convert_frame.py(", Doing::Compile),
        ("_inductor/compile_fx.py(", Doing::Compile),
        ("triton/compiler/compiler.py(", Doing::Compile),
        ("capture_begin", Doing::Compile),
        ("aten::item", Doing::Sync),
        ("aten::_local_scalar_dense", Doing::Sync),
        ("aten::is_nonzero", Doing::Sync),
    ];
    if name.contains("torch/serialization.py(") && name.ends_with(": save") {
        return Doing::Checkpoint;
    }
    named(name, &PARTS).unwrap_or(Doing::Issue)
}

fn named(name: &str, parts: &[(&str, Doing)]) -> Option<Doing> {
    parts
        .iter()
        .find(|(part, _)| name.contains(part))
        .map(|(_, doing)| *doing)
}

/// Whether a call puts work on a stream.
pub(super) fn is_launch(name: &str) -> bool {
    ["Launch", "Memcpy", "Memset"]
        .iter()
        .any(|part| name.contains(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_real_traces_mean_what_they_mean() {
        let operators = [
            (
                "enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__",
                Doing::Data,
            ),
            (
                "enumerate(DataLoader)#_MultiProcessingDataLoaderIter.__next__",
                Doing::Data,
            ),
            ("torch/serialization.py(944): save", Doing::Checkpoint),
            ("torch/serialization.py(1200): load", Doing::Issue),
            ("<built-in function collect>", Doing::Gc),
            ("aten::conv2d", Doing::Issue),
            ("aten::item", Doing::Sync),
        ];
        for (name, doing) in operators {
            assert_eq!(of_operator(name), doing, "{name}");
        }
        let calls = [
            ("cudaStreamSynchronize", Doing::Sync),
            ("hipMalloc", Doing::Alloc),
            ("cudaFree", Doing::Alloc),
            ("cudaLaunchKernel", Doing::Issue),
            ("cuModuleLoadData", Doing::Compile),
        ];
        for (name, doing) in calls {
            assert_eq!(of_call(name), doing, "{name}");
        }
        assert!(
            is_launch("cudaGraphLaunch")
                && is_launch("hipExtModuleLaunchKernel")
                && is_launch("cuLaunchKernelEx")
        );
        assert!(!is_launch("cudaEventQuery"));
    }
}
