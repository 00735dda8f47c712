//! PCI devices of interest: GPUs, network and RDMA devices, storage, and the bridges above them. From sysfs.
//!
//! # Facade
//! - [`PcieSource::start`]`(node, sys, load) -> io::Result<PcieSource>`: reads every device every 2 s in a thread of its
//!   own; [`Load`] tells which of them move data, because an idle GPU lowers the rate of its link.
//! - [`PcieSource::poll`]`(now_ns) -> Vec<Observation>`: `Fact::Hardware` of `Pci` when something changed, else every 30 s.
//! - [`PcieSource::trouble`]`(now_ns) -> Option<String>`: what cannot be seen.
//! - [`summary`]`(sys)`: one look, for `doctor`.

mod aer;
mod device;
mod link;
mod place;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stallscope_attribution::facts::{HardwareFact, PciDevice, PciKind};
use stallscope_attribution::reading::Reading;

use self::device::Device;
use super::load::Load;
use super::patrol::{self, Beat, Patrol};
use super::sysfs::{self, Lack};
use crate::observation::Observation;

const INTERVAL: Duration = Duration::from_secs(2);
/// Devices looked at; a node has some hundreds at most.
const MOST_DEVICES: usize = 4096;
/// Of them, devices that are read.
const MOST_READ: usize = 256;

/// The running source.
#[derive(Debug)]
pub struct PcieSource {
    patrol: Patrol<Devices>,
}

impl PcieSource {
    /// Begins to read the devices below `sys`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn start(node: &str, sys: &Path, load: Arc<Load>) -> std::io::Result<Self> {
        let beat = Devices { bus: bus(sys), load };
        let patrol = Patrol::start(node, beat, INTERVAL)?;
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

fn bus(sys: &Path) -> PathBuf {
    sys.join("bus/pci/devices")
}

#[derive(Debug)]
struct Devices {
    bus: PathBuf,
    load: Arc<Load>,
}

impl Beat for Devices {
    type Station = Device;

    fn name(&self) -> &'static str {
        "pcie"
    }

    fn find(&self) -> Result<BTreeSet<String>, String> {
        of_interest(&self.bus)
    }

    fn station(&self, name: &str) -> Device {
        Device::new(&self.bus, name, Arc::clone(&self.load))
    }

    fn silent(fact: &HardwareFact, why: &str) -> Option<HardwareFact> {
        let HardwareFact::Pci(device) = fact else {
            return None;
        };
        Some(HardwareFact::Pci(failed(device, why)))
    }
}

/// Addresses of GPUs, network devices and storage, and of the bridges above them.
fn of_interest(bus: &Path) -> Result<BTreeSet<String>, String> {
    let names = match sysfs::names(bus, MOST_DEVICES) {
        Ok(names) => names.names,
        // A machine without PCI.
        Err(Lack::Absent) => return Ok(BTreeSet::new()),
        Err(lack) => return Err(format!("{} cannot be read: {lack:?}", bus.display())),
    };
    let mut found = BTreeSet::new();
    for name in names.into_iter().filter(|name| sysfs::is_pci_address(name)) {
        let is_wanted = matches!(
            place::kind(&bus.join(&name)),
            PciKind::Gpu | PciKind::Nic | PciKind::Storage
        );
        if is_wanted && found.len() < MOST_READ {
            found.extend(place::bridges(&bus.join(&name)));
            found.insert(name);
        }
    }
    Ok(found)
}

/// The device with everything that was read of it failed; where it sits stays true.
fn failed(device: &PciDevice, why: &str) -> PciDevice {
    PciDevice {
        link: Reading::Failed(why.to_owned()),
        errors: patrol::unread(&device.errors, why),
        ..device.clone()
    }
}

/// What one look found, for `doctor`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PcieSummary {
    /// GPUs, network devices and storage.
    pub devices: usize,
    /// Of them, with a link whose width and rate are told.
    pub with_link: usize,
    /// Devices and bridges that count errors.
    pub with_errors: usize,
    /// Links with fewer lanes than device and slot both have.
    pub narrow: Vec<String>,
}

/// One look at the devices. May block: a file of a sick device.
///
/// # Errors
/// The devices cannot be listed.
pub fn summary(sys: &Path) -> Result<PcieSummary, String> {
    let bus = bus(sys);
    let mut summary = PcieSummary::default();
    for name in of_interest(&bus)? {
        let device = Device::new(&bus, &name, Arc::default()).look();
        summary.with_errors += usize::from(!device.errors.is_empty());
        if device.kind == PciKind::Bridge {
            continue;
        }
        summary.devices += 1;
        if let Reading::Value(link) = &device.link {
            summary.with_link += 1;
            if link.lanes < link.best_lanes {
                summary.narrow.push(format!(
                    "{name} {}: {} of {} lanes",
                    device.name, link.lanes, link.best_lanes
                ));
            }
        }
    }
    Ok(summary)
}

#[cfg(test)]
mod tests;
