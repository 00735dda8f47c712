#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use bytes::Bytes;
use stallscope_attribution::facts::{GpuSubject, RecordGap};
use stallscope_attribution::time::Window;
use tempfile::TempDir;

use super::segment::Segment;
use super::*;
use crate::timeline::Event;
use crate::timeline::synthetic::{MS, Script};

fn open(dir: &TempDir, max_bytes: u64) -> Ring {
    Ring::open(dir.path(), max_bytes, 77).unwrap().ring
}

fn put(ring: &Ring, text: &str) -> u64 {
    ring.turn_page();
    ring.append(|sequence| Bytes::from(format!("{sequence}:{text}")))
        .unwrap()
}

fn all(ring: &Ring) -> Vec<(u64, String)> {
    let messages = ring.next_after(0, usize::MAX, usize::MAX).unwrap();
    messages
        .into_iter()
        .map(|(number, body)| (number, String::from_utf8(body.to_vec()).unwrap()))
        .collect()
}

#[test]
fn messages_come_back_in_order_also_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let ring = open(&dir, 1 << 20);
    assert_eq!([put(&ring, "a"), put(&ring, "b")], [1, 2]);
    ring.acked(1);
    drop(ring);
    let opened = Ring::open(dir.path(), 1 << 20, 99).unwrap();
    assert!(!opened.is_new);
    let ring = opened.ring;
    assert_eq!(
        (ring.epoch(), ring.last_acked(), *ring.watch_last().borrow()),
        (77, 1, 2)
    );
    assert_eq!(put(&ring, "c"), 3);
    let expected = [
        (1, "1:a".to_owned()),
        (2, "2:b".to_owned()),
        (3, "3:c".to_owned()),
    ];
    assert_eq!(all(&ring), expected);
    assert_eq!(ring.next_after(2, 10, 1).unwrap().len(), 1);
    assert_eq!(ring.next_after(0, 2, usize::MAX).unwrap().len(), 2);
    assert_eq!(ring.next_after(3, 10, 10).unwrap(), []);
}

#[test]
fn reading_on_gives_each_message_once() {
    let dir = TempDir::new().unwrap();
    let ring = open(&dir, 32 << 20);
    let long = "x".repeat(1_000);
    for _ in 0..5_000 {
        put(&ring, &long);
    }
    let mut cursor = 0;
    loop {
        let part = ring.next_after(cursor, 100, 20_000).unwrap();
        let Some((last, _)) = part.last() else { break };
        assert!(part.iter().map(|(number, _)| *number).eq(cursor + 1..=*last));
        cursor = *last;
    }
    assert_eq!(cursor, 5_000);
    assert_eq!(
        ring.next_after(17, 1, 1).unwrap()[0].0,
        18,
        "and reading back works too"
    );
}

#[test]
fn only_one_agent_uses_a_directory() {
    let dir = TempDir::new().unwrap();
    let first = open(&dir, 1 << 20);
    let second = Ring::open(dir.path(), 1 << 20, 1);
    assert!(matches!(second, Err(OpenError::InUse { .. })));
    drop(first);
    assert!(Ring::open(dir.path(), 1 << 20, 1).is_ok());
}

#[test]
fn the_ring_is_bounded_and_drops_are_counted() {
    let dir = TempDir::new().unwrap();
    let max_bytes = 1 << 20;
    let ring = open(&dir, max_bytes);
    let long = "x".repeat(1_000);
    for _ in 0..3_000 {
        put(&ring, &long);
    }
    assert!(ring.bytes() <= max_bytes, "{} bytes", ring.bytes());
    let on_disk: u64 = Segment::list(&dir.path().join("segments"))
        .unwrap()
        .iter()
        .map(|segment| segment.bytes)
        .sum();
    assert_eq!(on_disk, ring.bytes());
    let kept = all(&ring);
    assert_eq!(kept.last().unwrap().0, 3_000);
    assert_eq!(kept[0].0, ring.first_sequence());
    assert_eq!(
        ring.dropped_unacked(),
        kept[0].0 - 1,
        "everything before was dropped unacknowledged"
    );
    ring.acked(3_000);
    let before = ring.dropped_unacked();
    for _ in 0..1_000 {
        put(&ring, &long);
        ring.acked(u64::MAX);
    }
    assert_eq!(ring.dropped_unacked(), before, "what the collector has may go");
    drop(ring);
    assert_eq!(open(&dir, max_bytes).dropped_unacked(), before);
}

/// A crash can leave any prefix of the last write.
#[test]
fn a_tail_torn_at_any_byte_is_cut_off() {
    let dir = TempDir::new().unwrap();
    let ring = open(&dir, 1 << 20);
    let messages = ["first", "second", "the third one"];
    let mut ends = vec![0];
    for text in messages {
        put(&ring, text);
        ends.push(ring.bytes());
    }
    drop(ring);
    let path = dir.path().join("segments").join(Segment::name(1));
    let whole = std::fs::read(&path).unwrap();
    for length in 0..=whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        let opened = Ring::open(dir.path(), 1 << 20, 1).unwrap();
        let kept = ends.iter().filter(|end| **end <= length as u64).count() - 1;
        assert_eq!(opened.torn_bytes, length as u64 - ends[kept], "cut at {length}");
        assert_eq!(all(&opened.ring).len(), kept);
        assert_eq!(
            put(&opened.ring, "next"),
            kept as u64 + 1,
            "numbers go on without a hole"
        );
        assert_eq!(all(&opened.ring).len(), kept + 1);
        drop(opened);
        for segment in Segment::list(&dir.path().join("segments")).unwrap() {
            std::fs::remove_file(segment.path(&dir.path().join("segments"))).unwrap();
        }
    }
}

#[test]
fn damage_in_the_middle_costs_the_rest_of_its_segment_only() {
    let dir = TempDir::new().unwrap();
    let ring = open(&dir, 1 << 20);
    let long = "x".repeat(1_000);
    for _ in 0..200 {
        put(&ring, &long);
    }
    let segments = Segment::list(&dir.path().join("segments")).unwrap();
    assert!(segments.len() > 2);
    let path = segments[0].path(&dir.path().join("segments"));
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[2_500] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let kept: Vec<u64> = all(&ring).iter().map(|(number, _)| *number).collect();
    let expected: Vec<u64> = (1..=2).chain(segments[1].first..=200).collect();
    assert_eq!(kept, expected);
    // Messages 3 to the end of the segment, however often they are asked for.
    assert_eq!(all(&ring).len(), kept.len());
    assert_eq!(ring.dropped_unacked(), segments[1].first - 3);
}

#[test]
fn what_is_not_a_store_is_left_alone() {
    let dir = TempDir::new().unwrap();
    std::fs::create_dir_all(dir.path().join("segments")).unwrap();
    std::fs::write(dir.path().join("segments/notes.txt"), "mine").unwrap();
    std::fs::write(dir.path().join("identity"), "no number").unwrap();
    let ring = open(&dir, 1 << 20);
    assert_eq!(ring.epoch(), 77);
    assert_eq!(put(&ring, "a"), 1);
    assert_eq!(
        std::fs::read_to_string(dir.path().join("segments/notes.txt")).unwrap(),
        "mine"
    );
    let missing = Ring::open(std::path::Path::new("/proc/no/such"), 1 << 20, 1);
    assert!(missing.unwrap_err().to_string().contains("store.dir"));
}

fn events() -> Vec<Event> {
    let mut script = Script::new(1_000 * MS);
    script.now_ns += 1_000 * MS;
    for _ in 0..40 {
        script.step(10 * MS, 5, 100 * MS);
    }
    let mut timeline = crate::timeline::Timeline::new("node-a");
    script
        .log
        .into_iter()
        .for_each(|observation| timeline.push(observation));
    let mut events = Vec::new();
    timeline.finish(&mut events);
    events
}

#[test]
fn history_reads_back_as_it_was_written() {
    let dir = TempDir::new().unwrap();
    let ring = Arc::new(open(&dir, 1 << 20));
    let events = events();
    let mut writer = Writer::new(Arc::clone(&ring), "node-a", 4);
    for event in &events {
        assert!(matches!(writer.write(event), Written::Yes));
    }
    let stored = read_back(dir.path(), Scope::default()).unwrap();
    assert_eq!((stored.refused, stored.damaged_segments), (0, 0));
    let left_off = stored.left_off();
    let jobs = stored.into_job_facts();
    assert_eq!(jobs.len(), 1);
    assert_eq!(
        (jobs[0].job.as_str(), jobs[0].kind.as_str()),
        ("made-up", "pretrain")
    );
    let steps: Vec<_> = events
        .iter()
        .filter_map(|event| {
            if let Event::Step { step, .. } = event {
                Some((**step).clone())
            } else {
                None
            }
        })
        .collect();
    assert_eq!(jobs[0].gpus.len(), 1);
    assert_eq!(jobs[0].gpus[0].steps, steps);
    let end_ns = jobs[0].gpus[0].steps.last().unwrap().window.end_ns();
    assert_eq!(
        left_off,
        [(jobs[0].gpus[0].subject.clone(), i128::from(end_ns) + 1_000)]
    );
    let late = Scope {
        since_realtime_ns: i64::try_from(end_ns).unwrap(),
        ..Scope::default()
    };
    assert_eq!(
        read_back(dir.path(), late).unwrap().into_job_facts()[0].gpus[0]
            .steps
            .len(),
        1
    );
}

/// Any segment can be the oldest one left: it must announce what it uses.
#[test]
fn every_segment_can_be_read_on_its_own() {
    let dir = TempDir::new().unwrap();
    let ring = Arc::new(open(&dir, 1 << 20));
    let mut writer = Writer::new(Arc::clone(&ring), "node-a", 4);
    let events = events();
    for _ in 0..200 {
        events.iter().for_each(|event| {
            writer.write(event);
        });
    }
    let segments = Segment::list(&dir.path().join("segments")).unwrap();
    assert!(
        segments.len() > 4 && ring.first_sequence() > 1,
        "{} segments",
        segments.len()
    );
    assert_eq!(read_back(dir.path(), Scope::default()).unwrap().refused, 0);
    let newest = Scope {
        newest_bytes: 1,
        ..Scope::default()
    };
    let newest = read_back(dir.path(), newest).unwrap();
    assert_eq!((newest.refused, newest.histories().count()), (0, 1));
}

/// A device that is full after some bytes: what is there stays, what comes waits in memory, what does not fit there
/// either is counted, and all but that is on disk once there is room.
#[test]
fn a_full_disk_loses_only_what_memory_cannot_hold() {
    let dir = TempDir::new().unwrap();
    let mount = dir.path().join("small");
    std::fs::create_dir(&mount).unwrap();
    let mounted = std::process::Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=256k", "none"])
        .arg(&mount)
        .status();
    if !mounted.is_ok_and(|status| status.success()) {
        eprintln!("skipped: mounting a tmpfs needs root");
        return;
    }
    let outcome = std::panic::catch_unwind(|| fill(&mount));
    let _ = std::process::Command::new("umount")
        .arg("-l")
        .arg(&mount)
        .status();
    outcome.unwrap();
}

fn fill(mount: &std::path::Path) {
    let ring = Arc::new(Ring::open(mount, 64 << 20, 1).unwrap().ring);
    let mut writer = Writer::new(Arc::clone(&ring), "node-a", 4);
    let gap = |count: u64| {
        Event::Gap(RecordGap {
            node: "node-a".to_owned(),
            window: Window::new(count, count + 1),
            what: "x".repeat(900),
            count,
        })
    };
    for count in 0..400 {
        assert!(matches!(writer.write(&gap(count)), Written::Yes), "{count}");
    }
    let (waiting, why) = ring.refused().unwrap();
    assert!(waiting > 100 && why.contains("No space left"), "{waiting}: {why}");
    // The stream reads on, from disk and from memory, without a seam.
    let numbers: Vec<u64> = ring
        .next_after(0, usize::MAX, usize::MAX)
        .unwrap()
        .iter()
        .map(|(number, _)| *number)
        .collect();
    assert_eq!(numbers, (1..=400).collect::<Vec<_>>());
    assert_eq!(ring.next_after(390, 4, usize::MAX).unwrap().len(), 4);

    let (mut written, mut lost, mut reasons) = (400_u64, 0_u64, Vec::new());
    for count in 400..6_000 {
        match writer.write(&gap(count)) {
            Written::Yes | Written::Again => written += 1,
            Written::Lost(why) => {
                lost += 1;
                reasons.extend(why.map(|error| error.to_string()));
            }
        }
    }
    assert!(written > 3_000 && lost > 500, "{written} written, {lost} lost");
    assert_eq!(reasons.len(), 1, "named once: {reasons:?}");
    assert!(reasons[0].contains("store"), "{}", reasons[0]);
    assert_eq!(writer.lost(), lost);

    let grown = std::process::Command::new("mount")
        .args(["-o", "remount,size=64m"])
        .arg(mount)
        .status();
    assert!(grown.unwrap().success());
    assert!(matches!(writer.write(&gap(9_000)), Written::Again));
    assert_eq!(ring.refused(), None);
    let named = ring.next_after(written + 1, 9, usize::MAX).unwrap();
    assert_eq!(named.len(), 1);
    drop((writer, ring));
    let again = Ring::open(mount, 64 << 20, 1).unwrap();
    assert_eq!(again.torn_bytes, 0);
    let on_disk = again.ring.next_after(0, usize::MAX, usize::MAX).unwrap();
    assert_eq!(
        on_disk.len() as u64,
        written + 2,
        "all that had room, and what is missing"
    );
    let stored = read_back(mount, Scope::default()).unwrap();
    let last = stored.gaps().back().unwrap();
    assert_eq!(last.count, lost, "the gap names what is missing");
    // What was lost began somewhere after what fitted, and ended with the last one.
    let window = last.window.unwrap();
    assert!(window.start_ns() >= 3_000, "{window:?}");
    assert_eq!(window.end_ns(), 6_000);
    assert_eq!((stored.refused, stored.damaged_segments), (0, 0));
}

#[test]
fn a_store_without_a_directory_streams_from_memory() {
    let ring = Ring::in_memory(7);
    let mut put = 0;
    let mut append = || {
        ring.append(|_| Bytes::from(vec![0; 100 << 10]))
            .inspect(|_| put += 1)
    };
    while append().is_ok() {}
    assert!((30..50).contains(&put), "{put} of 100 KiB fit");
    assert_eq!(ring.next_after(0, 3, usize::MAX).unwrap().len(), 3);
    // What the collector has makes room.
    ring.acked(10);
    assert_eq!(ring.next_after(0, 1, usize::MAX).unwrap()[0].0, 11);
    let next = ring.append(|_| Bytes::from_static(b"more")).unwrap();
    assert_eq!((next, *ring.watch_last().borrow()), (put + 1, put + 1));
    assert_eq!(
        ring.next_after(put, 9, usize::MAX).unwrap(),
        [(put + 1, Bytes::from_static(b"more"))]
    );
}

#[test]
fn a_subject_is_announced_with_its_kind() {
    let dir = TempDir::new().unwrap();
    let ring = Arc::new(open(&dir, 1 << 20));
    let mut writer = Writer::new(Arc::clone(&ring), "node-a", 4);
    events().iter().for_each(|event| {
        writer.write(event);
    });
    let subject: Vec<GpuSubject> = read_back(dir.path(), Scope::default())
        .unwrap()
        .histories()
        .map(|(subject, ..)| subject.clone())
        .collect();
    assert_eq!(subject[0].rank, 3);
}
