//! A proxy that is slow to take in what other nodes send: a fault the run may ask for.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::Ordering::SeqCst;
use std::time::Duration;

use virtual_node_state::VNODE_ENV;
use virtual_node_state::control::{Control, FILE, MAX_RANKS};
use virtual_node_state::map::Shared;

/// Longest pause at once: a fault that is lifted ends soon after.
const MOST: Duration = Duration::from_millis(200);

/// Sleeps as long as the rank's rate asks for after so many bytes.
pub(crate) fn pause_after(bytes: usize) {
    static KNOBS: OnceLock<Option<(Shared<Control>, usize)>> = OnceLock::new();
    let Some((control, rank)) = KNOBS.get_or_init(open) else {
        return;
    };
    let rate = control.ranks[*rank].drain_bytes_per_s.load(SeqCst);
    if rate > 0 {
        let pause = Duration::from_secs_f64(bytes as f64 / rate as f64);
        std::thread::sleep(pause.min(MOST));
    }
}

/// The run's knobs and this process's rank; nothing outside a run of virtual nodes.
fn open() -> Option<(Shared<Control>, usize)> {
    let node = PathBuf::from(std::env::var_os(VNODE_ENV)?);
    let rank: usize = std::env::var("RANK").ok()?.parse().ok()?;
    let control = Shared::<Control>::open(&node.parent()?.join(FILE)).ok()?;
    (rank < MAX_RANKS).then_some((control, rank))
}
