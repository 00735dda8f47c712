//! Runs the protocol core over QUIC.

use std::sync::Arc;
use std::time::Duration;

use stallscope_proto::{close, frame};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::core::{Action, Core, Pace, Sender, StreamCounts};
use super::link::{Link, LinkError};
use crate::config::StreamTarget;
use crate::store::Spool;

/// How long a stopping agent tries to hand over what is left; the rest stays in the store.
const FAREWELL: Duration = Duration::from_secs(2);

/// What the stream does now, for status and doctor.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StreamStatus {
    /// Whether the collector takes data.
    pub connected: bool,
    /// Why not, and what to do, when it does not.
    pub trouble: Option<String>,
    /// Messages in the store that the collector has not acknowledged.
    pub waiting_messages: u64,
    /// What happened so far.
    pub counts: StreamCounts,
}

struct Driver<'a> {
    target: &'a StreamTarget,
    spool: &'a dyn Spool,
    core: Core,
    link: Option<Link>,
    /// A frame is being written: given up half-way, nothing can follow it on the stream.
    sending: bool,
    status: &'a watch::Sender<StreamStatus>,
    answer: Duration,
    gather: Duration,
    started: Instant,
    /// The trouble that was logged last, so that the same one is not logged at every try.
    logged: Option<String>,
}

/// Streams the spool to the collector until `stop` becomes true or is dropped. Never fails: whatever goes wrong is
/// logged with what to do, and tried again; the data stays in the spool.
pub async fn run(
    target: &StreamTarget,
    sender: Sender,
    pace: Pace,
    spool: Arc<dyn Spool>,
    status: &watch::Sender<StreamStatus>,
    mut stop: watch::Receiver<bool>,
) {
    let mut driver = Driver {
        target,
        spool: &*spool,
        core: Core::new(sender, pace),
        link: None,
        sending: false,
        status,
        answer: Duration::from_nanos(pace.answer_ns),
        gather: Duration::from_nanos(pace.gather_ns),
        started: Instant::now(),
        logged: None,
    };
    tokio::select! {
        () = driver.run_forever() => {}
        () = stopped(&mut stop) => {}
    }
    driver.farewell().await;
}

async fn stopped(stop: &mut watch::Receiver<bool>) {
    // A dropped sender means that the agent is gone, which is a stop too.
    let _ = stop.wait_for(|stop| *stop).await;
}

impl Driver<'_> {
    fn now_ns(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    async fn run_forever(&mut self) {
        loop {
            self.step().await;
        }
    }

    /// Does one action of the core.
    async fn step(&mut self) {
        match self.core.poll(self.now_ns(), self.spool) {
            Action::Connect => self.connect().await,
            Action::Send(framed) => {
                let Some(link) = &mut self.link else {
                    return self.lost(LinkError::Stream("closed".into()));
                };
                self.sending = true;
                let sent = timeout(self.answer, link.send(&framed)).await;
                self.sending = false;
                if let Err(error) = sent.unwrap_or(Err(LinkError::Late(self.answer))) {
                    self.lost(error);
                }
            }
            Action::Disconnect { code, why } => {
                if let Some(link) = self.link.take() {
                    link.close(code, &why).await;
                }
                self.trouble(&why, "see the log of the collector", None);
            }
            Action::WaitUntil(until_ns) => self.wait(until_ns).await,
        }
    }

    async fn connect(&mut self) {
        let opened = timeout(self.answer, Link::open(self.target, frame::MAX_BODY_BYTES)).await;
        match opened.unwrap_or(Err(LinkError::Late(self.answer))) {
            Ok(link) => {
                self.link = Some(link);
                self.core.connected(self.now_ns());
            }
            Err(error) => self.lost(error),
        }
    }

    async fn wait(&mut self, until_ns: u64) {
        let until = self.started + Duration::from_nanos(until_ns.min(u64::MAX >> 8));
        let mut appended = self.spool.watch_last();
        // What is waited for that shortly is the next batch, which will take along what is appended until then.
        let is_gathering = until.saturating_duration_since(Instant::now()) <= self.gather;
        let Some(link) = &mut self.link else {
            return sleep_until(until).await;
        };
        let received = tokio::select! {
            () = sleep_until(until) => None,
            _ = appended.changed(), if !is_gathering => None,
            received = link.receive() => Some(received),
        };
        match received {
            None => {}
            Some(Err(error)) => self.lost(error),
            Some(Ok(message)) => {
                let was_streaming = self.core.is_streaming();
                // An error shows as the next action, which disconnects.
                let taken = self.core.receive(self.now_ns(), message, self.spool);
                if taken.is_ok() && !was_streaming {
                    self.joined();
                }
                self.publish(None);
            }
        }
    }

    fn joined(&mut self) {
        let (host, port) = (&self.target.host, self.target.port);
        tracing::info!(waiting = self.waiting(), "streaming to collector {host}:{port}");
        self.logged = None;
    }

    fn lost(&mut self, error: LinkError) {
        self.link = None;
        let now_ns = self.now_ns();
        let next_ns = self.core.disconnected(now_ns, error.close_code());
        self.trouble(
            &error.to_string(),
            error.advice(),
            Some(next_ns.saturating_sub(now_ns)),
        );
    }

    fn trouble(&mut self, why: &str, advice: &str, wait_ns: Option<u64>) {
        let trouble = format!("{why}; {advice}");
        let (host, port, waiting) = (&self.target.host, self.target.port, self.waiting());
        let next_try_s = wait_ns.unwrap_or(0).div_ceil(1_000_000_000);
        if self.logged.as_ref() == Some(&trouble) {
            tracing::debug!(waiting, next_try_s, "collector {host}:{port}: {trouble}");
        } else {
            tracing::warn!(
                "collector {host}:{port}: {why}. Nothing is lost: {waiting} messages wait in the local store and \
                 are sent when it is back; next try in {next_try_s} s. To do: {advice}"
            );
            self.logged = Some(trouble.clone());
        }
        self.publish(Some(trouble));
    }

    fn waiting(&self) -> u64 {
        self.spool
            .watch_last()
            .borrow()
            .saturating_sub(self.spool.last_acked())
    }

    fn publish(&self, trouble: Option<String>) {
        let connected = self.core.is_streaming();
        let (waiting_messages, counts) = (self.waiting(), self.core.counts());
        self.status.send_replace(StreamStatus {
            connected,
            trouble,
            waiting_messages,
            counts,
        });
    }

    /// Hands over what is left as far as time allows and says goodbye.
    async fn farewell(mut self) {
        let rest = async {
            while self.link.is_some() && !self.sending && !self.core.is_drained(self.spool) {
                self.step().await;
            }
        };
        let _ = timeout(FAREWELL, rest).await;
        let waiting = self.waiting();
        if let Some(link) = self.link.take() {
            link.close(close::DONE, "the agent stops").await;
        }
        if waiting > 0 {
            tracing::info!("{waiting} messages stay in the local store and are sent when the agent is back");
        }
    }
}
