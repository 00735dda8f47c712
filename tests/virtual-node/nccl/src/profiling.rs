//! The library's second name for every function, `pnccl...`, by which a profiling layer in front of it calls the real one.
//!
//! In NCCL both names are one address. Here the second is a jump to the first: registers and stack reach it untouched, so
//! whoever watches `ncclX` sees a call of `pncclX` too.

use std::arch::naked_asm;

use crate::api::*;
use crate::extras::*;

macro_rules! second_names {
    ($($second:ident => $first:ident,)+) => {
        $(
            #[unsafe(no_mangle)]
            #[unsafe(naked)]
            extern "C" fn $second() {
                #[cfg(target_arch = "x86_64")]
                naked_asm!("jmp {}", sym $first);
                #[cfg(target_arch = "aarch64")]
                naked_asm!("b {}", sym $first);
            }
        )+
    };
}

second_names! {
    pncclAllGather => ncclAllGather,
    pncclAllReduce => ncclAllReduce,
    pncclBcast => ncclBcast,
    pncclBroadcast => ncclBroadcast,
    pncclCommAbort => ncclCommAbort,
    pncclCommCount => ncclCommCount,
    pncclCommCuDevice => ncclCommCuDevice,
    pncclCommDeregister => ncclCommDeregister,
    pncclCommDestroy => ncclCommDestroy,
    pncclCommFinalize => ncclCommFinalize,
    pncclCommGetAsyncError => ncclCommGetAsyncError,
    pncclCommInitAll => ncclCommInitAll,
    pncclCommInitRank => ncclCommInitRank,
    pncclCommInitRankConfig => ncclCommInitRankConfig,
    pncclCommInitRankScalable => ncclCommInitRankScalable,
    pncclCommRegister => ncclCommRegister,
    pncclCommShrink => ncclCommShrink,
    pncclCommSplit => ncclCommSplit,
    pncclCommUserRank => ncclCommUserRank,
    pncclCommWindowDeregister => ncclCommWindowDeregister,
    pncclCommWindowRegister => ncclCommWindowRegister,
    pncclGetErrorString => ncclGetErrorString,
    pncclGetLastError => ncclGetLastError,
    pncclGetUniqueId => ncclGetUniqueId,
    pncclGetVersion => ncclGetVersion,
    pncclGroupEnd => ncclGroupEnd,
    pncclGroupSimulateEnd => ncclGroupSimulateEnd,
    pncclGroupStart => ncclGroupStart,
    pncclMemAlloc => ncclMemAlloc,
    pncclMemFree => ncclMemFree,
    pncclRecv => ncclRecv,
    pncclRedOpCreatePreMulSum => ncclRedOpCreatePreMulSum,
    pncclRedOpDestroy => ncclRedOpDestroy,
    pncclReduce => ncclReduce,
    pncclReduceScatter => ncclReduceScatter,
    pncclResetDebugInit => ncclResetDebugInit,
    pncclSend => ncclSend,
}
