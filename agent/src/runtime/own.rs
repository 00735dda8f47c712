//! What the agent itself costs.

use std::hash::{BuildHasher, Hasher, RandomState};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::time::{ClockId, clock_gettime};
use stallscope_proto::convert::MAX_NAME_BYTES;

use super::status::OwnUse;

/// Measures the agent's own process.
#[derive(Debug, Default)]
pub(super) struct OwnMeter {
    last: Option<(u64, u64, u64)>,
}

impl OwnMeter {
    /// Use since the start, and since the last call.
    pub(super) fn measure(&mut self, now_ns: u64, observations: u64) -> OwnUse {
        let time = clock_gettime(ClockId::ProcessCPUTime);
        let cpu_ns = u64::try_from(time.tv_sec * 1_000_000_000 + time.tv_nsec).unwrap_or(0);
        let (then_ns, then_cpu_ns, then_observations) = self.last.unwrap_or((now_ns, cpu_ns, observations));
        self.last = Some((now_ns, cpu_ns, observations));
        let wall_ns = now_ns.saturating_sub(then_ns).max(1);
        let rate = |now: u64, then: u64, unit: u64| {
            let scaled = u128::from(now.saturating_sub(then)) * u128::from(unit) / u128::from(wall_ns);
            u64::try_from(scaled).unwrap_or(u64::MAX)
        };
        OwnUse {
            cpu_ms: cpu_ns / 1_000_000,
            cpu_ppm: rate(cpu_ns, then_cpu_ns, 1_000_000),
            resident_bytes: resident_bytes().unwrap_or(0),
            observations,
            observations_per_s: rate(observations, then_observations, 1_000_000_000),
            ..OwnUse::default()
        }
    }
}

/// Raises the limit of open files to what the system allows. Every probed function holds up to four descriptors, so
/// that some ten library files are enough for the usual 1024; without descriptors every process would seem gone.
pub(super) fn raise_file_limit() {
    let now = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: now.maximum,
        maximum: now.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, limit = now.current, "the limit of open files is not raised: some libraries may stay unseen");
    }
}

/// `VmRSS` of `/proc/self/status`, which is in kB.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.split_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// A number that no other run of the agent draws. Not a secret.
pub(super) fn random() -> u64 {
    let mut hasher = RandomState::new().build_hasher();
    hasher.write_u64(super::now_ns());
    hasher.write_u32(std::process::id());
    hasher.finish()
}

/// Text as the wire takes it: one line, not too long.
pub(super) fn clean(text: &str) -> String {
    let mut clean: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    while clean.len() > MAX_NAME_BYTES {
        clean.pop();
    }
    clean
}
