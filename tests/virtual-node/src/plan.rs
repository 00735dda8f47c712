//! What a process of the job needs to know, handed over as a file.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::scenario::Scenario;

/// The run as its processes see it.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub(crate) struct Plan {
    /// Names everything the run makes on the host.
    pub(crate) id: String,
    pub(crate) dir: PathBuf,
    pub(crate) scenario: Scenario,
    pub(crate) nodes: Vec<Node>,
    pub(crate) management: Management,
}

/// One virtual node.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub(crate) struct Node {
    pub(crate) name: String,
    pub(crate) netns: String,
    pub(crate) ip: Ipv4Addr,
    /// Path below the root of every cgroup hierarchy used.
    pub(crate) cgroup: String,
    /// Folder with the state of its GPUs.
    pub(crate) state: PathBuf,
    /// Folder with its own copies of the stand-in libraries.
    pub(crate) lib: PathBuf,
}

/// Where the collector lives.
#[derive(Debug, Clone, Deserialize, Serialize)]
pub(crate) struct Management {
    pub(crate) netns: String,
    pub(crate) ip: Ipv4Addr,
}

/// Port at which rank 0 hands out the communicator's id.
pub(crate) const STORE_PORT: u16 = 29_500;

impl Plan {
    pub(crate) fn new(id: &str, dir: &Path, scenario: Scenario) -> Self {
        let node = |index: u32| {
            let name = format!("node{index}");
            Node {
                netns: format!("ss-{id}-n{index}"),
                ip: Ipv4Addr::from(0x0a58_000a + index),
                cgroup: format!("/stallscope-vnode-{id}/{name}"),
                state: dir.join(&name),
                lib: dir.join(&name).join("lib"),
                name,
            }
        };
        Self {
            id: id.to_owned(),
            dir: dir.to_owned(),
            nodes: (0..scenario.topology.nodes).map(node).collect(),
            management: Management {
                netns: format!("ss-{id}-m"),
                ip: Ipv4Addr::new(10, 88, 0, 1),
            },
            scenario,
        }
    }

    pub(crate) fn path(dir: &Path) -> PathBuf {
        dir.join("plan.json")
    }

    pub(crate) fn write(&self) -> anyhow::Result<()> {
        let path = Self::path(&self.dir);
        std::fs::write(&path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("failed to write {}", path.display()))
    }

    pub(crate) fn read(dir: &Path) -> anyhow::Result<Self> {
        let path = Self::path(dir);
        let bytes = std::fs::read(&path).with_context(|| format!("failed to read {}", path.display()))?;
        serde_json::from_slice(&bytes).with_context(|| format!("{} is not a plan", path.display()))
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.dir.join(virtual_node_state::control::FILE)
    }

    pub(crate) fn node_of(&self, rank: u32) -> (&Node, u32) {
        let per_node = self.scenario.topology.gpus_per_node;
        (&self.nodes[(rank / per_node) as usize], rank % per_node)
    }

    pub(crate) fn rank_cgroup(&self, rank: u32) -> String {
        format!("{}/rank{rank}", self.node_of(rank).0.cgroup)
    }

    /// Dataset files of a rank.
    pub(crate) fn sample(&self, rank: u32, index: u64) -> PathBuf {
        self.data()
            .join(format!("rank{rank}"))
            .join(format!("shard{}.bin", index % SHARDS))
    }
}

/// Dataset files per rank.
pub(crate) const SHARDS: u64 = 4;
