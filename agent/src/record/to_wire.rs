//! Observations to messages; never fails.

use stallscope_attribution::reading::Reading;
use stallscope_proto::v1;
use stallscope_proto::v1::observation::Fact as Wire;

use crate::observation::{
    CollectiveFunction, CopyDirection, Fact, FileOp, GpuReading, Observation, OffCpuReason, ProcessFacts,
    ProcessKey, ProcessRole, SyncTarget, Thread,
};

/// The message of an observation.
pub(super) fn observation(observation: &Observation) -> v1::Observation {
    v1::Observation {
        start_ns: observation.window.start_ns(),
        len_ns: observation.window.len_ns(),
        fact: Some(fact(&observation.fact)),
    }
}

fn fact(fact: &Fact) -> Wire {
    match fact {
        Fact::Process(facts) => Wire::Process(process(facts)),
        Fact::ProcessGone(process) => Wire::ProcessGone(key(*process)),
        Fact::CommCreated(created) => Wire::CommCreated(v1::CommCreated {
            thread: thread(created.thread),
            comm: created.comm,
            key: created.key,
            rank: created.rank,
            ranks: created.ranks,
            result: created.result,
            is_nccl_hash: created.is_nccl_hash,
            device: created.device,
            found_in_use: created.found_in_use,
        }),
        Fact::StepWaits { thread: of, waits } => Wire::StepWaits(v1::StepWaits {
            thread: thread(*of),
            ..(&**waits).into()
        }),
        Fact::CommDestroyed { thread: of, comm } => Wire::CommDestroyed(v1::CommDestroyed {
            thread: thread(*of),
            comm: *comm,
        }),
        Fact::Collective(collective) => Wire::Collective(v1::Collective {
            thread: thread(collective.thread),
            comm: collective.comm,
            function: function(collective.function).into(),
            count: collective.count,
            datatype: collective.datatype,
            peer: collective.peer,
            stream: collective.stream,
            result: collective.result,
        }),
        Fact::GroupEnd { thread: of } => Wire::GroupEnd(v1::Thread {
            process: Some(key(of.process)),
            tid: of.tid,
        }),
        Fact::FileIo {
            thread: of,
            op,
            bytes,
            blocked_ns,
        } => Wire::FileIo(v1::FileIo {
            thread: thread(*of),
            op: file_op(*op).into(),
            bytes: *bytes,
            blocked_ns: *blocked_ns,
        }),
        Fact::FileIoFolded {
            process,
            op,
            calls,
            bytes,
            total_ns,
            blocked_ns,
        } => Wire::FileIoFolded(v1::FileIoFolded {
            process: Some(key(*process)),
            op: file_op(*op).into(),
            calls: *calls,
            bytes: *bytes,
            total_ns: *total_ns,
            blocked_ns: *blocked_ns,
        }),
        Fact::Block {
            process,
            requests,
            bytes,
            latency_ns,
        } => Wire::Block(v1::Block {
            process: Some(key(*process)),
            requests: *requests,
            bytes: *bytes,
            latency_ns: *latency_ns,
        }),
        Fact::Gpu(reading) => Wire::Gpu(gpu(reading)),
        // No sender: the node is always named.
        Fact::Port(port) => Wire::Port(v1::PortFacts::new("", port)),
        Fact::Hardware(facts) => Wire::Hardware(v1::HardwareFacts::new("", facts)),
        Fact::CpuQuota {
            process,
            throttled_ns,
            quota_ppm,
        } => Wire::CpuQuota(v1::CpuQuota {
            process: Some(key(*process)),
            throttled_ns: uint(throttled_ns),
            quota_ppm: uint(quota_ppm),
        }),
        Fact::Lost { ring, count } => Wire::Lost(v1::Lost {
            ring: (*ring).to_owned(),
            count: *count,
        }),
        Fact::ThreadCpu { thread: of, cpu_ns } => Wire::ThreadCpu(v1::ThreadCpu {
            thread: thread(*of),
            cpu_ns: *cpu_ns,
        }),
        Fact::RealtimeOffset { ns } => Wire::RealtimeOffsetNs(*ns),
        Fact::LaunchRun {
            thread: of,
            stream,
            kernels,
            graphs,
        } => Wire::LaunchRun(v1::LaunchRun {
            thread: thread(*of),
            stream: *stream,
            kernels: *kernels,
            graphs: *graphs,
        }),
        Fact::Sync {
            thread: of,
            target,
            result,
        } => Wire::Sync(v1::Sync {
            thread: thread(*of),
            target: Some(match *target {
                SyncTarget::Context => v1::sync::Target::Context(true),
                SyncTarget::Stream(stream) => v1::sync::Target::Stream(stream),
                SyncTarget::Event(event) => v1::sync::Target::Event(event),
            }),
            result: *result,
        }),
        Fact::EventRecord {
            thread: of,
            event,
            stream,
        } => Wire::EventRecord(v1::EventRecord {
            thread: thread(*of),
            event: *event,
            stream: *stream,
        }),
        Fact::StreamWait {
            thread: of,
            stream,
            event,
        } => Wire::StreamWait(v1::StreamWait {
            thread: thread(*of),
            stream: *stream,
            event: *event,
        }),
        Fact::Copy {
            thread: of,
            bytes,
            direction,
            stream,
        } => Wire::Copy(v1::Copy {
            thread: thread(*of),
            bytes: *bytes,
            direction: copy_direction(*direction).into(),
            stream: *stream,
        }),
        Fact::OffCpu {
            thread: of,
            reason,
            runnable_ns,
        } => Wire::OffCpu(v1::OffCpu {
            thread: thread(*of),
            reason: off_cpu_reason(*reason).into(),
            runnable_ns: *runnable_ns,
        }),
    }
}

fn key(key: ProcessKey) -> v1::ProcessKey {
    v1::ProcessKey {
        pid: key.pid,
        start_ticks: key.start_ticks,
    }
}

fn thread(thread: Thread) -> Option<v1::Thread> {
    Some(v1::Thread {
        process: Some(key(thread.process)),
        tid: thread.tid,
    })
}

fn process(facts: &ProcessFacts) -> v1::ObservedProcess {
    let role = match facts.role {
        ProcessRole::Gpu => v1::ProcessRole::Gpu,
        ProcessRole::Helper => v1::ProcessRole::Helper,
    };
    v1::ObservedProcess {
        key: Some(key(facts.key)),
        parent_pid: facts.parent_pid,
        comm: facts.comm.clone(),
        role: role.into(),
        works_for: facts.works_for.map(key),
        job: facts.job.clone(),
        rank: facts.rank,
        world: facts.world,
        local_rank: facts.local_rank,
        gpu: facts.gpu,
        cgroup: facts.cgroup.clone(),
        kind: facts.kind.clone(),
        model_flops_per_step: facts.model_flops_per_step,
    }
}

fn gpu(reading: &GpuReading) -> v1::GpuReading {
    v1::GpuReading {
        gpu: reading.gpu,
        pci: reading.pci.clone(),
        device: reading.device.clone(),
        pci_device_id: reading.pci_device_id,
        busy_ppm: uint(&reading.busy_ppm),
        sm_ppm: uint(&reading.sm_ppm),
        occupancy_ppm: uint(&reading.occupancy_ppm),
        tensor_ppm: uint(&reading.tensor_ppm),
        dram_ppm: uint(&reading.dram_ppm),
        pcie_rx_bytes_per_s: uint(&reading.pcie_rx_bytes_per_s),
        pcie_tx_bytes_per_s: uint(&reading.pcie_tx_bytes_per_s),
        sm_mhz: uint(&reading.sm_mhz),
        sm_max_mhz: uint(&reading.sm_max_mhz),
        clock_reasons: uint(&reading.clock_reasons),
        thermal_ns: uint(&reading.thermal_ns),
        power_limit_ns: uint(&reading.power_limit_ns),
        energy_mj: uint(&reading.energy_mj),
        temperature_c: uint(&reading.temperature_c),
        memory_used_bytes: uint(&reading.memory_used_bytes),
        process_sm_ppm: shares(&reading.process_sm_ppm),
        processes: pids(&reading.processes),
        links: v1::LinkReading::of(&reading.links),
    }
}

fn uint<T: Copy + Into<u64>>(reading: &Reading<T>) -> Option<v1::UintReading> {
    use v1::uint_reading::State;
    let state = match reading {
        Reading::NotMeasured => return None,
        Reading::Value(value) => State::Value((*value).into()),
        Reading::Unsupported => State::Unsupported(v1::Unsupported {}),
        Reading::Failed(why) => State::Failed(why.clone()),
    };
    Some(v1::UintReading { state: Some(state) })
}

fn shares(reading: &Reading<Vec<(u32, u32)>>) -> Option<v1::ProcessSharesReading> {
    use v1::process_shares_reading::State;
    let share = |(pid, sm_ppm): &(u32, u32)| v1::ProcessShare {
        pid: *pid,
        sm_ppm: *sm_ppm,
    };
    let state = match reading {
        Reading::NotMeasured => return None,
        Reading::Value(value) => State::Value(v1::ProcessShares {
            shares: value.iter().map(share).collect(),
        }),
        Reading::Unsupported => State::Unsupported(v1::Unsupported {}),
        Reading::Failed(why) => State::Failed(why.clone()),
    };
    Some(v1::ProcessSharesReading { state: Some(state) })
}

fn pids(reading: &Reading<Vec<u32>>) -> Option<v1::PidsReading> {
    use v1::pids_reading::State;
    let state = match reading {
        Reading::NotMeasured => return None,
        Reading::Value(value) => State::Value(v1::Pids { pids: value.clone() }),
        Reading::Unsupported => State::Unsupported(v1::Unsupported {}),
        Reading::Failed(why) => State::Failed(why.clone()),
    };
    Some(v1::PidsReading { state: Some(state) })
}

const fn function(function: CollectiveFunction) -> v1::CollectiveFunction {
    use v1::CollectiveFunction as To;
    match function {
        CollectiveFunction::AllReduce => To::AllReduce,
        CollectiveFunction::AllGather => To::AllGather,
        CollectiveFunction::ReduceScatter => To::ReduceScatter,
        CollectiveFunction::Broadcast => To::Broadcast,
        CollectiveFunction::Reduce => To::Reduce,
        CollectiveFunction::AllToAll => To::AllToAll,
        CollectiveFunction::Gather => To::Gather,
        CollectiveFunction::Scatter => To::Scatter,
        CollectiveFunction::Send => To::Send,
        CollectiveFunction::Recv => To::Recv,
    }
}

const fn copy_direction(direction: CopyDirection) -> v1::CopyDirection {
    match direction {
        CopyDirection::ToDevice => v1::CopyDirection::ToDevice,
        CopyDirection::ToHost => v1::CopyDirection::ToHost,
        CopyDirection::DeviceToDevice => v1::CopyDirection::DeviceToDevice,
        CopyDirection::Unknown => v1::CopyDirection::Unknown,
    }
}

const fn off_cpu_reason(reason: OffCpuReason) -> v1::OffCpuReason {
    match reason {
        OffCpuReason::Preempted => v1::OffCpuReason::Preempted,
        OffCpuReason::Sleep => v1::OffCpuReason::Sleep,
        OffCpuReason::Disk => v1::OffCpuReason::Disk,
    }
}

const fn file_op(op: FileOp) -> v1::FileOp {
    match op {
        FileOp::Read => v1::FileOp::Read,
        FileOp::Write => v1::FileOp::Write,
        FileOp::Flush => v1::FileOp::Flush,
    }
}
