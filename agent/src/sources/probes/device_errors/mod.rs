//! Errors of devices from the kernel's own events: `ras:aer_event`, and the GPU driver's `nvidia:nvidia_dev_xid`.
//!
//! Not every kernel has the first, and the second comes and goes with the driver's module. So the programs are loaded
//! everywhere and attached where the event is; what is not there is looked for again now and then.

mod convert;

use std::collections::HashMap as StdHashMap;
use std::path::PathBuf;

use aya::Ebpf;
use aya::maps::{MapData, PerCpuArray, RingBuf};
use aya::programs::trace_point::TracePointLink;

pub use self::convert::DeviceError;
use super::format;
use super::health::{Health, Outcome};
use super::object::{LoadError, attach_tracepoint, take_map};

/// How often an event that was not there is looked for, ns.
const RETRY_NS: u64 = 30_000_000_000;
/// Errors read at once.
const MOST: usize = 1024;

/// An event of the kernel, its program, and the settings that hold the offsets of its fields.
#[derive(Debug)]
struct Point {
    program: &'static str,
    category: &'static str,
    event: &'static str,
    fields: [(&'static str, &'static str); 3],
    /// The offsets in the object, which are used where the event is not there while it is loaded.
    usual: [u32; 3],
}

const POINTS: [Point; 2] = [
    Point {
        program: "pcie_error",
        category: "ras",
        event: "aer_event",
        fields: [
            ("AER_DEVICE", "dev_name"),
            ("AER_STATUS", "status"),
            ("AER_SEVERITY", "severity"),
        ],
        usual: [8, 12, 16],
    },
    Point {
        program: "gpu_fault",
        category: "nvidia",
        event: "nvidia_dev_xid",
        fields: [
            ("XID_DEVICE", "dev"),
            ("XID_CODE", "error_code"),
            ("XID_MESSAGE", "msg"),
        ],
        usual: [8, 12, 16],
    },
];

/// How one of the events stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EventState {
    /// It is listened to.
    Heard,
    /// Neither kernel nor a loaded module has it.
    Absent,
    /// It is there and cannot be listened to, for the reason given.
    Refused(String),
}

/// The programs on those events and what they told.
pub(super) struct DeviceErrors {
    ring: RingBuf<MapData>,
    drops: PerCpuArray<MapData, u64>,
    dropped: u64,
    links: [Option<TracePointLink>; POINTS.len()],
    states: [EventState; POINTS.len()],
    /// The offsets that the programs were loaded with.
    offsets: StdHashMap<&'static str, u32>,
    due_ns: u64,
}

/// The offsets to load the programs with.
pub(super) fn offsets() -> StdHashMap<&'static str, u32> {
    let tracefs = format::tracefs().ok();
    let of = |point: &Point| {
        let read = tracefs.as_ref().and_then(|tracefs| read(point, tracefs)?.ok());
        let settings = point.fields.map(|(setting, _)| setting);
        settings.into_iter().zip(read.unwrap_or(point.usual))
    };
    POINTS.iter().flat_map(of).collect()
}

/// The offsets of an event's fields on this kernel; `None` when it has no such event.
fn read(point: &Point, tracefs: &std::path::Path) -> Option<Result<[u32; 3], String>> {
    let folder: PathBuf = tracefs.join("events").join(point.category).join(point.event);
    let text = match std::fs::read_to_string(folder.join("format")) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => return Some(Err(format!("its format cannot be read: {error}"))),
    };
    let mut offsets = [0; 3];
    for (offset, (_, field)) in offsets.iter_mut().zip(point.fields) {
        match format::offset_of(&text, field) {
            Some(found) => *offset = found,
            None => return Some(Err(format!("it has no field {field}"))),
        }
    }
    Some(Ok(offsets))
}

impl DeviceErrors {
    pub(super) fn new(ebpf: &mut Ebpf, offsets: StdHashMap<&'static str, u32>) -> Result<Self, LoadError> {
        Ok(Self {
            ring: take_map(ebpf, "DEVICE_ERRORS")?,
            drops: take_map(ebpf, "DEVICE_ERROR_DROPS")?,
            dropped: 0,
            links: [None, None],
            states: [EventState::Absent, EventState::Absent],
            offsets,
            due_ns: 0,
        })
    }

    /// Errors told since the last call. Looks for events that were not there.
    pub(super) fn poll(&mut self, ebpf: &mut Ebpf, health: &Health, now_ns: u64) -> Vec<DeviceError> {
        if now_ns >= self.due_ns {
            self.due_ns = now_ns.saturating_add(RETRY_NS);
            self.look(ebpf, health);
        }
        let mut errors = Vec::new();
        while errors.len() < MOST
            && let Some(record) = self.ring.next()
        {
            errors.extend(convert::decode(&record));
        }
        errors
    }

    /// Each event by name, and how it stands.
    pub(super) fn states(&self) -> Vec<(String, EventState)> {
        let name = |point: &Point| format!("{}:{}", point.category, point.event);
        POINTS.iter().map(name).zip(self.states.iter().cloned()).collect()
    }

    /// Errors lost because the ring was full, since the last call.
    pub(super) fn take_dropped(&mut self) -> u64 {
        let total: u64 = self.drops.get(&0, 0).map_or(0, |counts| counts.iter().sum());
        let before = std::mem::replace(&mut self.dropped, total);
        total.saturating_sub(before)
    }

    fn look(&mut self, ebpf: &mut Ebpf, health: &Health) {
        let Ok(tracefs) = format::tracefs() else { return };
        for (index, point) in POINTS.iter().enumerate() {
            let state = match read(point, &tracefs) {
                None => {
                    // A module that was unloaded took its event along; the next one is another.
                    self.links[index] = None;
                    EventState::Absent
                }
                Some(_) if self.links[index].is_some() => EventState::Heard,
                Some(Err(why)) => EventState::Refused(why),
                Some(Ok(offsets)) => match self.attach(ebpf, health, point, offsets) {
                    Ok(link) => {
                        self.links[index] = Some(link);
                        EventState::Heard
                    }
                    Err(why) => EventState::Refused(why),
                },
            };
            if self.states[index] != state {
                tracing::info!(event = point.event, ?state, "an event of devices");
                self.states[index] = state;
            }
        }
    }

    fn attach(
        &self,
        ebpf: &mut Ebpf,
        health: &Health,
        point: &Point,
        offsets: [u32; 3],
    ) -> Result<TracePointLink, String> {
        if let Some(Outcome::Unsupported(why) | Outcome::Broken(why)) = health.of(point.program) {
            return Err(why.clone());
        }
        let loaded = point
            .fields
            .map(|(setting, _)| self.offsets.get(setting).copied());
        if loaded != offsets.map(Some) {
            return Err("its fields lie elsewhere than when the agent started; restart the agent".to_owned());
        }
        attach_tracepoint(ebpf, point.program, point.category, point.event).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use std::process::Command;
    use std::time::{Duration, Instant};

    use stallscope_records::Field as _;
    use stallscope_records::device::{DeviceError as Record, kind};

    use super::super::{Probes, ProbesConfig};
    use super::*;
    use crate::sources::clock::monotonic_ns;

    /// Runs a program until its start was told as the error of a device; its name is that of the device then.
    fn told(errors: &mut DeviceErrors, program: &std::path::Path) -> (u32, Record) {
        let mut child = Command::new(program).spawn().unwrap();
        child.wait().unwrap();
        let begin = Instant::now();
        loop {
            while let Some(record) = errors.ring.next() {
                let record = Record::read(&record).unwrap();
                if record.code == child.id() {
                    return (child.id(), record);
                }
            }
            assert!(begin.elapsed() < Duration::from_secs(5), "it was not told");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// `sched:sched_process_exec` is shaped as `ras:aer_event` is: a text whose place stands at 8, numbers at 12 and 16.
    #[test]
    fn the_program_reads_text_and_numbers_of_an_event() {
        if std::env::var_os("STALLSCOPE_PRIVILEGED").is_none() {
            println!(
                "skipped: the_program_reads_text_and_numbers_of_an_event: STALLSCOPE_PRIVILEGED is not set"
            );
            return;
        }
        let mut probes = Probes::load(&ProbesConfig::default()).unwrap().probes;
        let (ebpf, errors) = probes.parts();
        let format = format::tracefs()
            .unwrap()
            .join("events/sched/sched_process_exec/format");
        let format = std::fs::read_to_string(format).unwrap();
        let offsets = ["filename", "pid", "old_pid"].map(|field| format::offset_of(&format, field));
        assert_eq!(
            offsets,
            [8, 12, 16].map(Some),
            "another event has this shape on this kernel"
        );
        let _link = attach_tracepoint(ebpf, "pcie_error", "sched", "sched_process_exec").unwrap();

        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("a-name-that-is-longer-than-what-is-kept-of-it");
        std::fs::copy("/bin/true", &long).unwrap();
        for program in [std::path::Path::new("/bin/true"), &long] {
            let begin_ns = monotonic_ns();
            let (pid, record) = told(errors, program);
            assert!((begin_ns..monotonic_ns()).contains(&record.at_ns));
            assert_eq!((record.kind, record.severity), (kind::PCIE, pid & 0xff));
            let name = program.to_str().unwrap().as_bytes();
            let kept = name.get(..31).unwrap_or(name);
            assert_eq!(record.device[..kept.len()], *kept);
            assert!(record.device[kept.len()..].iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn events_that_are_not_here_are_absent() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(&POINTS[0], dir.path()), None);
        let folder = dir.path().join("events/ras/aer_event");
        std::fs::create_dir_all(&folder).unwrap();
        let line =
            |name: &str, offset| format!("\tfield:u32 {name};\toffset:{offset};\tsize:4;\tsigned:0;\n");
        std::fs::write(folder.join("format"), line("dev_name", 8) + &line("status", 12)).unwrap();
        assert!(matches!(read(&POINTS[0], dir.path()), Some(Err(why)) if why.contains("severity")));
        let whole = line("dev_name", 8) + &line("status", 20) + &line("severity", 24);
        std::fs::write(folder.join("format"), whole).unwrap();
        assert_eq!(read(&POINTS[0], dir.path()), Some(Ok([8, 20, 24])));
    }
}
