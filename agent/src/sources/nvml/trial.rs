//! Starting the library once in a process of its own: one that crashes must not take the agent along.
//!
//! A library cut short on disk, or one that does not fit its driver, ends whoever loads it with a signal. That cannot
//! be caught in a process that goes on, so a child tries first.

use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::{NvmlError, OPEN_DEADLINE, start_library};

/// The hidden command of the child; its one argument is the library.
pub const COMMAND: &str = "nvml-trial";

/// Starts the library in a child: `program` is the agent's own binary. What the library itself answers is not looked
/// at: starting it again tells the same in more words.
///
/// # Errors
/// When the library ends its process, or does not return within [`OPEN_DEADLINE`].
pub fn try_in_child(program: &Path, library: &str) -> Result<(), NvmlError> {
    let mut child = Command::new(program)
        .args([COMMAND, library])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()?;
    let deadline = Instant::now() + OPEN_DEADLINE;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            // A child stuck in the driver may not end for hours; it is left behind.
            let _ = child.kill();
            return Err(NvmlError::Hung {
                library: library.to_owned(),
            });
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    match status.signal() {
        Some(signal) => Err(NvmlError::Crashed {
            library: library.to_owned(),
            signal,
        }),
        None => Ok(()),
    }
}

/// The child's part: starts the library and says nothing.
pub fn run(library: &str) {
    // An agent that stops while the library hangs must leave nothing behind.
    let with_parent = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
    if with_parent.is_err() {
        return;
    }
    // What it answers is told by whoever starts it next.
    drop(start_library(library));
}
