#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::File;
use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;
use stallscope_records::profiler::{
    BYTES, EVENT_BYTES, Event, MAGIC, OPEN_AT, RING_AT, SLOTS, VERSION, WORDS, asked, flag, header, kind,
    state,
};

use super::*;

const SEND: [u64; 3] = [110, 130, 160];

fn step(token: u64, sends: u8, entered_ns: [u64; 3], stop_ns: u64) -> Event {
    Event {
        kind: kind::PROXY_STEP,
        flags: flag::ASKED,
        tid: 7,
        sends,
        token,
        start_ns: 100,
        entered_ns,
        stop_ns,
        ..Event::default()
    }
}

fn window(from: u64, to: u64) -> Window {
    Window::new(from, to).unwrap()
}

fn wait(steps_ns: u64, any_ns: u64, entered: u64) -> crate::observation::StepWait {
    crate::observation::StepWait {
        steps_ns,
        any_ns,
        entered,
    }
}

#[test]
fn waits_that_overlap_sum_up_and_cover_once() {
    let mut sums = Sums::default();
    let ended = [step(1, 1, SEND, 200), step(2, 1, [150, 0, 180], 190)];
    let open = [step(3, 0, [120, 170, 0], 0)];
    sums.add(window(100, 300), &open, &ended);
    let waits = sums.take().remove(&7).unwrap();
    // 110..130 and 150..180; 130..160; 160..200 and 180..190.
    assert_eq!(waits.send_gpu, wait(50, 50, 2));
    assert_eq!(waits.send_credit, Some(wait(30, 30, 1)));
    assert_eq!(waits.send_wire, wait(50, 40, 2));
    // 120..170, and from 170 to the end of the window.
    assert_eq!(waits.receive_wire, wait(50, 50, 1));
    assert_eq!(waits.receive_flush, wait(130, 130, 1));
    assert_eq!((waits.sent, waits.received), (2, 0));
}

#[test]
fn a_step_is_told_once_however_the_windows_cut_it() {
    // The same step as a reader may meet it: under way, ended behind the window's end, and again as later.
    let whole = step(1, 1, SEND, 200);
    for cut in 101..260 {
        let mut sums = Sums::default();
        let open = Event { stop_ns: 0, ..whole };
        let known: [u64; 3] = SEND.map(|at_ns| if at_ns <= cut { at_ns } else { 0 });
        let open = Event {
            entered_ns: known,
            ..open
        };
        if cut < 200 {
            sums.add(window(100, cut), &[open], &[]);
            sums.add(window(cut, 300), &[], &[whole]);
        } else {
            sums.add(window(100, cut), &[], &[whole]);
            sums.add(window(cut, 300), &[], &[]);
        }
        let waits = sums.take().remove(&7).unwrap();
        assert_eq!(
            (waits.send_gpu, waits.send_credit, waits.send_wire, waits.sent),
            (wait(20, 20, 1), Some(wait(30, 30, 1)), wait(40, 40, 1), 1),
            "cut at {cut}"
        );
    }
}

#[test]
fn a_step_that_ended_while_it_was_read_counts_up_to_the_windows_end_and_goes_on() {
    let mut sums = Sums::default();
    let whole = step(1, 1, SEND, 200);
    let open = Event { stop_ns: 0, ..whole };
    sums.add(window(100, 170), &[open], &[whole]);
    let first = sums.take().remove(&7).unwrap();
    assert_eq!((first.send_wire, first.sent), (wait(10, 10, 1), 0));
    sums.add(window(170, 300), &[], &[]);
    let second = sums.take().remove(&7).unwrap();
    assert_eq!((second.send_wire, second.sent), (wait(30, 30, 0), 1));
}

#[test]
fn parts_of_a_step_do_not_hide_what_goes_on() {
    let mut sums = Sums::default();
    let part = Event {
        flags: flag::ASKED | flag::PART,
        ..step(1, 1, [110, 0, 0], 150)
    };
    let goes_on = step(1, 1, [150, 0, 0], 0);
    sums.add(window(100, 200), &[goes_on], &[part]);
    let waits = sums.take().remove(&7).unwrap();
    assert_eq!((waits.send_gpu, waits.sent), (wait(90, 90, 2), 0));
}

/// A plugin's memory, written by a test.
struct Made {
    file: File,
}

impl Made {
    fn new() -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        let made = Self { file };
        made.header(header::MAGIC, MAGIC);
        made.header(header::LAYOUT, u64::from(VERSION) | 42 << 32);
        made.header(header::INTERFACE, 4);
        made.header(header::MASK, u64::from(ASKED));
        made.header(header::SWITCHED, 1);
        made
    }

    fn header(&self, index: usize, word: u64) {
        self.file
            .write_all_at(&word.to_ne_bytes(), 8 * index as u64)
            .unwrap();
    }

    fn entry(&self, at: u64, first: u64, event: &Event) {
        let mut words = event.to_words();
        words[0] = first;
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        self.file.write_all_at(&bytes, at).unwrap();
    }

    fn ended(&self, place: u64, event: &Event) {
        self.entry(RING_AT + place % SLOTS * EVENT_BYTES, place + 1, event);
    }

    fn memory(&self) -> Memory {
        Memory::open(self.file.try_clone().unwrap(), 42).unwrap()
    }
}

#[test]
fn events_are_read_in_turn_and_losses_counted() {
    let made = Made::new();
    made.header(header::HEAD, 5);
    let mut memory = made.memory();
    assert_eq!(
        memory.turn().unwrap().ended,
        [],
        "what was there before is not read"
    );
    let event = |token| step(token, 1, SEND, 200);
    made.ended(5, &event(5));
    made.ended(7, &event(7));
    made.header(header::HEAD, 8);
    made.entry(
        OPEN_AT + EVENT_BYTES,
        9 << 32 | state::LIVE,
        &step(99, 0, [150, 0, 0], 0),
    );
    made.entry(OPEN_AT, 9 << 32 | state::BUSY, &step(98, 0, [150, 0, 0], 0));
    let first = memory.turn().unwrap();
    assert_eq!(first.ended, [event(5)]);
    assert_eq!(first.open, [step(99, 0, [150, 0, 0], 0)]);
    assert_eq!(
        (first.lost, first.refused),
        (0, 0),
        "the one between may still come"
    );
    let second = memory.turn().unwrap();
    assert_eq!((second.ended.as_slice(), second.lost), ([event(7)].as_slice(), 1));
    // More than a lap.
    made.header(header::HEAD, 8 + SLOTS + 3);
    made.ended(8 + SLOTS + 2, &event(12));
    made.header(header::CROWDED, 4);
    let third = memory.turn().unwrap();
    let fourth = memory.turn().unwrap();
    assert!(third.lost >= 3 + 4 && third.ended.is_empty(), "{third:?}");
    assert!(fourth.lost >= 1, "{fourth:?}");
}

#[test]
fn what_is_not_the_plugins_is_refused() {
    let made = Made::new();
    let open = |owner| Memory::open(made.file.try_clone().unwrap(), owner);
    assert!(matches!(open(43), Err(Refused::Other { owner: 42 })));
    made.header(header::LAYOUT, u64::from(VERSION + 1) | 42 << 32);
    assert!(matches!(open(42), Err(Refused::Version { .. })));
    made.header(header::MAGIC, 0);
    assert!(matches!(open(42), Err(Refused::Magic)));
    made.file.set_len(100).unwrap();
    assert!(matches!(open(42), Err(Refused::Read(_))));
}

#[test]
fn a_file_cut_short_while_it_is_read_ends_the_reading_only() {
    let made = Made::new();
    let mut memory = made.memory();
    memory.turn().unwrap();
    made.header(header::HEAD, 100);
    made.file.set_len(RING_AT).unwrap();
    assert!(matches!(memory.turn(), Err(Refused::Read(_))));
}

#[test]
fn a_plugin_that_is_silent_is_given_up() {
    let made = Made::new();
    let now_ns = clock::monotonic_ns();
    let key = ProcessKey {
        pid: 42,
        start_ticks: 1,
    };
    let turn = |found_ns| {
        let mut plugin = Plugin::new(made.memory(), found_ns);
        plugin.turn(&WaitsConfig::default(), key, &mut Vec::new())
    };
    assert!(turn(now_ns).is_ok(), "it may not have looked yet");
    assert!(matches!(turn(1), Err(Refused::Silent)));
    made.header(header::ALIVE, now_ns);
    assert!(turn(1).is_ok());
}

#[test]
fn any_other_file_is_left_alone() {
    use std::os::fd::{AsFd as _, AsRawFd as _};
    let of = |file: &dyn std::os::fd::AsFd| {
        let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
        find::open(path.as_ref()).unwrap().is_some()
    };
    let on_disk = tempfile::tempfile().unwrap();
    on_disk.set_len(BYTES).unwrap();
    assert!(!of(&on_disk), "a file of a file system");
    let memory = rustix::fs::memfd_create("any", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert!(!of(&memory), "memory of another size");
    rustix::fs::ftruncate(&memory, BYTES).unwrap();
    assert!(of(&memory.as_fd()));
    let (pipe, _other) = std::io::pipe().unwrap();
    assert!(!of(&pipe));
    assert!(
        find::open("/proc/self/fd/999999".as_ref()).unwrap().is_none(),
        "it was closed meanwhile"
    );
}

#[test]
fn the_agents_wish_is_whole() {
    let made = Made::new();
    made.memory().ask(77, ASKED).unwrap();
    let mut bytes = [0; 8];
    made.file
        .read_exact_at(&mut bytes, 8 * header::ASK as u64)
        .unwrap();
    assert_eq!(asked(u64::from_ne_bytes(bytes)), Some(ASKED));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_words_are_survived_and_no_wait_exceeds_its_window(
        head in prop_oneof![0..200u64, any::<u64>()],
        slots in prop::collection::vec((0..200u64, prop::array::uniform16(prop_oneof![0..400u64, any::<u64>()])), 0..20),
        open in prop::collection::vec((0..50u64, prop::array::uniform16(prop_oneof![0..400u64, any::<u64>()])), 0..20),
    ) {
        let made = Made::new();
        let mut memory = made.memory();
        memory.turn().unwrap();
        let write = |at: u64, words: &[u64; WORDS]| {
            let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            made.file.write_all_at(&bytes, at).unwrap();
        };
        for (place, words) in slots {
            let mut words = words;
            if words[15] % 2 == 0 {
                words[0] = place + 1;
                words[1] = u64::from(kind::PROXY_STEP) | words[1] << 48;
            }
            write(RING_AT + place * EVENT_BYTES, &words);
        }
        for (place, words) in open {
            write(OPEN_AT + place * EVENT_BYTES, &words);
        }
        made.header(header::HEAD, head);
        let turn = memory.turn().unwrap();
        let again = memory.turn().unwrap();
        prop_assert!(turn.lost <= 1 << 24 && again.lost <= 1 << 24);
        let mut sums = Sums::default();
        let all = window(0, turn.to_ns);
        sums.add(all, &turn.open, &turn.ended);
        for waits in sums.take().values() {
            prop_assert!(waits.send_gpu.any_ns <= all.len_ns() && waits.receive_gpu.any_ns <= all.len_ns());
        }
    }
}
