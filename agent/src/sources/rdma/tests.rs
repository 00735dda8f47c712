//! Trees laid out as drivers lay them out, and what becomes of them.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::os::unix::fs::symlink;
use std::time::Instant;

use super::super::clock::monotonic_ns;
use super::super::patrol::Station as _;
use super::*;
use crate::observation::Fact;

/// A `/sys` that is built file by file.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn sys(&self) -> &Path {
        self.0.path()
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.sys().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, format!("{text}\n")).unwrap();
    }

    fn link(&self, path: &str, to: &str) {
        let path = self.sys().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        symlink(to, path).unwrap();
    }

    /// A device behind a PCI function, linked from the class as the kernel links it.
    fn pci_device(&self, name: &str, pci: &str) -> String {
        let home = format!("devices/pci0000:3a/0000:3a:01.0/{pci}/infiniband/{name}");
        self.write(&format!("{home}/node_type"), "1: CA");
        self.link(&format!("{home}/device"), &format!("../../../{pci}"));
        self.link(&format!("class/infiniband/{name}"), &format!("../../{home}"));
        home
    }

    fn port(&self, home: &str, number: u32, [state, rate, link_layer]: [&str; 3]) {
        self.write(&format!("{home}/ports/{number}/state"), state);
        self.write(&format!("{home}/ports/{number}/rate"), rate);
        self.write(&format!("{home}/ports/{number}/link_layer"), link_layer);
    }

    /// A ConnectX port in Ethernet mode, as mlx5 has it.
    fn roce(&self, name: &str, pci: &str, netdev: &str) -> String {
        let home = self.pci_device(name, pci);
        self.port(&home, 1, ["4: ACTIVE", "400 Gb/sec (4X NDR)", "Ethernet"]);
        self.write(&format!("{home}/ports/1/gid_attrs/ndevs/0"), netdev);
        for (counter, value) in [
            ("port_xmit_data", "1000"),
            ("port_rcv_data", "2000"),
            ("port_xmit_wait", "0"),
        ] {
            self.write(&format!("{home}/ports/1/counters/{counter}"), value);
        }
        for (counter, value) in [
            ("out_of_sequence", "4294967290"),
            ("np_cnp_sent", "7"),
            ("lifespan", "10"),
        ] {
            self.write(&format!("{home}/ports/1/hw_counters/{counter}"), value);
        }
        home
    }

    fn device(&self, name: &str) -> Device {
        Device::new(&class(self.sys()), name, Arc::default())
    }
}

fn ports(told: Vec<patrol::Told>) -> Vec<RdmaPort> {
    told.into_iter()
        .map(|(window, fact)| {
            assert!(window.start_ns() > 0);
            let HardwareFact::RdmaPort(port) = fact else {
                panic!("{fact:?}")
            };
            port
        })
        .collect()
}

fn named(port: &RdmaPort) -> Vec<&str> {
    port.counters
        .iter()
        .map(|counter| counter.name.as_str())
        .collect()
}

#[test]
fn a_roce_port_with_growth_in_bytes_and_its_wrap_undone() {
    let tree = Tree::new();
    let home = tree.roce("mlx5_3", "0000:3b:00.1", "ens3f1np1");
    let mut device = tree.device("mlx5_3");
    assert_eq!(device.visit(monotonic_ns()), [], "growth needs two reads");
    tree.write(&format!("{home}/ports/1/counters/port_xmit_data"), "1250");
    tree.write(&format!("{home}/ports/1/hw_counters/out_of_sequence"), "4");
    tree.write(&format!("{home}/ports/1/hw_counters/np_cnp_sent"), "3");
    tree.write(&format!("{home}/ports/1/hw_counters/brand_new_counter"), "3");
    let told = ports(device.visit(monotonic_ns()));
    let [port] = told.as_slice() else {
        panic!("{told:?}")
    };
    assert_eq!(
        (
            port.device.as_str(),
            port.port,
            port.pci.as_str(),
            port.netdev.as_str(),
            port.link_layer.as_str()
        ),
        ("mlx5_3", 1, "0000:3b:00.1", "ens3f1np1", "Ethernet")
    );
    assert_eq!(port.active, Reading::Value(true));
    assert_eq!(port.rate_bytes_per_s, Reading::Value(50_000_000_000));
    assert_eq!(
        named(port),
        [
            "port_rcv_data",
            "port_xmit_data",
            "port_xmit_wait",
            "brand_new_counter",
            "np_cnp_sent",
            "out_of_sequence"
        ]
    );
    assert_eq!(port.growth("port_xmit_data"), Reading::Value(1000));
    assert_eq!(port.growth("port_rcv_data"), Reading::Value(0));
    assert_eq!(port.growth("out_of_sequence"), Reading::Value(10));
    assert!(matches!(port.growth("np_cnp_sent"), Reading::Failed(why) if why.contains("reset")));
    assert_eq!(port.growth("brand_new_counter"), Reading::NotMeasured);
}

#[test]
fn a_native_port_has_no_interface_and_need_not_be_number_one() {
    let tree = Tree::new();
    let home = tree.pci_device("mlx5_0", "0000:3b:00.0");
    tree.port(&home, 2, ["1: DOWN", "10 Gb/sec (4X SDR)", "InfiniBand"]);
    tree.port(&home, 3, ["4: ACTIVE", "200 Gb/sec (4X HDR)", "InfiniBand"]);
    tree.write(
        "devices/pci0000:3a/0000:3a:01.0/0000:3b:00.0/net/ib0/dev_port",
        "2",
    );
    let mut device = tree.device("mlx5_0");
    device.visit(monotonic_ns());
    let told = ports(device.visit(monotonic_ns()));
    let of = |port: &RdmaPort| {
        (
            port.port,
            port.netdev.clone(),
            port.active.clone(),
            port.rate_bytes_per_s.clone(),
        )
    };
    assert_eq!(
        told.iter().map(of).collect::<Vec<_>>(),
        [
            (
                2,
                String::new(),
                Reading::Value(false),
                Reading::Value(1_250_000_000)
            ),
            (
                3,
                String::new(),
                Reading::Value(true),
                Reading::Value(25_000_000_000)
            ),
        ]
    );
}

#[test]
fn devices_of_other_makers_have_the_counters_they_have() {
    let tree = Tree::new();
    let efa = tree.pci_device("rdmap16s27", "0000:10:1b.0");
    tree.port(&efa, 1, ["4: ACTIVE", "100 Gb/sec (4X EDR)", "Unspecified"]);
    // This driver counts per port, and per device beside it.
    tree.write(&format!("{efa}/ports/1/hw_counters/tx_bytes"), "10");
    tree.write(&format!("{efa}/ports/1/hw_counters/rdma_read_wrs"), "1");
    tree.write(&format!("{efa}/hw_counters/tx_bytes"), "999");
    tree.write(&format!("{efa}/hw_counters/alloc_pd_err"), "0");
    let mana = tree.pci_device("mana_0", "7870:00:00.0");
    for number in [1, 2] {
        tree.port(&mana, number, ["4: ACTIVE", "200 Gb/sec (4X HDR)", "Ethernet"]);
        tree.write(
            &format!("{mana}/ports/{number}/hw_counters/requester_timeout"),
            "0",
        );
        let net = format!("devices/pci0000:3a/0000:3a:01.0/7870:00:00.0/net/eth{number}/dev_port");
        tree.write(&net, &(number - 1).to_string());
    }
    // A software device: no PCI function, and its parent is an interface.
    tree.port(
        "class/infiniband/rxe0",
        1,
        ["4: ACTIVE", "2.5 Gb/sec (1X SDR)", "Ethernet"],
    );
    tree.write("class/infiniband/rxe0/parent", "veth0");

    let second = |name: &str| {
        let mut device = tree.device(name);
        device.visit(monotonic_ns());
        tree.write(&format!("{efa}/ports/1/hw_counters/tx_bytes"), "30");
        ports(device.visit(monotonic_ns()))
    };
    let efa = second("rdmap16s27").remove(0);
    assert_eq!(named(&efa), ["rdma_read_wrs", "tx_bytes", "alloc_pd_err"]);
    assert_eq!(
        (efa.growth("tx_bytes"), efa.netdev.as_str()),
        (Reading::Value(20), "")
    );
    let mana = second("mana_0");
    assert_eq!(
        mana.iter().map(|port| port.netdev.as_str()).collect::<Vec<_>>(),
        ["eth1", "eth2"]
    );
    assert_eq!(mana[1].growth("requester_timeout"), Reading::Value(0));
    let rxe = second("rxe0").remove(0);
    assert_eq!((rxe.pci.as_str(), rxe.netdev.as_str()), ("", "veth0"));
    assert_eq!(rxe.rate_bytes_per_s, Reading::Value(312_500_000));
}

#[test]
fn files_that_refuse_are_unsupported_and_strange_ones_failed() {
    let tree = Tree::new();
    let home = tree.roce("mlx5_0", "0000:3b:00.0", "eth0");
    // The kernel answers EINVAL to this file's reader.
    tree.link(
        &format!("{home}/ports/1/hw_counters/refuses"),
        "/sys/class/net/lo/speed",
    );
    tree.write(&format!("{home}/ports/1/hw_counters/text"), "N/A (no PMA)");
    tree.write(&format!("{home}/ports/1/hw_counters/{}", "long".repeat(40)), "1");
    for index in 0..2000 {
        tree.write(&format!("{home}/ports/1/counters/many_{index:04}"), "1");
    }
    tree.write(&format!("{home}/ports/not-a-number/state"), "4: ACTIVE");
    let mut device = tree.device("mlx5_0");
    device.visit(monotonic_ns());
    let port = ports(device.visit(monotonic_ns())).remove(0);
    assert_eq!(port.growth("refuses"), Reading::Unsupported);
    assert!(matches!(port.growth("text"), Reading::Failed(why) if why.contains("N/A")));
    assert_eq!(
        port.growth("np_cnp_sent"),
        Reading::Value(0),
        "the others are read"
    );
    assert!(port.counters.iter().all(|counter| counter.name.len() <= 128));
    assert!(port.counters.len() <= 2 * 512, "{}", port.counters.len());
}

#[test]
fn a_device_that_vanishes_is_told_of_once() {
    let tree = Tree::new();
    let home = tree.roce("mlx5_0", "0000:3b:00.0", "eth0");
    let mut device = tree.device("mlx5_0");
    device.visit(monotonic_ns());
    // One counter goes between the listing and the read: a dangling link is listed too.
    tree.link(&format!("{home}/ports/1/hw_counters/going"), "/nonexistent");
    let port = ports(device.visit(monotonic_ns())).remove(0);
    assert!(matches!(port.growth("going"), Reading::Failed(why) if why.contains("no longer there")));
    std::fs::remove_dir_all(tree.sys().join(&home)).unwrap();
    let gone = ports(device.visit(monotonic_ns()));
    assert_eq!(gone.len(), 1);
    assert!(matches!(&gone[0].active, Reading::Failed(why) if why.contains("no longer there")));
    assert!(matches!(gone[0].growth("np_cnp_sent"), Reading::Failed(_)));
    assert_eq!(device.visit(monotonic_ns()), []);
}

#[test]
fn a_file_that_blocks_leaves_the_other_devices_alone() {
    let tree = Tree::new();
    tree.roce("mlx5_0", "0000:3b:00.0", "eth0");
    let sick = tree.roce("mlx5_1", "0000:3b:00.1", "eth1");
    tree.roce("mlx5_2", "0000:3b:00.2", "eth2");
    let interval = Duration::from_millis(20);
    let mut source = RdmaSource::start_every(interval, "n0", tree.sys(), Arc::default()).unwrap();
    let mut until = |enough: &dyn Fn(&[RdmaPort]) -> bool| {
        let begin = Instant::now();
        let mut seen = Vec::new();
        while !enough(&seen) && begin.elapsed() < Duration::from_secs(12) {
            for observation in source.poll(monotonic_ns()) {
                let Fact::Hardware(facts) = observation.fact else {
                    panic!()
                };
                let HardwareFact::RdmaPort(port) = facts.fact else {
                    panic!()
                };
                seen.push(port);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let trouble = source.trouble(monotonic_ns());
        (seen, trouble)
    };
    let (seen, _) = until(&|seen| seen.iter().any(|port| port.device == "mlx5_1"));
    assert!(seen.iter().all(|port| port.active == Reading::Value(true)));
    let fifo = tree.sys().join(&sick).join("ports/1/hw_counters/np_cnp_sent");
    std::fs::remove_file(&fifo).unwrap();
    let (kind, mode) = (
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
    );
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, mode, 0).unwrap();
    let is_silent =
        |port: &RdmaPort| matches!(&port.active, Reading::Failed(why) if why.contains("not answered"));
    let (seen, trouble) = until(&|seen| seen.iter().any(is_silent));
    assert!(
        seen.iter()
            .filter(|port| is_silent(port))
            .all(|port| port.device == "mlx5_1")
    );
    assert!(trouble.unwrap().contains("mlx5_1"));
    for well in ["mlx5_0", "mlx5_2"] {
        assert!(
            seen.iter().filter(|port| port.device == well).count() > 10,
            "{well}"
        );
    }
    // Firmware comes back: a regular file again, and whoever waits is let go.
    std::fs::rename(&fifo, tree.sys().join("fifo")).unwrap();
    tree.write(&format!("{sick}/ports/1/hw_counters/np_cnp_sent"), "9");
    drop(
        std::fs::OpenOptions::new()
            .write(true)
            .open(tree.sys().join("fifo"))
            .unwrap(),
    );
    let (seen, trouble) = until(&|seen| {
        seen.iter()
            .any(|port| port.device == "mlx5_1" && !is_silent(port))
    });
    assert!(seen.iter().any(|port| port.device == "mlx5_1"));
    assert_eq!(trouble, None);
}

#[test]
fn a_node_without_rdma_and_one_look_for_people() {
    let tree = Tree::new();
    assert_eq!(summary(tree.sys()), Ok(Vec::new()));
    tree.roce("mlx5_0", "0000:3b:00.0", "eth0");
    assert_eq!(
        summary(tree.sys()),
        Ok(vec!["mlx5_0/1 eth0 Ethernet active, 6 counters".to_owned()])
    );
}

#[test]
fn a_device_on_the_bus_has_an_address_and_another_has_none() {
    let sys = tempfile::tempdir().unwrap();
    for (device, target) in [
        ("mlx5_0", "devices/pci0000:3a/0000:3a:00.0/0000:3b:00.1"),
        ("rxe0", "devices/virtual"),
    ] {
        let (folder, target) = (
            sys.path().join("class/infiniband").join(device),
            sys.path().join(target),
        );
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::create_dir_all(&target).unwrap();
        symlink(target, folder.join("device")).unwrap();
    }
    assert_eq!(pci_of(sys.path(), "mlx5_0"), "0000:3b:00.1");
    assert_eq!(pci_of(sys.path(), "rxe0"), "");
    assert_eq!(pci_of(sys.path(), "absent"), "");
}
