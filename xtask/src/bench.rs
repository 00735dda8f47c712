//! `cargo xtask bench explain`: how fast `stallscope explain` reads traces of any size, and how much memory it takes.

mod repeat;

use std::fs::File;
use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use serde_json::{Value, json};

use crate::build::PROFILE;
use crate::paths::{self, Paths};
use crate::shell;
use repeat::Template;

/// The real trace that is repeated: one GPU of two with NCCL, 54 MB of text.
const SOURCE: &str = "tests/data/traces/hta/df_index_resolver.json.gz";
const MEGABYTE: u64 = 1_000_000;
/// Between two looks at the memory of the process.
const LOOK: Duration = Duration::from_millis(20);

/// Arguments of the measurement.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// `stallscope explain` on a real trace repeated to each size, plain and once packed
    Explain {
        /// Sizes of the text, millions of bytes; the disk must hold the largest twice
        #[arg(long, value_delimiter = ',', default_value = "300,1000,3000")]
        megabytes: Vec<u64>,
    },
}

/// Measures, and prints one JSON object per run.
///
/// # Errors
/// Something could not be built, written or run.
pub fn run(paths: &Paths, args: &Args) -> Result<()> {
    let What::Explain { megabytes } = &args.what;
    let program = program(paths)?;
    let folder = tempfile::tempdir_in(&paths.target).context("failed to make a folder for the traces")?;
    let text = shell::output(
        Command::new("gzip")
            .args(["--decompress", "--stdout"])
            .arg(paths.root.join(SOURCE)),
    )?;
    let template = Template::of(&text)?;
    for (at, size) in megabytes.iter().enumerate() {
        let file = folder.path().join("trace.json");
        let bytes = write(&template, size * MEGABYTE, &file)?;
        println!("{}", measure(&program, &file, bytes)?);
        if at == 0 {
            shell::run(Command::new("gzip").args(["--fast", "--force"]).arg(&file))?;
            println!("{}", measure(&program, &file.with_extension("json.gz"), bytes)?);
        }
    }
    Ok(())
}

fn program(paths: &Paths) -> Result<PathBuf> {
    shell::run(Command::new(paths::cargo()).current_dir(&paths.root).args([
        "build",
        "--locked",
        "--profile",
        PROFILE,
        "--package",
        "stallscope",
    ]))?;
    Ok(paths.built(PROFILE, "stallscope"))
}

fn write(template: &Template<'_>, bytes: u64, file: &Path) -> Result<u64> {
    let writer = File::create(file).with_context(|| format!("failed to create {}", file.display()))?;
    let mut writer = BufWriter::with_capacity(1 << 20, writer);
    let written = template.write(bytes, &mut writer)?;
    writer.flush()?;
    Ok(written)
}

/// Runs it once on a file with so many bytes of text.
fn measure(program: &Path, file: &Path, text_bytes: u64) -> Result<Value> {
    let started = Instant::now();
    let mut child = Command::new(program)
        .args(["explain", "--format", "json"])
        .arg(file)
        .stdout(Stdio::null())
        .spawn()
        .context("failed to start stallscope")?;
    let pid = Pid::from_child(&child);
    let mut peak_kb = 0;
    // Not reaped yet, so that its CPU time can still be read.
    while waitid(
        WaitId::Pid(pid),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT,
    )?
    .is_none()
    {
        peak_kb = peak_kb.max(peak_resident_kb(child.id()).unwrap_or(0));
        std::thread::sleep(LOOK);
    }
    let wall_s = started.elapsed().as_secs_f64();
    let cpu_s = cpu_seconds(child.id())?;
    let status = child.wait()?;
    if !status.success() {
        bail!("stallscope explain failed with {status}");
    }
    #[expect(clippy::cast_precision_loss, reason = "a rate for people")]
    let megabytes = text_bytes as f64 / 1e6;
    Ok(json!({
        "file": file.file_name().map(|name| name.to_string_lossy()),
        "text_bytes": text_bytes,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "megabytes_per_s": megabytes / wall_s,
        "megabytes_per_cpu_s": megabytes / cpu_s,
        "peak_resident_kb": peak_kb,
    }))
}

fn peak_resident_kb(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// User and system time, fields 14 and 15 of `/proc/PID/stat`.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields = stat.rsplit_once(") ").context("no command in /proc/PID/stat")?.1;
    let ticks = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(str::parse::<u32>)
        .sum::<Result<u32, _>>()?;
    // USER_HZ is 100 on every Linux port that Rust's std runs on.
    Ok(f64::from(ticks) / 100.0)
}
