//! Another job's process that keeps a share of a GPU busy without pause.

use std::path::Path;

use anyhow::Context;

use crate::plan::Plan;
use crate::topology;
use crate::trainer::driver::Device;

/// Kernels of 5 ms between two waits; two such batches are in flight, so the GPU never runs dry.
const BATCH: u32 = 20;

/// Runs until killed.
pub(crate) fn run(dir: &Path, node: &str, gpu: u32, share_percent: f64) -> anyhow::Result<()> {
    let plan = Plan::read(dir)?;
    let node = plan
        .nodes
        .iter()
        .find(|found| found.name == node)
        .context("no such node")?;
    topology::enter(&node.netns, &topology::tenant_cgroup(node, gpu))?;
    let device = Device::open(gpu)?;
    let share = (share_percent * 1e4) as u64;
    let image = format!(
        "//virtual-gpu kernels\nkernel infer dur_ns=5000000 sm={share} occupancy={} tensor={} dram={} claim={share} clocked=0\n",
        share / 2,
        share / 4,
        share / 2
    );
    let module = device.module(&image)?;
    let kernel = device.kernel(module, "infer")?;
    device.allocate(6 << 30)?;
    let streams = device.stream()?;
    let marks = [device.event()?, device.event()?];
    for turn in 0_usize.. {
        for _ in 0..BATCH {
            device.launch(kernel, streams)?;
        }
        device.record(marks[turn % 2], streams)?;
        if turn > 0 {
            device.wait_for(marks[(turn + 1) % 2])?;
        }
    }
    Ok(())
}
