//! The limit of open files: every traced library costs some thirty of them.

use rustix::process::{Resource, getrlimit};

use super::shared::Shared;
use super::status::Condition;

/// Files that a node with one job takes, with room for the store, the stream and a few clients.
const ENOUGH_FILES: u64 = 256;

/// Says so where the limit of open files is too low.
pub(super) fn check(shared: &Shared) {
    let files = getrlimit(Resource::Nofile).current;
    // No limit at all is enough.
    let Some(files) = files.filter(|&files| files < ENOUGH_FILES) else {
        return;
    };
    let why = format!(
        "only {files} files may be open and about {ENOUGH_FILES} are needed: some sources, the store or the stream may \
         be missing; raise the limit (LimitNOFILE) and restart the agent"
    );
    super::name_gap(shared, format!("limits: {why}"));
    tracing::warn!(why, "the limit of open files is low");
    shared
        .status
        .lock()
        .set_health("limits", Condition::Degraded(why));
}
