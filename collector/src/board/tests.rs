//! What is missing is named, nothing counts twice, memory stays bounded.
#![expect(clippy::unwrap_used, reason = "tests")]

use stallscope_attribution::budget::Budget;
use stallscope_attribution::facts::{GpuStep, GpuSubject, PortFacts, StepMethod, StepSignals};
use stallscope_attribution::leaf::Leaf;
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;
use stallscope_proto::convert::{Payload, Record, SubjectEntry};
use stallscope_proto::v1;

use super::{Absence, Admission, Board, BoardLimits};

const SECOND: u64 = 1_000_000_000;
const OFFSET: i64 = 1_000_000 * 1_000_000_000;

fn subject(node: &str, rank: u32, pid: u32) -> GpuSubject {
    GpuSubject {
        job: "job".into(),
        node: node.into(),
        gpu: rank,
        pci: String::new(),
        device: String::new(),
        rank,
        world: 2,
        pid,
    }
}

fn step(index: u64) -> GpuStep {
    let mut leaves = [0; Leaf::COUNT];
    leaves[Leaf::IdleUnknown.index()] = SECOND as i64;
    GpuStep {
        index,
        window: Window::new(index * SECOND, (index + 1) * SECOND).unwrap(),
        realtime_offset_ns: OFFSET,
        method: StepMethod::CollectivePeriod,
        period_calls: 1,
        budget: Budget::from_leaves(SECOND, leaves, 0, vec![]).unwrap(),
        signals: StepSignals::default(),
    }
}

/// A node's agent that writes straight to a board.
struct Agent<'a> {
    board: &'a mut Board,
    node: &'static str,
    boot_id: u64,
    sequence: u64,
}

impl Agent<'_> {
    fn say(&mut self, payload: Payload) {
        self.sequence += 1;
        let record = Record {
            node: self.node.into(),
            boot_id: self.boot_id,
            sequence: self.sequence,
            payload,
        };
        self.board.apply(
            OFFSET as u64 + self.sequence * SECOND,
            v1::Envelope::from(&record),
        );
    }

    fn announce(&mut self, id: u32, subject: GpuSubject) {
        self.say(Payload::Subject {
            id,
            entry: SubjectEntry {
                subject,
                job_kind: "pretrain".into(),
            },
        });
    }

    fn steps(&mut self, subject: u32, indices: std::ops::Range<u64>) {
        for index in indices {
            self.say(Payload::Step {
                subject,
                step: Box::new(step(index)),
            });
        }
    }
}

fn agent<'a>(board: &'a mut Board, node: &'static str, boot_id: u64) -> Agent<'a> {
    Agent {
        board,
        node,
        boot_id,
        sequence: 0,
    }
}

fn gap_texts(board: &Board, now_ns: u64) -> Vec<String> {
    let gaps = board.facts("job", 0, now_ns).unwrap().gaps;
    gaps.into_iter()
        .map(|gap| format!("{}: {} ({})", gap.node, gap.what, gap.count))
        .collect()
}

fn now_ns(board: &Board) -> u64 {
    board.nodes.values().map(|node| node.heard_ns).max().unwrap()
}

#[test]
fn a_rank_that_tells_nothing_while_its_node_and_the_job_go_on_is_named() {
    let mut board = Board::new(BoardLimits::default());
    for (node, rank, steps) in [("n1", 0, 40), ("n2", 1, 5)] {
        board.connected(node, OFFSET as u64);
        let mut agent = agent(&mut board, node, 1);
        agent.announce(1, subject(node, rank, 100));
        agent.steps(1, 0..steps);
    }
    let named = |board: &Board| {
        let mut texts = gap_texts(board, now_ns(board));
        texts.retain(|text| text.contains("rank"));
        texts
    };
    assert_eq!(named(&board), Vec::<String>::new(), "the node itself is behind");
    let port = PortFacts {
        node: "n2".into(),
        port: "eth0".into(),
        window: Window::new(38 * SECOND, 39 * SECOND).unwrap(),
        realtime_offset_ns: OFFSET,
        line_bytes_per_s: Reading::NotMeasured,
        sent_bytes: 0,
        received_bytes: 0,
        backlog_bytes: Reading::NotMeasured,
        queue_overlimits: Reading::NotMeasured,
        flows: Vec::new(),
    };
    let mut agent = Agent {
        sequence: 6,
        ..agent(&mut board, "n2", 1)
    };
    agent.say(Payload::Port(port));
    assert_eq!(
        named(&board),
        ["n2: rank 1 (process 100, GPU 1) tells nothing while other ranks go on (for 34 s) (0)"]
    );
}

#[test]
fn ranks_of_two_nodes_become_one_job_without_gaps() {
    let mut board = Board::new(BoardLimits::default());
    for (node, rank) in [("n1", 0), ("n2", 1)] {
        board.connected(node, OFFSET as u64);
        let mut agent = agent(&mut board, node, 1);
        agent.announce(1, subject(node, rank, 100));
        agent.steps(1, 0..5);
    }
    let facts = board.facts("job", 0, now_ns(&board)).unwrap();
    assert_eq!(facts.kind, "pretrain");
    assert_eq!(
        facts.gpus.iter().map(|gpu| gpu.steps.len()).collect::<Vec<_>>(),
        [5, 5]
    );
    assert_eq!(facts.gaps, []);
    let since = board
        .facts("job", OFFSET as u64 + 3 * SECOND, now_ns(&board))
        .unwrap();
    assert_eq!(
        since.gpus[0].steps.len(),
        2,
        "only what ended after the time asked for"
    );
}

#[test]
fn a_co_tenant_that_speaks_last_is_not_the_main_job() {
    let mut board = Board::new(BoardLimits::default());
    board.connected("n1", OFFSET as u64);
    let mut agent = agent(&mut board, "n1", 1);
    agent.announce(1, subject("n1", 0, 100));
    agent.announce(2, subject("n1", 1, 101));
    agent.announce(
        3,
        GpuSubject {
            job: "co-tenant".into(),
            ..subject("n1", 0, 200)
        },
    );
    agent.steps(1, 0..3);
    agent.steps(2, 0..3);
    agent.steps(3, 3..9);
    assert_eq!(board.main_job().as_deref(), Some("job"));
}

#[test]
fn a_message_counts_once_and_each_boot_has_its_own_numbers() {
    let mut board = Board::new(BoardLimits::default());
    let mut first = agent(&mut board, "n1", 1);
    first.announce(1, subject("n1", 0, 100));
    first.steps(1, 0..3);
    first.sequence = 1;
    first.steps(1, 0..3);
    assert_eq!(board.entries(), 3);
    assert_eq!(board.admission("n1", 1, 4), Admission::Duplicate);
    assert_eq!(board.admission("n1", 1, 5), Admission::New);
    assert_eq!(
        board.admission("n1", 2, 2),
        Admission::New,
        "a boot that wrote over a lost tail"
    );
    let resume = v1::Resume {
        agent_boot_id: 1,
        last_seq: 4,
    };
    assert_eq!(board.resume("n1"), [resume]);
}

#[test]
fn holes_and_restarts_are_named_with_their_time() {
    let mut board = Board::new(BoardLimits::default());
    board.connected("n1", OFFSET as u64);
    let mut first = agent(&mut board, "n1", 1);
    first.announce(1, subject("n1", 0, 100));
    first.steps(1, 0..3);
    first.sequence += 7;
    first.steps(1, 10..12);
    let sequence = first.sequence;
    let mut second = agent(&mut board, "n1", 2);
    second.sequence = sequence;
    second.announce(1, subject("n1", 0, 100));
    second.steps(1, 30..32);
    let texts = gap_texts(&board, now_ns(&board));
    assert_eq!(
        texts,
        [
            "n1: messages 5 to 11 never arrived (7)",
            "n1: the agent restarted; nothing was seen until it was back (0)",
        ]
    );
    let gaps = board.facts("job", 0, now_ns(&board)).unwrap().gaps;
    let at = |seconds: u64| OFFSET as u64 + seconds * SECOND;
    assert_eq!(gaps[0].window, Window::new(at(3), at(11)));
    assert_eq!(gaps[1].window, Window::new(at(12), at(31)));
    let gpus = board.facts("job", 0, now_ns(&board)).unwrap().gpus;
    assert_eq!(gpus[0].steps.len(), 7, "both boots' steps are there");
}

#[test]
fn a_silent_node_is_named_and_a_finished_job_is_not_a_fault() {
    let mut board = Board::new(BoardLimits::default());
    for (node, rank, steps) in [("n1", 0, 5), ("n2", 1, 60)] {
        board.connected(node, OFFSET as u64);
        let mut agent = agent(&mut board, node, 1);
        agent.announce(1, subject(node, rank, 100));
        agent.steps(1, 0..steps);
    }
    let end_ns = now_ns(&board);
    board.disconnected("n1", Absence::Lost);
    let texts = gap_texts(&board, end_ns);
    assert!(
        texts[0].starts_with("n1: node unreachable: its connection was lost"),
        "{texts:?}"
    );
    assert_eq!(texts.len(), 1);

    board.disconnected("n1", Absence::Stopped);
    board.disconnected("n2", Absence::Stopped);
    let texts = gap_texts(&board, end_ns + 3600 * SECOND);
    assert!(
        texts[0].starts_with("n1: agent stopped while the job went on (for 55 s)"),
        "{texts:?}"
    );
    assert_eq!(texts.len(), 1, "n2 ended with the job: {texts:?}");
}

#[test]
fn a_restarted_job_is_told_apart_from_its_earlier_run() {
    let mut board = Board::new(BoardLimits::default());
    board.connected("n1", OFFSET as u64);
    let mut agent = agent(&mut board, "n1", 1);
    agent.announce(1, subject("n1", 0, 100));
    agent.steps(1, 0..4);
    agent.announce(2, subject("n1", 0, 200));
    agent.steps(2, 10..12);
    let facts = board.facts("job", 0, now_ns(&board)).unwrap();
    assert_eq!(facts.gpus.len(), 1);
    assert_eq!((facts.gpus[0].subject.pid, facts.gpus[0].steps.len()), (200, 2));
    assert_eq!(facts.gaps.len(), 1);
    assert!(
        facts.gaps[0].what.contains("rank 0 as process 100"),
        "{:?}",
        facts.gaps
    );
    assert_eq!(facts.gaps[0].count, 4);
    let began_ns = step(0).window.start_ns().saturating_add_signed(OFFSET);
    let window = facts.gaps[0].window.unwrap();
    assert_eq!(window.start_ns(), began_ns, "not since 1970: {window:?}");
}

#[test]
fn what_is_no_fact_is_refused_counted_and_named_and_the_rest_goes_on() {
    let mut board = Board::new(BoardLimits::default());
    board.connected("n1", OFFSET as u64);
    let mut agent = agent(&mut board, "n1", 1);
    agent.announce(1, subject("n1", 0, 100));
    agent.steps(1, 0..1);
    for sequence in [3, 4] {
        let record = Record {
            node: "n1".into(),
            boot_id: 1,
            sequence,
            payload: Payload::Step {
                subject: 1,
                step: Box::new(step(1)),
            },
        };
        let mut envelope = v1::Envelope::from(&record);
        let Some(v1::envelope::Body::Step(wire)) = &mut envelope.body else {
            unreachable!()
        };
        wire.budget.as_mut().unwrap().leaves_ns[0] += 1;
        agent.board.apply(OFFSET as u64, envelope);
    }
    agent.sequence = 4;
    agent.steps(9, 2..3);
    agent.steps(1, 3..4);
    assert_eq!(board.refused_messages(), 3);
    let texts = gap_texts(&board, now_ns(&board));
    assert_eq!(
        texts,
        ["n1: messages refused, the last because: subject 9 refused: it was never announced (3)"]
    );
    assert_eq!(
        board.facts("job", 0, now_ns(&board)).unwrap().gpus[0].steps.len(),
        2
    );
}

#[test]
fn memory_is_bounded_and_what_was_forgotten_is_known() {
    let limits = BoardLimits {
        window_ns: 100 * SECOND,
        max_entries: 50,
        max_nodes: 2,
        max_jobs: 2,
    };
    let mut board = Board::new(limits);
    let mut first = agent(&mut board, "n1", 1);
    first.announce(1, subject("n1", 0, 100));
    first.steps(1, 0..1000);
    assert_eq!(board.entries(), 50);
    assert_eq!(board.complete_since("job"), OFFSET as u64 + 950 * SECOND);
    for job in ["second", "third"] {
        let mut agent = agent(&mut board, "n2", 7);
        agent.sequence = if job == "second" { 0 } else { 100 };
        agent.announce(
            agent.sequence as u32 + 1,
            GpuSubject {
                job: job.into(),
                ..subject("n2", 0, 1)
            },
        );
        let id = agent.sequence as u32;
        agent.steps(id, 0..10);
    }
    assert!(board.entries() <= 50);
    assert!(board.jobs_since(0).len() <= 2);
    assert_eq!(board.admission("n3", 1, 1), Admission::TooManyNodes);
    board.connected("n3", 0);
    assert_eq!(board.admission("n3", 1, 1), Admission::TooManyNodes);
}

#[test]
fn a_board_read_back_from_states_and_messages_is_the_same() {
    let mut board = Board::new(BoardLimits::default());
    let mut first = agent(&mut board, "n1", 1);
    first.announce(1, subject("n1", 0, 100));
    first.steps(1, 0..3);
    let mut later = Board::new(BoardLimits::default());
    for state in board.states() {
        later.apply_state(state);
    }
    let mut rest = Agent {
        board: &mut later,
        node: "n1",
        boot_id: 1,
        sequence: 4,
    };
    rest.steps(1, 3..5);
    let facts = later.facts("job", 0, 0).unwrap();
    assert_eq!(facts.gpus[0].steps.len(), 2);
    assert_eq!(facts.gaps, [], "what an older segment held is no hole");
}

#[test]
fn an_agent_cannot_speak_of_another_node() {
    let mut board = Board::default();
    let mut honest = agent(&mut board, "n0", 1);
    honest.announce(1, subject("n0", 0, 10));
    honest.steps(1, 0..3);
    let mut liar = agent(&mut board, "n1", 2);
    liar.announce(1, subject("n0", 0, 11));
    liar.steps(1, 10..20);
    liar.say(Payload::Gap(stallscope_attribution::facts::RecordGap {
        node: "n0".into(),
        window: None,
        what: "invented".into(),
        count: 1,
    }));
    assert_eq!(board.refused_messages(), 12);
    let facts = board.facts("job", 0, OFFSET as u64).unwrap();
    let ranks: Vec<_> = facts
        .gpus
        .iter()
        .map(|gpu| (gpu.subject.node.as_str(), gpu.subject.pid, gpu.steps.len()))
        .collect();
    assert_eq!(ranks, [("n0", 10, 3)]);
    assert!(
        facts.gaps.iter().all(|gap| gap.what != "invented"),
        "{:?}",
        facts.gaps
    );
}
