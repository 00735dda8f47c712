//! Damaged, truncated and invented bytes: refused by name, never a panic, never memory that was only claimed.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use stallscope_proto::convert::{
    KnownSubjects, MAX_SUBJECTS, Payload, Record, SubjectEntry, SubjectNumbers, WireError,
};
use stallscope_proto::frame::{self, Decoder, FrameError};
use stallscope_proto::v1;

fn envelope_of(name: &str) -> v1::Envelope {
    let (_, record) = common::every_kind()
        .into_iter()
        .find(|(kind, _)| *kind == name)
        .unwrap();
    (&record).into()
}

/// The envelope of a full step after a change.
fn changed_step(change: impl FnOnce(&mut v1::GpuStep)) -> Result<Record, WireError> {
    let mut envelope = envelope_of("step_full");
    let Some(v1::envelope::Body::Step(step)) = &mut envelope.body else {
        panic!("a step")
    };
    change(step);
    envelope.try_into()
}

fn budget(step: &mut v1::GpuStep) -> &mut v1::Budget {
    step.budget.as_mut().unwrap()
}

#[test]
fn a_budget_that_does_not_sum_is_refused() {
    let refused = changed_step(|step| budget(step).leaves_ns[0] += 1);
    assert!(matches!(refused, Err(WireError::Budget(_))), "{refused:?}");
}

#[test]
fn an_idle_leaf_below_zero_is_refused() {
    let refused = changed_step(|step| {
        let leaves = &mut budget(step).leaves_ns;
        leaves[0] += leaves[23] + 1;
        leaves[23] = -1;
    });
    assert!(matches!(refused, Err(WireError::Budget(_))), "{refused:?}");
}

#[test]
fn unknown_tables_counts_methods_and_readings_are_named() {
    let refused = changed_step(|step| budget(step).leaf_table = 2);
    assert!(
        matches!(
            refused,
            Err(WireError::LeafTable {
                version: 2,
                newest: 1
            })
        ),
        "{refused:?}"
    );
    let refused = changed_step(|step| budget(step).leaves_ns.push(0));
    assert!(
        matches!(
            refused,
            Err(WireError::LeafCount {
                found: 25,
                expected: 24,
                ..
            })
        ),
        "{refused:?}"
    );
    let refused = changed_step(|step| step.method = 0);
    assert!(
        matches!(
            refused,
            Err(WireError::Unknown {
                field: "step.method",
                ..
            })
        ),
        "{refused:?}"
    );
    let refused =
        changed_step(|step| step.signals.as_mut().unwrap().clock = Some(v1::ClockReading { state: None }));
    assert!(
        matches!(
            refused,
            Err(WireError::Unknown {
                field: "signals.clock",
                ..
            })
        ),
        "{refused:?}"
    );
    let refused = changed_step(|step| step.start_ns = u64::MAX);
    assert!(matches!(refused, Err(WireError::Time { .. })), "{refused:?}");
    let refused = changed_step(|step| {
        budget(step).interval_lows_ns.pop();
    });
    assert!(matches!(refused, Err(WireError::Intervals { .. })), "{refused:?}");
    let refused = changed_step(|step| budget(step).interval_lows_ns[0] = i64::MAX);
    assert!(matches!(refused, Err(WireError::Intervals { .. })), "{refused:?}");
}

#[test]
fn names_with_control_characters_are_refused() {
    let mut envelope = envelope_of("gap");
    envelope.node = "n1\u{1b}[2J".into();
    let refused = Record::try_from(envelope);
    assert!(
        matches!(refused, Err(WireError::Name { field: "node", .. })),
        "{refused:?}"
    );
}

#[test]
fn a_subject_number_never_changes_hands() {
    let entry = SubjectEntry {
        subject: common::subject(),
        job_kind: String::new(),
    };
    let mut other = entry.clone();
    other.subject.rank += 1;

    let mut numbers = SubjectNumbers::default();
    assert_eq!(numbers.number(&entry.subject), Some((1, true)));
    assert_eq!(numbers.number(&other.subject), Some((2, true)));
    assert_eq!(numbers.number(&entry.subject), Some((1, false)));
    numbers.forget_announcements();
    assert_eq!(numbers.number(&entry.subject), Some((1, true)));

    let mut known = KnownSubjects::default();
    known.announce(1, entry.clone()).unwrap();
    known.announce(1, entry.clone()).unwrap();
    assert!(matches!(
        known.announce(1, other),
        Err(WireError::Subject { id: 1, .. })
    ));
    assert!(matches!(
        known.announce(0, entry.clone()),
        Err(WireError::Subject { id: 0, .. })
    ));
    assert_eq!(known.get(1), Some(&entry));
}

#[test]
fn an_agent_never_runs_out_of_numbers_and_its_reader_keeps_those_in_use() {
    let subject = |pid: u32| {
        let mut subject = common::subject();
        subject.pid = pid;
        subject
    };
    let mut numbers = SubjectNumbers::default();
    let mut known = KnownSubjects::default();
    let mut announce = |pid: u32, numbers: &mut SubjectNumbers| {
        let (id, is_new) = numbers.number(&subject(pid)).expect("a number");
        if is_new {
            let entry = SubjectEntry {
                subject: subject(pid),
                job_kind: String::new(),
            };
            known.announce(id, entry).unwrap();
        }
        assert_eq!(known.get(id).map(|entry| entry.subject.pid), Some(pid));
        id
    };
    // One process runs all the time, and in every segment a thousand others begin and end.
    let first = announce(1, &mut numbers);
    for segment in 0..6 {
        for other in 0..1_000 {
            announce(2 + segment * 1_000 + other, &mut numbers);
        }
        assert_eq!(announce(1, &mut numbers), first, "it is in use");
        numbers.forget_announcements();
    }
    assert_eq!(known.iter().count(), MAX_SUBJECTS);
}

#[test]
fn a_hostile_length_is_refused_before_any_of_it_is_held() {
    let mut decoder = Decoder::new(1 << 20);
    decoder.push(&u32::MAX.to_le_bytes());
    decoder.push(&[0; 4]);
    let refused = FrameError::TooLong {
        body_bytes: u64::from(u32::MAX),
        max_bytes: 1 << 20,
    };
    assert_eq!(decoder.next_body(), Err(refused.clone()));
    decoder.push(&[0; 1000]);
    assert_eq!(decoder.next_body(), Err(refused), "the error stays");
    assert_eq!(decoder.pending_bytes(), 0);
}

#[test]
fn zeros_are_not_frames() {
    let mut decoder = Decoder::default();
    decoder.push(&[0; 64]);
    assert_eq!(decoder.next_body(), Err(FrameError::Empty));
    assert_eq!(frame::encode(&[], &mut BytesMut::new()), Err(FrameError::Empty));
}

proptest! {
    #[test]
    fn frames_survive_any_split(
        bodies in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 0..8),
        pieces in prop::collection::vec(1_usize..64, 1..64),
    ) {
        let mut bytes = BytesMut::new();
        for body in &bodies {
            frame::encode(body, &mut bytes).unwrap();
        }
        let mut decoder = Decoder::new(200);
        let mut found: Vec<Bytes> = Vec::new();
        let mut rest = &bytes[..];
        for piece in pieces.iter().copied().cycle() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(piece.min(rest.len()));
            rest = later;
            decoder.push(now);
            while let Some(body) = decoder.next_body().unwrap() {
                found.push(body);
            }
        }
        prop_assert_eq!(found, bodies);
        prop_assert_eq!(decoder.pending_bytes(), 0);
        prop_assert_eq!(decoder.consumed_bytes(), bytes.len() as u64);
    }

    #[test]
    fn any_damaged_byte_is_noticed(at in any::<prop::sample::Index>(), flip in 1_u8..) {
        let record = common::record(9, Payload::Port(common::port()));
        let mut bytes = BytesMut::new();
        frame::encode(&record.encode(), &mut bytes).unwrap();
        let index = at.index(bytes.len());
        bytes[index] ^= flip;
        let mut decoder = Decoder::default();
        decoder.push(&bytes);
        // A longer claimed length waits for more; anything else is an error. The damaged body never comes out.
        prop_assert!(!matches!(decoder.next_body(), Ok(Some(_))));
    }

    #[test]
    fn any_bytes_are_read_without_panic(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let mut decoder = Decoder::new(256);
        decoder.push(&bytes);
        while let Ok(Some(body)) = decoder.next_body() {
            let _ = Record::decode(body);
        }
        let _ = Record::decode(bytes.into());
    }

    #[test]
    fn any_change_of_an_envelope_reads_without_panic(
        kind in 0_usize..6,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut bytes = common::every_kind()[kind].1.encode().to_vec();
        for (at, value) in edits {
            let index = at.index(bytes.len());
            bytes[index] = value;
        }
        if let Ok(record) = Record::decode(bytes.into()) {
            // What is accepted is a fact: it survives the wire unchanged.
            prop_assert_eq!(Record::decode(record.encode()).unwrap(), record);
        }
    }
}
