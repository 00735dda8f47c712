//! Counts of what passed, failed and could not run.

/// The account so far.
#[derive(Debug, Default)]
pub(super) struct Tally {
    passed: u64,
    failures: Vec<String>,
    skipped: Vec<(String, String)>,
}

impl Tally {
    /// Counts tests that another program ran and found good.
    pub(super) fn add_passed(&mut self, count: u64) {
        self.passed += count;
    }

    /// Counts and names one failure.
    pub(super) fn fail(&mut self, what: String) {
        self.failures.push(what);
    }

    /// Names what could not run.
    pub(super) fn skip(&mut self, name: &str, why: &str) {
        self.skipped.push((name.to_owned(), why.to_owned()));
    }

    /// Counts one result and shows it as it comes.
    pub(super) fn record(&mut self, name: &str, result: Result<String, String>) {
        match result {
            Ok(text) => {
                println!("test {name} ... ok {text}");
                self.passed += 1;
            }
            Err(text) => {
                println!("test {name} ... FAILED {text}");
                self.fail(format!("{name}: {text}"));
            }
        }
    }

    /// How many passed.
    pub(super) fn passed(&self) -> u64 {
        self.passed
    }

    /// What failed.
    pub(super) fn failures(&self) -> &[String] {
        &self.failures
    }

    /// What could not run, and why.
    pub(super) fn skipped(&self) -> &[(String, String)] {
        &self.skipped
    }
}
