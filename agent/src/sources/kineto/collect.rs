//! Events to compact records.

use std::collections::{BTreeMap, HashMap};
use std::hash::{DefaultHasher, Hash, Hasher};

use memchr::memmem;
use stallscope_attribution::activity::{
    Collective, Device, Doing, HostRange, KernelClass, Launch, Peer, Pipe, RankTrace, Record, Work,
};
use stallscope_attribution::facts::{GpuSubject, RecordGap};
use stallscope_attribution::time::Window;

use super::decimal::{BadTime, micros_to_ns};
use super::event::{Args, Category, Event, number, text};
use super::header::Header;
use super::operators::{Operators, Role};
use super::{Trace, TraceError, host};

/// Times from here on are of `CLOCK_REALTIME`: September 2001, ns.
const REALTIME_FROM_NS: u64 = 1_000_000_000_000_000_000;

/// Half of the longest trace: a week. No profiler runs so long, and sums over thousands of ranks stay exact.
const LONGEST_NS: u64 = 7 * 24 * 3600 * 1_000_000_000 / 2;
/// Names whose meaning is kept.
const MOST_NAMES: usize = 1 << 16;

/// What could not be used, by reason.
#[derive(Debug, Default)]
struct Losses {
    malformed: u64,
    not_a_number: u64,
    negative: u64,
    overflow: u64,
    far: u64,
    duplicates: u64,
    without_launch: u64,
}

/// A GPU event whose launch is not looked up yet.
struct Raw {
    record: Record,
    correlation: u64,
    device: u32,
}

/// What names mean, found out once for each. Bounded: traces of Python functions have any number of names.
struct ByName<T>(HashMap<Box<[u8]>, T>);

impl<T> Default for ByName<T> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<T: Copy> ByName<T> {
    fn of(&mut self, raw: &[u8], meaning: impl FnOnce(&str) -> T) -> T {
        if let Some(known) = self.0.get(raw) {
            return *known;
        }
        let found = meaning(&text(raw));
        if self.0.len() < MOST_NAMES {
            self.0.insert(raw.into(), found);
        }
        found
    }
}

fn window_of(event: &Event<'_>) -> Result<Window, BadTime> {
    let (start, length) = (micros_to_ns(event.ts())?, micros_to_ns(event.dur())?);
    let end = start.checked_add(length).ok_or(BadTime::Overflow)?;
    Window::new(start, end).ok_or(BadTime::Overflow)
}

/// A call that launched work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Launched {
    launch: Launch,
    /// Hash of the grid and block of the kernel, where the trace tells them of the call and not of the kernel.
    shape: Option<u64>,
}

/// Takes events in any order.
#[derive(Default)]
pub(super) struct Collector {
    /// Most events taken.
    limit: u64,
    events: u64,
    taken: u64,
    losses: Losses,
    gpu: Vec<Raw>,
    launches: HashMap<u64, Launched>,
    threads: HashMap<Box<str>, u32>,
    last_thread: Option<(Box<[u8]>, u32)>,
    kernels: ByName<(Work, Option<Pipe>)>,
    calls: ByName<(bool, Doing)>,
    meanings: ByName<(Doing, Role)>,
    busy: BTreeMap<u32, Vec<Window>>,
    named: Vec<HostRange>,
    marks: Vec<(Window, u32)>,
    operators: Operators,
    /// Kernels of no known class: count and time by name.
    unknown: HashMap<Box<str>, (u64, u64)>,
}

impl Collector {
    /// Takes no more than so many.
    pub(super) fn at_most(limit: u64) -> Self {
        Self {
            limit,
            ..Self::default()
        }
    }

    /// Counts an element that is no event.
    pub(super) fn malformed(&mut self) {
        self.losses.malformed += 1;
    }

    /// Takes one element of `traceEvents`.
    ///
    /// # Errors
    /// [`TraceError::TooMany`]: memory grows with what is taken.
    pub(super) fn event(&mut self, event: Event<'_>) -> Result<(), TraceError> {
        self.events += 1;
        let category = event.category();
        if !event.is_complete() || category == Category::Other {
            return Ok(());
        }
        self.taken += 1;
        if self.taken > self.limit {
            return Err(TraceError::TooMany { limit: self.limit });
        }
        match window_of(&event) {
            Ok(window) => match category {
                Category::Kernel | Category::Copy | Category::Set => self.gpu(event, category, window),
                Category::Runtime => self.call(event, window),
                Category::Operator => self.operator(event, window),
                Category::Other => {}
            },
            Err(why) => self.losses.time(why),
        }
        Ok(())
    }

    fn gpu(&mut self, event: Event<'_>, category: Category, window: Window) {
        let args = event.args();
        let device = number(args.device).or_else(|| number(event.pid()));
        let Some(device) = device.and_then(|device| u32::try_from(device).ok()) else {
            return self.malformed();
        };
        let (work, pipe) = match category {
            Category::Kernel => {
                let meaning = |name: &str| (Work::Kernel(KernelClass::of(name)), Pipe::of(name));
                self.kernels.of(event.raw_name(), meaning)
            }
            Category::Copy => (copy(&text(event.raw_name())), None),
            _ => (Work::OnDevice, None),
        };
        if work == Work::Kernel(KernelClass::Unknown) {
            self.unknown(&text(event.raw_name()), window);
        }
        let collective = (work == Work::Kernel(KernelClass::Communication))
            .then(|| collective(&text(event.raw_name()), &args));
        let stream = number(args.stream).or_else(|| number(event.tid())).unwrap_or(0);
        self.gpu.push(Raw {
            record: Record {
                window,
                work,
                stream: u32::try_from(stream).unwrap_or(u32::MAX),
                launch: None,
                bytes: number(args.bytes),
                token: hash(&(event.raw_name(), args.grid, args.block)),
                shaped: !args.grid.is_empty(),
                pipe,
                pageable: memmem::find(event.raw_name(), b"Pageable").is_some(),
                collective,
            },
            correlation: number(args.correlation).unwrap_or(0),
            device,
        });
    }

    fn unknown(&mut self, name: &str, window: Window) {
        let (count, ns) = self.unknown.entry(name.into()).or_default();
        *count += 1;
        *ns += window.len_ns();
    }

    fn call(&mut self, event: Event<'_>, window: Window) {
        let thread = self.thread(event.tid());
        let (is_launch, doing) = self.calls.of(event.raw_name(), |name| {
            (host::is_launch(name), host::of_call(name))
        });
        if is_launch
            && let args = event.args()
            && let Some(correlation) = number(args.correlation).filter(|id| *id > 0)
        {
            let launch = Launched {
                launch: Launch {
                    at_ns: window.start_ns(),
                    thread,
                },
                shape: (!args.grid.is_empty()).then(|| hash(&(args.grid, args.block))),
            };
            let known = self.launches.entry(correlation).or_insert(launch);
            *known = launch.min(*known);
        }
        self.range(window, thread, doing);
    }

    fn operator(&mut self, event: Event<'_>, window: Window) {
        let thread = self.thread(event.tid());
        if event.raw_name().starts_with(b"\"ProfilerStep#") {
            // The mark spans the step whatever the thread does in it.
            return self.marks.push((window, thread));
        }
        let meaning = |name: &str| (host::of_operator(name), Role::of(name));
        let (doing, role) = self.meanings.of(event.raw_name(), meaning);
        self.operators.take(role, window, thread, event.raw_args());
        self.range(window, thread, doing);
    }

    /// Nested issuing is one stretch; only what has a name of its own is kept apart.
    fn range(&mut self, window: Window, thread: u32, doing: Doing) {
        if doing != Doing::Issue {
            return self.named.push(HostRange {
                window,
                thread,
                doing,
            });
        }
        let busy = self.busy.entry(thread).or_default();
        if let Some(last) = busy.last_mut()
            && (last.start_ns()..=last.end_ns()).contains(&window.start_ns())
            && let Some(joined) = Window::new(last.start_ns(), last.end_ns().max(window.end_ns()))
        {
            *last = joined;
            return;
        }
        busy.push(window);
    }

    fn thread(&mut self, tid: &[u8]) -> u32 {
        if let Some((last, thread)) = &self.last_thread
            && **last == *tid
        {
            return *thread;
        }
        let next = u32::try_from(self.threads.len()).unwrap_or(u32::MAX);
        let thread = *self.threads.entry(text(tid).as_ref().into()).or_insert(next);
        self.last_thread = Some((tid.into(), thread));
        thread
    }

    /// The trace, when it holds GPU events. `cut` says how the text ended early.
    pub(super) fn finish(
        mut self,
        header: Header,
        cut: Option<String>,
        bytes: u64,
    ) -> Result<Trace, TraceError> {
        if self.gpu.is_empty() {
            let gaps = self.gaps(&header.host, cut);
            let lost: String = gaps
                .iter()
                .map(|gap| format!("; {} {}", gap.count, gap.what))
                .collect();
            return Err(TraceError::NoGpuEvents {
                events: self.events,
                lost,
            });
        }
        self.leave_out_the_far();
        if self.gpu.iter().all(|raw| raw.record.window.is_empty()) {
            return Err(TraceError::NoGpuTime {
                events: self.gpu.len() as u64,
            });
        }
        let start = self
            .gpu
            .iter()
            .map(|raw| raw.record.window.start_ns())
            .min()
            .unwrap_or(0);
        let realtime_offset_ns = if start >= REALTIME_FROM_NS {
            Some(0)
        } else {
            header.base_ns.and_then(|base| i64::try_from(base).ok())
        };
        let devices = self.devices(&header);
        let main_thread = self.main_thread(&devices);
        let gaps = self.gaps(&header.host, cut);
        Ok(Trace {
            rank: header.rank,
            world: header.world,
            host: header.host,
            records: RankTrace {
                devices,
                host: self.ranges(),
                repeated: self.operators.repeated(),
                math: self.operators.math(),
                marks: self.marks.iter().map(|(window, _)| *window).collect(),
                main_thread,
                realtime_offset_ns,
                gaps,
            },
            events: self.events,
            bytes,
        })
    }

    /// Damaged times make years of idle time, whose sums over ranks no integer holds.
    fn leave_out_the_far(&mut self) {
        let mut starts: Vec<u64> = self.gpu.iter().map(|raw| raw.record.window.start_ns()).collect();
        let middle = starts.len() / 2;
        let (_, middle_ns, _) = starts.select_nth_unstable(middle);
        let middle_ns = *middle_ns;
        let is_near = |window: Window| {
            window.start_ns().abs_diff(middle_ns) < LONGEST_NS
                && window.end_ns().abs_diff(middle_ns) < LONGEST_NS
        };
        let count = |collector: &Self| collector.gpu.len() + collector.named.len() + collector.marks.len();
        let before = count(self);
        self.gpu.retain(|raw| is_near(raw.record.window));
        self.named.retain(|range| is_near(range.window));
        self.marks.retain(|(window, _)| is_near(*window));
        self.losses.far += (before - count(self)) as u64;
        for busy in self.busy.values_mut() {
            busy.retain(|window| is_near(*window));
        }
        self.launches
            .retain(|_, launched| launched.launch.at_ns.abs_diff(middle_ns) < LONGEST_NS);
    }

    fn devices(&mut self, header: &Header) -> Vec<Device> {
        let mut devices: BTreeMap<u32, Vec<Record>> = BTreeMap::new();
        let mut raws = std::mem::take(&mut self.gpu);
        let key = |raw: &Raw| {
            let record = &raw.record;
            (
                raw.device,
                record.window,
                record.stream,
                raw.correlation,
                record.token,
                record.work,
            )
        };
        raws.sort_unstable_by_key(key);
        let found = raws.len();
        raws.dedup_by(|a, b| key(a) == key(b));
        self.losses.duplicates += (found - raws.len()) as u64;
        for raw in raws {
            let launched = self.launches.get(&raw.correlation).copied();
            self.losses.without_launch += u64::from(launched.is_none());
            let mut record = raw.record;
            record.launch = launched.map(|launched| launched.launch);
            if let Some(shape) = launched.and_then(|launched| launched.shape)
                && !record.shaped
            {
                record.token = hash(&(record.token, shape));
                record.shaped = true;
            }
            devices.entry(raw.device).or_default().push(record);
        }
        let subject = |gpu: u32| GpuSubject {
            job: String::new(),
            node: header.host.clone(),
            gpu,
            pci: String::new(),
            device: header.device(gpu),
            rank: header.rank.unwrap_or(0),
            world: header.world,
            pid: 0,
        };
        let devices = devices.into_iter().map(|(gpu, records)| Device {
            subject: subject(gpu),
            records,
        });
        devices.collect()
    }

    /// The thread of the steps; without steps the one that launches most.
    fn main_thread(&self, devices: &[Device]) -> Option<u32> {
        if let Some((_, thread)) = self.marks.first() {
            return Some(*thread);
        }
        let mut counts: BTreeMap<u32, u64> = BTreeMap::new();
        for record in devices.iter().flat_map(|device| &device.records) {
            if let Some(launch) = record.launch {
                *counts.entry(launch.thread).or_default() += 1;
            }
        }
        counts
            .into_iter()
            .max_by_key(|(_, count)| *count)
            .map(|(thread, _)| thread)
    }

    fn ranges(&mut self) -> Vec<HostRange> {
        let mut ranges = std::mem::take(&mut self.named);
        for (thread, busy) in std::mem::take(&mut self.busy) {
            ranges.extend(busy.into_iter().map(|window| HostRange {
                window,
                thread,
                doing: Doing::Issue,
            }));
        }
        ranges
    }

    fn gaps(&self, node: &str, cut: Option<String>) -> Vec<RecordGap> {
        let losses = &self.losses;
        let counted = [
            (
                losses.malformed,
                "events are not valid JSON objects and were left out",
            ),
            (
                losses.not_a_number,
                "events have a time that is no number and were left out",
            ),
            (losses.negative, "events have a negative time and were left out"),
            (
                losses.overflow,
                "events have a time beyond 64 bits of nanoseconds and were left out",
            ),
            (
                losses.far,
                "events have times days away from the others and were left out",
            ),
            (losses.duplicates, "GPU events appear twice and were counted once"),
            (
                losses.without_launch,
                "GPU events have no launching call in the trace: idle time before them has no explanation",
            ),
        ];
        let counted = counted.into_iter().filter(|(count, _)| *count > 0);
        let mut gaps: Vec<RecordGap> = counted
            .map(|(count, what)| gap(node, what.to_owned(), count))
            .collect();
        gaps.extend(cut.map(|what| gap(node, what, 0)));
        gaps.extend(self.unnamed(node));
        gaps
    }

    fn unnamed(&self, node: &str) -> Option<RecordGap> {
        let count: u64 = self.unknown.values().map(|(count, _)| count).sum();
        let ns: u64 = self.unknown.values().map(|(_, ns)| ns).sum();
        let mut names: Vec<_> = self.unknown.iter().map(|(name, (_, ns))| (*ns, name)).collect();
        names.sort_unstable_by(|a, b| b.cmp(a));
        let most: Vec<String> = names
            .iter()
            .take(3)
            .map(|(_, name)| name.chars().take(60).collect())
            .collect();
        (count > 0).then(|| {
            let what = format!(
                "kernels have names of no known class ({} us in all, most in {}): they count as compute.kernel",
                ns / 1000,
                most.join(", ")
            );
            gap(node, what, count)
        })
    }
}

impl Losses {
    fn time(&mut self, why: BadTime) {
        match why {
            BadTime::NotANumber => self.not_a_number += 1,
            BadTime::Negative => self.negative += 1,
            BadTime::Overflow => self.overflow += 1,
        }
    }
}

fn gap(node: &str, what: String, count: u64) -> RecordGap {
    RecordGap {
        node: node.to_owned(),
        window: None,
        what,
        count,
    }
}

fn copy(name: &str) -> Work {
    if name.contains("HtoD") || name.contains("HostToDevice") {
        Work::ToDevice
    } else if name.contains("DtoH") || name.contains("DeviceToHost") {
        Work::ToHost
    } else {
        Work::OnDevice
    }
}

/// Sizes are part of what must agree only where the operation has the same size on all ranks.
fn collective(name: &str, args: &Args<'_>) -> Collective {
    let operation = text(args.collective);
    let even = ["allreduce", "_allgather_base", "_reduce_scatter_base"].contains(&operation.as_ref());
    let size = even.then_some((args.elements, args.dtype));
    let function = name.split('(').next().unwrap_or_default();
    let ranks = number(args.group_size);
    let peer = peer(&operation, args);
    Collective {
        group: if args.group_name.is_empty() {
            0
        } else {
            hash(&(args.group_name, args.group_ranks)).max(1)
        },
        ranks: ranks.and_then(|ranks| u32::try_from(ranks).ok()).unwrap_or(0),
        // A send and its receive have names of their own; both have the size.
        message: match peer {
            Some(_) => hash(&(args.elements, args.dtype)),
            None => hash(&(function, operation.as_ref(), size)),
        },
        peer,
        bus_bytes: ranks.and_then(|ranks| bus_bytes(&operation, args, ranks)),
    }
}

/// The other rank of a transfer between two, where the trace names it.
fn peer(operation: &str, args: &Args<'_>) -> Option<Peer> {
    let rank = |raw| u32::try_from(number(raw)?).ok();
    match operation {
        "send" => rank(args.receiver).map(Peer::To),
        "recv" => rank(args.sender).map(Peer::From),
        _ => None,
    }
}

/// Bytes on the slowest link of each rank, as nccl-tests counts bus bandwidth.
fn bus_bytes(operation: &str, args: &Args<'_>, ranks: u64) -> Option<u64> {
    let element = match text(args.dtype).as_ref() {
        "Byte" | "Char" | "Bool" | "Float8_e4m3fn" | "Float8_e5m2" => 1,
        "Half" | "BFloat16" => 2,
        "Float" | "Int" => 4,
        "Double" | "Long" => 8,
        _ => return None,
    };
    let input = number(args.elements)?.checked_mul(element)?;
    let others = ranks.checked_sub(1)?;
    match operation {
        "allreduce" => input.checked_mul(2)?.checked_mul(others)?.checked_div(ranks),
        "send" | "recv" => Some(input),
        "_allgather_base" => input.checked_mul(others),
        "_reduce_scatter_base" => input.checked_mul(others)?.checked_div(ranks),
        _ => None,
    }
}

/// Equal for equal values in every process: the hasher's keys are fixed.
fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}
