//! Trees of real machines, built file by file.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::symlink;

use stallscope_attribution::facts::{Counter, PciLink};

use super::super::patrol::{Station as _, Told};
use super::*;

const S: u64 = 1_000_000_000;

/// A `/sys` with a root port, a switch and devices behind it.
struct Tree(tempfile::TempDir);

const ROOT: &str = "0000:16:01.0";
const UP: &str = "0000:17:00.0";
const DOWN: &str = "0000:18:00.0";
const GPU: &str = "0000:19:00.0";
const NIC: &str = "0000:1a:00.0";

impl Tree {
    fn new() -> Self {
        let tree = Self(tempfile::tempdir().unwrap());
        let switch = [ROOT, UP];
        tree.device(&[ROOT], "0x060400", Some(("32.0 GT/s PCIe", "16")));
        tree.device(&switch, "0x060400", Some(("32.0 GT/s PCIe", "16")));
        tree.device(&[ROOT, UP, DOWN], "0x060400", Some(("32.0 GT/s PCIe", "16")));
        tree.device(&[ROOT, UP, DOWN, GPU], "0x030200", Some(("64.0 GT/s PCIe", "16")));
        tree.device(&[ROOT, NIC], "0x020000", Some(("16.0 GT/s PCIe", "16")));
        tree.device(&["0000:00:1f.0"], "0x060100", None);
        for (device, kind) in [(ROOT, 4_u8), (UP, 5), (DOWN, 6)] {
            let mut config = vec![0; 256];
            config[0x34] = 0x40;
            config[0x40..0x43].copy_from_slice(&[0x10, 0, kind << 4 | 2]);
            std::fs::write(tree.of(device, "config"), config).unwrap();
        }
        std::fs::create_dir_all(tree.of(NIC, "net/ens3")).unwrap();
        std::fs::create_dir_all(tree.of(NIC, "infiniband/mlx5_3")).unwrap();
        tree.set(NIC, "numa_node", "1");
        tree.set(GPU, "numa_node", "-1");
        tree.set(NIC, "aer_dev_correctable", "RxErr 4\nBadTLP 0\nTOTAL_ERR_COR 4");
        tree.set(ROOT, "aer_rootport_total_err_cor", "4");
        tree
    }

    fn sys(&self) -> &Path {
        self.0.path()
    }

    fn device(&self, path: &[&str], class: &str, link: Option<(&str, &str)>) {
        let address = path.last().unwrap();
        let home = self.sys().join("devices/pci0000:16").join(path.join("/"));
        std::fs::create_dir_all(&home).unwrap();
        let bus = bus(self.sys());
        std::fs::create_dir_all(&bus).unwrap();
        symlink(home, bus.join(address)).unwrap();
        self.set(address, "class", class);
        self.set(address, "vendor", "0x15b3");
        if let Some((rate, lanes)) = link {
            for when in ["current", "max"] {
                self.set(address, &format!("{when}_link_speed"), rate);
                self.set(address, &format!("{when}_link_width"), lanes);
            }
        }
    }

    fn of(&self, address: &str, file: &str) -> PathBuf {
        bus(self.sys()).join(address).join(file)
    }

    fn set(&self, address: &str, file: &str, text: &str) {
        std::fs::write(self.of(address, file), format!("{text}\n")).unwrap();
    }

    fn station(&self, address: &str, load: &Arc<Load>) -> Device {
        Device::new(&bus(self.sys()), address, Arc::clone(load))
    }
}

fn one(told: Vec<Told>) -> (u64, PciDevice) {
    let [(window, HardwareFact::Pci(device))] = told.as_slice() else {
        panic!("{told:?}")
    };
    (window.len_ns(), device.clone())
}

const fn link(
    rate_mt_per_s: u32,
    lanes: u32,
    best_rate_mt_per_s: u32,
    best_lanes: u32,
    under_load: bool,
) -> Reading<PciLink> {
    Reading::Value(PciLink {
        rate_mt_per_s,
        lanes,
        best_rate_mt_per_s,
        best_lanes,
        under_load,
    })
}

#[test]
fn devices_of_interest_and_the_bridges_above_them() {
    let tree = Tree::new();
    let expected = [ROOT, UP, DOWN, GPU, NIC].map(str::to_owned);
    assert_eq!(of_interest(&bus(tree.sys())), Ok(expected.into()));
    assert_eq!(of_interest(&tree.sys().join("none")), Ok(BTreeSet::new()));
}

#[test]
fn a_device_with_its_place_its_link_and_its_errors() {
    let tree = Tree::new();
    let mut nic = tree.station(NIC, &Arc::default());
    assert_eq!(nic.visit(S), []);
    tree.set(NIC, "aer_dev_correctable", "RxErr 9\nBadTLP 0\nTOTAL_ERR_COR 9");
    let (window_ns, device) = one(nic.visit(3 * S));
    assert_eq!(window_ns, 2 * S);
    let errors = [("BadTLP", 0), ("RxErr", 5), ("TOTAL_ERR_COR", 5)].map(|(name, growth)| Counter {
        name: format!("aer_dev_correctable.{name}"),
        growth: Reading::Value(growth),
    });
    assert_eq!(
        device,
        PciDevice {
            address: NIC.to_owned(),
            kind: PciKind::Nic,
            name: "mlx5_3".to_owned(),
            link: link(16_000, 16, 16_000, 16, false),
            path: vec![ROOT.to_owned()],
            numa_node: Reading::Value(1),
            errors: errors.to_vec(),
        }
    );
    assert_eq!(nic.visit(5 * S), [], "nothing new");
    tree.set(NIC, "current_link_width", "8");
    assert_eq!(one(nic.visit(7 * S)).1.link, link(16_000, 8, 16_000, 16, false));
    assert_eq!(nic.visit(9 * S), []);
    let (window_ns, device) = one(nic.visit(37 * S));
    assert_eq!(window_ns, 30 * S);
    assert_eq!(device.growth("aer_dev_correctable.RxErr"), Reading::Value(0));
}

#[test]
fn best_is_what_device_and_slot_both_have_and_rate_counts_under_load() {
    let tree = Tree::new();
    let load = Arc::new(Load::default());
    let mut gpu = tree.station(GPU, &load);
    tree.set(GPU, "current_link_speed", "2.5 GT/s PCIe");
    gpu.visit(S);
    let (_, device) = one(gpu.visit(3 * S));
    assert_eq!(
        device.link,
        link(2_500, 16, 32_000, 16, false),
        "a slot of generation 5"
    );
    assert_eq!(device.path, [DOWN, UP, ROOT]);
    assert_eq!(
        (device.kind, device.numa_node),
        (PciKind::Gpu, Reading::NotMeasured)
    );
    for tick in 30..51 {
        load.mark(GPU, tick * S / 10);
    }
    assert_eq!(one(gpu.visit(5 * S)).1.link, link(2_500, 16, 32_000, 16, true));

    let mut nic = tree.station(NIC, &load);
    for tick in 30..51 {
        load.mark("ens3", tick * S / 10);
    }
    nic.visit(3 * S);
    assert_eq!(
        one(nic.visit(5 * S)).1.link,
        link(16_000, 16, 16_000, 16, true),
        "by its interface"
    );
}

#[test]
fn a_bridge_tells_of_the_link_above_it_only() {
    let tree = Tree::new();
    let of = |address| {
        let mut station = tree.station(address, &Arc::default());
        station.visit(S);
        one(station.visit(3 * S)).1
    };
    // A narrow card in a wide slot: the port's link is no trouble of the port.
    tree.set(DOWN, "current_link_width", "4");
    assert_eq!(of(DOWN).link, Reading::Unsupported);
    assert_eq!(of(ROOT).link, Reading::Unsupported);
    tree.set(UP, "current_link_width", "8");
    assert_eq!(of(UP).link, link(32_000, 8, 32_000, 16, false));
    assert_eq!(of(ROOT).growth("aer_rootport_total_err_cor"), Reading::Value(0));
}

#[test]
fn links_that_say_nothing_are_not_slow() {
    let tree = Tree::new();
    let of = |address: &str| {
        let mut station = tree.station(address, &Arc::default());
        station.visit(S);
        one(station.visit(3 * S)).1.link
    };
    let failed = |address: &str, part: &str| {
        let link = of(address);
        assert!(
            matches!(&link, Reading::Failed(why) if why.contains(part)),
            "{link:?}"
        );
    };
    tree.set(GPU, "current_link_width", "63");
    tree.set(GPU, "current_link_speed", "Unknown");
    failed(GPU, "does not answer");
    tree.set(GPU, "current_link_width", "0");
    failed(GPU, "down");
    tree.set(GPU, "current_link_width", "sixteen");
    failed(GPU, "sixteen");
    // A virtual function has no link of its own.
    tree.set(NIC, "max_link_width", "0");
    tree.set(NIC, "max_link_speed", "Unknown");
    assert_eq!(of(NIC), Reading::Unsupported);
    std::fs::remove_file(tree.of(NIC, "max_link_width")).unwrap();
    std::fs::remove_file(tree.of(NIC, "max_link_speed")).unwrap();
    assert_eq!(of(NIC), Reading::Unsupported);
}

#[test]
fn a_device_that_vanishes_is_told_of_once() {
    let tree = Tree::new();
    let mut nic = tree.station(NIC, &Arc::default());
    nic.visit(S);
    nic.visit(3 * S);
    std::fs::remove_dir_all(bus(tree.sys()).join(NIC).canonicalize().unwrap()).unwrap();
    let (_, gone) = one(nic.visit(5 * S));
    assert_eq!((gone.address.as_str(), gone.kind), (NIC, PciKind::Nic));
    assert!(matches!(&gone.link, Reading::Failed(why) if why.contains("no longer there")));
    assert!(matches!(
        gone.growth("aer_dev_correctable.RxErr"),
        Reading::Failed(_)
    ));
    assert_eq!(nic.visit(7 * S), []);
}

#[test]
fn one_look_for_people_and_this_machine() {
    let tree = Tree::new();
    tree.set(GPU, "current_link_width", "8");
    let seen = summary(tree.sys()).unwrap();
    assert_eq!((seen.devices, seen.with_link, seen.with_errors), (2, 2, 2));
    assert_eq!(seen.narrow, [format!("{GPU} : 8 of 16 lanes")]);
    summary(Path::new("/sys")).unwrap();
}
