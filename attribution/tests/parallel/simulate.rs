//! A job of tensor, pipeline, data and expert parallelism, played call by call.
//!
//! Every rank runs its program on one stream: compute, and calls that end when the last of their ranks has come and
//! the bytes have moved. Nothing here knows how blame is found: what a fault costs is the difference between two plays.

use std::collections::BTreeMap;

use stallscope_attribution::activity::{
    Collective, Declared, Device, KernelClass, Launch, Peer, RankTrace, Record, TraceJob, Work,
};
use stallscope_attribution::facts::GpuSubject;
use stallscope_attribution::time::Window;

const US: u64 = 1_000;
/// GPUs of a node.
pub(super) const GPUS: usize = 8;

/// The shape of a job.
#[derive(Debug, Clone)]
pub(super) struct Shape {
    pub(super) tensor: usize,
    pub(super) pipeline: usize,
    pub(super) data: usize,
    pub(super) micro_batches: usize,
    pub(super) steps: usize,
    /// Whether a collective of all ranks ends each step.
    pub(super) world: bool,
    /// Compute of one micro-batch's half layer, ns.
    pub(super) compute_ns: u64,
}

impl Shape {
    pub(super) fn ranks(&self) -> usize {
        self.tensor * self.pipeline * self.data
    }

    /// Stage, replica and tensor rank of a rank, as Megatron counts.
    pub(super) fn place(&self, rank: usize) -> (usize, usize, usize) {
        let plane = self.tensor * self.data;
        (rank / plane, rank % plane / self.tensor, rank % self.tensor)
    }

    fn rank(&self, (stage, replica, tensor): (usize, usize, usize)) -> usize {
        stage * self.tensor * self.data + replica * self.tensor + tensor
    }
}

/// One thing a rank does.
#[derive(Debug, Clone, Copy)]
pub(super) enum Call {
    /// Computes, ns.
    Compute(u64),
    /// Meets all ranks of a communicator.
    Group(u64),
    /// Meets the receiver.
    Send(usize),
    /// Meets the sender.
    Receive(usize),
}

/// What each rank did: when, and what.
pub(super) type Played = Vec<Vec<(Window, Call)>>;

/// Members of each communicator.
type Members = BTreeMap<u64, Vec<usize>>;

const WORLD: u64 = 1;

fn communicators(shape: &Shape) -> Members {
    let mut members = Members::new();
    for rank in 0..shape.ranks() {
        let (stage, replica, tensor) = shape.place(rank);
        let (stage, replica, tensor) = (stage as u64, replica as u64, tensor as u64);
        for group in [
            WORLD,
            1_000 + stage * 100 + replica,
            2_000 + stage * 100 + tensor,
            3_000 + stage * 100 + tensor,
        ] {
            members.entry(group).or_default().push(rank);
        }
    }
    members
}

/// A rank's program. `compute` gives how long each piece takes, by step and piece.
fn program(shape: &Shape, rank: usize, mut compute: impl FnMut(usize) -> u64) -> Vec<Call> {
    let (stage, replica, tensor) = shape.place(rank);
    let tensor_group = 1_000 + (stage * 100 + replica) as u64;
    let expert_group = 3_000 + (stage * 100 + tensor) as u64;
    let data_group = 2_000 + (stage * 100 + tensor) as u64;
    let before = (stage > 0).then(|| shape.rank((stage - 1, replica, tensor)));
    let after = (stage + 1 < shape.pipeline).then(|| shape.rank((stage + 1, replica, tensor)));
    let mut calls = Vec::new();
    for step in 0..shape.steps {
        for _ in 0..shape.micro_batches {
            calls.extend(before.map(Call::Receive));
            calls.extend([Call::Compute(compute(step)), Call::Group(tensor_group)]);
            calls.extend([Call::Compute(compute(step)), Call::Group(expert_group)]);
            calls.push(Call::Group(tensor_group));
            calls.extend(after.map(Call::Send));
        }
        for _ in 0..shape.micro_batches {
            calls.extend(after.map(Call::Receive));
            calls.extend([Call::Compute(2 * compute(step)), Call::Group(tensor_group)]);
            calls.extend([Call::Compute(2 * compute(step)), Call::Group(expert_group)]);
            calls.push(Call::Group(tensor_group));
            calls.extend(before.map(Call::Send));
        }
        calls.push(Call::Group(data_group));
        calls.extend(shape.world.then_some(Call::Group(WORLD)));
    }
    calls
}

/// Plays a job. `pace` gives a rank's compute in a step in thousandths of the usual.
pub(super) fn play(shape: &Shape, pace: impl Fn(usize, usize) -> u64) -> Played {
    let members = communicators(shape);
    let mut noise = 0x9e37_79b9_u64;
    let programs: Vec<Vec<Call>> = (0..shape.ranks())
        .map(|rank| {
            program(shape, rank, |step| {
                // Two in a hundred, so that no two ranks come in the same nanosecond.
                noise = noise
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let jitter = 980 + (noise >> 33) % 40;
                shape.compute_ns * pace(rank, step) / 1000 * jitter / 1000
            })
        })
        .collect();
    run(&programs, &members)
}

/// A call as all its ranks name it.
fn key(call: Call, rank: usize) -> Option<(u64, usize, usize)> {
    match call {
        Call::Compute(_) => None,
        Call::Group(group) => Some((group, 0, 0)),
        Call::Send(to) => Some((0, rank, to)),
        Call::Receive(from) => Some((0, from, rank)),
    }
}

fn run(programs: &[Vec<Call>], members: &Members) -> Played {
    let mut played: Played = vec![Vec::new(); programs.len()];
    let mut now = vec![1_000_000_u64; programs.len()];
    let mut at = vec![0_usize; programs.len()];
    // Who has come to a call and when; a rank is at one call at a time.
    let mut come: BTreeMap<(u64, usize, usize), Vec<(usize, u64)>> = BTreeMap::new();
    let mut blocked = vec![false; programs.len()];
    loop {
        let mut moved = false;
        for rank in 0..programs.len() {
            while !blocked[rank] && at[rank] < programs[rank].len() {
                moved = true;
                let call = programs[rank][at[rank]];
                let Some(key) = key(call, rank) else {
                    let Call::Compute(ns) = call else { break };
                    played[rank].push((window(now[rank], now[rank] + ns), call));
                    now[rank] += ns;
                    at[rank] += 1;
                    continue;
                };
                let here = come.entry(key).or_default();
                here.push((rank, now[rank]));
                blocked[rank] = true;
                let needed = members.get(&key.0).map_or(2, Vec::len);
                if here.len() == needed {
                    let end = here.iter().map(|(_, came)| *came).max().unwrap_or(0) + 20 * US;
                    for (rank, came) in come.remove(&key).unwrap_or_default() {
                        played[rank].push((window(came, end), programs[rank][at[rank]]));
                        now[rank] = end;
                        at[rank] += 1;
                        blocked[rank] = false;
                    }
                }
            }
        }
        if !moved {
            return played;
        }
    }
}

pub(super) fn window(start: u64, end: u64) -> Window {
    Window::new(start, end).expect("a window")
}

/// Time from coming to a call until its last rank came, over all ranks, ns.
pub(super) fn waited_ns(played: &Played) -> u64 {
    let calls = played
        .iter()
        .flatten()
        .filter(|(_, call)| !matches!(call, Call::Compute(_)));
    calls.map(|(window, _)| window.len_ns() - 20 * US).sum()
}

/// What a profiler on each rank would have recorded. `clock` maps a rank's times to its own clock.
pub(super) fn traces(shape: &Shape, played: &Played, clock: impl Fn(usize, u64) -> u64) -> TraceJob {
    let ranks = played.iter().enumerate().map(|(rank, calls)| {
        let records = calls.iter().enumerate().map(|(at, (ran, call))| {
            let ran = window(clock(rank, ran.start_ns()), clock(rank, ran.end_ns()));
            record(shape, rank, ran, *call, at)
        });
        RankTrace {
            devices: vec![Device {
                subject: subject(shape, rank),
                records: records.collect(),
            }],
            host: Vec::new(),
            repeated: Vec::new(),
            math: Vec::new(),
            marks: Vec::new(),
            main_thread: Some(1),
            realtime_offset_ns: None,
            gaps: Vec::new(),
        }
    });
    TraceJob {
        job: "generated".into(),
        kind: "unknown".into(),
        declared: Declared::default(),
        ranks: ranks.collect(),
    }
}

fn subject(shape: &Shape, rank: usize) -> GpuSubject {
    GpuSubject {
        job: "generated".into(),
        node: format!("node{}", rank / GPUS),
        gpu: u32::try_from(rank % GPUS).expect("small"),
        pci: String::new(),
        device: String::new(),
        rank: u32::try_from(rank).expect("small"),
        world: u32::try_from(shape.ranks()).expect("small"),
        pid: 0,
    }
}

fn record(shape: &Shape, rank: usize, ran: Window, call: Call, at: usize) -> Record {
    let number = |rank: usize| u32::try_from(rank).expect("small");
    let meets = |group, ranks, message, peer| {
        Some(Collective {
            group,
            ranks,
            message,
            peer,
            bus_bytes: Some(1 << 20),
        })
    };
    let pipe = |rank: usize| {
        let (_, replica, tensor) = shape.place(rank);
        10_000 + (replica * 100 + tensor) as u64
    };
    let (collective, token) = match call {
        // Forward and backward are different kernels, and so are the two halves of a layer.
        Call::Compute(_) => (None, 10 + at as u64 % 5),
        Call::Group(group) => {
            let ranks = communicators_of(shape, group);
            (meets(group, number(ranks), group / 1000, None), group / 1000)
        }
        Call::Send(to) => (meets(pipe(rank), 0, 9, Some(Peer::To(number(to)))), 8),
        Call::Receive(from) => (meets(pipe(rank), 0, 9, Some(Peer::From(number(from)))), 9),
    };
    let work = match call {
        Call::Compute(_) => KernelClass::Gemm,
        _ => KernelClass::Communication,
    };
    Record {
        window: ran,
        work: Work::Kernel(work),
        stream: 7,
        launch: Some(Launch { at_ns: 0, thread: 1 }),
        bytes: None,
        token,
        shaped: true,
        pipe: None,
        pageable: false,
        collective,
    }
}

fn communicators_of(shape: &Shape, group: u64) -> usize {
    match group / 1000 {
        0 => shape.ranks(),
        1 => shape.tensor,
        _ => shape.data,
    }
}
