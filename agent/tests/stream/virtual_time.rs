//! Outages, crashes and restarts in any order: the collector ends up with every message once.

use std::collections::{BTreeMap, VecDeque};

use bytes::Bytes;
use proptest::prelude::*;
use prost::Message;
use stallscope_proto::frame::Decoder;
use stallscope_proto::v1::{self, client_message, server_message};

use crate::spool::MemorySpool;
use stallscope::store::Spool;
use stallscope::stream::core::{Action, Core, Pace, Sender};

const NODE: &str = "n1";
const MS: u64 = 1_000_000;

/// A collector that stores what it is sent, one message per boot and number.
#[derive(Debug, Default)]
struct ModelCollector {
    /// Boots in order of their first message, with their newest number.
    boots: Vec<(u64, u64)>,
    stored: BTreeMap<(u64, u64), u32>,
}

impl ModelCollector {
    fn answer(&mut self, message: client_message::Kind) -> Option<server_message::Kind> {
        match message {
            client_message::Kind::Hello(_) => {
                let resume = |(boot, last): &(u64, u64)| v1::Resume {
                    agent_boot_id: *boot,
                    last_seq: *last,
                };
                let resume = self.boots.iter().rev().map(resume).collect();
                let ack = v1::HelloAck {
                    resume,
                    window_bytes: 4096,
                    max_frame_bytes: 4096,
                };
                Some(server_message::Kind::HelloAck(ack))
            }
            client_message::Kind::Batch(batch) => {
                let envelopes = batch
                    .envelopes
                    .iter()
                    .map(|bytes| v1::Envelope::decode(bytes.clone()).unwrap());
                let last_seq = envelopes.map(|envelope| self.store(&envelope)).last().unwrap();
                Some(server_message::Kind::Ack(v1::Ack { last_seq }))
            }
            client_message::Kind::Heartbeat(_) => None,
            client_message::Kind::Report(_) => panic!("agents ask no reports"),
        }
    }

    fn store(&mut self, envelope: &v1::Envelope) -> u64 {
        assert_eq!(
            envelope.node, NODE,
            "the collector refuses a batch that names another node"
        );
        let (boot, sequence) = (envelope.agent_boot_id, envelope.sequence);
        let index = self
            .boots
            .iter()
            .position(|(known, _)| *known == boot)
            .unwrap_or_else(|| {
                self.boots.push((boot, 0));
                self.boots.len() - 1
            });
        if sequence > self.boots[index].1 {
            self.boots[index].1 = sequence;
            *self.stored.entry((boot, sequence)).or_insert(0) += 1;
        }
        sequence
    }
}

/// Agent, collector and the connection between them.
struct World {
    now_ns: u64,
    core: Core,
    boot_id: u64,
    spool: MemorySpool,
    collector: ModelCollector,
    collector_is_up: bool,
    connected: bool,
    to_collector: VecDeque<Bytes>,
    to_agent: VecDeque<server_message::Kind>,
    /// Every message the agent wrote and its disk kept: the boot that wrote it, by number.
    written: BTreeMap<u64, u64>,
    connects: Vec<u64>,
}

fn sender(boot_id: u64) -> Sender {
    Sender {
        node: NODE.into(),
        agent_version: "test".into(),
        boot_id,
    }
}

fn pace() -> Pace {
    Pace {
        batch_bytes: 1024,
        window_bytes: 4096,
        gather_ns: 100_000_000,
        ..Pace::default()
    }
}

impl World {
    fn new() -> Self {
        Self {
            now_ns: 0,
            core: Core::new(sender(1), pace()),
            boot_id: 1,
            spool: MemorySpool::new(usize::MAX),
            collector: ModelCollector::default(),
            collector_is_up: true,
            connected: false,
            to_collector: VecDeque::new(),
            to_agent: VecDeque::new(),
            written: BTreeMap::new(),
            connects: Vec::new(),
        }
    }

    fn append(&mut self) {
        let sequence = self.spool.append(NODE, self.boot_id);
        self.written.insert(sequence, self.boot_id);
    }

    fn cut(&mut self) {
        self.to_collector.clear();
        self.to_agent.clear();
        if self.connected {
            self.connected = false;
            self.core.disconnected(self.now_ns, None);
        }
    }

    fn restart_agent(&mut self, lost_messages: usize) {
        self.cut();
        for sequence in self.spool.lose_tail(lost_messages) {
            self.written.remove(&sequence);
        }
        self.boot_id += 1;
        self.core = Core::new(sender(self.boot_id), pace());
    }

    /// Runs the agent until it waits; when it wants to be called again.
    fn run_agent(&mut self) -> u64 {
        for _ in 0..10_000 {
            match self.core.poll(self.now_ns, &self.spool) {
                Action::Connect => {
                    self.connects.push(self.now_ns);
                    if self.collector_is_up {
                        self.connected = true;
                        self.core.connected(self.now_ns);
                    } else {
                        self.core.disconnected(self.now_ns, None);
                    }
                }
                Action::Send(framed) => {
                    assert!(self.connected, "sends without a connection");
                    assert!(framed.len() <= 4096 + 8, "a frame of {} bytes", framed.len());
                    self.to_collector.push_back(framed);
                }
                Action::Disconnect { .. } => {
                    self.connected = false;
                    self.to_collector.clear();
                    self.to_agent.clear();
                }
                Action::WaitUntil(until_ns) => {
                    assert!(until_ns > self.now_ns, "waits for the past");
                    return until_ns;
                }
            }
        }
        panic!("the agent never waits");
    }

    /// Delivers up to `count` messages in each direction.
    fn deliver(&mut self, count: usize) {
        for _ in 0..count {
            if let Some(framed) = self.to_collector.pop_front() {
                let mut decoder = Decoder::default();
                decoder.push(&framed);
                let body = decoder.next_body().unwrap().unwrap();
                let message = v1::ClientMessage::decode(body).unwrap().kind.unwrap();
                self.to_agent.extend(self.collector.answer(message));
            }
            if let Some(message) = self.to_agent.pop_front() {
                self.core.receive(self.now_ns, message, &self.spool).unwrap();
            }
        }
    }

    fn pass(&mut self, ns: u64) {
        let end_ns = self.now_ns + ns;
        loop {
            let wake_ns = self.run_agent();
            self.deliver(64);
            let wake_ns = wake_ns.min(self.run_agent());
            if wake_ns >= end_ns {
                break;
            }
            self.now_ns = wake_ns;
        }
        self.now_ns = end_ns;
    }

    fn assert_complete(&self) {
        for (sequence, boot) in &self.written {
            let times = self.collector.stored.get(&(*boot, *sequence));
            assert_eq!(times, Some(&1), "message {sequence} of boot {boot}");
        }
        assert!(
            self.collector.stored.values().all(|times| *times == 1),
            "something is stored twice"
        );
        assert_eq!(self.spool.last_acked(), self.spool.last());
    }
}

#[test]
fn an_hour_without_a_collector_loses_nothing_and_does_not_storm() {
    let mut world = World::new();
    world.append();
    world.pass(1_000 * MS);
    world.cut();
    world.collector_is_up = false;
    for _ in 0..3600 {
        world.append();
        world.pass(1_000 * MS);
    }
    let tries = world.connects.len();
    assert!(tries < 400, "{tries} tries in an hour");
    world.collector_is_up = true;
    world.pass(60_000 * MS);
    world.assert_complete();
    assert_eq!(world.spool.last_acked(), 3601);
}

#[test]
fn waits_double_up_to_the_bound_and_differ_between_agents() {
    let mut waits = Vec::new();
    for boot_id in [7, 8] {
        let spool = MemorySpool::new(10);
        let mut core = Core::new(sender(boot_id), pace());
        let mut now_ns = 0;
        let mut own = Vec::new();
        for _ in 0..12 {
            assert_eq!(core.poll(now_ns, &spool), Action::Connect);
            let next_ns = core.disconnected(now_ns, None);
            own.push(next_ns - now_ns);
            now_ns = next_ns;
        }
        let (least, most) = (pace().backoff_min_ns, pace().backoff_max_ns);
        for (index, wait_ns) in own.iter().enumerate() {
            let full = (least << index.min(20)).min(most);
            assert!(
                *wait_ns <= full && *wait_ns >= full - full / 4,
                "wait {index} is {wait_ns} ns"
            );
        }
        waits.push(own);
    }
    assert_ne!(waits[0], waits[1]);
}

#[test]
fn a_collector_that_never_answers_is_given_up_and_tried_again() {
    let mut world = World::new();
    world.append();
    world.run_agent();
    assert_eq!(world.to_collector.len(), 1, "Hello");
    world.now_ns += pace().answer_ns;
    let actions: Vec<_> = (0..2)
        .map(|_| world.core.poll(world.now_ns, &world.spool))
        .collect();
    assert!(matches!(actions[0], Action::Disconnect { .. }), "{actions:?}");
    assert!(matches!(actions[1], Action::WaitUntil(_)), "{actions:?}");
}

#[test]
fn an_idle_stream_says_that_it_lives() {
    let mut world = World::new();
    world.pass(10_000 * MS);
    assert!(world.core.is_streaming());
    world.run_agent();
    world.now_ns += pace().heartbeat_ns;
    world.run_agent();
    let framed = world.to_collector.pop_front().expect("a heartbeat");
    let body = framed.slice(8..);
    let message = v1::ClientMessage::decode(body).unwrap().kind.unwrap();
    assert!(
        matches!(message, client_message::Kind::Heartbeat(_)),
        "{message:?}"
    );
}

#[test]
fn acknowledging_what_was_not_sent_ends_the_connection() {
    let mut world = World::new();
    world.pass(1_000 * MS);
    let ack = server_message::Kind::Ack(v1::Ack { last_seq: 1 });
    assert!(world.core.receive(world.now_ns, ack, &world.spool).is_err());
    assert!(matches!(
        world.core.poll(world.now_ns, &world.spool),
        Action::Disconnect { .. }
    ));
    assert_eq!(world.spool.last_acked(), 0);
}

#[test]
fn a_spool_whose_newest_messages_are_damaged_is_not_asked_without_pause() {
    let mut world = World::new();
    world.pass(1_000 * MS);
    world.spool.damage_newest();
    let (mut polls, end_ns) = (0, world.now_ns + 10_000 * MS);
    while world.now_ns < end_ns {
        world.now_ns = world.run_agent();
        polls += 1;
        assert!(polls < 100, "{polls} polls in less than ten seconds");
    }
}

#[test]
fn no_more_than_the_window_is_on_its_way() {
    let mut world = World::new();
    world.pass(1_000 * MS);
    for _ in 0..1000 {
        world.append();
    }
    for _ in 0..100 {
        world.now_ns += 100 * MS;
        world.run_agent();
    }
    let bytes: usize = world.to_collector.iter().map(Bytes::len).sum();
    assert!((3_000..=4096 + 2048).contains(&bytes), "{bytes} bytes in flight");
    world.pass(60_000 * MS);
    world.assert_complete();
}

#[test]
fn a_fresh_collector_gets_everything_the_store_still_has() {
    let mut world = World::new();
    for _ in 0..50 {
        world.append();
    }
    world.pass(10_000 * MS);
    world.assert_complete();
    world.cut();
    world.collector = ModelCollector::default();
    world.append();
    world.pass(60_000 * MS);
    world.assert_complete();
    assert_eq!(world.collector.stored.len(), 51);
}

#[derive(Debug, Clone)]
enum Event {
    Append(u8),
    Pass(u16),
    Deliver(u8),
    Cut,
    CollectorDown,
    CollectorUp,
    RestartAgent { lost_messages: u8 },
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        5 => (1_u8..20).prop_map(Event::Append),
        5 => (1_u16..5_000).prop_map(Event::Pass),
        3 => (0_u8..4).prop_map(Event::Deliver),
        2 => Just(Event::Cut),
        1 => Just(Event::CollectorDown),
        2 => Just(Event::CollectorUp),
        1 => (0_u8..8).prop_map(|lost_messages| Event::RestartAgent { lost_messages }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn every_message_arrives_once_whatever_happens(events in prop::collection::vec(event(), 1..60)) {
        let mut world = World::new();
        for event in events {
            match event {
                Event::Append(count) => (0..count).for_each(|_| world.append()),
                Event::Pass(ms) => world.pass(u64::from(ms) * MS),
                Event::Deliver(count) => {
                    world.run_agent();
                    world.deliver(count.into());
                }
                Event::Cut => world.cut(),
                Event::CollectorDown => {
                    world.cut();
                    world.collector_is_up = false;
                }
                Event::CollectorUp => world.collector_is_up = true,
                Event::RestartAgent { lost_messages } => world.restart_agent(lost_messages.into()),
            }
        }
        world.collector_is_up = true;
        world.pass(300_000 * MS);
        world.assert_complete();
    }
}

#[test]
fn a_node_that_was_renamed_streams_what_it_records_under_its_new_name() {
    let mut world = World::new();
    for _ in 0..3_000 {
        world.spool.append("localhost", 7);
    }
    world.append();
    world.append();
    world.pass(5_000 * MS);
    assert_eq!(world.core.counts().renamed_messages, 3_000);
    assert_eq!(
        world.collector.stored,
        BTreeMap::from([((1, 3_001), 1), ((1, 3_002), 1)])
    );
    assert!(world.core.is_drained(&world.spool));
}
