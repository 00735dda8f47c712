//! Wait states.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use stallscope::observation::StepWait;
use stallscope::sources::clock::monotonic_ns;
use stallscope::sources::probes::{NoWaitHooks, ProbesConfig, ThreadWaits, WaitsConfig};
use stallscope::sources::procs::LibraryKind;
use stallscope_e2e::tracer::Tracer;

use crate::{Real, trace};

/// Windows long enough for the caller's walk on a busy machine.
const WINDOW: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) fn one(real: &Real) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let config = ProbesConfig {
        waits: WaitsConfig {
            // No pauses.
            budget_ppm: 1_000_000_000,
            window_ns: u64::try_from(WINDOW.as_nanos())?,
        },
        ..ProbesConfig::default()
    };
    let mut traced = trace(&real.library, &folder.path().join("log"), config)?;
    let waits = traced
        .attached
        .waits
        .clone()
        .context("an NCCL without a word on its waits")?;
    let hooks = match waits {
        Ok(hooks) => hooks,
        Err(why @ NoWaitHooks::TooOld { version }) => {
            println!("{why}");
            ensure!(
                version == real.version && version.to_string() == "2.21.5",
                "{why}"
            );
            return Ok(());
        }
        Err(why) => bail!("{why}"),
    };
    ensure!(hooks.tells_credit, "{hooks:?}");
    traced.tracer.probes.count_runs()?;
    ensure!(
        traced.tracer.probes.poll_waits(monotonic_ns()).is_empty(),
        "a window before the first"
    );
    let trouble = traced.tracer.probes.waits_trouble();
    ensure!(trouble.is_none(), "{trouble:?}");
    let said = traced.puppet.asked("waits")?;
    let spans: Vec<u64> = said.split(' ').map(str::parse).collect::<Result<_, _>>()?;
    let first = window(&mut traced.tracer)?;
    ensure!(
        (first.tgid, first.tid) == (traced.puppet.pid(), traced.puppet.pid()),
        "{first:?}"
    );
    check(&spans, &first)?;
    // The last step still waits: it fills the next window, which begins where the first ended.
    let second = window(&mut traced.tracer)?;
    ensure!(
        second.window.start_ns() == first.window.end_ns(),
        "{first:?} {second:?}"
    );
    let whole = StepWait {
        steps_ns: second.window.len_ns(),
        any_ns: second.window.len_ns(),
        entered: 0,
    };
    ensure!(second.waits.receive_wire == whole, "{second:?}");
    ensure!(second.waits.send_gpu == StepWait::default(), "{second:?}");
    for stats in traced.tracer.probes.run_stats() {
        if stats.program.starts_with("nccl_step_") {
            println!(
                "{}: {} hits, mean {:?} ns",
                stats.program,
                stats.runs,
                stats.mean_ns()
            );
        }
    }
    Ok(())
}

/// The next window of the one thread there is.
fn window(tracer: &mut Tracer) -> Result<ThreadWaits> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut given = tracer.probes.poll_waits(monotonic_ns());
        if let Some(last) = given.pop() {
            ensure!(given.is_empty(), "another thread: {given:?}");
            return Ok(last);
        }
        ensure!(Instant::now() < deadline, "no window ended");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Compares with what the caller measured around its calls.
fn check(spans: &[u64], given: &ThreadWaits) -> Result<()> {
    println!("the caller: {spans:?}; the probes: {given:?}");
    let waits = &given.waits;
    let credit = waits.send_credit.context("credit is not told apart")?;
    let named = [
        ("GPU", waits.send_gpu, 2),
        ("credit", credit, 1),
        ("wire", waits.send_wire, 2),
        ("arrival", waits.receive_wire, 2),
        ("flush", waits.receive_flush, 1),
        ("consumption", waits.receive_gpu, 1),
    ];
    let end_ns = given.window.end_ns();
    let [left_after, left_before] = [spans[12], spans[13]].map(|at_ns| end_ns.saturating_sub(at_ns));
    for ((name, wait, entered), span) in named.into_iter().zip(spans.chunks(2)) {
        let (mut least, mut most) = (span[0], span[1]);
        if name == "arrival" {
            least += left_before;
            most += left_after;
        }
        ensure!(
            (least..=most).contains(&wait.steps_ns),
            "{name}: {wait:?} is not within {least}..={most} ns"
        );
        ensure!(
            wait.entered == entered,
            "{name}: {wait:?} was entered {entered} times"
        );
        ensure!(
            wait.any_ns <= wait.steps_ns && wait.any_ns <= given.window.len_ns(),
            "{name}: {wait:?}"
        );
    }
    // Two steps waited for the GPU at once, so that time is shorter than their sum.
    ensure!(waits.send_gpu.any_ns < waits.send_gpu.steps_ns, "{waits:?}");
    ensure!(
        (waits.sent, waits.received, waits.unknown) == (2, 1, 0),
        "{waits:?}"
    );
    Ok(())
}

pub(crate) fn without_symbols(real: &Real) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let library = folder.path().join("libnccl.so.2");
    fs::copy(&real.library, &library)?;
    remove_symbols(&library)?;
    let mut tracer = Tracer::load(ProbesConfig::default())?;
    let attached = tracer.attach(LibraryKind::Nccl, &library, std::process::id())?;
    let Some(Err(why)) = &attached.waits else {
        bail!("hooks without symbols: {attached:?}");
    };
    println!("{why}");
    ensure!(
        *why == NoWaitHooks::NoSymbols {
            version: Some(real.version)
        },
        "{why:?}"
    );
    ensure!(why.to_string().contains("public calls"), "{why}");
    ensure!(
        attached.functions > 15 && attached.layout.is_some(),
        "{attached:?}"
    );
    Ok(())
}

/// Marks the table of local symbols as none, as `strip` leaves a library to its readers.
fn remove_symbols(library: &Path) -> Result<()> {
    const SYMBOL_TABLE: [u8; 4] = 2u32.to_le_bytes();
    let file = OpenOptions::new().read(true).write(true).open(library)?;
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0)?;
    let short = |at: usize| u64::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let sections = u64::from_le_bytes(header[40..48].try_into()?);
    let mut removed = 0;
    for index in 0..short(60) {
        let at = sections + index * short(58) + 4;
        let mut kind = [0; 4];
        file.read_exact_at(&mut kind, at)?;
        if kind == SYMBOL_TABLE {
            file.write_all_at(&[0; 4], at)?;
            removed += 1;
        }
    }
    ensure!(removed == 1, "{removed} tables of symbols");
    Ok(())
}
