//! A client with a valid certificate that sends garbage: closed with a code, nobody else is affected.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use prost::Message;
use quinn::{ConnectionError, Endpoint, RecvStream, SendStream};
use stallscope::store::Spool;
use stallscope_collector::Collector;
use stallscope_collector::tls::{Identity, IdentityFiles};
use stallscope_proto::v1::{self, client_message};
use stallscope_proto::{SCHEMA, close, frame};

use crate::lab::{self, Authority};
use crate::spool::{MemorySpool, gap_record};

/// A QUIC client without our protocol.
struct Raw {
    endpoint: Endpoint,
    connection: quinn::Connection,
    send: SendStream,
    recv: RecvStream,
}

impl Raw {
    async fn connect(address: SocketAddr, identity: &IdentityFiles) -> Self {
        let config = Identity::load(identity).unwrap().client().unwrap();
        let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let connection = endpoint
            .connect_with(config, address, "collector")
            .unwrap()
            .await
            .unwrap();
        let (send, recv) = connection.open_bi().await.unwrap();
        Self {
            endpoint,
            connection,
            send,
            recv,
        }
    }

    /// Sends the bytes and ends the stream; the code with which the collector closes the connection.
    async fn send_all(mut self, bytes: &[u8]) -> u64 {
        // The collector may close before everything is sent.
        let _ = self.send.write_all(bytes).await;
        let _ = self.send.finish();
        let closed = tokio::time::timeout(Duration::from_secs(20), self.connection.closed()).await;
        drop((self.recv, self.endpoint));
        match closed.expect("the collector closes the connection") {
            ConnectionError::ApplicationClosed(closed) => closed.error_code.into_inner(),
            other => panic!("closed by {other}"),
        }
    }
}

fn framed(kind: client_message::Kind) -> BytesMut {
    let mut out = BytesMut::new();
    frame::encode(&v1::ClientMessage { kind: Some(kind) }.encode_to_vec(), &mut out).unwrap();
    out
}

fn hello(node: &str, schema: u32) -> BytesMut {
    framed(client_message::Kind::Hello(v1::Hello {
        schema,
        node: node.into(),
        agent_version: "hostile".into(),
        agent_boot_id: 666,
        last_seq: 0,
    }))
}

fn batch(envelopes: Vec<bytes::Bytes>) -> BytesMut {
    framed(client_message::Kind::Batch(v1::Batch { envelopes }))
}

/// What a hostile client sends, with the code it deserves.
fn attacks() -> Vec<(&'static str, Vec<u8>, u32)> {
    let greeted = |rest: &[u8]| [&hello("evil", SCHEMA)[..], rest].concat();
    let mut damaged = batch(vec![gap_record("evil", 666, 1).encode()]);
    *damaged.last_mut().unwrap() ^= 1;
    let ascending = vec![
        gap_record("evil", 666, 2).encode(),
        gap_record("evil", 666, 1).encode(),
    ];
    let heartbeat = framed(client_message::Kind::Heartbeat(v1::Heartbeat {
        spooled_messages: 1,
        ..Default::default()
    }));
    vec![
        ("zeros", vec![0; 4096], close::PROTOCOL),
        ("a length of 4 GiB", vec![0xff; 16], close::LIMIT),
        (
            "half a frame",
            greeted(&batch(vec![gap_record("evil", 666, 1).encode()])[..20]),
            close::PROTOCOL,
        ),
        ("a damaged frame", greeted(&damaged), close::PROTOCOL),
        (
            "a frame of garbage",
            {
                let mut out = BytesMut::new();
                frame::encode(&[0xff; 100], &mut out).unwrap();
                out.to_vec()
            },
            close::PROTOCOL,
        ),
        (
            "a batch before Hello",
            batch(vec![gap_record("evil", 666, 1).encode()]).to_vec(),
            close::PROTOCOL,
        ),
        ("a heartbeat before Hello", heartbeat.to_vec(), close::PROTOCOL),
        ("Hello twice", greeted(&hello("evil", SCHEMA)), close::PROTOCOL),
        ("another schema", hello("evil", 99).to_vec(), close::SCHEMA),
        (
            "a name with escapes",
            hello("evil\u{1b}[2J", SCHEMA).to_vec(),
            close::PROTOCOL,
        ),
        ("an empty batch", greeted(&batch(vec![])), close::PROTOCOL),
        (
            "an envelope of garbage",
            greeted(&batch(vec![vec![0xff; 50].into()])),
            close::PROTOCOL,
        ),
        (
            "another node's envelope",
            greeted(&batch(vec![gap_record("good", 1, 1).encode()])),
            close::PROTOCOL,
        ),
        (
            "envelopes out of order",
            greeted(&batch(ascending)),
            close::PROTOCOL,
        ),
        (
            "a number nobody counts to",
            greeted(&batch(vec![gap_record("evil", 666, u64::MAX).encode()])),
            close::PROTOCOL,
        ),
        (
            "a number just too far ahead",
            greeted(&batch(vec![gap_record("evil", 666, (1 << 32) + 1).encode()])),
            close::PROTOCOL,
        ),
        (
            "another node's name",
            hello("good", SCHEMA).to_vec(),
            close::PROTOCOL,
        ),
        ("nothing at all", vec![], close::PROTOCOL),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_closes_its_own_connection_only() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let store = dir.path().join("store");
    let collector = lab::collector(&authority, &store).await;
    let address = collector.local_addr().unwrap();
    let spool = Arc::new(MemorySpool::new(usize::MAX));
    let good = lab::agent(lab::target(address, &authority.issue("good")), "good", 1, spool);
    let evil = authority.issue("evil");

    let attacks = attacks();
    for (count, (what, bytes, expected)) in (1..).zip(&attacks) {
        for _ in 0..10 {
            good.spool.append("good", 1);
        }
        // An empty stream reaches nobody before its first byte or its end.
        let code = Raw::connect(address, &evil).await.send_all(bytes).await;
        assert_eq!(code, u64::from(*expected), "{what}");
        assert_eq!(collector.stats().protocol_errors, count, "{what} is counted");
    }
    good.caught_up().await;
    assert_eq!(
        good.status().counts.connections,
        1,
        "the good agent never noticed"
    );
    good.stop().await;
    collector.stop().await;
    lab::assert_stored_once(&store, "good", 1, attacks.len() as u64 * 10);
    assert!(
        lab::stored(&store).keys().all(|(node, ..)| node == "good"),
        "nothing hostile was stored"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_bytes_never_stop_the_collector() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let collector = lab::collector(&authority, &dir.path().join("store")).await;
    let address = collector.local_addr().unwrap();
    let evil = authority.issue("evil");
    let mut runner = TestRunner::deterministic();
    let bytes = proptest::collection::vec(proptest::num::u8::ANY, 1..3000);
    let with_length = (proptest::num::u8::ANY, bytes);
    for _ in 0..40 {
        let (small, mut body) = with_length.new_tree(&mut runner).unwrap().current();
        if small > 128 {
            // A length that is taken, so that what follows is looked at.
            let length = (body.len() as u32).saturating_sub(8).max(1);
            body.splice(0..0, length.to_le_bytes());
        }
        let code = Raw::connect(address, &evil).await.send_all(&body).await;
        assert!(
            [close::PROTOCOL, close::LIMIT].contains(&(code as u32)),
            "code {code}"
        );
    }
    assert_eq!(collector.stats().protocol_errors, 40);
    let spool = Arc::new(MemorySpool::new(usize::MAX));
    let good = lab::agent(lab::target(address, &authority.issue("good")), "good", 1, spool);
    good.spool.append("good", 1);
    good.caught_up().await;
    good.stop().await;
    collector.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_sent_again_is_acknowledged_again_and_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let store = dir.path().join("store");
    let collector = lab::collector(&authority, &store).await;
    let mut client = Raw::connect(collector.local_addr().unwrap(), &authority.issue("n1")).await;
    client.send.write_all(&hello("n1", SCHEMA)).await.unwrap();
    for last in [2, 2, 3, 1, 3] {
        let envelopes = (1..=last)
            .map(|sequence| gap_record("n1", 666, sequence).encode())
            .collect();
        client.send.write_all(&batch(envelopes)).await.unwrap();
    }
    lab::eventually("all five are answered", || collector.stats().duplicates == 8).await;
    client.send.finish().unwrap();
    client.connection.closed().await;
    assert_eq!(collector.stats().stored_messages, 3);
    collector.stop().await;
    lab::assert_stored_once(&store, "n1", 666, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_agent_of_the_same_name_takes_over_and_the_first_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let collector = lab::collector(&authority, &dir.path().join("store")).await;
    let address = collector.local_addr().unwrap();
    let mut first = Raw::connect(address, &authority.issue("n1")).await;
    first.send.write_all(&hello("n1", SCHEMA)).await.unwrap();
    assert!(
        first.recv.read_chunk(1000, true).await.unwrap().is_some(),
        "HelloAck"
    );
    let mut second = Raw::connect(address, &authority.issue("n1")).await;
    second.send.write_all(&hello("n1", SCHEMA)).await.unwrap();
    assert!(
        second.recv.read_chunk(1000, true).await.unwrap().is_some(),
        "HelloAck"
    );
    let code = first.send_all(&[]).await;
    assert_eq!(code, u64::from(close::SUPERSEDED));
    collector.stop().await;
}

/// Anybody with one node's key could otherwise take over any node, and make its messages duplicates.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_speaks_for_the_node_it_names_only() {
    let dir = tempfile::tempdir().unwrap();
    let authority = Authority::new(dir.path(), "ours");
    let store = dir.path().join("store");
    let collector = lab::collector(&authority, &store).await;
    let shared = authority.issue("n1");
    let target = |collector: &Collector| lab::target(collector.local_addr().unwrap(), &shared);

    let other = lab::agent(
        target(&collector),
        "n2",
        1,
        Arc::new(MemorySpool::new(usize::MAX)),
    );
    other.spool.append("n2", 1);
    let told = other.trouble("does not name node \"n2\"").await;
    assert!(told.contains("set `node`"), "for who owns the node: {told}");
    assert!(told.contains("--any-name"), "for who owns the collector: {told}");
    assert_eq!(other.spool.last_acked(), 0);
    other.stop().await;
    collector.stop().await;
    assert!(lab::stored(&store).is_empty());

    let mut config = lab::collector_config(&authority, &store);
    config.any_name = true;
    let collector = Collector::start(config).await.unwrap();
    for node in ["n1", "n2"] {
        let agent = lab::agent(
            target(&collector),
            node,
            1,
            Arc::new(MemorySpool::new(usize::MAX)),
        );
        agent.spool.append(node, 1);
        agent.caught_up().await;
        agent.stop().await;
    }
    collector.stop().await;
    assert_eq!(lab::stored(&store).len(), 2);
}
