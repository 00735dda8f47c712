//! The programs that run in the kernel, one file per traced world.
//!
//! Every program first asks [`filter`] whether the process is traced and does nothing for others. Records leave
//! through [`emit`]; what does not fit into a ring is counted there.
#![no_std]
#![no_main]
// Every compiler that builds for BPF is one that takes features.
#![feature(asm_experimental_arch)]

mod block;
mod call;
mod cuda;
mod emit;
mod filter;
mod hints;
mod nccl;
mod nccl_comms;
mod nccl_waits;
mod pcie;
mod procs;
mod sched;
mod settings;
mod verbs;

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual BSD/GPL\0";
