//! One device and its ports.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use stallscope_attribution::facts::{HardwareFact, RdmaPort};
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use super::super::clock::monotonic_ns;
use super::super::load::Load;
use super::super::nic_stats::{Chosen, NicStats};
use super::super::patrol::{Station, Told};
use super::super::sysfs::{self, Lack, names, number, text};
use super::counters::{Counters, Family, Read};
use super::failed;
use super::text::{is_active, rate_bytes_per_s};

/// Ports of a device, and counters of a port, that are read.
const MOST_PORTS: usize = 64;
const MOST_COUNTERS: usize = 512;
/// Entries of a port's address table that are asked for its interface.
const MOST_ADDRESSES: usize = 8;
/// A device that took this long for part of its files is asked for no more of them this time.
const ENOUGH: Duration = Duration::from_secs(2);
/// Beside the counters: for how long the driver keeps them.
const LIFESPAN: &str = "lifespan";

/// A port is under load above this share of its line rate.
const LOAD_PER_CENT: u64 = 2;

/// A device, visited.
#[derive(Debug)]
pub(super) struct Device {
    path: PathBuf,
    name: String,
    load: Arc<Load>,
    nic_stats: Option<Arc<NicStats>>,
    ports: BTreeMap<u32, Port>,
}

/// A port, and when it was read.
#[derive(Debug, Default)]
struct Port {
    read_ns: u64,
    counters: Counters,
    last: RdmaPort,
    /// The numbers of its interface that are told; none where it has none.
    chosen: Option<(String, Chosen)>,
}

impl Station for Device {
    fn visit(&mut self, now_ns: u64) -> Vec<Told> {
        let listed = match self.port_numbers() {
            Ok(listed) => listed,
            Err(lack) => return self.vanish(now_ns, lack),
        };
        let pci = self.pci();
        self.ports.retain(|number, _| listed.contains(number));
        let until_ns = now_ns.saturating_add(u64::try_from(ENOUGH.as_nanos()).unwrap_or(u64::MAX));
        let mut told = Vec::new();
        for (index, &number) in listed.iter().enumerate() {
            let at_ns = monotonic_ns();
            let mut reads = self.read_counters(number, until_ns);
            if index == 0 {
                let folder = self.path.join("hw_counters");
                reads.extend(read_folder(&folder, Family::Device, until_ns));
                // What the port has goes before what the whole device has.
                let mut seen = std::collections::BTreeSet::new();
                reads.retain(|(family, name, _)| seen.insert((*family, name.clone())));
            }
            let described = self.describe(number, &pci);
            let port = self.ports.entry(number).or_default();
            if let Some(nic_stats) = &self.nic_stats {
                reads.extend(port.read_interface(nic_stats, &described.netdev));
            }
            let begun_ns = std::mem::replace(&mut port.read_ns, at_ns);
            port.last = RdmaPort {
                counters: port.counters.take(reads),
                ..described
            };
            // Growth needs two reads.
            if begun_ns == 0 {
                continue;
            }
            if let Some(window) = Window::new(begun_ns, at_ns) {
                note_load(&self.load, &port.last, window);
                told.push((window, HardwareFact::RdmaPort(port.last.clone())));
            }
        }
        told
    }
}

impl Port {
    /// Numbers of the port's interface that tell of pauses.
    fn read_interface(&mut self, nic_stats: &NicStats, netdev: &str) -> Vec<(Family, String, Read)> {
        if netdev.is_empty() {
            return Vec::new();
        }
        let is_known = self.chosen.as_ref().is_some_and(|(of, _)| of == netdev);
        if !is_known {
            // One that refuses has none, and is asked again with the next read.
            self.chosen = nic_stats
                .choose(netdev)
                .ok()
                .map(|chosen| (netdev.to_owned(), chosen));
        }
        let read = self
            .chosen
            .as_ref()
            .map(|(_, chosen)| nic_stats.read(netdev, chosen));
        match read {
            Some(Ok(Some(values))) => values
                .into_iter()
                .map(|(name, value)| (Family::Device, name, Ok(value)))
                .collect(),
            // Its numbers are others now: they are chosen anew.
            _ => {
                self.chosen = None;
                Vec::new()
            }
        }
    }
}

impl Device {
    pub(super) fn new(class: &Path, name: &str, load: Arc<Load>) -> Self {
        Self {
            path: class.join(name),
            name: name.to_owned(),
            load,
            nic_stats: None,
            ports: BTreeMap::new(),
        }
    }

    pub(super) fn with_nic_stats(self, nic_stats: Option<Arc<NicStats>>) -> Self {
        Self { nic_stats, ..self }
    }

    /// One line a port, for people.
    pub(super) fn shown(&self) -> Vec<String> {
        let pci = self.pci();
        let ports = self.port_numbers().unwrap_or_default();
        let line = |number: u32| {
            let port = self.describe(number, &pci);
            let counters = [Family::Standard, Family::Device]
                .map(|family| names(&self.counters_folder(number, family), MOST_COUNTERS))
                .into_iter()
                .filter_map(Result::ok)
                .map(|names| names.names.len())
                .sum::<usize>();
            format!(
                "{}/{number} {} {} {}, {counters} counters",
                self.name,
                if port.netdev.is_empty() { "-" } else { &port.netdev },
                port.link_layer,
                match port.active {
                    Reading::Value(true) => "active",
                    Reading::Value(false) => "not active",
                    _ => "state unknown",
                },
            )
        };
        ports.into_iter().map(line).collect()
    }

    fn port_numbers(&self) -> Result<Vec<u32>, Lack> {
        let names = names(&self.path.join("ports"), MOST_PORTS)?;
        let mut numbers: Vec<u32> = names.names.iter().filter_map(|name| name.parse().ok()).collect();
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Tells once that the device is gone: after this there are no ports to tell of.
    fn vanish(&mut self, now_ns: u64, lack: Lack) -> Vec<Told> {
        let why = match lack {
            Lack::Failed(why) => format!("its ports cannot be listed: {why}"),
            Lack::Absent | Lack::Gone | Lack::Unsupported => "the device is no longer there".to_owned(),
        };
        let tell = |port: Port| {
            let window = Window::new(port.read_ns, now_ns)?;
            Some((window, HardwareFact::RdmaPort(failed(&port.last, &why))))
        };
        let gone = std::mem::take(&mut self.ports);
        gone.into_values().filter_map(tell).collect()
    }

    /// The nearest part of the device's path that is a PCI address; software devices have none.
    fn pci(&self) -> String {
        sysfs::pci_of(&self.path)
    }

    fn port_path(&self, number: u32) -> PathBuf {
        self.path.join("ports").join(number.to_string())
    }

    fn describe(&self, number: u32, pci: &str) -> RdmaPort {
        let path = self.port_path(number);
        let link_layer = text(&path.join("link_layer")).unwrap_or_default();
        let told = |file: &str| text(&path.join(file));
        RdmaPort {
            device: self.name.clone(),
            port: number,
            pci: pci.to_owned(),
            netdev: if link_layer == "InfiniBand" {
                String::new()
            } else {
                self.netdev(&path, number).unwrap_or_default()
            },
            link_layer: sysfs::shown(&link_layer),
            active: told("state").map_or_else(Lack::reading, |state| is_active(&state)),
            rate_bytes_per_s: told("rate").map_or_else(Lack::reading, |rate| rate_bytes_per_s(&rate)),
            counters: Vec::new(),
        }
    }

    /// The interface: as the address table says, else the one of the same port of the same device, else what a software
    /// device sits on.
    fn netdev(&self, port: &Path, number: u32) -> Option<String> {
        let by_address = (0..MOST_ADDRESSES).find_map(|index| {
            let name = text(&port.join("gid_attrs/ndevs").join(index.to_string())).ok()?;
            (!name.is_empty()).then_some(name)
        });
        let by_device = || {
            let folder = self.path.join("device/net");
            let names = names(&folder, MOST_PORTS).ok()?.names;
            let of_port = |name: &&String| {
                let port = sysfs::number(&folder.join(name).join("dev_port"));
                port.is_ok_and(|port| port + 1 == u64::from(number))
            };
            names
                .iter()
                .find(of_port)
                .cloned()
                .or_else(|| match names.as_slice() {
                    [only] => Some(only.clone()),
                    _ => None,
                })
        };
        let by_parent = || text(&self.path.join("parent")).ok();
        let name = by_address.or_else(by_device).or_else(by_parent)?;
        Some(sysfs::shown(&name))
    }

    fn counters_folder(&self, number: u32, family: Family) -> PathBuf {
        let folder = match family {
            Family::Standard => "counters",
            Family::Device => "hw_counters",
        };
        self.port_path(number).join(folder)
    }

    fn read_counters(&self, number: u32, until_ns: u64) -> Vec<(Family, String, Read)> {
        [Family::Standard, Family::Device]
            .into_iter()
            .flat_map(|family| read_folder(&self.counters_folder(number, family), family, until_ns))
            .collect()
    }
}

fn read_folder(folder: &Path, family: Family, until_ns: u64) -> Vec<(Family, String, Read)> {
    // A device without such a folder has no such counters.
    let names = names(folder, MOST_COUNTERS).unwrap_or_default().names;
    let read = |name: String| {
        let read = if monotonic_ns() >= until_ns {
            Err(Lack::Failed("the device takes too long to answer".to_owned()))
        } else {
            match number(&folder.join(&name)) {
                // It was listed a moment ago.
                Err(Lack::Absent) => Err(Lack::Gone),
                read => read,
            }
        };
        (family, name, read)
    };
    names
        .into_iter()
        .filter(|name| name != LIFESPAN)
        .map(read)
        .collect()
}

/// Notes that the port moves data, for whoever judges the link behind it.
fn note_load(load: &Load, port: &RdmaPort, window: Window) {
    let moved: u64 = ["port_xmit_data", "port_rcv_data", "tx_bytes", "rx_bytes"]
        .iter()
        .filter_map(|name| port.growth(name).value().copied())
        .fold(0, u64::saturating_add);
    let line = port.rate_bytes_per_s.value().copied().unwrap_or(0);
    let could = u128::from(line) * u128::from(window.len_ns()) / 1_000_000_000;
    if moved > 0 && u128::from(moved) * 100 >= could * u128::from(LOAD_PER_CENT) {
        load.mark(&port.pci, window.end_ns());
    }
}
