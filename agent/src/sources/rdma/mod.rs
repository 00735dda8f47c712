//! Ports of InfiniBand, `RoCE` and EFA devices, from sysfs.
//!
//! # Facade
//! - [`RdmaSource::start`]`(node, sys, load) -> io::Result<RdmaSource>`: reads every port every 2 s in a thread of its own.
//! - [`RdmaSource::poll`]`(now_ns) -> Vec<Observation>`: what was read, as `Fact::Hardware` of `RdmaPort`.
//! - [`RdmaSource::trouble`]`(now_ns) -> Option<String>`: what cannot be seen.
//! - [`summary`]`(sys)`: one look, for `doctor`.
//!
//! Beside the port's own counters are those of its interface that tell of pauses (by ethtool).
//!
//! Devices, ports and counters are whatever is there: no port number, network interface or counter is taken for granted.
//! Only ports that the RDMA subsystem shows in the agent's network namespace are seen.

mod counters;
mod device;
mod text;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stallscope_attribution::facts::{HardwareFact, RdmaPort};
use stallscope_attribution::reading::Reading;

use self::device::Device;
use super::load::Load;
use super::nic_stats::NicStats;
use super::patrol::{self, Beat, Patrol};
use super::sysfs::{self, Lack};
use crate::observation::Observation;

/// Drivers cache counters for milliseconds, and a read of many of them is a command to firmware each.
const INTERVAL: Duration = Duration::from_secs(2);
/// Devices read; more are only counted.
const MOST_DEVICES: usize = 64;

/// The running source.
#[derive(Debug)]
pub struct RdmaSource {
    patrol: Patrol<Devices>,
}

impl RdmaSource {
    /// Begins to read the devices below `sys`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(node: &str, sys: &Path, load: Arc<Load>) -> std::io::Result<Self> {
        Self::start_every(INTERVAL, node, sys, load)
    }

    fn start_every(interval: Duration, node: &str, sys: &Path, load: Arc<Load>) -> std::io::Result<Self> {
        let beat = Devices {
            class: class(sys),
            load,
            // Interfaces are asked by name: those of a copied tree are not this machine's.
            nic_stats: (sys == Path::new("/sys"))
                .then(|| NicStats::open().ok())
                .flatten()
                .map(Arc::new),
        };
        let patrol = Patrol::start(node, beat, interval)?;
        Ok(Self { patrol })
    }

    /// Everything that was read since the last call.
    pub fn poll(&mut self, now_ns: u64) -> Vec<Observation> {
        self.patrol.poll(now_ns)
    }

    /// What cannot be seen now.
    #[must_use]
    pub fn trouble(&self, now_ns: u64) -> Option<String> {
        self.patrol.trouble(now_ns)
    }
}

/// The PCI address of a device of this name below `sys`; empty when it has none, as devices made of software.
#[must_use]
pub fn pci_of(sys: &Path, device: &str) -> String {
    sysfs::pci_of(&class(sys).join(device))
}

fn class(sys: &Path) -> PathBuf {
    sys.join("class/infiniband")
}

#[derive(Debug)]
struct Devices {
    class: PathBuf,
    load: Arc<Load>,
    nic_stats: Option<Arc<NicStats>>,
}

impl Beat for Devices {
    type Station = Device;

    fn name(&self) -> &'static str {
        "rdma"
    }

    fn find(&self) -> Result<BTreeSet<String>, String> {
        match sysfs::names(&self.class, MOST_DEVICES) {
            Ok(names) => Ok(names.names.into_iter().collect()),
            // A node without RDMA.
            Err(Lack::Absent) => Ok(BTreeSet::new()),
            Err(lack) => Err(format!("{} cannot be read: {lack:?}", self.class.display())),
        }
    }

    fn station(&self, name: &str) -> Device {
        Device::new(&self.class, name, Arc::clone(&self.load)).with_nic_stats(self.nic_stats.clone())
    }

    fn silent(fact: &HardwareFact, why: &str) -> Option<HardwareFact> {
        let HardwareFact::RdmaPort(port) = fact else {
            return None;
        };
        Some(HardwareFact::RdmaPort(failed(port, why)))
    }
}

/// The port with everything that was read of it failed.
fn failed(port: &RdmaPort, why: &str) -> RdmaPort {
    RdmaPort {
        active: Reading::Failed(why.to_owned()),
        rate_bytes_per_s: Reading::Failed(why.to_owned()),
        counters: patrol::unread(&port.counters, why),
        ..port.clone()
    }
}

/// One look at the ports, as `doctor` shows them; an error says why there is none. May block: a file of a sick device.
///
/// # Errors
/// The devices cannot be listed.
pub fn summary(sys: &Path) -> Result<Vec<String>, String> {
    let class = class(sys);
    let devices = match sysfs::names(&class, MOST_DEVICES) {
        Ok(devices) => devices.names,
        Err(Lack::Absent) => Vec::new(),
        Err(lack) => return Err(format!("{} cannot be read: {lack:?}", class.display())),
    };
    Ok(devices
        .iter()
        .flat_map(|name| Device::new(&class, name, Arc::default()).shown())
        .collect())
}

#[cfg(test)]
mod tests;
