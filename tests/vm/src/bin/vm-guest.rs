//! The first process of a virtual machine: mounts what a Linux system has, then does what the host asks.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Read, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process_group};
use stallscope_vm::{Hello, Job, Outcome, PORT, Program, Reply, Request, SHARED_FOLDER, SHARED_TAG};

/// What the initial file system leaves to mount: type, source, place, options.
const MOUNTS: [(&str, &str, &str, &str); 7] = [
    ("tracefs", "nodev", "/sys/kernel/tracing", ""),
    ("debugfs", "nodev", "/sys/kernel/debug", ""),
    ("bpf", "nodev", "/sys/fs/bpf", ""),
    ("cgroup2", "nodev", "/sys/fs/cgroup", ""),
    ("devpts", "nodev", "/dev/pts", ""),
    ("tmpfs", "nodev", "/dev/shm", ""),
    (
        "9p",
        SHARED_TAG,
        SHARED_FOLDER,
        "trans=virtio,version=9p2000.L,msize=524288",
    ),
];

/// How often a process is looked at that somebody waits for.
const LOOK: Duration = Duration::from_millis(20);

/// Programs that were started and not yet waited for, by process id.
type Started = Arc<Mutex<BTreeMap<u32, Child>>>;

fn main() -> Result<()> {
    mount_all()?;
    let port = serial_port()?;
    // A serial port can be opened once: reading and writing share it.
    let port = File::options()
        .read(true)
        .write(true)
        .open(&port)
        .with_context(|| format!("failed to open {}", port.display()))?;
    let mut replies = port.try_clone()?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease")?
        .trim()
        .to_owned();
    say(&mut replies, &Hello { kernel })?;
    let replies = Arc::new(Mutex::new(replies));
    let started = Started::default();
    for line in BufReader::new(port).lines() {
        let request: Request = serde_json::from_str(&line?).context("the host sent no request")?;
        let (replies, started) = (Arc::clone(&replies), Arc::clone(&started));
        thread::spawn(move || {
            let result = perform(request.job, &started).map_err(|error| format!("{error:#}"));
            let mut replies = replies.lock().unwrap_or_else(PoisonError::into_inner);
            // Without a host there is nobody to tell.
            let _ = say(
                &mut replies,
                &Reply {
                    id: request.id,
                    result,
                },
            );
        });
    }
    bail!("the host went away")
}

fn mount_all() -> Result<()> {
    for (kind, source, place, options) in MOUNTS {
        fs::create_dir_all(place).with_context(|| format!("failed to create {place}"))?;
        let mut command = Command::new("mount");
        command.args(["-t", kind, source, place]);
        if !options.is_empty() {
            command.args(["-o", options]);
        }
        let status = command.status().context("failed to start mount")?;
        if !status.success() {
            bail!("{place} was not mounted: {status}");
        }
    }
    Ok(())
}

/// The device of the port that is named [`PORT`].
fn serial_port() -> Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports").context("there is no virtio serial port")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT) {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("no virtio serial port is named {PORT}")
}

fn say(port: &mut File, message: &impl serde::Serialize) -> Result<()> {
    let mut line = serde_json::to_string(message)?;
    line.push('\n');
    Ok(port.write_all(line.as_bytes())?)
}

fn perform(job: Job, started: &Started) -> Result<Outcome> {
    match job {
        Job::Run { program, at_most_s } => run(&program, Duration::from_secs(at_most_s)),
        Job::Start { program, log } => start(&program, &log, started),
        Job::Finish {
            pid,
            terminate,
            at_most_s,
        } => {
            let child = started
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&pid);
            let mut child = child.with_context(|| format!("no process {pid} was started"))?;
            if terminate {
                signal(&child, Signal::TERM);
            }
            let status = wait(&mut child, Duration::from_secs(at_most_s))?;
            Ok(Outcome {
                pid,
                code: status.code(),
                ..Outcome::default()
            })
        }
    }
}

fn run(program: &Program, at_most: Duration) -> Result<Outcome> {
    let mut child = command(program)?
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("failed to start {}", program.words.join(" ")))?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let ended = wait(&mut child, at_most);
    // What it leaves behind in its group would hold the pipes open.
    signal(&child, Signal::KILL);
    let (stdout, stderr) = (joined(stdout), joined(stderr));
    let status = ended.with_context(|| format!("{}; it said:\n{stdout}{stderr}", program.words.join(" ")))?;
    Ok(Outcome {
        pid: child.id(),
        code: status.code(),
        stdout,
        stderr,
    })
}

fn start(program: &Program, log: &str, started: &Started) -> Result<Outcome> {
    let path = Path::new(SHARED_FOLDER).join(log);
    let file = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    let child = command(program)?
        .stdout(file.try_clone()?)
        .stderr(file)
        .spawn()
        .with_context(|| format!("failed to start {}", program.words.join(" ")))?;
    let pid = child.id();
    started
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(pid, child);
    Ok(Outcome {
        pid,
        ..Outcome::default()
    })
}

fn command(program: &Program) -> Result<Command> {
    let (name, arguments) = program.words.split_first().context("no program was named")?;
    let mut command = Command::new(name);
    command
        .args(arguments)
        .envs(program.variables.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .process_group(0);
    Ok(command)
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read until an error is what there is.
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

fn joined(reader: thread::JoinHandle<Vec<u8>>) -> String {
    String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
}

/// Waits for an end; a process that takes too long is killed with its group.
fn wait(child: &mut Child, at_most: Duration) -> Result<ExitStatus> {
    let deadline = Instant::now() + at_most;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        if Instant::now() >= deadline {
            signal(child, Signal::KILL);
            child.wait()?;
            bail!("it did not end within {at_most:?} and was killed");
        }
        thread::sleep(LOOK);
    }
}

fn signal(child: &Child, signal: Signal) {
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        // A group that is gone is what was wanted.
        let _ = kill_process_group(group, signal);
    }
}
