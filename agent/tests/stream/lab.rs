//! Certificates, collectors and agents for the tests.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use stallscope::config::StreamTarget;
use stallscope::store::Spool;
use stallscope::stream::core::{Pace, Sender};
use stallscope::stream::{self, StreamStatus};
use stallscope_collector::board::BoardLimits;
use stallscope_collector::store::{SegmentReader, StoredItem};
use stallscope_collector::tls::IdentityFiles;
use stallscope_collector::{Collector, CollectorConfig, Limits};
use stallscope_proto::v1;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// An authority and the PEM files it signed.
pub(crate) struct Authority {
    dir: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        let dir = dir.join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        std::fs::write(dir.join("ca.pem"), issuer.pem()).unwrap();
        Self { dir, issuer }
    }

    pub(crate) fn issue(&self, name: &str) -> IdentityFiles {
        self.sign(name, CertificateParams::new(vec![name.to_owned()]).unwrap())
    }

    pub(crate) fn issue_expired(&self, name: &str) -> IdentityFiles {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2021, 1, 1);
        self.sign(name, params)
    }

    fn sign(&self, name: &str, params: CertificateParams) -> IdentityFiles {
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let files = IdentityFiles {
            ca: self.dir.join("ca.pem"),
            cert: self.dir.join(format!("{name}.pem")),
            key: self.dir.join(format!("{name}.key")),
        };
        std::fs::write(&files.cert, cert.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        files
    }
}

pub(crate) fn collector_config(authority: &Authority, store: &Path) -> CollectorConfig {
    CollectorConfig {
        listen: (std::net::Ipv4Addr::LOCALHOST, 0).into(),
        store: store.to_owned(),
        max_bytes: 64 << 20,
        identity: authority.issue("collector"),
        any_name: false,
        board: BoardLimits::default(),
        limits: Limits::default(),
    }
}

pub(crate) async fn collector(authority: &Authority, store: &Path) -> Collector {
    Collector::start(collector_config(authority, store))
        .await
        .unwrap()
}

pub(crate) fn target(address: SocketAddr, identity: &IdentityFiles) -> StreamTarget {
    StreamTarget {
        host: address.ip().to_string(),
        port: address.port(),
        server_name: "collector".into(),
        ca: identity.ca.clone(),
        cert: identity.cert.clone(),
        key: identity.key.clone(),
    }
}

/// An agent's stream, running.
pub(crate) struct Streaming<S> {
    pub(crate) spool: Arc<S>,
    status: watch::Receiver<StreamStatus>,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
}

pub(crate) fn pace() -> Pace {
    Pace {
        gather_ns: 5_000_000,
        backoff_min_ns: 20_000_000,
        backoff_max_ns: 200_000_000,
        ..Pace::default()
    }
}

pub(crate) fn agent<S: Spool + 'static>(
    target: StreamTarget,
    node: &str,
    boot_id: u64,
    spool: Arc<S>,
) -> Streaming<S> {
    let (status_in, status) = watch::channel(StreamStatus::default());
    let (stop, stopped) = watch::channel(false);
    let sender = Sender {
        node: node.to_owned(),
        agent_version: "test".into(),
        boot_id,
    };
    let own = Arc::clone(&spool) as Arc<dyn Spool>;
    let task = tokio::spawn(async move {
        stream::run(&target, sender, pace(), own, &status_in, stopped).await;
    });
    Streaming {
        spool,
        status,
        stop,
        task,
    }
}

impl<S: Spool> Streaming<S> {
    /// Waits until everything appended is acknowledged.
    pub(crate) async fn caught_up(&self) {
        eventually("everything is acknowledged", || {
            self.spool.last_acked() == *self.spool.watch_last().borrow()
        })
        .await;
    }

    /// Waits for trouble that says this.
    pub(crate) async fn trouble(&self, part: &str) -> String {
        let says = |status: &StreamStatus| {
            status
                .trouble
                .as_ref()
                .is_some_and(|trouble| trouble.contains(part))
        };
        let mut watched = self.status.clone();
        let found = tokio::time::timeout(Duration::from_secs(20), watched.wait_for(says)).await;
        match found {
            Ok(status) => status.unwrap().trouble.clone().unwrap(),
            Err(_late) => panic!("no trouble with {part:?}; last: {:?}", self.status()),
        }
    }

    pub(crate) fn status(&self) -> StreamStatus {
        self.status.borrow().clone()
    }

    pub(crate) async fn stop(self) {
        self.stop.send_replace(true);
        self.task.await.unwrap();
    }
}

pub(crate) async fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..3000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("after 30 s still not: {what}");
}

/// How often each message is on a collector's disk, by node, boot and number.
pub(crate) fn stored(store: &Path) -> BTreeMap<(String, u64, u64), u32> {
    let mut found = BTreeMap::new();
    let mut reader = SegmentReader::open(store).unwrap();
    while let Some(result) = reader.next_segment(|item| {
        if let StoredItem::Envelope { bytes, .. } = item {
            let envelope = v1::Envelope::decode(bytes).unwrap();
            let key = (envelope.node, envelope.agent_boot_id, envelope.sequence);
            *found.entry(key).or_insert(0) += 1;
        }
    }) {
        result.unwrap();
    }
    found
}

/// Every message of the node up to `last` is on disk, once.
pub(crate) fn assert_stored_once(store: &Path, node: &str, boot_id: u64, last: u64) {
    let found = stored(store);
    for sequence in 1..=last {
        let times = found.get(&(node.to_owned(), boot_id, sequence));
        assert_eq!(times, Some(&1), "message {sequence} of {node}");
    }
    assert_eq!(
        found.keys().filter(|(owner, ..)| owner == node).count() as u64,
        last
    );
}
