//! Bad surroundings and bad input: a clear message, the rest keeps working, nothing panics.

use std::fs;

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, ensure};
use stallscope_e2e::{LoneAgent, Said, eventually, privileged, stallscope};

fn ends_with(said: &Said, code: i32, words: &[&str]) -> Result<()> {
    let text = said.text.to_lowercase();
    ensure!(
        said.status.code() == Some(code),
        "exit {:?} instead of {code}: {}",
        said.status.code(),
        said.text
    );
    ensure!(!text.contains("panicked"), "{}", said.text);
    for word in words {
        ensure!(
            text.contains(&word.to_lowercase()),
            "nothing about {word:?} in: {}",
            said.text
        );
    }
    Ok(())
}

#[test]
fn a_malformed_configuration_is_refused_with_its_line() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("bad.toml");
    let file_name = file.display().to_string();
    for (text, line) in [
        ("node = \"n\"\n[stroe]\ndir = \"/x\"\n", ":2"),
        ("\n\n[nvml]\nsample_ms = \"fast\"\n", ":4"),
        ("node = \n", ":1"),
    ] {
        fs::write(&file, text)?;
        for command in [
            &["agent", "--config", &file_name][..],
            &["config", "check", &file_name],
        ] {
            ends_with(&stallscope(command)?, 2, &[&format!("bad.toml{line}")])?;
        }
    }
    Ok(())
}

#[test]
fn a_configuration_that_is_not_there_is_named() -> Result<()> {
    ends_with(
        &stallscope(&["agent", "--config", "/nonexistent/stallscope.toml"])?,
        2,
        &["/nonexistent/stallscope.toml"],
    )
}

#[test]
fn check_and_report_without_an_agent_say_so() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let config = dir.path().join("stallscope.toml");
    let (store, socket) = (dir.path().join("store"), dir.path().join("socket"));
    fs::write(
        &config,
        format!(
            "[store]\ndir = \"{}\"\n[control]\nsocket = \"{}\"\n",
            store.display(),
            socket.display()
        ),
    )?;
    let config = config.display().to_string();
    ends_with(&stallscope(&["check", "--config", &config])?, 3, &["socket"])?;
    ends_with(&stallscope(&["report", "--config", &config])?, 3, &[])
}

#[test]
fn doctor_names_what_is_missing_in_one_line_each() -> Result<()> {
    let said = stallscope(&["doctor"])?;
    ensure!(
        matches!(said.status.code(), Some(0 | 1)),
        "exit {:?}: {}",
        said.status.code(),
        said.text
    );
    ensure!(
        said.text.to_lowercase().contains("nvml"),
        "nothing about NVML in: {}",
        said.text
    );
    Ok(())
}

#[test]
fn without_nvml_the_agent_runs_and_says_what_is_lost() -> Result<()> {
    if !privileged("without_nvml_the_agent_runs_and_says_what_is_lost") {
        return Ok(());
    }
    let mut agent = LoneAgent::start("[nvml]\nlibrary = \"/nonexistent/libnvidia-ml.so.1\"\n", &[])?;
    agent.says(&["nvml", "/nonexistent/libnvidia-ml.so.1"])?;
    agent.stops_cleanly()
}

#[test]
fn without_a_usable_bpf_object_the_agent_runs_and_says_what_is_lost() -> Result<()> {
    if !privileged("without_a_usable_bpf_object_the_agent_runs_and_says_what_is_lost") {
        return Ok(());
    }
    let mut agent = LoneAgent::start("[probes]\nobject = \"/nonexistent/stallscope.bpf.o\"\n", &[])?;
    agent.says(&["/nonexistent/stallscope.bpf.o"])?;
    agent.stops_cleanly()?;

    let dir = tempfile::tempdir()?;
    let truncated = dir.path().join("truncated.bpf.o");
    let (_, programs) = stallscope_e2e::programs()?;
    let whole = fs::read(&programs.bpf_object)?;
    fs::write(&truncated, &whole[..whole.len() / 3])?;
    let mut agent = LoneAgent::start(&format!("[probes]\nobject = \"{}\"\n", truncated.display()), &[])?;
    agent.says(&["truncated.bpf.o"])?;
    agent.stops_cleanly()
}

#[test]
fn without_root_the_agent_runs_and_says_what_is_lost() -> Result<()> {
    if !privileged("without_root_the_agent_runs_and_says_what_is_lost") {
        return Ok(());
    }
    let nobody = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
        "--inh-caps=-all",
    ];
    let mut agent = LoneAgent::start("", &nobody)?;
    agent.says(&["probes"])?;
    agent.stops_cleanly()
}

/// Libraries that end whoever loads them: one that crashes in its first call, one that was cut short on disk.
#[test]
fn a_management_library_that_crashes_leaves_the_agent_alive() -> Result<()> {
    if !privileged("a_management_library_that_crashes_leaves_the_agent_alive") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let source = dir.path().join("crash.c");
    let crashing = dir.path().join("libcrashing.so");
    // Much read-only data, so that half of the file lacks pages that the loader touches.
    fs::write(
        &source,
        "const char big[1 << 16] = {1}; char data[1 << 16] = {1};\n\
         int nvmlInit_v2(void) { *(volatile int *)0 = 1; return 0; }\n",
    )?;
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-w", "-o"])
        .args([&crashing, &source])
        .status()?;
    ensure!(built.success(), "cc failed");
    let whole = fs::read(&crashing)?;
    let cut = dir.path().join("libcut.so");
    fs::write(&cut, &whole[..whole.len() / 4])?;
    for library in [&crashing, &cut] {
        let library = library.display().to_string();
        let mut agent = LoneAgent::start(&format!("[nvml]\nlibrary = \"{library}\"\n"), &[])?;
        agent.says(&[
            "runs without",
            "no GPU counters",
            &library,
            "crashes as it starts",
        ])?;
        agent.stops_cleanly()?;
        let doctor = agent_doctor(&library)?;
        ends_with(&doctor, 1, &[&library, "crashes as it starts"])?;
    }
    Ok(())
}

fn agent_doctor(library: &str) -> Result<Said> {
    let dir = tempfile::tempdir()?;
    let config = dir.path().join("stallscope.toml");
    fs::write(&config, format!("[nvml]\nlibrary = \"{library}\"\n"))?;
    stallscope(&["doctor", "--config", &config.display().to_string()])
}

/// The driver hangs as it starts: everything else runs, a stop is heard, and nobody is told that the node is unfit.
#[test]
fn a_management_library_that_hangs_stops_nothing_else() -> Result<()> {
    if !privileged("a_management_library_that_hangs_stops_nothing_else") {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let source = dir.path().join("hang.c");
    let hanging = dir.path().join("libhanging.so");
    fs::write(
        &source,
        "int pause(void);\nint nvmlInit_v2(void) { for (;;) pause(); }\n",
    )?;
    let built = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&hanging, &source])
        .status()?;
    ensure!(built.success(), "cc failed");
    let mut agent = LoneAgent::start(&format!("[nvml]\nlibrary = \"{}\"\n", hanging.display()), &[])?;
    agent.says(&["everything else begins"])?;
    let library = hanging.display().to_string();
    ensure!(is_mapped(&library)?, "nobody loaded the library");
    let config = agent.home().join("stallscope.toml").display().to_string();
    ends_with(&stallscope(&["check", "--config", &config])?, 3, &["starts"])?;
    agent.stops_cleanly()?;
    eventually(Duration::from_secs(5), || {
        ensure!(!is_mapped(&library)?, "a process of the agent is left");
        Ok(())
    })
}

/// Whether any process has the file mapped.
fn is_mapped(file: &str) -> Result<bool> {
    let maps = fs::read_dir("/proc")?.filter_map(|entry| Some(entry.ok()?.path().join("maps")));
    // Processes end meanwhile, and what is no process has no maps.
    Ok(maps
        .filter_map(|maps| fs::read_to_string(maps).ok())
        .any(|maps| maps.contains(file)))
}

/// Few files, and an unusable store: said, and the rest runs.
#[test]
fn a_low_limit_of_open_files_is_named() -> Result<()> {
    if !privileged("a_low_limit_of_open_files_is_named") {
        return Ok(());
    }
    let mut agent = LoneAgent::start("", &["prlimit", "--nofile=40:40"])?;
    agent.says(&["only 40 files may be open", "LimitNOFILE"])?;
    agent.stops_cleanly()
}

/// Two agents would cost the job twice: the second waits for the first to end, and takes over.
#[test]
fn a_second_agent_waits_for_the_first() -> Result<()> {
    if !privileged("a_second_agent_waits_for_the_first") {
        return Ok(());
    }
    let store = tempfile::tempdir()?;
    let settings = format!("[store]\ndir = \"{}\"\n", store.path().display());
    let mut first = LoneAgent::start(&settings, &[])?;
    first.says(&["agent starts", "runs without"])?;
    let mut second = LoneAgent::start(&settings, &[])?;
    second.says(&["in use by another agent", "waiting"])?;
    std::thread::sleep(Duration::from_millis(300));
    ensure!(
        !second.log()?.contains("runs without"),
        "it did not wait: {}",
        second.log()?
    );
    first.stops_cleanly()?;
    second.says(&["runs without"])?;
    second.stops_cleanly()
}

#[test]
fn a_store_that_cannot_be_written_is_named() -> Result<()> {
    if !privileged("a_store_that_cannot_be_written_is_named") {
        return Ok(());
    }
    let mut agent = LoneAgent::start("[store]\ndir = \"/proc/stallscope-store\"\n", &[])?;
    agent.says(&["store", "/proc/stallscope-store", "in memory only"])?;
    agent.stops_cleanly()
}
