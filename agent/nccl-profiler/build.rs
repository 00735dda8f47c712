//! How the library is linked.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,libnccl-profiler-stallscope.so");
    // NCCL closes its plugin with the last communicator, and the thread that switches lives on.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
}
