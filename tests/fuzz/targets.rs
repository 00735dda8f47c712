//! What must hold for any input. Each function panics when it does not.

use std::path::Path;

use stallscope::answers::recordings;
use stallscope::record::Replay;
use stallscope::sources::kineto;
use stallscope_attribution::activity;
use stallscope_proto::frame;
use stallscope_report::document::Document;

/// The shortest text of an event that becomes a record.
const LEAST_EVENT_BYTES: usize = 40;

/// A trace is refused by name, or becomes a report that sums exactly and holds no more than the text did.
pub(super) fn trace(bytes: &[u8]) {
    let trace = match kineto::read(bytes) {
        Ok(trace) => trace,
        Err(error) => return assert!(!error.to_string().is_empty()),
    };
    let records: usize = trace
        .records
        .devices
        .iter()
        .map(|device| device.records.len())
        .sum();
    let held = records + trace.records.host.len() + trace.records.marks.len();
    assert!(
        held * LEAST_EVENT_BYTES <= bytes.len(),
        "{held} records from {} bytes",
        bytes.len()
    );
    let Ok(job) = kineto::job("job", vec![("file".to_owned(), trace)]) else {
        return;
    };
    check(&Document::from(&activity::analyse(job)));
}

/// GPU records in a trace; 0 when it is refused.
#[must_use]
pub(super) fn trace_records(bytes: &[u8]) -> usize {
    let devices = kineto::read(bytes).map(|trace| trace.records.devices);
    devices.map_or(0, |devices| {
        devices.iter().map(|device| device.records.len()).sum()
    })
}

/// A recording is refused by name, or becomes a report that sums exactly.
pub(super) fn recording(bytes: &[u8]) {
    let replayed = Replay::new(bytes, Path::new("recording"))
        .map_err(Into::into)
        .and_then(recordings::document_of);
    match replayed {
        Ok(document) => check(&document),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// The same below the checksums: the input is the bodies of frames, each after its length in two bytes.
pub(super) fn bodies(bytes: &[u8]) {
    let mut framed = bytes::BytesMut::new();
    let mut rest = bytes;
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length)).min(after.len());
        let (body, after) = after.split_at(length);
        if frame::encode(body, &mut framed).is_err() {
            break;
        }
        rest = after;
    }
    recording(&framed);
}

/// Frames come out whole or not at all, however the bytes are cut.
pub(super) fn frames(bytes: &[u8]) {
    let mut whole = frame::Decoder::default();
    whole.push(bytes);
    let mut dripped = frame::Decoder::default();
    let mut found = Vec::new();
    for byte in bytes {
        dripped.push(&[*byte]);
        while let Ok(Some(body)) = dripped.next_body() {
            found.push(body);
        }
    }
    let mut expected = Vec::new();
    while let Ok(Some(body)) = whole.next_body() {
        expected.push(body);
    }
    assert_eq!(found, expected);
}

fn check(document: &Document) {
    if let Err(error) = document.check() {
        panic!("the report does not sum: {error}");
    }
}
