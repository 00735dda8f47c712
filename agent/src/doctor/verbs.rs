//! What can be seen of RDMA queue pairs.

use super::{Check, Roots, State};

/// Where distributions put the library that programs use for RDMA; containers may carry their own.
const PLACES: [&str; 5] = [
    "/usr/lib/x86_64-linux-gnu/libibverbs.so.1",
    "/usr/lib/aarch64-linux-gnu/libibverbs.so.1",
    "/usr/lib64/libibverbs.so.1",
    "/usr/lib/libibverbs.so.1",
    "/lib64/libibverbs.so.1",
];

/// What no probe on the CPU sees.
const FROM_THE_DEVICE: &str =
    "what GPUs send by themselves (GIN, GPUNetIO, IBGDA) is only in the ports' counters";

pub(super) fn queue_pairs(roots: &Roots) -> Check {
    queue_pairs_in(roots, &PLACES)
}

fn queue_pairs_in(roots: &Roots, places: &[&str]) -> Check {
    const NAME: &str = "verbs";
    const LOST: &str = "who posted what to which RDMA peer; the ports' counters remain";
    let devices = std::fs::read_dir(roots.sys.join("class/infiniband"))
        .map(|entries| entries.flatten().count())
        .unwrap_or(0);
    if devices == 0 {
        return Check::ok(NAME, "no RDMA device on this node");
    }
    match places.iter().find(|place| std::path::Path::new(place).exists()) {
        Some(place) => Check::ok(
            NAME,
            format!("{devices} RDMA devices, {place}: posts and bytes by queue pair; {FROM_THE_DEVICE}"),
        ),
        None => Check::bad(
            NAME,
            State::Limited,
            format!("{devices} RDMA devices, and no libibverbs.so.1 where distributions put it"),
            format!("{LOST}, unless the job's container has its own"),
            "nothing when jobs run in containers; else install libibverbs, which NCCL needs too",
        ),
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn the_library_is_missed_only_where_there_are_devices() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots {
            proc: dir.path().join("proc"),
            sys: dir.path().join("sys"),
        };
        let library = dir.path().join("libibverbs.so.1");
        let library = library.to_str().unwrap();
        assert_eq!(queue_pairs_in(&roots, &[library]).state, State::Ok);
        std::fs::create_dir_all(roots.sys.join("class/infiniband/mlx5_0")).unwrap();
        let without = queue_pairs_in(&roots, &[library]);
        assert_eq!(without.state, State::Limited);
        assert!(!without.needed && !without.fix.is_empty());
        std::fs::write(library, "").unwrap();
        let with = queue_pairs_in(&roots, &[library]);
        assert_eq!(with.state, State::Ok);
        assert!(with.found.contains("IBGDA"), "{}", with.found);
    }
}
