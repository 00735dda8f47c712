#![expect(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use stallscope_records::Ring;
use stallscope_records::fold::{BlockFold, FileFold, Run};

use super::*;

const KEY: ProcessKey = ProcessKey {
    pid: 100,
    start_ticks: 7,
};
const THREAD: Thread = Thread {
    process: KEY,
    tid: 101,
};

/// The bytes of a head from 1000 to 2000 ns by thread 101 of process 100, and of what follows.
fn record(kind: Kind, flags: u16, result: i32, rest: &[&[u8]]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((kind as u16).to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend(result.to_ne_bytes());
    bytes.extend(100u32.to_ne_bytes());
    bytes.extend(101u32.to_ne_bytes());
    bytes.extend(1000u64.to_ne_bytes());
    bytes.extend(2000u64.to_ne_bytes());
    for part in rest {
        bytes.extend(*part);
    }
    bytes
}

fn word(value: u64) -> [u8; 8] {
    value.to_ne_bytes()
}

fn half(value: u32) -> [u8; 4] {
    value.to_ne_bytes()
}

fn decode(decoder: &mut Decoder, event: RawEvent<'_>) -> Option<Decoded> {
    let mut out = None;
    decoder.decode(
        event,
        &mut |tgid| (tgid == KEY.pid).then_some(KEY),
        &mut |decoded| out = Some(decoded),
    );
    out
}

fn fact(decoder: &mut Decoder, bytes: &[u8]) -> Option<Fact> {
    match decode(
        decoder,
        RawEvent::Record {
            ring: Ring::Nccl,
            bytes,
        },
    )? {
        Decoded::Observation(observation) => {
            assert_eq!(observation.window, Window::new(1000, 2000).unwrap());
            Some(observation.fact)
        }
        Decoded::Process(event) => panic!("{event:?}"),
    }
}

fn collective(flags: u16) -> Vec<u8> {
    let words = [word(0xc0), word(4096), word(0x5e)].concat();
    let halves = [half(Function::Reduce as u32), half(9), half(3), half(0)].concat();
    record(Kind::Collective, flags, 4, &[&words, &halves])
}

fn constructor(function: Function, flags: u16, comm: u64, parent: u64, color: u32, id: u8) -> Vec<u8> {
    let words = [word(comm), word(parent)].concat();
    let halves = [half(function as u32), half(8), half(3), half(color)].concat();
    let library = [half(0), half(0)].concat();
    record(
        Kind::Constructor,
        flags,
        0,
        &[&words, &halves, &[id; 128], &library],
    )
}

#[test]
fn a_collective_keeps_every_argument() {
    let mut decoder = Decoder::new();
    let expected = |peer, result| {
        Fact::Collective(Collective {
            thread: THREAD,
            comm: 0xc0,
            function: CollectiveFunction::Reduce,
            count: 4096,
            datatype: 9,
            peer,
            stream: 0x5e,
            result,
        })
    };
    let returned = fact(&mut decoder, &collective(flag::PEER | flag::RETURNED)).unwrap();
    assert_eq!(returned, expected(Some(3), Some(4)));
    assert_eq!(fact(&mut decoder, &collective(0)).unwrap(), expected(None, None));
}

#[test]
fn ranks_of_a_communicator_share_its_key_and_those_of_its_children() {
    let made = |id, color| {
        let mut decoder = Decoder::new();
        let flags = flag::RETURNED | flag::ID | flag::RANK | flag::RANKS;
        let parent = fact(
            &mut decoder,
            &constructor(Function::CommInitRank, flags, 0xc0, 0, 0, id),
        )
        .unwrap();
        let mut child = || {
            let bytes = constructor(Function::CommSplit, flag::RETURNED, 0xc1, 0xc0, color, 0);
            fact(&mut decoder, &bytes).unwrap()
        };
        let (first, second) = (child(), child());
        [parent, first, second].map(|fact| match fact {
            Fact::CommCreated(made) => made,
            other => panic!("{other:?}"),
        })
    };
    let [parent, first, second] = made(1, 0);
    assert_eq!(
        (parent.comm, parent.rank, parent.ranks, parent.result),
        (0xc0, Some(3), Some(8), 0)
    );
    assert_eq!((first.comm, first.rank, first.ranks), (0xc1, None, None));
    assert_eq!(
        [parent.key, first.key, second.key],
        made(1, 0).map(|made| made.key)
    );
    let keys = [
        parent.key,
        first.key,
        second.key,
        made(2, 0)[0].key,
        made(1, 1)[1].key,
    ];
    for (index, key) in keys.iter().enumerate() {
        assert!(key.is_some() && !keys[..index].contains(key), "{keys:?}");
    }
}

#[test]
fn a_rank_outside_of_a_split_makes_no_communicator_but_counts_it() {
    let flags = flag::RETURNED | flag::ID;
    let split = |decoder: &mut Decoder, comm| {
        fact(
            decoder,
            &constructor(Function::CommSplit, flag::RETURNED, comm, 0xc0, 5, 0),
        )
    };
    let mut outside = Decoder::new();
    fact(
        &mut outside,
        &constructor(Function::CommInitRank, flags, 0xc0, 0, 0, 1),
    )
    .unwrap();
    assert_eq!(split(&mut outside, 0), None);
    let mut inside = Decoder::new();
    fact(
        &mut inside,
        &constructor(Function::CommInitRank, flags, 0xc0, 0, 0, 1),
    )
    .unwrap();
    split(&mut inside, 0xc1).unwrap();
    assert_eq!(split(&mut outside, 0xc2), split(&mut inside, 0xc2));
    assert_eq!(outside.refused(), Refused::default());
}

#[test]
fn the_other_records_keep_their_fields() {
    let mut decoder = Decoder::new();
    let sync = |target: u32| {
        record(
            Kind::Sync,
            flag::RETURNED,
            0,
            &[&word(0x51), &half(target), &half(0)],
        )
    };
    assert_eq!(
        fact(&mut decoder, &sync(1)),
        Some(Fact::Sync {
            thread: THREAD,
            target: SyncTarget::Stream(0x51),
            result: 0
        })
    );
    assert_eq!(
        fact(&mut decoder, &sync(2)),
        Some(Fact::Sync {
            thread: THREAD,
            target: SyncTarget::Event(0x51),
            result: 0
        })
    );
    let copy = |flags| {
        record(
            Kind::Copy,
            flags,
            0,
            &[&word(64), &word(0x5e), &half(1), &half(0)],
        )
    };
    let copied = |stream| Fact::Copy {
        thread: THREAD,
        bytes: 64,
        direction: CopyDirection::ToDevice,
        stream,
    };
    assert_eq!(fact(&mut decoder, &copy(flag::ASYNC)), Some(copied(Some(0x5e))));
    assert_eq!(fact(&mut decoder, &copy(flag::RETURNED)), Some(copied(None)));
    let off = record(Kind::OffCpu, 0, 0, &[&word(300), &half(2), &half(0)]);
    assert_eq!(
        fact(&mut decoder, &off),
        Some(Fact::OffCpu {
            thread: THREAD,
            reason: OffCpuReason::Disk,
            runnable_ns: 300
        })
    );
    let io = record(
        Kind::FileIo,
        flag::RETURNED,
        0,
        &[&word(512), &word(900), &half(0), &half(3)],
    );
    assert_eq!(
        fact(&mut decoder, &io),
        Some(Fact::FileIo {
            thread: THREAD,
            op: FileOp::Read,
            bytes: 512,
            blocked_ns: 900
        })
    );
    let teardown = record(
        Kind::Teardown,
        0,
        0,
        &[&word(0xc0), &half(Function::CommAbort as u32), &half(0)],
    );
    assert_eq!(
        fact(&mut decoder, &teardown),
        Some(Fact::CommDestroyed {
            thread: THREAD,
            comm: 0xc0
        })
    );
    assert_eq!(
        fact(&mut decoder, &record(Kind::GroupEnd, 0, 0, &[])),
        Some(Fact::GroupEnd { thread: THREAD })
    );
}

#[test]
fn process_records_become_news() {
    let mut decoder = Decoder::new();
    let mut news = |kind, result| {
        decode(
            &mut decoder,
            RawEvent::Record {
                ring: Ring::Procs,
                bytes: &record(kind, 0, result, &[]),
            },
        )
    };
    assert_eq!(
        news(Kind::Exec, 0),
        Some(Decoded::Process(ProcessEvent::Exec { tgid: 100 }))
    );
    assert_eq!(
        news(Kind::MapExec, 0),
        Some(Decoded::Process(ProcessEvent::MapExec { tgid: 100 }))
    );
    assert_eq!(
        news(Kind::Exit, 0),
        Some(Decoded::Process(ProcessEvent::Exit { tgid: 100 }))
    );
    assert_eq!(
        news(Kind::Fork, 55),
        Some(Decoded::Process(ProcessEvent::Fork {
            parent: 55,
            child: 100
        }))
    );
}

#[test]
fn an_idle_run_is_told_once() {
    let mut decoder = Decoder::new();
    let run = Run {
        first_ns: 1000,
        last_ns: 2000,
        stream: 0x5e,
        kernels: 4,
        graphs: 1,
    };
    let idle = RawEvent::IdleRun {
        tgid: 100,
        tid: 101,
        run,
    };
    let again = record(Kind::LaunchRun, 0, 0, &[&word(0x5e), &half(4), &half(1)]);
    assert!(decode(&mut decoder, idle).is_some());
    assert_eq!(decode(&mut decoder, idle), None);
    assert_eq!(fact(&mut decoder, &again), None);
    let told = Fact::LaunchRun {
        thread: THREAD,
        stream: 0x5e,
        kernels: 4,
        graphs: 1,
    };
    assert_eq!(fact(&mut decoder, &again), Some(told));
}

#[test]
fn folds_and_losses_are_passed_on() {
    let mut decoder = Decoder::new();
    let window = Window::new(5, 9).unwrap();
    let fold = FileFold {
        calls: 3,
        bytes: 30,
        total_ns: 20,
        blocked_ns: 10,
    };
    let files = RawEvent::Files {
        window,
        tgid: 100,
        op: abi::FileOp::Write,
        fold,
    };
    let expected = Fact::FileIoFolded {
        process: KEY,
        op: FileOp::Write,
        calls: 3,
        bytes: 30,
        total_ns: 20,
        blocked_ns: 10,
    };
    let observed = |fact| Some(Decoded::Observation(Observation { window, fact }));
    assert_eq!(decode(&mut decoder, files), observed(expected));
    let fold = BlockFold {
        requests: u64::MAX,
        bytes: 1,
        latency_ns: 2,
    };
    let expected = Fact::Block {
        process: KEY,
        requests: u32::MAX,
        bytes: 1,
        latency_ns: 2,
    };
    assert_eq!(
        decode(
            &mut decoder,
            RawEvent::Block {
                window,
                tgid: 100,
                fold
            }
        ),
        observed(expected)
    );
    let lost = RawEvent::Lost {
        window,
        ring: Ring::Sched,
        count: 6,
    };
    assert_eq!(
        decode(&mut decoder, lost),
        observed(Fact::Lost {
            ring: "sched",
            count: 6
        })
    );
}

#[test]
fn what_gives_nothing_is_counted_by_cause() {
    let mut decoder = Decoder::new();
    let whole = collective(flag::RETURNED);
    let mut backwards = whole.clone();
    backwards[24..32].copy_from_slice(&word(999));
    let mut stranger = whole.clone();
    stranger[8..12].copy_from_slice(&half(1));
    let mut unknown_kind = whole.clone();
    unknown_kind[..2].copy_from_slice(&99u16.to_ne_bytes());
    for bytes in [&whole[..71], &whole[..3], &backwards, &unknown_kind] {
        assert_eq!(fact(&mut decoder, bytes), None);
    }
    assert_eq!(fact(&mut decoder, &stranger), None);
    assert_eq!(fact(&mut decoder, &collective(flag::UNREADABLE)), None);
    assert_eq!(
        fact(
            &mut decoder,
            &record(Kind::Sync, 0, 0, &[&word(1), &half(1), &half(0)])
        ),
        None
    );
    let expected = Refused {
        malformed: 4,
        unknown_process: 1,
        unfinished: 1,
        unreadable: 1,
        strange_comms: 0,
    };
    assert_eq!(decoder.refused(), expected);
}

proptest! {
    #[test]
    fn any_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..260), kind in 0u16..50) {
        let mut bytes = bytes;
        if let Some(start) = bytes.first_chunk_mut() {
            *start = kind.to_ne_bytes();
        }
        decode(&mut Decoder::new(), RawEvent::Record { ring: Ring::Cuda, bytes: &bytes });
    }
}
