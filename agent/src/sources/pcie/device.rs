//! One device, visited.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use stallscope_attribution::facts::{Counter, HardwareFact, PciDevice, PciKind};
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use super::super::load::Load;
use super::super::patrol::{Station, Told};
use super::super::sysfs::{Lack, number};
use super::aer::{self, Counts};
use super::link::{self, Best};
use super::{failed, place};

/// How often a device is told of that stays as it is, ns.
const AT_LEAST_NS: u64 = 30_000_000_000;
/// Where a bridge's configuration says which end of a link it is: the capability list, and the kind of port.
const CAPABILITIES: usize = 0x34;
const EXPRESS: u8 = 0x10;
const UPSTREAM: u8 = 5;
const MOST_CAPABILITIES: usize = 48;

/// A device.
#[derive(Debug)]
pub(super) struct Device {
    path: PathBuf,
    address: String,
    load: Arc<Load>,
    known: Option<Known>,
    told: Option<Before>,
}

/// What stays as long as the device is there.
#[derive(Debug, Clone)]
struct Known {
    device: PciDevice,
    best: Result<Best, Lack>,
}

/// What was told last, and when.
#[derive(Debug)]
struct Before {
    at_ns: u64,
    device: PciDevice,
    counts: Counts,
    /// It was read but not told yet.
    is_first: bool,
}

impl Station for Device {
    fn visit(&mut self, now_ns: u64) -> Vec<Told> {
        if number(&self.path.join("vendor")).is_err_and(|lack| lack != Lack::Unsupported) {
            return self.vanish(now_ns);
        }
        let counts = aer::counts(&self.path);
        let device = self.read(now_ns);
        let Some(before) = &self.told else {
            self.told = Some(Before {
                at_ns: now_ns,
                device,
                counts,
                is_first: true,
            });
            return Vec::new();
        };
        let errors = aer::growth(&before.counts, &counts);
        let grew = errors.iter().any(|error| is_news(before, error));
        let is_due = before.is_first
            || grew
            || has_changed(&before.device, &device)
            || now_ns.saturating_sub(before.at_ns) >= AT_LEAST_NS;
        if !is_due {
            return Vec::new();
        }
        let window = Window::new(before.at_ns, now_ns);
        self.told = Some(Before {
            at_ns: now_ns,
            device: device.clone(),
            counts,
            is_first: false,
        });
        let told = PciDevice { errors, ..device };
        window
            .into_iter()
            .map(|window| (window, HardwareFact::Pci(told.clone())))
            .collect()
    }
}

/// Whether errors were counted, or can be counted no longer.
fn is_news(before: &Before, error: &Counter) -> bool {
    match &error.growth {
        Reading::Value(growth) => *growth > 0,
        Reading::Failed(_) => before.counts.get(&error.name).is_none_or(Result::is_ok),
        Reading::NotMeasured | Reading::Unsupported => false,
    }
}

/// Whether the link is another one. Load comes and goes; by itself it is no news.
fn has_changed(before: &PciDevice, now: &PciDevice) -> bool {
    match (&before.link, &now.link) {
        (Reading::Value(before), Reading::Value(now)) => {
            (before.rate_mt_per_s, before.lanes) != (now.rate_mt_per_s, now.lanes)
                || before.ppm() != now.ppm()
        }
        (before, now) => before != now,
    }
}

impl Device {
    pub(super) fn new(bus: &Path, address: &str, load: Arc<Load>) -> Self {
        Self {
            path: bus.join(address),
            address: address.to_owned(),
            load,
            known: None,
            told: None,
        }
    }

    /// One look, with the errors it counts but not their growth.
    pub(super) fn look(&mut self) -> PciDevice {
        let counts = aer::counts(&self.path);
        let errors: Vec<Counter> = aer::growth(&Counts::new(), &counts);
        PciDevice {
            errors,
            ..self.read(0)
        }
    }

    fn read(&mut self, now_ns: u64) -> PciDevice {
        let known = match &self.known {
            Some(known) => known.clone(),
            None => self.know(),
        };
        let link = match &known.best {
            Ok(best) => link::link(&self.path, *best, self.is_under_load(now_ns)),
            Err(lack) => lack.clone().reading(),
        };
        // Names come later than devices: their drivers give them.
        let name = place::name(&self.path);
        let device = PciDevice {
            link,
            name,
            ..known.device.clone()
        };
        self.known = Some(known);
        device
    }

    fn know(&self) -> Known {
        let kind = place::kind(&self.path);
        let path = place::bridges(&self.path);
        let bus = self.path.parent().unwrap_or(Path::new(""));
        let above = path.first().map(|above| bus.join(above));
        let best = if kind == PciKind::Bridge && !self.looks_up() {
            // Its link leads down: the device at the other end tells of it.
            Err(Lack::Unsupported)
        } else {
            link::best(&self.path, above.as_deref())
        };
        Known {
            device: PciDevice {
                address: self.address.clone(),
                kind,
                name: String::new(),
                link: Reading::NotMeasured,
                path,
                numa_node: place::numa_node(&self.path),
                errors: Vec::new(),
            },
            best,
        }
    }

    fn is_under_load(&self, now_ns: u64) -> bool {
        self.load.lasts(&self.address, now_ns)
            || place::interfaces(&self.path)
                .iter()
                .any(|name| self.load.lasts(name, now_ns))
    }

    /// Whether the bridge is the upstream port of a switch, whose link leads up. Without permission to read past the
    /// first 64 bytes it is not known, and such a link is not told.
    fn looks_up(&self) -> bool {
        let config = std::fs::read(self.path.join("config")).unwrap_or_default();
        port_kind(&config) == Some(UPSTREAM)
    }

    /// Tells once that the device is gone.
    fn vanish(&mut self, now_ns: u64) -> Vec<Told> {
        let Some(before) = self.told.take() else {
            return Vec::new();
        };
        let device = PciDevice {
            errors: aer::growth(&before.counts, &before.counts),
            ..before.device
        };
        let gone = failed(&device, "the device is no longer there");
        let window = Window::new(before.at_ns, now_ns);
        window
            .into_iter()
            .map(|window| (window, HardwareFact::Pci(gone.clone())))
            .collect()
    }
}

/// The kind of port in a configuration's PCI Express capability (PCI Express base specification, section 7.5.3.2).
fn port_kind(config: &[u8]) -> Option<u8> {
    let mut at = usize::from(*config.get(CAPABILITIES)? & !3);
    for _ in 0..MOST_CAPABILITIES {
        if at == 0 {
            return None;
        }
        if *config.get(at)? == EXPRESS {
            return config.get(at + 2).map(|flags| flags >> 4);
        }
        at = usize::from(*config.get(at + 1)? & !3);
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header whose list has a power capability at 0x40 and PCI Express at 0x60.
    fn config(kind: u8) -> Vec<u8> {
        let mut config = vec![0; 256];
        config[CAPABILITIES] = 0x40;
        config[0x40..0x42].copy_from_slice(&[0x01, 0x60]);
        config[0x60..0x64].copy_from_slice(&[EXPRESS, 0, kind << 4 | 2, 0]);
        config
    }

    #[test]
    fn finds_the_kind_of_port() {
        assert_eq!(port_kind(&config(UPSTREAM)), Some(UPSTREAM));
        assert_eq!(port_kind(&config(4)), Some(4));
        assert_eq!(port_kind(&config(UPSTREAM)[..64]), None, "without privileges");
        let mut endless = vec![0; 256];
        endless[CAPABILITIES] = 0x40;
        endless[0x40..0x42].copy_from_slice(&[0x01, 0x40]);
        assert_eq!(port_kind(&endless), None);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_survived(bytes: Vec<u8>) {
            let _ = port_kind(&bytes);
        }
    }

    #[test]
    fn load_alone_is_no_news() {
        use stallscope_attribution::facts::PciLink;
        let with = |link: Reading<PciLink>| PciDevice {
            link,
            ..PciDevice::default()
        };
        let link = |lanes, under_load| {
            with(Reading::Value(PciLink {
                rate_mt_per_s: 16_000,
                lanes,
                best_rate_mt_per_s: 16_000,
                best_lanes: 16,
                under_load,
            }))
        };
        assert!(!has_changed(&link(16, false), &link(16, true)));
        assert!(has_changed(&link(16, true), &link(8, true)));
        assert!(has_changed(
            &link(16, true),
            &with(Reading::Failed("x".to_owned()))
        ));
        let slow = |under_load| {
            let mut device = link(16, under_load);
            device.link = device.link.map(|link| PciLink {
                rate_mt_per_s: 2_500,
                ..link
            });
            device
        };
        assert!(has_changed(&slow(false), &slow(true)), "slow under load is news");
    }
}
