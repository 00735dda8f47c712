//! The source over the kernel of the test's own network namespace.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::*;
use crate::sources::clock::monotonic_ns;

const S: u64 = 1_000_000_000;

#[test]
fn reports_every_port_once_a_second() {
    let mut source = NetSource::open("n0").unwrap();
    let traced = BTreeSet::from([std::process::id()]);
    assert_eq!(source.poll(S, 5, &traced), []);
    assert_eq!(source.poll(S + S / 10, 5, &traced), []);
    let observations = source.poll(2 * S, 5, &traced);
    assert_eq!(source.trouble(), None);
    let with_address = links::links(&mut source.route).unwrap();
    let own: BTreeSet<i32> = source.addresses.values().copied().collect();
    let expected: BTreeSet<String> = with_address
        .into_iter()
        .filter(|(index, _)| own.contains(index))
        .map(|(_, link)| link.name)
        .collect();
    let mut seen = BTreeSet::new();
    for observation in &observations {
        let Fact::Port(port) = &observation.fact else {
            panic!("{observation:?}")
        };
        assert_eq!((port.node.as_str(), port.realtime_offset_ns), ("n0", 5));
        assert_eq!(port.window, Window::new(S, 2 * S).unwrap());
        assert!(port.flows.iter().all(|flow| flow.pid == std::process::id()));
        seen.insert(port.port.clone());
    }
    assert_eq!(seen, expected);
    assert_eq!(source.poll(2 * S + S / 10, 5, &traced), []);
}

#[test]
fn a_queue_made_anew_starts_at_zero() {
    let queue = |overlimits| Queue {
        backlog_bytes: 0,
        overlimits,
    };
    assert_eq!(overlimits(Some(&queue(5)), Some(&queue(9))), Some(4));
    assert_eq!(overlimits(Some(&queue(9)), Some(&queue(5))), Some(5));
    assert_eq!(overlimits(None, Some(&queue(5))), Some(5));
    assert_eq!(overlimits(Some(&queue(5)), None), None);
}

/// Two network namespaces joined by a veth pair, of which the first sends through a token bucket.
struct Lab;

impl Lab {
    const NAMES: [&str; 2] = ["stallscope-net-a", "stallscope-net-b"];

    fn new(rate: &str) -> Self {
        let lab = Self;
        lab.remove();
        let [a, b] = Self::NAMES;
        for line in [
            format!("ip netns add {a}"),
            format!("ip netns add {b}"),
            format!("ip -n {a} link add nic0 type veth peer name nic0 netns {b}"),
            format!("ip -n {a} addr add 10.231.7.1/24 dev nic0"),
            format!("ip -n {b} addr add 10.231.7.2/24 dev nic0"),
            format!("ip -n {a} link set nic0 up"),
            format!("ip -n {b} link set nic0 up"),
            format!("ip netns exec {a} tc qdisc add dev nic0 root tbf rate {rate} burst 32kb limit 4mb"),
        ] {
            assert!(run(&line), "{line}");
        }
        lab
    }

    fn remove(&self) {
        for name in Self::NAMES {
            run(&format!("ip netns del {name}"));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.remove();
    }
}

fn run(line: &str) -> bool {
    let mut words = line.split(' ');
    Command::new(words.next().unwrap())
        .args(words)
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
        .success()
}

/// Moves the calling thread; its sockets belong there from then on.
fn enter(name: &str) {
    let namespace = std::fs::File::open(format!("/run/netns/{name}")).unwrap();
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
}

#[test]
fn a_slow_link_shows_as_backlog_and_a_busy_flow() {
    if std::env::var_os("STALLSCOPE_PRIVILEGED").is_none() {
        println!("skipped: a_slow_link_shows_as_backlog_and_a_busy_flow: STALLSCOPE_PRIVILEGED is not set");
        return;
    }
    let _lab = Lab::new("20mbit");
    let (ready, address) = std::sync::mpsc::channel();
    let receiver = std::thread::spawn(move || {
        enter(Lab::NAMES[1]);
        let listener = TcpListener::bind("10.231.7.2:0").unwrap();
        ready.send(listener.local_addr().unwrap()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 1 << 16];
        while stream.read(&mut buffer).unwrap() > 0 {}
    });
    let measured = std::thread::spawn(move || {
        enter(Lab::NAMES[0]);
        // Link settings come through in a network namespace other than that of `/sys`: a veth says 10 Gbit/s.
        let rates = Ethtool::open().unwrap().line_rates().unwrap();
        assert!(
            rates.values().any(|rate| *rate == Reading::Value(1_250_000_000)),
            "{rates:?}"
        );
        let mut source = NetSource::open("a").unwrap();
        let mut stream = TcpStream::connect(address.recv().unwrap()).unwrap();
        stream.set_write_timeout(Some(Duration::from_millis(50))).unwrap();
        let traced = BTreeSet::from([std::process::id()]);
        let begin = Instant::now();
        let mut ports = Vec::new();
        while begin.elapsed() < Duration::from_millis(2600) {
            let _ = stream.write(&[7; 1 << 16]);
            for observation in source.poll(monotonic_ns(), 0, &traced) {
                let Fact::Port(port) = observation.fact else {
                    panic!("not a port")
                };
                ports.push(*port);
            }
        }
        assert_eq!(source.trouble(), None);
        ports
    });
    let ports = measured.join().unwrap();
    receiver.join().unwrap();
    // The second window is wholly inside the transfer.
    let port = &ports[1];
    assert_eq!(port.port, "nic0");
    assert_eq!(
        port.line_bytes_per_s,
        Reading::Unsupported,
        "what a veth tells is made up"
    );
    let rate = port.sent_bytes * S / port.window.len_ns();
    assert!(
        (2_000_000..3_000_000).contains(&rate),
        "20 Mbit/s are 2.5 MB/s: {rate}"
    );
    assert!(
        matches!(port.backlog_bytes, Reading::Value(bytes) if bytes > 10_000),
        "{port:?}"
    );
    assert!(
        matches!(port.queue_overlimits, Reading::Value(packets) if packets > 10),
        "{port:?}"
    );
    let [flow] = port.flows.as_slice() else {
        panic!("{port:?}")
    };
    assert_eq!(flow.pid, std::process::id());
    assert!(
        flow.local.starts_with("10.231.7.1:") && flow.peer.starts_with("10.231.7.2:"),
        "{flow:?}"
    );
    assert!(flow.busy_ns > port.window.len_ns() / 10 * 8, "{flow:?}");
    assert!(flow.acked_bytes > 1_500_000, "{flow:?}");
    assert!(flow.rtt_us > 1000 && flow.min_rtt_us < flow.rtt_us, "{flow:?}");
}
