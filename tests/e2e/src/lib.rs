//! What the end-to-end tests share: the built programs, a daemon under watch, a place for its files.
#![forbid(unsafe_code)]

pub mod tracer;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use xtask::build::{self, Programs};
use xtask::lab::process::{Child, inside};
use xtask::paths::Paths;

/// How long a daemon may take to say what it has to say.
const PATIENCE: Duration = Duration::from_secs(10);

/// Whether this run may do what needs root; says so when not.
#[must_use]
pub fn privileged(test: &str) -> bool {
    let privileged = std::env::var_os("STALLSCOPE_PRIVILEGED").is_some();
    if !privileged {
        println!("skipped: {test}: it needs root, and STALLSCOPE_PRIVILEGED is not set");
    }
    privileged
}

/// The built programs.
///
/// # Errors
/// They are not built.
pub fn programs() -> Result<(Paths, Programs)> {
    let paths = Paths::find()?;
    let programs = build::built(&paths)?;
    Ok((paths, programs))
}

/// What a finished command said.
#[derive(Debug)]
pub struct Said {
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output and standard error together.
    pub text: String,
}

/// Runs the product to its end.
///
/// # Errors
/// It is not built or did not start.
pub fn stallscope(arguments: &[&str]) -> Result<Said> {
    let (_, programs) = programs()?;
    let output = Command::new(&programs.stallscope)
        .args(arguments)
        .stdin(Stdio::null())
        .output()?;
    let text = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(Said {
        status: output.status,
        text,
    })
}

/// An agent with files of its own.
#[derive(Debug)]
pub struct LoneAgent {
    home: PathBuf,
    child: Child,
    _dir: tempfile::TempDir,
}

impl LoneAgent {
    /// Starts an agent with `settings` (TOML) added to a configuration whose store and socket are its own. `wrapper` is
    /// put before the command line.
    ///
    /// # Errors
    /// It did not start.
    pub fn start(settings: &str, wrapper: &[&str]) -> Result<Self> {
        let (_, programs) = programs()?;
        let dir = tempfile::Builder::new().prefix("stallscope-e2e-").tempdir()?;
        let home = dir.path().to_owned();
        make_public(&home)?;
        // Another user may not be able to reach the build folder.
        let binary = home.join("stallscope");
        fs::copy(&programs.stallscope, &binary).context("failed to copy the binary")?;
        let config = home.join("stallscope.toml");
        fs::write(&config, configuration(settings, &home, &programs.bpf_object))?;
        let log = home.join("log");
        let mut words: Vec<String> = wrapper.iter().map(|word| (*word).to_owned()).collect();
        words.extend([
            binary.display().to_string(),
            "agent".into(),
            "--config".into(),
            config.display().to_string(),
        ]);
        let mut command = inside(None, Path::new(&words[0]));
        command.args(&words[1..]);
        let child = Child::start("agent", &mut command, &log, false)?;
        Ok(Self {
            home,
            child,
            _dir: dir,
        })
    }

    /// Waits until the agent has said every one of `words`, in any case, and still runs.
    ///
    /// # Errors
    /// It did not, or ended; the message holds its log.
    pub fn says(&mut self, words: &[&str]) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.child.check_running()?;
            let log = self.log()?.to_lowercase();
            if words.iter().all(|word| log.contains(&word.to_lowercase())) {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "the agent never said {words:?}; it said:\n{}",
                self.log()?
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// It does not.
    pub fn ended(&mut self) -> Result<ExitStatus> {
        self.child.wait(PATIENCE)
    }

    /// Asks it to stop; it must end with 0 and must not have panicked.
    ///
    /// # Errors
    /// It ended otherwise.
    pub fn stops_cleanly(mut self) -> Result<()> {
        let status = self.child.stop().context("the agent did not stop when asked")?;
        let log = self.log()?;
        ensure!(!log.contains("panicked"), "the agent panicked:\n{log}");
        ensure!(status.success(), "the agent ended with {status}:\n{log}");
        Ok(())
    }

    /// Everything it said.
    ///
    /// # Errors
    /// Its log cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(self.home.join("log"))?).into_owned())
    }

    /// Its folder.
    #[must_use]
    pub fn home(&self) -> &Path {
        &self.home
    }
}

/// `settings` with a store, a socket and a BPF object where it names none.
fn configuration(settings: &str, home: &Path, object: &Path) -> String {
    let mut text = settings.to_owned();
    let mut add = |section: &str, line: String| {
        if !settings.contains(&format!("[{section}]")) {
            text.push_str(&format!("\n[{section}]\n{line}\n"));
        }
    };
    add("store", format!("dir = \"{}\"", home.join("store").display()));
    add(
        "control",
        format!("socket = \"{}\"", home.join("control.sock").display()),
    );
    add("probes", format!("object = \"{}\"", object.display()));
    // Nobody else's processes: tests run beside other work.
    add("scope", "cgroup = \"/stallscope-e2e-nothing\"".to_owned());
    text
}

fn make_public(folder: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    Ok(fs::set_permissions(folder, fs::Permissions::from_mode(0o777))?)
}

/// Tries until `check` succeeds.
///
/// # Errors
/// The last failure, when `at_most` is over.
pub fn eventually<T>(at_most: Duration, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + at_most;
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() >= deadline => bail!("not within {at_most:?}: {error:#}"),
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}
