//! Hand-made truths: what each rank of a ring shows when one of them, or a way between two, is slow.

use super::*;
use crate::facts::StepWaits;

const SECOND: u64 = 1_000_000_000;

/// Percent of the time watched in each wait: sending for GPU, credit, wire; receiving for arrival, flush, GPU.
type Percent = [u64; 6];

/// A quiet ring: a collective takes a tenth of the time.
const QUIET: Percent = [5, 1, 5, 5, 0, 4];

fn rank(at: usize, node: &str, percent: Percent) -> RankWaits {
    let wait = |percent| StepWait {
        steps_ns: percent * SECOND / 10,
        any_ns: percent * SECOND / 10,
        entered: 10,
    };
    let [gpu, credit, wire, arrival, flush, consume] = percent.map(wait);
    RankWaits {
        rank: at,
        node: node.into(),
        seen: ProcessWaits {
            pid: 1,
            watched_ns: 10 * SECOND,
            waits: StepWaits {
                send_gpu: gpu,
                send_credit: Some(credit),
                send_wire: wire,
                receive_wire: arrival,
                receive_flush: flush,
                receive_gpu: consume,
                sent: 10,
                received: 10,
                unknown: 0,
            },
        },
    }
}

fn ring<const N: usize>(of: [Percent; N]) -> Vec<RankWaits> {
    let nodes = ["a", "b", "c", "d", "e"];
    let ranks = of.into_iter().zip(nodes).enumerate();
    ranks
        .map(|(at, (percent, node))| rank(at, node, percent))
        .collect()
}

/// Fills up before it, starves after it: a ring of four in which what `b` sends is slow.
const SLOW_WAY: [Percent; 4] = [
    [5, 60, 5, 10, 0, 55],
    [5, 3, 70, 6, 0, 65],
    [70, 1, 5, 70, 0, 4],
    [30, 40, 6, 30, 0, 30],
];

#[test]
fn what_is_long_on_the_wire_names_its_sender() {
    let (now, before) = (ring(SLOW_WAY), ring([QUIET; 4]));
    assert_eq!(says(&now, Some(&before)), Says::Slow(Slow::Way(1)));
    assert_eq!(
        says(&now, None),
        Says::Slow(Slow::Way(1)),
        "four nodes are enough to stand out without a past"
    );
    assert_eq!(
        says(&now[..3], None),
        Says::Nothing,
        "three without a past are not"
    );
    let always = ring([QUIET, [5, 3, 60, 6, 0, 65], QUIET, QUIET]);
    assert_eq!(says(&now, Some(&always)), Says::Nothing, "as long as ever");
}

#[test]
fn a_wire_nobody_waits_for_accuses_nobody() {
    let hidden = ring([QUIET, [5, 3, 70, 6, 0, 5], QUIET, QUIET]);
    assert_eq!(says(&hidden, Some(&ring([QUIET; 4]))), Says::Nothing);
}

#[test]
fn a_wire_as_long_everywhere_is_nobodys() {
    let now = ring([[5, 5, 40, 40, 0, 10]; 3]);
    assert_eq!(says(&now, Some(&ring([QUIET; 3]))), Says::Slow(Slow::Everywhere));
    assert_eq!(says(&now, None), Says::Nothing, "who knows what is normal");
}

#[test]
fn a_gpu_that_neither_takes_nor_gives_is_late_and_the_network_is_not() {
    // c is late: b has sent what c has room for, d and those after it get nothing.
    let now = ring([
        [60, 5, 5, 60, 0, 4],
        [5, 70, 5, 20, 0, 40],
        [75, 1, 5, 5, 0, 75],
        [70, 1, 5, 70, 0, 4],
    ]);
    assert_eq!(says(&now, Some(&ring([QUIET; 4]))), Says::Late(2));
    let mut untold = now;
    for rank in &mut untold {
        rank.seen.waits.send_credit = None;
    }
    assert!(
        !matches!(says(&untold, Some(&ring([QUIET; 4]))), Says::Late(_)),
        "where credit is not told apart, a late rank looks like a full one"
    );
}

#[test]
fn credit_that_no_gpu_holds_back_is_the_receivers() {
    // b's GPU takes everything at once, and b says late that there is room.
    let now = ring([[1, 50, 10, 10, 0, 45], [41, 0, 10, 10, 0, 0]]);
    assert_eq!(says(&now, Some(&ring([QUIET; 2]))), Says::Slow(Slow::Receiver(1)));
}

#[test]
fn flushes_that_take_long_are_the_way_into_that_gpu() {
    let now = ring([[20, 30, 5, 20, 0, 10], [40, 2, 5, 10, 50, 6]]);
    assert_eq!(says(&now, Some(&ring([QUIET; 2]))), Says::Slow(Slow::Flush(1)));
}

#[test]
fn a_network_as_fast_as_it_was_is_said_to_be() {
    // The step got longer, and everybody waits for GPUs.
    let now = ring([[60, 1, 4, 5, 0, 4], [62, 1, 4, 5, 0, 4]]);
    assert_eq!(says(&now, Some(&ring([QUIET; 2]))), Says::AsBefore);
    let awaited = ring([[60, 1, 4, 60, 0, 4], [62, 1, 4, 58, 0, 4]]);
    assert_eq!(
        says(&awaited, Some(&ring([QUIET; 2]))),
        Says::Nothing,
        "what is sent may wait in buffers of sockets"
    );
    let unseen = ring([QUIET]);
    assert_eq!(
        says(&now, Some(&unseen)),
        Says::Nothing,
        "one of them was not watched before"
    );
}

#[test]
fn ranks_of_one_node_or_none_say_nothing() {
    assert_eq!(says(&[], None), Says::Nothing);
    let mut now = ring(SLOW_WAY);
    now.iter_mut().for_each(|rank| rank.node = "a".into());
    assert_eq!(says(&now, Some(&ring([QUIET; 4]))), Says::Nothing);
}

#[test]
fn windows_count_for_the_rank_and_the_stretch_they_belong_to() {
    let subject = |node: &str, pid| GpuSubject {
        job: "job".into(),
        node: node.into(),
        gpu: 0,
        pci: String::new(),
        device: String::new(),
        rank: 0,
        world: 2,
        pid,
    };
    let subjects = [&subject("a", 7), &subject("b", 7)];
    let told = |node: &str, pid, start: u64, any_ns| HardwareFacts {
        node: node.into(),
        window: Window::new(start * SECOND, (start + 2) * SECOND).unwrap_or_default(),
        realtime_offset_ns: 100,
        fact: HardwareFact::Waits(Box::new(ProcessWaits {
            pid,
            watched_ns: SECOND,
            waits: StepWaits {
                send_wire: StepWait {
                    any_ns,
                    ..StepWait::default()
                },
                ..StepWaits::default()
            },
        })),
    };
    let all = [
        told("b", 7, 0, 1),
        told("b", 7, 10, 20),
        told("b", 7, 12, 300),
        told("b", 8, 12, 4_000),
        told("a", 7, 12, 50_000),
        told("b", 7, 20, 600_000),
    ];
    let within = Window::new(10 * SECOND, 14 * SECOND).unwrap_or_default();
    let ranks = of_ranks(&all, &subjects, within);
    let [only] = &ranks[..] else {
        panic!("a's second says too little: {ranks:?}");
    };
    assert_eq!((only.rank, only.node.as_str()), (1, "b"));
    assert_eq!(only.seen.waits.send_wire.any_ns, 320);
    assert_eq!(only.seen.watched_ns, 2 * SECOND);
}
