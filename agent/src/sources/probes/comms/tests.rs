#![expect(clippy::unwrap_used, reason = "tests")]

use stallscope_records::{Head, Kind};

use super::*;

const PROCESS: ProcessKey = ProcessKey {
    pid: 100,
    start_ticks: 7,
};
const THREAD: Thread = Thread {
    process: PROCESS,
    tid: 101,
};
const VERSION: u32 = 22_705;
/// What 2.27.5 itself gives for an id of 128 times 0x5a.
const NAME: u64 = 0x3e97_385d_3fda_a372;

fn head(kind: Kind, flags: u16, result: i32) -> Head {
    Head {
        kind: kind as u16,
        flags: flags | flag::RETURNED,
        result,
        tgid: 100,
        tid: 101,
        begin_ns: 1,
        end_ns: 2,
    }
}

fn made(function: Function, version: u32, comm: u64, result: i32) -> Constructor {
    let by_id = matches!(function, Function::CommInitRank | Function::CommInitAll);
    Constructor {
        head: head(Kind::Constructor, if by_id { flag::ID } else { 0 }, result),
        comm,
        parent: if by_id { 0 } else { 0xc0 },
        function: function as u32,
        ranks: 12,
        rank: 0,
        color: 3,
        id: [0x5a; 128],
        version,
        device: 0,
    }
}

fn seen(comm: u64, hash: u64) -> CommSeen {
    CommSeen {
        head: head(Kind::CommSeen, 0, 0),
        comm,
        magic: nccl::MAGIC,
        hash,
        rank: 3,
        ranks: 8,
        device: 2,
        reserved: 0,
    }
}

fn told(comms: &mut Comms, made: &Constructor) -> CommCreated {
    comms.made(THREAD, made).map_err(|_| "refused").unwrap()
}

fn used(comms: &mut Comms, seen: &CommSeen) -> CommCreated {
    comms.seen(THREAD, seen).map_err(|_| "refused").unwrap()
}

#[test]
fn a_communicator_has_the_librarys_own_name_where_its_version_is_known() {
    let mut comms = Comms::default();
    let known = told(&mut comms, &made(Function::CommInitRank, VERSION, 0xc0, 0));
    assert_eq!((known.key, known.is_nccl_hash), (Some(NAME), true));
    let unknown = told(&mut Comms::default(), &made(Function::CommInitRank, 0, 0xc0, 0));
    assert!(unknown.key.is_some() && unknown.key != known.key && !unknown.is_nccl_hash);
}

#[test]
fn children_are_named_by_their_number_until_one_fails() {
    let mut comms = Comms::default();
    told(&mut comms, &made(Function::CommInitRank, VERSION, 0xc0, 0));
    let version = NcclVersion::from_code(VERSION).unwrap();
    for count in 1..=2 {
        let child = told(&mut comms, &made(Function::CommSplit, VERSION, 0xc1, 0));
        assert_eq!(child.key, Some(nccl::of_split(version, NAME, count, 3)));
        // A shrunk one is not counted.
        let shrunk = told(&mut comms, &made(Function::CommShrink, VERSION, 0xc2, 0));
        assert_eq!(shrunk.key, Some(nccl::of_split(version, NAME, 0, 0)));
    }
    let failed = told(&mut comms, &made(Function::CommSplit, VERSION, 0, 5));
    assert_eq!(failed.result, 5);
    let after = told(&mut comms, &made(Function::CommSplit, VERSION, 0xc3, 0));
    assert_eq!((after.key, after.is_nccl_hash), (None, false));
    // Once it is used, the library itself tells.
    let named = used(&mut comms, &seen(0xc3, 77));
    assert_eq!(
        (named.key, named.is_nccl_hash, named.found_in_use),
        (Some(77), true, false)
    );
}

/// Ranks that were in compute the magic, ranks that join read it from the id they are given: `combined(magic, 1)`.
#[test]
fn old_and_new_ranks_of_a_grown_communicator_agree() {
    let version = 22_907;
    let mut old = Comms::default();
    told(&mut old, &made(Function::CommInitRank, version, 0xc0, 0));
    let mut grow = made(Function::CommGrow, version, 0xc1, 0);
    let of_old = told(&mut old, &grow);
    let magic = nccl::combined(u64::from_le_bytes([0x5a; 8]), 1);
    grow.parent = 0;
    grow.head.flags |= flag::ID;
    grow.id[..8].copy_from_slice(&magic.to_le_bytes());
    let of_new = told(&mut Comms::default(), &grow);
    assert_eq!(of_old.key, Some(nccl::combined(magic, 12)));
    assert_eq!(of_old.key, of_new.key);
}

#[test]
fn one_made_in_a_group_is_known_again_when_it_is_used() {
    for result in [0, 7] {
        let mut comms = Comms::default();
        let constructor = made(Function::CommInitRank, VERSION, 0, result);
        assert_eq!(comms.made(THREAD, &constructor).is_err(), result == 0);
        let named = used(&mut comms, &seen(0xc0, NAME));
        assert!(!named.found_in_use, "{named:?}");
        assert_eq!(
            (named.rank, named.ranks, named.device),
            (Some(3), Some(8), Some(2))
        );
        let child = told(&mut comms, &made(Function::CommSplit, VERSION, 0xc1, 0));
        assert!(child.is_nccl_hash, "{child:?}");
    }
}

#[test]
fn one_older_than_the_agent_is_named_but_its_children_only_when_used() {
    let mut comms = Comms::default();
    let old = used(&mut comms, &seen(0xc0, 99));
    assert_eq!((old.key, old.found_in_use), (Some(99), true));
    assert_eq!(
        told(&mut comms, &made(Function::CommSplit, VERSION, 0xc1, 0)).key,
        None
    );
    // Another at the same address is another.
    assert!(used(&mut comms, &seen(0xc0, 100)).found_in_use);
}

#[test]
fn what_does_not_look_like_a_communicator_is_none() {
    let good = seen(0xc0, 1);
    for strange in [
        CommSeen { magic: 1, ..good },
        CommSeen { hash: 0, ..good },
        CommSeen { rank: 8, ..good },
        CommSeen { rank: -1, ..good },
        CommSeen { ranks: -1, ..good },
        CommSeen { device: -1, ..good },
    ] {
        assert!(matches!(
            Comms::default().seen(THREAD, &strange),
            Err(Refusal::StrangeComm)
        ));
    }
}
