//! Raw events to observations.

use std::collections::HashMap;

use stallscope_attribution::time::Window;
use stallscope_records::abi::{self, Function, SyncTarget as RawTarget};
use stallscope_records::record::{
    Collective as RawCollective, Constructor, Copy, EventOp, FileIo, LaunchRun, OffCpu, Sync, Teardown, flag,
};
use stallscope_records::{Field, Head, Kind};

use super::rings::RawEvent;
use crate::observation::{
    Collective, CollectiveFunction, CommCreated, CopyDirection, Fact, FileOp, Observation, OffCpuReason,
    ProcessKey, SyncTarget, Thread,
};
use crate::sources::procs::ProcessEvent;

/// Communicators remembered for the keys of their children, and idle runs remembered until they come again.
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
}

/// Turns raw events into observations. It remembers communicators, whose children's keys come from their parents'.
#[derive(Debug, Default)]
pub struct Decoder {
    refused: Refused,
    comms: HashMap<(ProcessKey, u64), Lineage>,
    idle_runs: HashMap<(u32, u64), u64>,
}

/// What a communicator's children need to know of it.
#[derive(Debug, Clone, Copy)]
struct Lineage {
    key: Option<u64>,
    children: u64,
}

enum Refusal {
    Malformed,
    UnknownProcess,
    Unfinished,
    Unreadable,
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
        self.comms.retain(|(owner, _), _| *owner != process);
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
            _ => {}
        }
        let window = Window::new(head.begin_ns, head.end_ns).ok_or(Refusal::Malformed)?;
        let thread = Thread {
            process: process(tgid)?,
            tid: head.tid,
        };
        let fact = match kind {
            Kind::Collective => collective(thread, &read(bytes)?)?,
            Kind::Constructor => self.constructor(thread, &read(bytes)?)?,
            Kind::Teardown => self.teardown(thread, &read(bytes)?)?,
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
            Kind::Exec | Kind::Fork | Kind::Exit | Kind::MapExec => return Err(Refusal::Malformed),
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

    fn constructor(&mut self, thread: Thread, made: &Constructor) -> Result<Fact, Refusal> {
        let function = Function::from_number(made.function).ok_or(Refusal::Malformed)?;
        let key = if made.head.flags & flag::ID != 0 {
            Some(hash(&[&made.id]))
        } else {
            self.child_key(thread.process, function, made)
        };
        if made.head.flags & flag::RETURNED == 0 {
            return Err(Refusal::Unfinished);
        }
        if made.comm == 0 && made.head.flags & flag::UNREADABLE != 0 {
            return Err(Refusal::Unreadable);
        }
        if made.comm == 0 && made.head.result == 0 {
            // A rank that takes no part in the split.
            return Err(Refusal::Known);
        }
        if made.comm != 0 {
            if self.comms.len() >= REMEMBERED {
                self.comms.clear();
            }
            self.comms
                .insert((thread.process, made.comm), Lineage { key, children: 0 });
        }
        let number = |value: i32, flag: u16| {
            (made.head.flags & flag != 0)
                .then_some(value)
                .and_then(|value| u32::try_from(value).ok())
        };
        Ok(Fact::CommCreated(CommCreated {
            thread,
            comm: made.comm,
            key,
            rank: number(made.rank, flag::RANK),
            ranks: number(made.ranks, flag::RANKS),
            result: made.head.result,
        }))
    }

    /// Children are numbered alike on all ranks, since every rank of the parent takes part in making them.
    fn child_key(&mut self, process: ProcessKey, function: Function, made: &Constructor) -> Option<u64> {
        let parent = self.comms.get_mut(&(process, made.parent))?;
        parent.children += 1;
        let parts = [parent.key?, function as u64, parent.children];
        let color = if function == Function::CommSplit {
            made.color
        } else {
            0
        };
        Some(hash(&[
            &parts[0].to_le_bytes(),
            &parts[1].to_le_bytes(),
            &parts[2].to_le_bytes(),
            &color.to_le_bytes(),
        ]))
    }

    fn teardown(&mut self, thread: Thread, ended: &Teardown) -> Result<Fact, Refusal> {
        let function = Function::from_number(ended.function).ok_or(Refusal::Malformed)?;
        if matches!(function, Function::CommDestroy | Function::CommAbort) {
            self.comms.remove(&(thread.process, ended.comm));
        }
        Ok(Fact::CommDestroyed {
            thread,
            comm: ended.comm,
        })
    }
}

fn read<T: Field>(bytes: &[u8]) -> Result<T, Refusal> {
    T::read(bytes).ok_or(Refusal::Malformed)
}

/// FNV-1a over the parts: the same on every rank, and good enough for keys that are random or few.
fn hash(parts: &[&[u8]]) -> u64 {
    parts
        .iter()
        .flat_map(|part| part.iter())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
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
