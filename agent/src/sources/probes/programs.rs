//! The programs of the object: how each hooks into the kernel, and what is lost without it.

use stallscope_records::Ring;

/// How a program hooks into the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    /// First instruction of functions of a library.
    Entry,
    /// Return of functions of a library.
    Return,
    /// Tracepoints, as (category, name), attached while [`When`] holds.
    Tracepoints(When, &'static [(&'static str, &'static str)]),
}

/// When a tracepoint program is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum When {
    /// From loading on.
    Always,
    /// Where the kernel, or a module of a driver, has the event.
    Present,
    /// While at least one process is traced: they are on the path of every context switch or system call.
    Tracing,
}

/// A program of the object.
#[derive(Debug, Clone, Copy)]
pub(super) struct ProgramSpec {
    /// Its name in the object.
    pub(super) name: &'static str,
    /// Its world.
    pub(super) ring: Ring,
    /// Its hook.
    pub(super) hook: Hook,
    /// What is lost without it.
    pub(super) intent: &'static str,
}

const fn uprobe(name: &'static str, ring: Ring, hook: Hook, intent: &'static str) -> ProgramSpec {
    ProgramSpec {
        name,
        ring,
        hook,
        intent,
    }
}

const fn tracepoints(
    name: &'static str,
    ring: Ring,
    when: When,
    points: &'static [(&'static str, &'static str)],
    intent: &'static str,
) -> ProgramSpec {
    ProgramSpec {
        name,
        ring,
        hook: Hook::Tracepoints(when, points),
        intent,
    }
}

/// Every program of the object.
pub(super) const PROGRAMS: &[ProgramSpec] = &[
    uprobe(
        "nccl_call",
        Ring::Nccl,
        Hook::Entry,
        "collectives, and with them steps",
    ),
    uprobe(
        "nccl_call_return",
        Ring::Nccl,
        Hook::Return,
        "ends and results of collectives",
    ),
    uprobe(
        "nccl_group_start",
        Ring::Nccl,
        Hook::Entry,
        "nesting of groups of collectives",
    ),
    uprobe("nccl_group_end", Ring::Nccl, Hook::Entry, "groups of collectives"),
    uprobe(
        "nccl_group_end_return",
        Ring::Nccl,
        Hook::Return,
        "groups of collectives",
    ),
    uprobe(
        "nccl_init_rank",
        Ring::Nccl,
        Hook::Entry,
        "communicators made from a unique id",
    ),
    uprobe(
        "nccl_init_scalable",
        Ring::Nccl,
        Hook::Entry,
        "communicators made from many unique ids",
    ),
    uprobe(
        "nccl_init_all",
        Ring::Nccl,
        Hook::Entry,
        "communicators of one process with many GPUs",
    ),
    uprobe(
        "nccl_unique_id",
        Ring::Nccl,
        Hook::Entry,
        "ids of communicators of one process with many GPUs",
    ),
    uprobe(
        "nccl_unique_id_return",
        Ring::Nccl,
        Hook::Return,
        "ids of communicators of one process with many GPUs",
    ),
    uprobe(
        "nccl_step_state",
        Ring::Nccl,
        Hook::Entry,
        "what network steps wait for",
    ),
    uprobe(
        "nccl_step_stop",
        Ring::Nccl,
        Hook::Entry,
        "what network steps wait for",
    ),
    uprobe(
        "nccl_split",
        Ring::Nccl,
        Hook::Entry,
        "communicators split from another",
    ),
    uprobe(
        "nccl_shrink",
        Ring::Nccl,
        Hook::Entry,
        "communicators shrunk from another",
    ),
    uprobe(
        "nccl_grow",
        Ring::Nccl,
        Hook::Entry,
        "communicators grown from another",
    ),
    uprobe(
        "nccl_constructor_return",
        Ring::Nccl,
        Hook::Return,
        "communicators",
    ),
    uprobe("nccl_teardown", Ring::Nccl, Hook::Entry, "ends of communicators"),
    uprobe(
        "cuda_launch",
        Ring::Cuda,
        Hook::Entry,
        "kernel and graph launches",
    ),
    uprobe(
        "cuda_sync",
        Ring::Cuda,
        Hook::Entry,
        "synchronisations, and with them waiting for the GPU",
    ),
    uprobe("cuda_copy", Ring::Cuda, Hook::Entry, "synchronous copies"),
    uprobe(
        "cuda_return",
        Ring::Cuda,
        Hook::Return,
        "synchronisations and synchronous copies",
    ),
    uprobe("cuda_copy_async", Ring::Cuda, Hook::Entry, "asynchronous copies"),
    uprobe(
        "cuda_event_record",
        Ring::Cuda,
        Hook::Entry,
        "order between streams",
    ),
    uprobe(
        "cuda_stream_wait",
        Ring::Cuda,
        Hook::Entry,
        "order between streams",
    ),
    uprobe(
        "verbs_control",
        Ring::Verbs,
        Hook::Entry,
        "where posts of queue pairs go",
    ),
    uprobe(
        "verbs_qp_made",
        Ring::Verbs,
        Hook::Return,
        "queue pairs from their making",
    ),
    uprobe(
        "verbs_qp_extended",
        Ring::Verbs,
        Hook::Entry,
        "queue pairs that are posted to by other functions",
    ),
    uprobe(
        "verbs_qp_changed",
        Ring::Verbs,
        Hook::Entry,
        "peers and states of queue pairs",
    ),
    uprobe(
        "verbs_qp_gone",
        Ring::Verbs,
        Hook::Entry,
        "the last of queue pairs",
    ),
    uprobe(
        "verbs_post_send",
        Ring::Verbs,
        Hook::Entry,
        "posts and bytes of queue pairs",
    ),
    uprobe(
        "verbs_post_part",
        Ring::Verbs,
        Hook::Entry,
        "posts and bytes of queue pairs that are posted to by other functions",
    ),
    uprobe(
        "verbs_event_wait",
        Ring::Verbs,
        Hook::Entry,
        "events of RDMA devices, ports and queue pairs",
    ),
    uprobe(
        "verbs_event_got",
        Ring::Verbs,
        Hook::Return,
        "events of RDMA devices, ports and queue pairs",
    ),
    tracepoints(
        "sched_switch",
        Ring::Sched,
        When::Tracing,
        &[("sched", "sched_switch")],
        "time off the CPU, and time blocked in file calls",
    ),
    tracepoints(
        "sched_wakeup",
        Ring::Sched,
        When::Tracing,
        &[("sched", "sched_wakeup")],
        "waiting for a CPU after a sleep",
    ),
    tracepoints(
        "file_read",
        Ring::Block,
        When::Tracing,
        &[
            ("syscalls", "sys_enter_read"),
            ("syscalls", "sys_enter_pread64"),
            ("syscalls", "sys_enter_readv"),
            ("syscalls", "sys_enter_preadv"),
            ("syscalls", "sys_enter_preadv2"),
        ],
        "reads of files",
    ),
    tracepoints(
        "file_write",
        Ring::Block,
        When::Tracing,
        &[
            ("syscalls", "sys_enter_write"),
            ("syscalls", "sys_enter_pwrite64"),
            ("syscalls", "sys_enter_writev"),
            ("syscalls", "sys_enter_pwritev"),
            ("syscalls", "sys_enter_pwritev2"),
        ],
        "writes of files",
    ),
    tracepoints(
        "file_flush",
        Ring::Block,
        When::Tracing,
        &[
            ("syscalls", "sys_enter_fsync"),
            ("syscalls", "sys_enter_fdatasync"),
            ("syscalls", "sys_enter_sync_file_range"),
            ("syscalls", "sys_enter_syncfs"),
        ],
        "flushes of files",
    ),
    tracepoints(
        "file_done",
        Ring::Block,
        When::Tracing,
        &[
            ("syscalls", "sys_exit_read"),
            ("syscalls", "sys_exit_pread64"),
            ("syscalls", "sys_exit_readv"),
            ("syscalls", "sys_exit_preadv"),
            ("syscalls", "sys_exit_preadv2"),
            ("syscalls", "sys_exit_write"),
            ("syscalls", "sys_exit_pwrite64"),
            ("syscalls", "sys_exit_writev"),
            ("syscalls", "sys_exit_pwritev"),
            ("syscalls", "sys_exit_pwritev2"),
            ("syscalls", "sys_exit_fsync"),
            ("syscalls", "sys_exit_fdatasync"),
            ("syscalls", "sys_exit_sync_file_range"),
            ("syscalls", "sys_exit_syncfs"),
        ],
        "every file call",
    ),
    tracepoints(
        "block_issue",
        Ring::Block,
        When::Tracing,
        &[("block", "block_rq_issue")],
        "block requests of traced processes",
    ),
    tracepoints(
        "block_complete",
        Ring::Block,
        When::Tracing,
        &[("block", "block_rq_complete")],
        "latency of block requests",
    ),
    tracepoints(
        "process_exec",
        Ring::Procs,
        When::Always,
        &[("sched", "sched_process_exec")],
        "news of started programs; they are found by scanning instead",
    ),
    tracepoints(
        "process_fork",
        Ring::Procs,
        When::Always,
        &[("task", "task_newtask")],
        "helpers from birth; they are found by scanning instead",
    ),
    tracepoints(
        "process_exit",
        Ring::Procs,
        When::Always,
        &[("sched", "sched_process_exit")],
        "ends of processes, and calls that were cut off by them",
    ),
    tracepoints(
        "mmap_enter",
        Ring::Procs,
        When::Always,
        &[("syscalls", "sys_enter_mmap")],
        "news of loaded libraries; they are found by scanning instead",
    ),
    tracepoints(
        "mmap_done",
        Ring::Procs,
        When::Always,
        &[("syscalls", "sys_exit_mmap")],
        "news of loaded libraries; they are found by scanning instead",
    ),
    tracepoints(
        "pcie_error",
        Ring::Procs,
        When::Present,
        &[("ras", "aer_event")],
        "the moment of PCI Express errors",
    ),
    tracepoints(
        "gpu_fault",
        Ring::Procs,
        When::Present,
        &[("nvidia", "nvidia_dev_xid")],
        "faults of GPUs; the kernel's log and NVML tell of them too",
    ),
];
