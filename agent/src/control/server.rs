//! The agent's end of the control socket.

use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use stallscope_attribution::facts::JobFacts;

use super::{AgentStatus, Answer, MAX_REQUEST_BYTES, Own, Part, Request, fitness};
use crate::answers::select;
use crate::runtime::status::{Condition, SharedStatus, Status};
use crate::sources::clock;

/// Clients served at once; one more is told to come back.
const MAX_CLIENTS: u32 = 8;
/// A client whose question is not there after so long is dropped.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(2);
/// Owner and group may speak to the agent.
const SOCKET_MODE: u32 = 0o660;

/// Why the control socket cannot be had. The agent runs on without it.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Another agent answers there.
    #[error(
        "another agent already listens on {}: stop it, or set another control.socket; check, top and report ask the \
         other one",
        path.display()
    )]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// Something that is no socket lies there.
    #[error("{} is no socket and is left alone: move it, or set another control.socket", path.display())]
    NotASocket {
        /// The path.
        path: PathBuf,
    },
    /// The system refused.
    #[error("failed to listen on {}: {source}; check, top and report cannot ask this agent", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// The listening socket; dropped, it stops and removes the socket if it is still its own.
#[derive(Debug)]
pub struct ControlServer {
    path: PathBuf,
    inode: (u64, u64),
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ControlServer {
    /// Listens on `path` and answers from `status`. A stale socket of a dead agent is replaced.
    ///
    /// # Errors
    /// When another agent listens there, something else lies there, or the system refuses.
    pub fn start(path: &Path, status: SharedStatus) -> Result<Self, ControlError> {
        let failed = |source| ControlError::Io {
            path: path.to_owned(),
            source,
        };
        refuse_unless_stale(path)?;
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed)?;
        }
        let (listener, inode) = bind_private(path).map_err(failed)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let accept = move || accept(&listener, &status, &stopping);
        let thread = std::thread::Builder::new()
            .name("control".to_owned())
            .spawn(accept)
            .map_err(failed)?;
        Ok(Self {
            path: path.to_owned(),
            inode,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let is_own =
            std::fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.inode);
        // The thread sleeps in accept: a connection wakes it. Without a way in, it is left to end with the process.
        let woken = is_own && UnixStream::connect(&self.path).is_ok();
        if is_own {
            let _ = std::fs::remove_file(&self.path);
        }
        if let Some(thread) = self.thread.take().filter(|_| woken) {
            let _ = thread.join();
        }
    }
}

/// An existing path must be a socket that nobody listens on.
fn refuse_unless_stale(path: &Path) -> Result<(), ControlError> {
    let Ok(meta) = std::fs::symlink_metadata(path) else {
        return Ok(());
    };
    if !meta.file_type().is_socket() {
        return Err(ControlError::NotASocket {
            path: path.to_owned(),
        });
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(ControlError::InUse {
            path: path.to_owned(),
        }),
        Err(_) => Ok(()),
    }
}

/// Binds beside the final name and moves the socket there once its mode is set, so that at no moment anybody else
/// can connect, and a stale socket is replaced in one step.
fn bind_private(path: &Path) -> std::io::Result<(UnixListener, (u64, u64))> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}", std::process::id()));
    let private = PathBuf::from(name);
    let _ = std::fs::remove_file(&private);
    let listener = UnixListener::bind(&private)?;
    let moved = std::fs::set_permissions(&private, std::fs::Permissions::from_mode(SOCKET_MODE))
        .and_then(|()| std::fs::symlink_metadata(&private))
        .and_then(|meta| std::fs::rename(&private, path).map(|()| (meta.dev(), meta.ino())));
    match moved {
        Ok(inode) => Ok((listener, inode)),
        Err(error) => {
            let _ = std::fs::remove_file(&private);
            Err(error)
        }
    }
}

fn accept(listener: &UnixListener, status: &SharedStatus, stop: &AtomicBool) {
    let clients = Arc::new(AtomicU32::new(0));
    for client in listener.incoming() {
        if stop.load(Ordering::Acquire) {
            return;
        }
        let Ok(client) = client else {
            // Out of descriptors, most likely: do not spin while that lasts.
            std::thread::sleep(Duration::from_millis(100));
            continue;
        };
        if clients.load(Ordering::Acquire) >= MAX_CLIENTS {
            let why = format!("{MAX_CLIENTS} clients are being served: ask again");
            let _ = send(&client, &Answer::Failed { why });
            continue;
        }
        clients.fetch_add(1, Ordering::AcqRel);
        let (status, served) = (status.clone(), Served(Arc::clone(&clients)));
        let serve = move || {
            let _served = served;
            // A client that goes away or sends nothing useful is its own problem.
            let _ = serve(&client, &status);
        };
        // Without a thread the client is dropped, and its place with it.
        let _ = std::thread::Builder::new()
            .name("control-client".to_owned())
            .spawn(serve);
    }
}

/// A client's place among those served at once: given back however serving ends.
struct Served(Arc<AtomicU32>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

fn serve(client: &UnixStream, status: &SharedStatus) -> std::io::Result<()> {
    client.set_write_timeout(Some(CLIENT_TIMEOUT))?;
    let line = read_line(client)?;
    let answer = match line.strip_suffix(b"\n") {
        None if line.len() as u64 == MAX_REQUEST_BYTES => Answer::Failed {
            why: format!("the request is longer than {MAX_REQUEST_BYTES} bytes"),
        },
        None => return Ok(()),
        Some(request) => match serde_json::from_slice(request) {
            Ok(request) => answer(&request, status),
            Err(error) => Answer::Failed {
                why: format!("not a request this agent knows: {error}"),
            },
        },
    };
    send(client, &answer)
}

/// The request line, or what there is of it when the client ends or the line is too long. A client that sends byte by
/// byte has no more time than one that sends nothing.
fn read_line(mut client: &UnixStream) -> std::io::Result<Vec<u8>> {
    let deadline = Instant::now() + CLIENT_TIMEOUT;
    let mut line = Vec::new();
    let mut buffer = [0; 512];
    while !line.ends_with(b"\n") && (line.len() as u64) < MAX_REQUEST_BYTES {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(std::io::ErrorKind::TimedOut.into());
        }
        client.set_read_timeout(Some(left))?;
        let room = usize::try_from(MAX_REQUEST_BYTES).map_or(0, |most| most - line.len());
        let most = room.min(buffer.len());
        match client.read(&mut buffer[..most])? {
            0 => break,
            read => line.extend_from_slice(&buffer[..read]),
        }
        if let Some(end) = line.iter().position(|&byte| byte == b'\n') {
            line.truncate(end + 1);
        }
    }
    Ok(line)
}

fn send(mut client: &UnixStream, answer: &Answer) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    client.write_all(&line)
}

/// The answer to a request, from the status as it is now.
fn answer(request: &Request, status: &SharedStatus) -> Answer {
    let now_ns = clock::monotonic_ns();
    match request {
        Request::Check { gpu } => {
            let status = status.lock();
            match fitness::check(&status, *gpu, now_ns) {
                Some(check) => Answer::Check(check),
                None => Answer::Failed {
                    why: "the agent starts and has read no GPU yet: ask again".to_owned(),
                },
            }
        }
        Request::Status => Answer::Status(agent_status(&status.lock(), now_ns)),
        Request::Report { job, since_ms } => {
            // Copied under the lock, analysed without it.
            let facts = status.lock().recent.job_facts();
            report(
                facts,
                job.as_deref(),
                since_ms.map(|ms| now_ns.saturating_sub(ms.saturating_mul(1_000_000))),
            )
        }
    }
}

fn report(mut facts: Vec<JobFacts>, job: Option<&str>, since_ns: Option<u64>) -> Answer {
    if let Some(since_ns) = since_ns {
        facts.iter_mut().for_each(|facts| keep_since(facts, since_ns));
    }
    match select::document(facts, job) {
        Ok(document) => Answer::Report {
            document: Box::new(document),
        },
        Err(why) => Answer::NothingRecorded { why },
    }
}

/// Drops what ended before `since_ns`, `CLOCK_MONOTONIC`.
fn keep_since(facts: &mut JobFacts, since_ns: u64) {
    for gpu in &mut facts.gpus {
        gpu.steps.retain(|step| step.window.end_ns() >= since_ns);
        gpu.spans.retain(|span| span.window.end_ns() >= since_ns);
    }
    facts
        .gpus
        .retain(|gpu| !gpu.steps.is_empty() || !gpu.spans.is_empty());
    facts.ports.retain(|port| port.window.end_ns() >= since_ns);
    facts.hardware.retain(|device| device.window.end_ns() >= since_ns);
}

fn agent_status(status: &Status, now_ns: u64) -> AgentStatus {
    let ms_since = |then_ns: u64| now_ns.saturating_sub(then_ns) / 1_000_000;
    let own = status.own;
    AgentStatus {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        node: status.node.clone(),
        uptime_ms: ms_since(status.started_ns),
        idle_ms: ms_since(status.updated_ns),
        gpus: status.gpus.keys().copied().collect(),
        jobs: status.recent.jobs().map(str::to_owned).collect(),
        parts: status
            .health
            .iter()
            .map(|health| part(health.part, &health.condition))
            .collect(),
        own: Own {
            cpu_ms: own.cpu_ms,
            cpu_ppm: own.cpu_ppm,
            resident_bytes: own.resident_bytes,
            observations: own.observations,
            lost_records: own.lost_records,
            dropped_observations: own.dropped_observations,
            late_observations: own.late_observations,
            dropped_messages: own.dropped_messages,
        },
    }
}

fn part(part: &str, condition: &Condition) -> Part {
    let (condition, why) = match condition {
        Condition::Works => ("works", ""),
        Condition::Degraded(why) => ("degraded", why.as_str()),
        Condition::Missing(why) => ("missing", why.as_str()),
        Condition::Starting => ("starting", ""),
        Condition::Off => ("off", ""),
    };
    Part {
        part: part.to_owned(),
        condition: condition.to_owned(),
        why: why.to_owned(),
    }
}

#[cfg(test)]
mod tests;
