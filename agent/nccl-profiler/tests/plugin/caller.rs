//! A program in C that plays NCCL to the plugin, by NCCL's own headers.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

/// Every version of NCCL's profiler interface that the plugin serves.
pub(crate) const VERSIONS: [u8; 5] = [2, 3, 4, 5, 6];

/// The plugin, built now: cargo builds no library of another kind than Rust's own for a test.
pub(crate) fn plugin() -> Result<PathBuf> {
    static BUILT: OnceLock<bool> = OnceLock::new();
    let test = std::env::current_exe()?;
    let folder = test
        .ancestors()
        .nth(2)
        .context("the test lies nowhere")?
        .to_owned();
    let build = || {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.args(["build", "--locked", "-p", "stallscope-nccl-profiler"]);
        if folder.ends_with("release") {
            cargo.arg("--release");
        }
        let status = cargo.current_dir(env!("CARGO_MANIFEST_DIR")).status();
        status.is_ok_and(|status| status.success())
    };
    ensure!(*BUILT.get_or_init(build), "the plugin did not build");
    Ok(folder.join("libnccl_profiler_stallscope.so"))
}

/// A running caller.
#[derive(Debug)]
pub(crate) struct Caller {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    _folder: tempfile::TempDir,
}

impl Caller {
    /// Compiles it for a version and starts it.
    pub(crate) fn start(version: u8) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let program = folder.path().join("caller");
        let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plugin");
        let compiled = Command::new("cc")
            .args(["-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&program)
            .arg(format!("-DVERSION={version}"))
            .arg("-I")
            .arg(sources.join("nccl"))
            .arg(sources.join("caller.c"))
            .args(["-lpthread", "-ldl"])
            .status()?;
        ensure!(
            compiled.success(),
            "the caller did not compile for version {version}"
        );
        let mut child = Command::new(program)
            .arg(plugin()?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = child.stdin.take().context("no input")?;
        let output = BufReader::new(child.stdout.take().context("no output")?);
        let mut caller = Self {
            child,
            input,
            output,
            _folder: folder,
        };
        let ready = caller.line()?;
        ensure!(ready.starts_with("ready stallscope "), "{ready}");
        Ok(caller)
    }

    /// Its process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "the caller ended: {:?}", self.child.wait());
        Ok(line.trim_end().to_owned())
    }

    /// Has it do something without waiting for the answer.
    pub(crate) fn tell(&mut self, what: &str) -> Result<()> {
        Ok(writeln!(self.input, "{what}")?)
    }

    /// What it says after it was [told](Self::tell) something, without the word that it was told.
    pub(crate) fn answer(&mut self, what: &str) -> Result<String> {
        let line = self.line()?;
        let word = what.split(' ').next().unwrap_or(what);
        let said = line.strip_prefix(word);
        let said = said.with_context(|| format!("to {what} it said {line}"))?;
        Ok(said.trim().to_owned())
    }

    /// Both.
    pub(crate) fn ask(&mut self, what: &str) -> Result<String> {
        self.tell(what)?;
        self.answer(what)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
