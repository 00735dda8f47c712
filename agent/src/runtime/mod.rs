//! The running agent: sources, timeline and sinks joined.
//!
//! ```text
//! discover ── facts about processes ─┐
//!    ▲  process events               ▼
//! gather (rings, NVML, net, devices, quota) ── batches ──▶ history (timeline ─▶ store, status)
//!                                                    store ──▶ stream (tokio, main thread)
//! ```
//!
//! One thread gathers from all sources in turn, so that a starved agent is late with everything alike and what belongs
//! together stays together. Every queue is bounded; what does not fit is counted and named.

mod devices;
mod discover;
mod gather;
mod gpus;
mod history;
mod limits;
mod own;
mod queue;
mod shared;
pub mod status;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::sync_channel;
use std::thread::JoinHandle;
use std::time::Duration;

use stallscope_attribution::facts::RecordGap;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::config::{Config, StreamTarget};
use crate::control::server::ControlServer;
use crate::record::{RecordError, Recorder};
use crate::sources::clock;
use crate::sources::nccl_profiler::NcclProfiler;
use crate::sources::net::NetSource;
use crate::sources::probes::{Loaded, Probes, ProbesConfig, Reader};
use crate::sources::procs::Discovery;
use crate::store::{OpenError, Ring, Spool};
use crate::stream::{self, StreamStatus};
use shared::Shared;
use status::Condition;

/// Process events between gathering and discovery.
const EVENTS: usize = 4_096;
/// Facts about processes on their way to history.
const FACTS: usize = 4_096;
const TICK: Duration = Duration::from_secs(1);
/// How long an agent that is ending may keep the store: the kernel takes some seconds to detach its probes.
const TAKEOVER: Duration = Duration::from_secs(15);
const TAKEOVER_POLL: Duration = Duration::from_millis(250);
/// How long threads may take to end: well within what a service manager waits.
const LONGEST_STOP: Duration = Duration::from_secs(20);
const STOP_POLL: Duration = Duration::from_millis(10);

/// Why the agent does not run at all. Anything less is named in the log, the status and the report.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The system gives no thread, no signal or no event loop.
    #[error(
        "failed to start {what}: {source}; raise the limits of tasks and files and start the agent again"
    )]
    Start {
        /// What.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Another agent runs here. Two would cost the job twice and tell everything twice.
    #[error("{0}; this one ends")]
    Another(OpenError),
    /// Observations were to be recorded and cannot be.
    #[error(transparent)]
    Record(#[from] RecordError),
}

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The configuration.
    pub config: Config,
    /// Where to record observations.
    pub record: Option<PathBuf>,
    /// Record only: no store, no stream, no control socket.
    pub record_only: bool,
    /// Stop by itself after this time.
    pub run_for: Option<Duration>,
}

/// Runs until SIGTERM or SIGINT, then hands over what is left.
///
/// # Errors
/// When it cannot start at all.
pub fn run(options: &Options) -> Result<(), RunError> {
    let start = |what| move |source| RunError::Start { what, source };
    let event_loop = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(start("the event loop"))?;
    event_loop.block_on(supervise(options))
}

async fn supervise(options: &Options) -> Result<(), RunError> {
    let start = |what| move |source| RunError::Start { what, source };
    // Before anything else: a signal during start is a clean stop too.
    let mut terminate = signal(SignalKind::terminate()).map_err(start("the SIGTERM handler"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(start("the SIGINT handler"))?;

    own::raise_file_limit();
    let config = &options.config;
    let shared = Arc::new(Shared::new(config.node_name()));
    tracing::info!(node = %shared.node, "agent starts");
    limits::check(&shared);
    let recorder = options
        .record
        .as_deref()
        .map(|path| Recorder::create(path, &shared.node))
        .transpose()?;
    let ring = if options.record_only {
        None
    } else {
        tokio::select! {
            ring = open_store(config, &shared) => Some(ring?),
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    };
    let _control = if options.record_only {
        None
    } else {
        open_control(config, &shared)
    };
    let threads = start_threads(config, &shared, ring.clone(), recorder)?;

    let (stop_stream, stopped) = watch::channel(false);
    let streaming = ring.and_then(|ring| start_stream(config, &shared, ring, stopped));
    let timer = async {
        match options.run_for {
            Some(duration) => tokio::time::sleep(duration).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = timer => {}
        () = shared.stopped() => {}
        () = follow_stream(&shared, streaming.as_ref().map(|(_, status)| status.clone())) => {}
    }

    tracing::info!(node = %shared.node, "agent stops");
    shared.stop();
    // The stream goes on while the threads hand over what they have.
    let joined = tokio::task::spawn_blocking(move || join_all(threads)).await;
    if let Err(error) = joined {
        tracing::error!(%error, "a thread could not be waited for");
    }
    stop_stream.send_replace(true);
    if let Some((task, _)) = streaming
        && let Err(error) = task.await
    {
        tracing::error!(%error, "the stream ended badly; what it did not send stays in the store");
    }
    Ok(())
}

/// Waits for the threads to end, but not for ever: one may hang in a system call on a file system that is gone. What
/// the others have is handed over, and the process ends with the one that hangs.
fn join_all(mut threads: Vec<JoinHandle<()>>) {
    let deadline = std::time::Instant::now() + LONGEST_STOP;
    loop {
        let ended = threads.extract_if(.., |thread| thread.is_finished());
        ended.for_each(join);
        if threads.is_empty() {
            return;
        }
        if std::time::Instant::now() >= deadline {
            break;
        }
        std::thread::sleep(STOP_POLL);
    }
    for thread in threads {
        tracing::error!(
            thread = name_of(&thread),
            "a thread does not end within {} s and is left behind; what it still had is not in the store",
            LONGEST_STOP.as_secs()
        );
    }
}

fn name_of(thread: &JoinHandle<()>) -> String {
    thread.thread().name().unwrap_or("unnamed").to_owned()
}

fn join(thread: JoinHandle<()>) {
    let name = name_of(&thread);
    if thread.join().is_err() {
        tracing::error!(
            thread = name,
            "a thread of the agent panicked: what it gave is missing since"
        );
    }
}

/// Starts gathering, discovery and history. They end when told to, the last one when the others have.
fn start_threads(
    config: &Config,
    shared: &Arc<Shared>,
    ring: Option<Arc<Ring>>,
    recorder: Option<Recorder>,
) -> Result<Vec<JoinHandle<()>>, RunError> {
    let (batches, received) = queue::queue();
    let (events, news) = sync_channel(EVENTS);
    let (facts, found) = sync_channel(FACTS);
    let (probes, reader) = load_probes(config, shared);
    let gather = gather::Gather::new(
        Arc::clone(shared),
        gather::Sources {
            reader,
            gpus: gpus::Gpus::open(&config.nvml, shared),
            net: open_net(shared),
            devices: devices::Devices::open(&config.devices.sys, shared),
            found,
            events,
            batches,
        },
    );
    let mut discovery = Discovery::new("/proc", config.scope.cgroup.clone());
    match config.model.declared() {
        Ok(model) => discovery.set_model(model),
        Err(why) => missing(shared, "model", &why),
    }
    let nccl_profiler = config.nccl.profiler.then(NcclProfiler::default);
    let discover = discover::Discover::new(Arc::clone(shared), discovery, probes, nccl_profiler, news, facts);
    let history = history::History::new(Arc::clone(shared), &config.store.dir, ring, recorder, received);
    Ok(vec![
        spawn("stallscope-find", shared, move || discover.run())?,
        spawn("stallscope-read", shared, move || gather.run())?,
        spawn("stallscope-time", shared, move || history.run())?,
    ])
}

fn spawn(
    name: &'static str,
    shared: &Arc<Shared>,
    body: impl FnOnce() + Send + 'static,
) -> Result<JoinHandle<()>, RunError> {
    let thread = std::thread::Builder::new().name(name.to_owned()).spawn(body);
    thread.map_err(|source| {
        shared.stop();
        RunError::Start { what: name, source }
    })
}

/// Names what is missing in the log, the status and the record.
fn missing(shared: &Shared, part: &'static str, why: &dyn std::fmt::Display) {
    let why = why.to_string();
    tracing::warn!(part, why, "runs without");
    name_gap(shared, format!("{part}: {why}"));
    shared.status.lock().set_health(part, Condition::Missing(why));
}

/// Something that this run of the agent lacks.
fn name_gap(shared: &Shared, what: String) {
    shared.add_gap(RecordGap {
        node: shared.node.clone(),
        window: None,
        what,
        count: 0,
    });
}

fn works(shared: &Shared, part: &'static str) {
    shared.status.lock().set_health(part, Condition::Works);
}

fn load_probes(config: &Config, shared: &Shared) -> (Option<Probes>, Option<Reader>) {
    let mut settings = ProbesConfig {
        object: config.probes.object.clone(),
        ..ProbesConfig::default()
    };
    if !config.nccl.waits {
        settings.waits.budget_ppm = 0;
    }
    match Probes::load(&settings) {
        Ok(Loaded {
            probes,
            reader,
            health,
        }) => {
            let lost: Vec<String> = health
                .missing()
                .map(|program| format!("{} ({}): {:?}", program.program, program.intent, program.outcome))
                .collect();
            if lost.is_empty() {
                works(shared, "probes");
            } else {
                let why = lost.join("; ");
                tracing::warn!(why, "some programs do not run here");
                shared
                    .status
                    .lock()
                    .set_health("probes", Condition::Degraded(why));
            }
            (Some(probes), Some(reader))
        }
        Err(error) => {
            missing(shared, "probes", &error);
            (None, None)
        }
    }
}

fn open_net(shared: &Shared) -> Option<NetSource> {
    match NetSource::open(shared.node.clone()) {
        Ok(source) => {
            works(shared, "net");
            Some(source)
        }
        Err(error) => {
            missing(shared, "net", &error);
            None
        }
    }
}

/// The store; in memory when the disk refuses. Waits a while for an agent that is about to end.
async fn open_store(config: &Config, shared: &Shared) -> Result<Arc<Ring>, RunError> {
    let deadline = tokio::time::Instant::now() + TAKEOVER;
    let mut said = false;
    loop {
        let opened = match Ring::open(&config.store.dir, config.store.max_bytes, own::random()) {
            Ok(opened) => opened,
            Err(error @ OpenError::InUse { .. }) if tokio::time::Instant::now() >= deadline => {
                return Err(RunError::Another(error));
            }
            Err(error @ OpenError::InUse { .. }) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(%error, "waiting {} s for the other agent to end", TAKEOVER.as_secs());
                }
                tokio::time::sleep(TAKEOVER_POLL).await;
                continue;
            }
            Err(error) => {
                missing(shared, "store", &error);
                return Ok(Arc::new(Ring::in_memory(own::random())));
            }
        };
        if opened.torn_bytes > 0 {
            tracing::warn!(
                bytes = opened.torn_bytes,
                "the last message of the store was torn and is cut off"
            );
            shared.add_gap(RecordGap {
                node: shared.node.clone(),
                window: None,
                what: "the agent or the node crashed while writing its store: a message was torn".to_owned(),
                count: 1,
            });
        }
        works(shared, "store");
        return Ok(Arc::new(opened.ring));
    }
}

fn open_control(config: &Config, shared: &Shared) -> Option<ControlServer> {
    match ControlServer::start(&config.control.socket, shared.status.clone()) {
        Ok(server) => {
            works(shared, "control");
            Some(server)
        }
        Err(error) => {
            missing(shared, "control", &error);
            None
        }
    }
}

type Streaming = (tokio::task::JoinHandle<()>, watch::Receiver<StreamStatus>);

fn start_stream(
    config: &Config,
    shared: &Shared,
    ring: Arc<Ring>,
    stopped: watch::Receiver<bool>,
) -> Option<Streaming> {
    let target: StreamTarget = match config.stream.target() {
        Ok(Some(target)) => target,
        Ok(None) => {
            shared.status.lock().set_health("stream", Condition::Off);
            return None;
        }
        Err(error) => {
            missing(shared, "stream", &error);
            return None;
        }
    };
    let sender = stream::core::Sender {
        node: shared.node.clone(),
        agent_version: env!("CARGO_PKG_VERSION").to_owned(),
        boot_id: shared.boot_id,
    };
    let (status, followed) = watch::channel(StreamStatus::default());
    let task = tokio::spawn(async move {
        let spool: Arc<dyn Spool> = ring;
        stream::run(
            &target,
            sender,
            stream::core::Pace::default(),
            spool,
            &status,
            stopped,
        )
        .await;
    });
    Some((task, followed))
}

/// Keeps the stream's line in the status up to date; never ends.
async fn follow_stream(shared: &Shared, followed: Option<watch::Receiver<StreamStatus>>) {
    let Some(followed) = followed else {
        return std::future::pending().await;
    };
    loop {
        let condition = {
            let status = followed.borrow();
            match (&status.trouble, status.connected) {
                (_, true) => Condition::Works,
                (Some(why), false) => Condition::Degraded(format!(
                    "{why}; {} messages wait in the store",
                    status.waiting_messages
                )),
                (None, false) => Condition::Degraded("connecting".to_owned()),
            }
        };
        shared.status.lock().set_health("stream", condition);
        tokio::time::sleep(TICK).await;
    }
}

/// Now, as the record's clocks have it.
fn now_ns() -> u64 {
    clock::monotonic_ns()
}
