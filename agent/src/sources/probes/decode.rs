//! Raw events to observations.

use std::collections::HashMap;

use stallscope_attribution::time::Window;
use stallscope_records::abi::{self, Function, SyncTarget as RawTarget};
use stallscope_records::record::{
    Collective as RawCollective, CommSeen, Constructor, Copy, EventOp, FileIo, LaunchRun, OffCpu, Sync,
    Teardown, flag,
};
use stallscope_records::verbs::{PostsThrough, posts_by};
use stallscope_records::{Field, Head, Kind};

use super::comms::Comms;
use super::rings::RawEvent;
use super::verbs;
use crate::observation::{
    Collective, CollectiveFunction, CopyDirection, Fact, FileOp, Observation, OffCpuReason, ProcessKey,
    SyncTarget, Thread,
};
use crate::sources::procs::ProcessEvent;

/// Idle runs remembered until they come again.
const REMEMBERED: usize = 65_536;

/// What a raw event means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decoded {
    /// A fact for the timeline.
    Observation(Observation),
    /// News for discovery.
    Process(ProcessEvent),
}

/// Events that gave nothing, by cause. They only grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Refused {
    /// Shorter than their kind, of no known kind, or inconsistent.
    pub malformed: u64,
    /// Of a process that is not known (any more).
    pub unknown_process: u64,
    /// Synchronisations and copies whose thread died inside.
    pub unfinished: u64,
    /// Calls whose arguments could not be read.
    pub unreadable: u64,
    /// Communicators that hold something else than their library's layout says.
    pub strange_comms: u64,
}

/// Turns raw events into observations. It remembers communicators, whose children's keys come from their parents'.
#[derive(Debug, Default)]
pub struct Decoder {
    refused: Refused,
    comms: Comms,
    idle_runs: HashMap<(u32, u64), u64>,
}

pub(super) enum Refusal {
    Malformed,
    UnknownProcess,
    Unfinished,
    Unreadable,
    StrangeComm,
    /// Told before, or nothing to tell.
    Known,
}

type Lookup<'a> = &'a mut dyn FnMut(u32) -> Option<ProcessKey>;

impl Decoder {
    /// A decoder that knows no communicator yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Decodes one event; `lookup` names the process with a thread group id.
    pub fn decode(&mut self, event: RawEvent<'_>, lookup: Lookup<'_>, out: &mut dyn FnMut(Decoded)) {
        match self.decoded(event, lookup) {
            Ok(decoded) => out(decoded),
            Err(Refusal::Malformed) => self.refused.malformed += 1,
            Err(Refusal::UnknownProcess) => self.refused.unknown_process += 1,
            Err(Refusal::Unfinished) => self.refused.unfinished += 1,
            Err(Refusal::Unreadable) => self.refused.unreadable += 1,
            Err(Refusal::StrangeComm) => self.refused.strange_comms += 1,
            Err(Refusal::Known) => {}
        }
    }

    /// What gave nothing so far.
    #[must_use]
    pub const fn refused(&self) -> Refused {
        self.refused
    }

    /// Forgets what is remembered about a process that is gone.
    pub fn forget(&mut self, process: ProcessKey) {
        self.comms.forget(process);
    }

    fn decoded(&mut self, event: RawEvent<'_>, lookup: Lookup<'_>) -> Result<Decoded, Refusal> {
        let mut process = |tgid| lookup(tgid).ok_or(Refusal::UnknownProcess);
        let (window, fact) = match event {
            RawEvent::Record { bytes, .. } => return self.record(bytes, &mut process),
            RawEvent::IdleRun { tgid, tid, run } => {
                let thread = Thread {
                    process: process(tgid)?,
                    tid,
                };
                if self.idle_runs.len() >= REMEMBERED {
                    self.idle_runs.clear();
                }
                if self.idle_runs.insert((tid, run.stream), run.first_ns) == Some(run.first_ns) {
                    return Err(Refusal::Known);
                }
                let window = Window::new(run.first_ns, run.last_ns).ok_or(Refusal::Malformed)?;
                let fact = Fact::LaunchRun {
                    thread,
                    stream: run.stream,
                    kernels: run.kernels,
                    graphs: run.graphs,
                };
                (window, fact)
            }
            RawEvent::Files {
                window,
                tgid,
                op,
                fold,
            } => {
                let fact = Fact::FileIoFolded {
                    process: process(tgid)?,
                    op: file_op(op as u32)?,
                    calls: fold.calls,
                    bytes: fold.bytes,
                    total_ns: fold.total_ns,
                    blocked_ns: fold.blocked_ns,
                };
                (window, fact)
            }
            RawEvent::Block { window, tgid, fold } => {
                let fact = Fact::Block {
                    process: process(tgid)?,
                    requests: u32::try_from(fold.requests).unwrap_or(u32::MAX),
                    bytes: fold.bytes,
                    latency_ns: fold.latency_ns,
                };
                (window, fact)
            }
            RawEvent::QueuePair { window, tgid, pair } => {
                (window, verbs::hardware(window, verbs::queue_pair(tgid, pair)))
            }
            RawEvent::Lost { window, ring, count } => (
                window,
                Fact::Lost {
                    ring: ring.name(),
                    count,
                },
            ),
        };
        Ok(Decoded::Observation(Observation { window, fact }))
    }

    fn record(
        &mut self,
        bytes: &[u8],
        process: &mut dyn FnMut(u32) -> Result<ProcessKey, Refusal>,
    ) -> Result<Decoded, Refusal> {
        let head = read::<Head>(bytes)?;
        let kind = Kind::from_number(head.kind).ok_or(Refusal::Malformed)?;
        let tgid = head.tgid;
        match kind {
            Kind::Exec => return Ok(Decoded::Process(ProcessEvent::Exec { tgid })),
            Kind::MapExec => return Ok(Decoded::Process(ProcessEvent::MapExec { tgid })),
            Kind::Exit => return Ok(Decoded::Process(ProcessEvent::Exit { tgid })),
            Kind::Fork => {
                let parent = u32::try_from(head.result).map_err(|_| Refusal::Malformed)?;
                return Ok(Decoded::Process(ProcessEvent::Fork { parent, child: tgid }));
            }
            Kind::PostsThrough => {
                let PostsThrough { address, by, .. } = read(bytes)?;
                if by > posts_by::LAST {
                    return Err(Refusal::Malformed);
                }
                return Ok(Decoded::Process(ProcessEvent::PostsThrough { tgid, address, by }));
            }
            _ => {}
        }
        let window = Window::new(head.begin_ns, head.end_ns).ok_or(Refusal::Malformed)?;
        let thread = Thread {
            process: process(tgid)?,
            tid: head.tid,
        };
        let fact = match kind {
            Kind::Collective => collective(thread, &read(bytes)?)?,
            Kind::Constructor => Fact::CommCreated(self.comms.made(thread, &read::<Constructor>(bytes)?)?),
            Kind::CommSeen => Fact::CommCreated(self.comms.seen(thread, &read::<CommSeen>(bytes)?)?),
            Kind::Teardown => self.comms.ended(thread, &read::<Teardown>(bytes)?)?,
            Kind::GroupEnd => Fact::GroupEnd { thread },
            Kind::Sync => sync(thread, &read(bytes)?)?,
            Kind::Copy => copy(thread, &read(bytes)?)?,
            Kind::EventRecord => {
                let op = read::<EventOp>(bytes)?;
                Fact::EventRecord {
                    thread,
                    event: op.event,
                    stream: op.stream,
                }
            }
            Kind::StreamWait => {
                let op = read::<EventOp>(bytes)?;
                Fact::StreamWait {
                    thread,
                    stream: op.stream,
                    event: op.event,
                }
            }
            Kind::LaunchRun => self.launch_run(thread, &read(bytes)?)?,
            Kind::OffCpu => off_cpu(thread, &read(bytes)?)?,
            Kind::FileIo => file_io(thread, &read(bytes)?)?,
            Kind::VerbsEvent => {
                // The call waited for it; it came at its end.
                let window =
                    Window::new(head.end_ns, head.end_ns.saturating_add(1)).ok_or(Refusal::Malformed)?;
                let fact = verbs::hardware(window, verbs::event(&read(bytes)?));
                return Ok(Decoded::Observation(Observation { window, fact }));
            }
            Kind::Exec | Kind::Fork | Kind::Exit | Kind::MapExec | Kind::PostsThrough | Kind::QpGone => {
                return Err(Refusal::Malformed);
            }
        };
        Ok(Decoded::Observation(Observation { window, fact }))
    }

    /// A run told while it was idle comes again when its thread moves on.
    fn launch_run(&mut self, thread: Thread, run: &LaunchRun) -> Result<Fact, Refusal> {
        let told = self.idle_runs.remove(&(thread.tid, run.stream));
        if told == Some(run.head.begin_ns) {
            return Err(Refusal::Known);
        }
        Ok(Fact::LaunchRun {
            thread,
            stream: run.stream,
            kernels: run.kernels,
            graphs: run.graphs,
        })
    }
}

fn read<T: Field>(bytes: &[u8]) -> Result<T, Refusal> {
    T::read(bytes).ok_or(Refusal::Malformed)
}

fn collective(thread: Thread, call: &RawCollective) -> Result<Fact, Refusal> {
    if call.head.flags & flag::UNREADABLE != 0 {
        return Err(Refusal::Unreadable);
    }
    let function = match Function::from_number(call.function).ok_or(Refusal::Malformed)? {
        Function::AllReduce => CollectiveFunction::AllReduce,
        Function::AllGather => CollectiveFunction::AllGather,
        Function::ReduceScatter => CollectiveFunction::ReduceScatter,
        Function::Broadcast => CollectiveFunction::Broadcast,
        Function::Reduce => CollectiveFunction::Reduce,
        Function::AllToAll => CollectiveFunction::AllToAll,
        Function::Gather => CollectiveFunction::Gather,
        Function::Scatter => CollectiveFunction::Scatter,
        Function::Send => CollectiveFunction::Send,
        Function::Recv => CollectiveFunction::Recv,
        _ => return Err(Refusal::Malformed),
    };
    Ok(Fact::Collective(Collective {
        thread,
        comm: call.comm,
        function,
        count: call.count,
        datatype: call.datatype,
        peer: (call.head.flags & flag::PEER != 0).then_some(call.peer),
        stream: call.stream,
        result: (call.head.flags & flag::RETURNED != 0).then_some(call.head.result),
    }))
}

fn sync(thread: Thread, call: &Sync) -> Result<Fact, Refusal> {
    if call.head.flags & flag::RETURNED == 0 {
        return Err(Refusal::Unfinished);
    }
    let target = match call.target {
        target if target == RawTarget::Context as u32 => SyncTarget::Context,
        target if target == RawTarget::Stream as u32 => SyncTarget::Stream(call.handle),
        target if target == RawTarget::Event as u32 => SyncTarget::Event(call.handle),
        _ => return Err(Refusal::Malformed),
    };
    Ok(Fact::Sync {
        thread,
        target,
        result: call.head.result,
    })
}

fn copy(thread: Thread, call: &Copy) -> Result<Fact, Refusal> {
    let is_async = call.head.flags & flag::ASYNC != 0;
    if !is_async && call.head.flags & flag::RETURNED == 0 {
        return Err(Refusal::Unfinished);
    }
    let direction = match call.direction {
        direction if direction == abi::Direction::Unknown as u32 => CopyDirection::Unknown,
        direction if direction == abi::Direction::ToDevice as u32 => CopyDirection::ToDevice,
        direction if direction == abi::Direction::ToHost as u32 => CopyDirection::ToHost,
        direction if direction == abi::Direction::DeviceToDevice as u32 => CopyDirection::DeviceToDevice,
        _ => return Err(Refusal::Malformed),
    };
    Ok(Fact::Copy {
        thread,
        bytes: call.bytes,
        direction,
        stream: is_async.then_some(call.stream),
    })
}

fn off_cpu(thread: Thread, off: &OffCpu) -> Result<Fact, Refusal> {
    let reason = match off.reason {
        reason if reason == abi::OffCpuReason::Preempted as u32 => OffCpuReason::Preempted,
        reason if reason == abi::OffCpuReason::Sleep as u32 => OffCpuReason::Sleep,
        reason if reason == abi::OffCpuReason::Disk as u32 => OffCpuReason::Disk,
        _ => return Err(Refusal::Malformed),
    };
    Ok(Fact::OffCpu {
        thread,
        reason,
        runnable_ns: off.runnable_ns,
    })
}

fn file_op(op: u32) -> Result<FileOp, Refusal> {
    match op {
        op if op == abi::FileOp::Read as u32 => Ok(FileOp::Read),
        op if op == abi::FileOp::Write as u32 => Ok(FileOp::Write),
        op if op == abi::FileOp::Flush as u32 => Ok(FileOp::Flush),
        _ => Err(Refusal::Malformed),
    }
}

fn file_io(thread: Thread, call: &FileIo) -> Result<Fact, Refusal> {
    Ok(Fact::FileIo {
        thread,
        op: file_op(call.op)?,
        bytes: call.bytes,
        blocked_ns: call.blocked_ns,
    })
}

#[cfg(test)]
mod tests;
