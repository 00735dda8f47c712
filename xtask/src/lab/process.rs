//! Supervised child processes.

use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::shell;

/// How long a child may take to stop when asked.
const PATIENCE: Duration = Duration::from_secs(5);

/// A network namespace, held open: it lives at least as long as this value, also when its name is taken away.
#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// Opens a namespace by the name that `ip netns` gave it.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new("/run/netns").join(name);
        File::open(&path)
            .map(Self)
            .with_context(|| format!("failed to open {}", path.display()))
    }
}

/// A command that runs `program` inside a network namespace and dies with this process.
///
/// Unlike `ip netns exec` this keeps the mounts: a fresh `/sys` would hide tracefs, bpffs and the control groups.
#[must_use]
pub fn inside(netns: Option<&Namespace>, program: &Path) -> Command {
    let mut command = match netns {
        Some(Namespace(file)) => {
            let mut command = Command::new("nsenter");
            command
                .arg(format!(
                    "--net=/proc/{}/fd/{}",
                    std::process::id(),
                    file.as_raw_fd()
                ))
                .args(["--", "setpriv"]);
            command
        }
        None => Command::new("setpriv"),
    };
    command.args(["--pdeathsig", "TERM", "--"]).arg(program);
    command
}

/// A child in a process group of its own, with its output in a file.
#[derive(Debug)]
pub struct Child {
    name: String,
    log: PathBuf,
    child: std::process::Child,
    ended: Option<ExitStatus>,
}

impl Child {
    /// Starts it. What it prints on standard error, and on standard output unless the command pipes that, is appended to
    /// `log`.
    ///
    /// # Errors
    /// The program or the log cannot be opened.
    pub fn start(name: &str, command: &mut Command, log: &Path, pipe_stdio: bool) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("failed to open {}", log.display()))?;
        command.process_group(0).stderr(file.try_clone()?);
        if pipe_stdio {
            command.stdin(Stdio::piped()).stdout(Stdio::piped());
        } else {
            command.stdin(Stdio::null()).stdout(file);
        }
        let child = command
            .spawn()
            .with_context(|| format!("failed to start {name}: {}", shell::line(command)))?;
        Ok(Self {
            name: name.to_owned(),
            log: log.to_owned(),
            child,
            ended: None,
        })
    }

    /// Its name in messages.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its piped ends, once.
    pub fn take_pipes(&mut self) -> Option<(std::process::ChildStdin, std::process::ChildStdout)> {
        Some((self.child.stdin.take()?, self.child.stdout.take()?))
    }

    /// How it ended, if it did.
    ///
    /// # Errors
    /// Waiting failed.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self
                .child
                .try_wait()
                .with_context(|| format!("failed to wait for {}", self.name))?;
        }
        Ok(self.ended)
    }

    /// An error that shows the end of its log if it is no longer running.
    ///
    /// # Errors
    /// It ended.
    pub fn check_running(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => anyhow::bail!(
                "{} ended early with {status}; its log ends:\n{}",
                self.name,
                self.log_tail()
            ),
        }
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// It did not end in time; it still runs then.
    pub fn wait(&mut self, at_most: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + at_most;
        loop {
            if let Some(status) = self.ended()? {
                return Ok(status);
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "{} did not end within {at_most:?}",
                self.name
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Asks it to stop, then makes it.
    pub fn stop(&mut self) -> Option<ExitStatus> {
        self.signal(Signal::TERM);
        let status = self.wait(PATIENCE).ok();
        // Also what it may have left in its group.
        self.kill();
        status
    }

    /// Kills it and its group at once.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        if self.ended.is_none() {
            self.ended = self.child.wait().ok();
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = Pid::from_raw(self.child.id().cast_signed()) {
            // A group that is gone is what was wanted.
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.ended.is_none() {
            self.stop();
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn shell(script: &str, log: &Path) -> Child {
        Child::start(
            "child",
            inside(None, Path::new("sh")).args(["-c", script]),
            log,
            false,
        )
        .unwrap()
    }

    #[test]
    fn an_early_end_shows_the_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut child = shell("echo no such device; exit 7", &dir.path().join("log"));
        assert_eq!(child.wait(PATIENCE).unwrap().code(), Some(7));
        let error = child.check_running().unwrap_err().to_string();
        assert!(
            error.contains("exit status: 7") && error.contains("no such device"),
            "{error}"
        );
    }

    #[test]
    fn stopping_takes_the_whole_group() {
        let dir = tempfile::tempdir().unwrap();
        let pid_file = dir.path().join("pid");
        // The grandchild ignores the request, so only the group's end removes it.
        let script = format!(
            "sh -c 'trap \"\" TERM; echo $$ > {}; sleep 60 & wait' & sleep 60",
            pid_file.display()
        );
        let mut child = shell(&script, &dir.path().join("log"));
        let deadline = Instant::now() + PATIENCE;
        while std::fs::read_to_string(&pid_file).map_or(true, |text| text.is_empty()) {
            assert!(Instant::now() < deadline);
            std::thread::sleep(Duration::from_millis(10));
        }
        let grandchild = std::fs::read_to_string(&pid_file).unwrap();
        child.stop();
        let deadline = Instant::now() + PATIENCE;
        while is_running(grandchild.trim()) {
            assert!(Instant::now() < deadline, "the grandchild survived");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn is_running(pid: &str) -> bool {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    }
}
