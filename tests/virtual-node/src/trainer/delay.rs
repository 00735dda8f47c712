//! How long this process's threads waited for a processor, as the kernel counted it.

use std::collections::HashMap;
use std::fs;

/// Counts per thread, and what they were when last asked.
#[derive(Debug, Default)]
pub(crate) struct Delays(HashMap<String, u64>);

impl Delays {
    /// The longest that any one thread waited since the last call, ns; 0 on a kernel that does not say. Threads wait
    /// beside each other, so their sum would be no time that anyone lost.
    pub(crate) fn longest_ns(&mut self) -> u64 {
        let Ok(threads) = fs::read_dir("/proc/self/task") else {
            return 0;
        };
        let mut longest = 0;
        for thread in threads.flatten() {
            let text = fs::read_to_string(thread.path().join("schedstat")).unwrap_or_default();
            let total = parse(&text);
            let name = thread.file_name().to_string_lossy().into_owned();
            let before = self.0.insert(name, total).unwrap_or(total);
            longest = longest.max(total.saturating_sub(before));
        }
        longest
    }
}

/// `time-running time-waiting slices`, both in ns.
fn parse(schedstat: &str) -> u64 {
    let word = schedstat.split_whitespace().nth(1);
    word.and_then(|word| word.parse().ok()).unwrap_or(0)
}

/// Time the calling thread has waited for a processor so far; 0 on a kernel that does not say.
pub(crate) fn own_ns() -> u64 {
    parse(&fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default())
}
