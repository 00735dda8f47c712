//! Messages to observations. A message that is not one is refused with the field that is wrong.

use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;
use stallscope_proto::convert::WireError;
use stallscope_proto::v1;
use stallscope_proto::v1::observation::Fact as Wire;

use crate::observation::{
    Collective, CollectiveFunction, CommCreated, CopyDirection, Fact, FileOp, GpuReading, Observation,
    OffCpuReason, ProcessFacts, ProcessKey, ProcessRole, SyncTarget, Thread,
};
use crate::sources::nccl_profiler;

/// Rings by name; one that this version does not know is `other`.
const RINGS: [&str; 8] = [
    "nccl",
    "cuda",
    "sched",
    "block",
    "procs",
    "verbs",
    "agent",
    nccl_profiler::RING,
];

/// The observation of a message.
pub(super) fn observation(wire: v1::Observation) -> Result<Observation, WireError> {
    let window = wire
        .start_ns
        .checked_add(wire.len_ns)
        .and_then(|end_ns| Window::new(wire.start_ns, end_ns))
        .ok_or(WireError::Time { field: "observation" })?;
    let fact = fact(wire.fact.ok_or(WireError::Unknown {
        field: "observation.fact",
        value: 0,
    })?)?;
    Ok(Observation { window, fact })
}

fn fact(wire: Wire) -> Result<Fact, WireError> {
    Ok(match wire {
        Wire::Process(facts) => Fact::Process(Box::new(process(facts)?)),
        Wire::ProcessGone(process) => Fact::ProcessGone(key(Some(process))?),
        Wire::CommCreated(created) => Fact::CommCreated(CommCreated {
            thread: thread(created.thread)?,
            comm: created.comm,
            key: created.key,
            rank: created.rank,
            ranks: created.ranks,
            result: created.result,
            is_nccl_hash: created.is_nccl_hash,
            device: created.device,
            found_in_use: created.found_in_use,
        }),
        Wire::StepWaits(waits) => Fact::StepWaits {
            waits: Box::new((&waits).try_into()?),
            thread: thread(waits.thread)?,
        },
        Wire::CommDestroyed(destroyed) => Fact::CommDestroyed {
            thread: thread(destroyed.thread)?,
            comm: destroyed.comm,
        },
        Wire::Collective(collective) => Fact::Collective(Collective {
            function: function(collective.function())?,
            thread: thread(collective.thread)?,
            comm: collective.comm,
            count: collective.count,
            datatype: collective.datatype,
            peer: collective.peer,
            stream: collective.stream,
            result: collective.result,
        }),
        Wire::GroupEnd(of) => Fact::GroupEnd {
            thread: thread(Some(of))?,
        },
        Wire::LaunchRun(run) => Fact::LaunchRun {
            thread: thread(run.thread)?,
            stream: run.stream,
            kernels: run.kernels,
            graphs: run.graphs,
        },
        Wire::Sync(sync) => Fact::Sync {
            target: match sync.target.ok_or(WireError::Missing { field: "sync.target" })? {
                v1::sync::Target::Context(_) => SyncTarget::Context,
                v1::sync::Target::Stream(stream) => SyncTarget::Stream(stream),
                v1::sync::Target::Event(event) => SyncTarget::Event(event),
            },
            thread: thread(sync.thread)?,
            result: sync.result,
        },
        Wire::EventRecord(record) => Fact::EventRecord {
            thread: thread(record.thread)?,
            event: record.event,
            stream: record.stream,
        },
        Wire::StreamWait(wait) => Fact::StreamWait {
            thread: thread(wait.thread)?,
            stream: wait.stream,
            event: wait.event,
        },
        Wire::Copy(copy) => Fact::Copy {
            direction: copy_direction(copy.direction())?,
            thread: thread(copy.thread)?,
            bytes: copy.bytes,
            stream: copy.stream,
        },
        Wire::OffCpu(off) => Fact::OffCpu {
            reason: off_cpu_reason(off.reason())?,
            thread: thread(off.thread)?,
            runnable_ns: off.runnable_ns,
        },
        wire => process_or_device(wire)?,
    })
}

fn process_or_device(wire: Wire) -> Result<Fact, WireError> {
    Ok(match wire {
        Wire::FileIo(io) => Fact::FileIo {
            op: file_op(io.op())?,
            thread: thread(io.thread)?,
            bytes: io.bytes,
            blocked_ns: io.blocked_ns,
        },
        Wire::FileIoFolded(io) => Fact::FileIoFolded {
            op: file_op(io.op())?,
            process: key(io.process)?,
            calls: io.calls,
            bytes: io.bytes,
            total_ns: io.total_ns,
            blocked_ns: io.blocked_ns,
        },
        Wire::Block(block) => Fact::Block {
            process: key(block.process)?,
            requests: block.requests,
            bytes: block.bytes,
            latency_ns: block.latency_ns,
        },
        Wire::Gpu(reading) => Fact::Gpu(Box::new(gpu(reading)?)),
        Wire::Port(port) => Fact::Port(Box::new(port.into_facts("")?)),
        Wire::Hardware(facts) => Fact::Hardware(Box::new(facts.into_facts("")?)),
        Wire::CpuQuota(quota) => Fact::CpuQuota {
            process: key(quota.process)?,
            throttled_ns: uint("quota.throttled_ns", quota.throttled_ns)?,
            quota_ppm: uint("quota.quota_ppm", quota.quota_ppm)?,
        },
        Wire::Lost(lost) => Fact::Lost {
            ring: RINGS
                .into_iter()
                .find(|ring| *ring == lost.ring)
                .unwrap_or("other"),
            count: lost.count,
        },
        Wire::ThreadCpu(cpu) => Fact::ThreadCpu {
            thread: thread(cpu.thread)?,
            cpu_ns: cpu.cpu_ns,
        },
        Wire::RealtimeOffsetNs(ns) => Fact::RealtimeOffset { ns },
        _ => {
            return Err(WireError::Unknown {
                field: "observation.fact",
                value: 0,
            });
        }
    })
}

fn key(wire: Option<v1::ProcessKey>) -> Result<ProcessKey, WireError> {
    let wire = wire.ok_or(WireError::Missing { field: "process" })?;
    Ok(ProcessKey {
        pid: wire.pid,
        start_ticks: wire.start_ticks,
    })
}

fn thread(wire: Option<v1::Thread>) -> Result<Thread, WireError> {
    let wire = wire.ok_or(WireError::Missing { field: "thread" })?;
    Ok(Thread {
        process: key(wire.process)?,
        tid: wire.tid,
    })
}

fn process(wire: v1::ObservedProcess) -> Result<ProcessFacts, WireError> {
    Ok(ProcessFacts {
        role: match wire.role() {
            v1::ProcessRole::Gpu => ProcessRole::Gpu,
            v1::ProcessRole::Helper => ProcessRole::Helper,
            v1::ProcessRole::Unspecified => return Err(unknown("process.role", wire.role)),
        },
        key: key(wire.key)?,
        parent_pid: wire.parent_pid,
        comm: wire.comm,
        works_for: wire.works_for.map(|owner| key(Some(owner))).transpose()?,
        job: wire.job,
        rank: wire.rank,
        world: wire.world,
        local_rank: wire.local_rank,
        gpu: wire.gpu,
        cgroup: wire.cgroup,
        kind: wire.kind,
        model_flops_per_step: wire.model_flops_per_step,
    })
}

fn gpu(wire: v1::GpuReading) -> Result<GpuReading, WireError> {
    Ok(GpuReading {
        gpu: wire.gpu,
        pci: wire.pci,
        device: wire.device,
        pci_device_id: wire.pci_device_id,
        busy_ppm: uint("gpu.busy_ppm", wire.busy_ppm)?,
        sm_ppm: uint("gpu.sm_ppm", wire.sm_ppm)?,
        occupancy_ppm: uint("gpu.occupancy_ppm", wire.occupancy_ppm)?,
        tensor_ppm: uint("gpu.tensor_ppm", wire.tensor_ppm)?,
        dram_ppm: uint("gpu.dram_ppm", wire.dram_ppm)?,
        pcie_rx_bytes_per_s: uint("gpu.pcie_rx_bytes_per_s", wire.pcie_rx_bytes_per_s)?,
        pcie_tx_bytes_per_s: uint("gpu.pcie_tx_bytes_per_s", wire.pcie_tx_bytes_per_s)?,
        sm_mhz: uint("gpu.sm_mhz", wire.sm_mhz)?,
        sm_max_mhz: uint("gpu.sm_max_mhz", wire.sm_max_mhz)?,
        clock_reasons: uint("gpu.clock_reasons", wire.clock_reasons)?,
        thermal_ns: uint("gpu.thermal_ns", wire.thermal_ns)?,
        power_limit_ns: uint("gpu.power_limit_ns", wire.power_limit_ns)?,
        energy_mj: uint("gpu.energy_mj", wire.energy_mj)?,
        temperature_c: uint("gpu.temperature_c", wire.temperature_c)?,
        memory_used_bytes: uint("gpu.memory_used_bytes", wire.memory_used_bytes)?,
        process_sm_ppm: shares(wire.process_sm_ppm)?,
        processes: pids(wire.processes)?,
        links: v1::LinkReading::into_reading("gpu.links", wire.links)?,
    })
}

fn uint<T: TryFrom<u64>>(
    field: &'static str,
    wire: Option<v1::UintReading>,
) -> Result<Reading<T>, WireError> {
    use v1::uint_reading::State;
    let Some(wire) = wire else {
        return Ok(Reading::NotMeasured);
    };
    match wire.state {
        Some(State::Value(value)) => T::try_from(value)
            .map(Reading::Value)
            .map_err(|_| WireError::Unknown {
                field,
                value: i64::try_from(value).unwrap_or(i64::MAX),
            }),
        Some(State::Unsupported(_)) => Ok(Reading::Unsupported),
        Some(State::Failed(why)) => Ok(Reading::Failed(why)),
        None => Err(WireError::Unknown { field, value: 0 }),
    }
}

fn shares(wire: Option<v1::ProcessSharesReading>) -> Result<Reading<Vec<(u32, u32)>>, WireError> {
    use v1::process_shares_reading::State;
    let Some(wire) = wire else {
        return Ok(Reading::NotMeasured);
    };
    match wire.state {
        Some(State::Value(value)) => Ok(Reading::Value(
            value
                .shares
                .iter()
                .map(|share| (share.pid, share.sm_ppm))
                .collect(),
        )),
        Some(State::Unsupported(_)) => Ok(Reading::Unsupported),
        Some(State::Failed(why)) => Ok(Reading::Failed(why)),
        None => Err(WireError::Unknown {
            field: "gpu.process_sm_ppm",
            value: 0,
        }),
    }
}

fn pids(wire: Option<v1::PidsReading>) -> Result<Reading<Vec<u32>>, WireError> {
    use v1::pids_reading::State;
    let Some(wire) = wire else {
        return Ok(Reading::NotMeasured);
    };
    match wire.state {
        Some(State::Value(value)) => Ok(Reading::Value(value.pids)),
        Some(State::Unsupported(_)) => Ok(Reading::Unsupported),
        Some(State::Failed(why)) => Ok(Reading::Failed(why)),
        None => Err(WireError::Unknown {
            field: "gpu.processes",
            value: 0,
        }),
    }
}

fn unknown(field: &'static str, value: i32) -> WireError {
    WireError::Unknown {
        field,
        value: value.into(),
    }
}

fn function(wire: v1::CollectiveFunction) -> Result<CollectiveFunction, WireError> {
    use v1::CollectiveFunction as From;
    Ok(match wire {
        From::AllReduce => CollectiveFunction::AllReduce,
        From::AllGather => CollectiveFunction::AllGather,
        From::ReduceScatter => CollectiveFunction::ReduceScatter,
        From::Broadcast => CollectiveFunction::Broadcast,
        From::Reduce => CollectiveFunction::Reduce,
        From::AllToAll => CollectiveFunction::AllToAll,
        From::Gather => CollectiveFunction::Gather,
        From::Scatter => CollectiveFunction::Scatter,
        From::Send => CollectiveFunction::Send,
        From::Recv => CollectiveFunction::Recv,
        From::Unspecified => return Err(unknown("collective.function", 0)),
    })
}

fn copy_direction(wire: v1::CopyDirection) -> Result<CopyDirection, WireError> {
    Ok(match wire {
        v1::CopyDirection::ToDevice => CopyDirection::ToDevice,
        v1::CopyDirection::ToHost => CopyDirection::ToHost,
        v1::CopyDirection::DeviceToDevice => CopyDirection::DeviceToDevice,
        v1::CopyDirection::Unknown => CopyDirection::Unknown,
        v1::CopyDirection::Unspecified => return Err(unknown("copy.direction", 0)),
    })
}

fn off_cpu_reason(wire: v1::OffCpuReason) -> Result<OffCpuReason, WireError> {
    Ok(match wire {
        v1::OffCpuReason::Preempted => OffCpuReason::Preempted,
        v1::OffCpuReason::Sleep => OffCpuReason::Sleep,
        v1::OffCpuReason::Disk => OffCpuReason::Disk,
        v1::OffCpuReason::Unspecified => return Err(unknown("off_cpu.reason", 0)),
    })
}

fn file_op(wire: v1::FileOp) -> Result<FileOp, WireError> {
    Ok(match wire {
        v1::FileOp::Read => FileOp::Read,
        v1::FileOp::Write => FileOp::Write,
        v1::FileOp::Flush => FileOp::Flush,
        v1::FileOp::Unspecified => return Err(unknown("file_io.op", 0)),
    })
}
