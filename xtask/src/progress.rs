//! Progress on standard error: one line that renews itself on a terminal, plain lines elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::{Duration, Instant};

/// Plain lines that only renew come at most this often.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);

/// Where progress goes.
#[derive(Debug)]
pub struct Progress {
    started: Instant,
    terminal: bool,
    last: Option<Instant>,
}

impl Progress {
    /// Starts the clock that every line shows.
    #[must_use]
    pub fn start() -> Self {
        Self {
            started: Instant::now(),
            terminal: std::io::stderr().is_terminal(),
            last: None,
        }
    }

    /// Something happened: a line that stays.
    pub fn event(&mut self, text: &str) {
        self.clear();
        eprintln!("{:>5.1} s  {text}", self.started.elapsed().as_secs_f64());
    }

    /// Something goes on: replaces the last such line.
    pub fn status(&mut self, text: &str) {
        if self.terminal {
            eprint!("\r\x1b[K{:>5.1} s  {text}", self.started.elapsed().as_secs_f64());
            // A terminal that is gone is no reason to stop.
            let _ = std::io::stderr().flush();
        } else if self.last.is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL) {
            eprintln!("{:>5.1} s  {text}", self.started.elapsed().as_secs_f64());
        } else {
            return;
        }
        self.last = Some(Instant::now());
    }

    fn clear(&self) {
        if self.terminal && self.last.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
    }
}
