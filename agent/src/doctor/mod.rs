//! What can be seen on this node, what cannot, why, and how to fix it.
//!
//! [`examine`] looks; a [`Report`] renders as text or JSON. A report is useful when nothing that is *needed* is missing:
//! the probes (host side of every loss) and NVML with at least one device (GPU side).

mod devices;
mod kernel;
mod node;
mod render;
mod verbs;

use serde::Serialize;

use crate::config::Config;

pub use self::kernel::Roots;

/// The schema of the JSON form.
pub const SCHEMA: &str = "stallscope.doctor/1";

/// How one thing stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// As it should be.
    Ok,
    /// Something is lost, but reports are useful.
    Limited,
    /// Not there; when it is needed, reports are not useful.
    Missing,
    /// Not asked for in the configuration.
    NotConfigured,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Stable name, like `kernel.btf`.
    pub name: &'static str,
    /// How it stands.
    pub state: State,
    /// Whether a useful report needs it.
    pub needed: bool,
    /// What was found.
    pub found: String,
    /// What reports lack because of it; empty when nothing.
    pub lost: String,
    /// What to do; empty when nothing.
    pub fix: String,
}

/// Everything that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Always [`SCHEMA`].
    pub schema: &'static str,
    /// Node name.
    pub node: String,
    /// Agent version.
    pub version: &'static str,
    /// Whether everything needed for a useful report is there.
    pub useful: bool,
    /// In the order in which one would fix them.
    pub checks: Vec<Check>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Ok,
            needed: false,
            found: found.into(),
            lost: String::new(),
            fix: String::new(),
        }
    }

    fn bad(
        name: &'static str,
        state: State,
        found: impl Into<String>,
        lost: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            state,
            lost: lost.into(),
            fix: fix.into(),
            ..Self::ok(name, found)
        }
    }

    fn needed(self) -> Self {
        Self { needed: true, ..self }
    }
}

impl Report {
    fn new(node: String, checks: Vec<Check>) -> Self {
        let useful = !checks
            .iter()
            .any(|check| check.needed && check.state == State::Missing);
        Self {
            schema: SCHEMA,
            node,
            version: env!("CARGO_PKG_VERSION"),
            useful,
            checks,
        }
    }
}

/// Looks at everything. Loads the probes and NVML as the agent would, and lets them go again; disturbs nothing. Takes up
/// to some ten seconds when a GPU's driver hangs.
#[must_use]
pub fn examine(config: &Config) -> Report {
    let roots = Roots::default();
    let mut checks = kernel::checks(&roots);
    checks.push(node::probes(&config.probes));
    checks.extend(node::nvml(&config.nvml));
    checks.push(node::nccl_profiler(&config.nccl, &node::plugin_places()));
    checks.push(node::flows(&config.node_name()));
    let of_devices = Roots {
        sys: config.devices.sys.clone(),
        ..roots
    };
    checks.extend(devices::checks(&of_devices));
    checks.push(verbs::queue_pairs(&of_devices));
    checks.push(node::scope(&config.scope));
    checks.push(node::store(&config.store));
    checks.push(node::stream(&config.stream));
    Report::new(config.node_name(), checks)
}
