//! The probes on a process that does as it is told.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use stallscope::observation::{Observation, ProcessKey, ProcessRole};
use stallscope::sources::probes::{Attached, Decoded, Decoder, Health, Probes, ProbesConfig, Reader};
use stallscope::sources::procs::{Library, LibraryId, LibraryKind, ProcessEvent};

/// How long what was recorded may take to come.
const PATIENCE: Duration = Duration::from_secs(10);

/// A program that prints what it is about to do, and goes on for each line it reads.
#[derive(Debug)]
pub struct Puppet {
    child: Child,
    said: BufReader<ChildStdout>,
}

impl Puppet {
    /// Starts it and waits for its first line, `ready`.
    ///
    /// # Errors
    /// It did not start or said something else.
    pub fn start(command: &mut Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let said = BufReader::new(child.stdout.take().context("no standard output")?);
        let mut puppet = Self { child, said };
        let first = puppet.line()?;
        ensure!(first == "ready", "the program said {first:?} instead of ready");
        Ok(puppet)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line it says.
    ///
    /// # Errors
    /// It ended.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let bytes = self.said.read_line(&mut line)?;
        ensure!(bytes != 0, "the program ended without another word");
        Ok(line.trim_end().to_owned())
    }

    /// Tells it a word.
    ///
    /// # Errors
    /// It ended.
    pub fn tell(&mut self, word: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("its input was closed")?;
        writeln!(stdin, "{word}")?;
        Ok(stdin.flush()?)
    }

    /// Tells it a word and reads its answer.
    ///
    /// # Errors
    /// It ended.
    pub fn asked(&mut self, word: &str) -> Result<String> {
        self.tell(word)?;
        self.line()
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// It ended.
    pub fn go(&mut self) -> Result<()> {
        self.tell("go")
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        drop(self.child.stdin.take());
        Ok(self.child.wait()?)
    }
}

impl Drop for Puppet {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Loaded probes, and everything they said.
pub struct Tracer {
    /// Control.
    pub probes: Probes,
    /// What each program gives.
    pub health: Health,
    /// Decodes.
    pub decoder: Decoder,
    /// Everything observed so far.
    pub observations: Vec<Observation>,
    /// Everything discovery would have heard so far.
    pub events: Vec<ProcessEvent>,
    /// Why some RDMA posts went unseen.
    pub unwatched: Vec<String>,
    reader: Reader,
    known: BTreeMap<u32, ProcessKey>,
}

impl Tracer {
    /// Loads the object named by `STALLSCOPE_BPF_OBJECT`, or else the one of this build folder.
    ///
    /// # Errors
    /// It is not built or does not load.
    pub fn load(config: ProbesConfig) -> Result<Self> {
        let object = match std::env::var_os("STALLSCOPE_BPF_OBJECT") {
            Some(object) => PathBuf::from(object),
            None => xtask::paths::Paths::find()?.bpf_object(),
        };
        let loaded = Probes::load(&ProbesConfig {
            object: Some(object),
            ..config
        })?;
        Ok(Self {
            probes: loaded.probes,
            health: loaded.health,
            decoder: Decoder::new(),
            observations: Vec::new(),
            events: Vec::new(),
            unwatched: Vec::new(),
            reader: loaded.reader,
            known: BTreeMap::new(),
        })
    }

    /// Traces a process; its start time is not looked at here.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn trace(&mut self, pid: u32) -> Result<ProcessKey> {
        self.probes.trace_process(pid, ProcessRole::Gpu)?;
        let key = ProcessKey { pid, start_ticks: 1 };
        self.known.insert(pid, key);
        Ok(key)
    }

    /// Attaches to a library of a process.
    ///
    /// # Errors
    /// It is not there, or nothing of it can be traced.
    pub fn attach(&mut self, kind: LibraryKind, path: &Path, pid: u32) -> Result<Attached> {
        // As maps names it: without links.
        let path = std::fs::canonicalize(path)?;
        let path = PathBuf::from(format!("/proc/{pid}/root")).join(path.strip_prefix("/")?);
        let metadata = std::fs::metadata(&path)?;
        let library = Library {
            id: LibraryId {
                device: metadata.dev(),
                inode: metadata.ino(),
            },
            kind,
            shown: path.display().to_string(),
            path,
            pid,
        };
        Ok(self.probes.attach_library(&library)?)
    }

    /// Reads what there is, waiting at most `timeout`; children of traced processes become known.
    ///
    /// # Errors
    /// The rings cannot be waited for.
    pub fn drain(&mut self, timeout: Duration) -> Result<()> {
        let Self {
            reader,
            decoder,
            known,
            observations,
            events,
            ..
        } = self;
        let mut posting = Vec::new();
        reader.drain(timeout, &mut |event| {
            let mut decoded = None;
            decoder.decode(event, &mut |pid| known.get(&pid).copied(), &mut |fact| {
                decoded = Some(fact)
            });
            match decoded {
                Some(Decoded::Observation(observation)) => observations.push(observation),
                Some(Decoded::Process(event)) => {
                    if let ProcessEvent::Fork { child, .. } = event {
                        known.insert(
                            child,
                            ProcessKey {
                                pid: child,
                                start_ticks: 2,
                            },
                        );
                    }
                    if let ProcessEvent::PostsThrough { tgid, address, by } = event {
                        posting.push((tgid, address, by));
                    }
                    events.push(event);
                }
                None => {}
            }
        })?;
        for (tgid, address, by) in posting {
            let watched = self.probes.watch_posts(tgid, address, by);
            self.unwatched.extend(watched.err().map(|why| why.to_string()));
        }
        Ok(())
    }

    /// Reads until `enough` says so.
    ///
    /// # Errors
    /// It never does.
    pub fn drain_until(&mut self, enough: impl Fn(&Self) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !enough(self) {
            ensure!(
                Instant::now() < deadline,
                "it never came; observed were {:#?} and {:?}; refused {:?}",
                self.observations,
                self.events,
                self.decoder.refused()
            );
            self.drain(Duration::from_millis(20))?;
        }
        Ok(())
    }

    /// The records lost in the kernel, of all rings.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.reader.lost().map(|(_, count)| count).sum()
    }
}

/// Compiles a file of `fixtures/` with the system's C compiler.
///
/// # Errors
/// There is no compiler, or it refuses.
pub fn compile(source: &str, arguments: &[&OsStr], output: &Path) -> Result<()> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fixtures")
        .join(source);
    let status = Command::new("cc")
        .args(["-O1", "-g", "-Wall", "-Werror", "-o"])
        .arg(output)
        .arg(&source)
        .args(arguments)
        .arg("-pthread")
        .status()
        .context("there is no C compiler `cc`")?;
    ensure!(status.success(), "{} does not compile", source.display());
    Ok(())
}
