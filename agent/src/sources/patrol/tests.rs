//! A patrol over devices that hang and vanish.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::time::Instant;

use stallscope_attribution::facts::RdmaPort;
use stallscope_attribution::reading::Reading;

use super::*;

/// What the devices of the test do.
#[derive(Debug, Default)]
struct World {
    devices: Mutex<BTreeSet<String>>,
    hanging: Mutex<BTreeSet<String>>,
    returned: Condvar,
    visits: AtomicU64,
    inside: AtomicU64,
}

struct Devices(Arc<World>);

struct Device {
    name: String,
    world: Arc<World>,
}

impl Station for Device {
    fn visit(&mut self, now_ns: u64) -> Vec<Told> {
        self.world.visits.fetch_add(1, Ordering::Relaxed);
        self.world.inside.fetch_add(1, Ordering::Relaxed);
        let hanging = self.world.hanging.lock().unwrap();
        drop(
            self.world
                .returned
                .wait_while(hanging, |hanging| hanging.contains(&self.name))
                .unwrap(),
        );
        self.world.inside.fetch_sub(1, Ordering::Relaxed);
        let port = RdmaPort {
            device: self.name.clone(),
            ..RdmaPort::default()
        };
        vec![(Window::instant(now_ns), HardwareFact::RdmaPort(port))]
    }
}

impl Beat for Devices {
    type Station = Device;

    fn name(&self) -> &'static str {
        "test"
    }

    fn find(&self) -> Result<BTreeSet<String>, String> {
        Ok(self.0.devices.lock().unwrap().clone())
    }

    fn station(&self, name: &str) -> Device {
        Device {
            name: name.to_owned(),
            world: Arc::clone(&self.0),
        }
    }

    fn silent(fact: &HardwareFact, why: &str) -> Option<HardwareFact> {
        let HardwareFact::RdmaPort(port) = fact else {
            return None;
        };
        Some(HardwareFact::RdmaPort(RdmaPort {
            active: Reading::Failed(why.to_owned()),
            ..port.clone()
        }))
    }
}

fn world(devices: &[&str]) -> Arc<World> {
    let world = World::default();
    *world.devices.lock().unwrap() = devices.iter().map(|name| (*name).to_owned()).collect();
    Arc::new(world)
}

/// Polls until `enough` of (device, silent) or 12 s.
fn until(patrol: &mut Patrol<Devices>, enough: impl Fn(&[(String, bool)]) -> bool) -> Vec<(String, bool)> {
    let begin = Instant::now();
    let mut seen = Vec::new();
    while !enough(&seen) && begin.elapsed() < Duration::from_secs(12) {
        for observation in patrol.poll(clock::monotonic_ns()) {
            let Fact::Hardware(facts) = observation.fact else {
                panic!("not hardware")
            };
            assert_eq!((facts.node.as_str(), facts.window), ("n0", observation.window));
            let HardwareFact::RdmaPort(port) = facts.fact else {
                panic!("not a port")
            };
            seen.push((port.device, matches!(port.active, Reading::Failed(_))));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    seen
}

fn of(seen: &[(String, bool)], device: &str) -> usize {
    seen.iter()
        .filter(|(name, silent)| name == device && !silent)
        .count()
}

#[test]
fn a_device_that_hangs_delays_no_other_and_is_told_of() {
    let world = world(&["a", "b", "c"]);
    let mut patrol = Patrol::start("n0", Devices(Arc::clone(&world)), Duration::from_millis(20)).unwrap();
    until(&mut patrol, |seen| of(seen, "b") >= 2);
    world.hanging.lock().unwrap().insert("b".to_owned());
    let seen = until(&mut patrol, |seen| seen.contains(&("b".to_owned(), true)));
    assert!(of(&seen, "a") > 20 && of(&seen, "c") > 20, "{}", seen.len());
    assert_eq!(seen.iter().filter(|(_, silent)| *silent).count(), 1, "told once");
    assert!(
        world.inside.load(Ordering::Relaxed) <= 2,
        "one hangs, one goes on"
    );
    let trouble = patrol.trouble(clock::monotonic_ns()).unwrap();
    assert!(trouble.starts_with("b has not answered"), "{trouble}");

    world.hanging.lock().unwrap().clear();
    world.returned.notify_all();
    let seen = until(&mut patrol, |seen| of(seen, "b") >= 2);
    assert!(of(&seen, "b") >= 2, "it is read again");
    assert_eq!(patrol.trouble(clock::monotonic_ns()), None);
    assert_eq!(
        locked(&patrol.rounds.state).threads,
        1,
        "the one that hung has ended"
    );
}

#[test]
fn devices_come_and_go() {
    let world = world(&["a"]);
    let mut patrol = Patrol::start("n0", Devices(Arc::clone(&world)), Duration::from_millis(10)).unwrap();
    until(&mut patrol, |seen| of(seen, "a") >= 1);
    *world.devices.lock().unwrap() = ["b".to_owned()].into();
    let seen = until(&mut patrol, |seen| of(seen, "b") >= 2);
    let last_a = seen.iter().rposition(|(name, _)| name == "a");
    let first_b = seen.iter().position(|(name, _)| name == "b");
    assert!(last_a < first_b, "{seen:?}");
    assert_eq!(locked(&patrol.rounds.state).slots.len(), 1);
    let rounds = Arc::clone(&patrol.rounds);
    drop(patrol);
    let begin = Instant::now();
    while locked(&rounds.state).threads > 0 {
        assert!(begin.elapsed() < Duration::from_secs(5), "the thread goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
}
