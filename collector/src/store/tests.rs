//! What a crash, a full quota or a bad disk leaves behind is read as far as it is whole.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::fs::OpenOptions;
use std::io::Write;

use super::*;

fn append(store: &mut SegmentStore, text: &str) {
    let state = v1::StreamState {
        node: "n1".into(),
        agent_boot_id: 1,
        last_seq: 7,
        subjects: vec![],
    };
    store
        .append(5, Bytes::copy_from_slice(text.as_bytes()), || vec![state])
        .unwrap();
}

/// Envelopes in order of reading, the number of stream states, and what is damaged.
fn read_all(dir: &Path) -> (Vec<String>, usize, Vec<Damage>) {
    let (mut texts, mut states, mut damages) = (Vec::new(), 0, Vec::new());
    let mut reader = SegmentReader::open(dir).unwrap();
    while let Some(result) = reader.next_segment(|item| match item {
        StoredItem::Envelope {
            received_realtime_ns,
            bytes,
        } => {
            assert_eq!(received_realtime_ns, 5);
            texts.push(String::from_utf8(bytes.to_vec()).unwrap());
        }
        StoredItem::State(state) => {
            assert_eq!(state.last_seq, 7);
            states += 1;
        }
    }) {
        damages.extend(result.err());
    }
    (texts, states, damages)
}

fn newest_segment(dir: &Path) -> PathBuf {
    segment_path(dir, *list_segments(dir).unwrap().last().unwrap())
}

#[test]
fn a_torn_tail_is_cut_off_and_what_follows_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for torn_bytes in [1, 7, 8, 30] {
        let mut store = SegmentStore::open(dir.path(), 1 << 20).unwrap();
        append(&mut store, "kept");
        store.sync().unwrap();
        let whole_bytes = std::fs::metadata(newest_segment(dir.path())).unwrap().len();
        let mut torn = BytesMut::new();
        frame::encode(&[b'x'; 100], &mut torn).unwrap();
        let mut file = OpenOptions::new()
            .append(true)
            .open(newest_segment(dir.path()))
            .unwrap();
        file.write_all(&torn[..torn_bytes]).unwrap();
        drop(store);
        drop(SegmentStore::open(dir.path(), 1 << 20).unwrap());
        let cut_bytes = std::fs::metadata(newest_segment(dir.path())).unwrap().len();
        assert_eq!(
            cut_bytes, whole_bytes,
            "{torn_bytes} bytes of an unfinished frame"
        );
    }
    let (texts, states, damages) = read_all(dir.path());
    assert_eq!(texts, ["kept"; 4]);
    assert_eq!(states, 4, "each segment begins with the state of the streams");
    assert_eq!(damages, []);
}

#[test]
fn what_was_not_synced_is_not_promised_and_what_was_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = SegmentStore::open(dir.path(), 1 << 20).unwrap();
    append(&mut store, "synced");
    store.sync().unwrap();
    append(&mut store, "not synced");
    let (texts, ..) = read_all(dir.path());
    assert_eq!(texts, ["synced"]);
}

#[test]
fn a_damaged_segment_is_named_and_the_others_are_read() {
    let dir = tempfile::tempdir().unwrap();
    for text in ["first", "second", "third"] {
        let mut store = SegmentStore::open(dir.path(), 1 << 20).unwrap();
        append(&mut store, text);
        append(&mut store, "tail");
        store.sync().unwrap();
    }
    let path = segment_path(dir.path(), 2);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.windows(6).position(|part| part == b"second").unwrap();
    bytes[at] ^= 0x20;
    std::fs::write(&path, bytes).unwrap();
    let (texts, _, damages) = read_all(dir.path());
    assert_eq!(texts, ["first", "tail", "third", "tail"]);
    assert_eq!(damages.len(), 1);
    assert_eq!(damages[0].path, path);
    assert!(damages[0].why.contains("checksum"), "{damages:?}");
}

#[test]
fn the_oldest_segments_go_first_and_the_bound_holds() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = SegmentStore::open(dir.path(), MIN_BYTES).unwrap();
    let text = "x".repeat(500);
    for index in 0..1000 {
        append(&mut store, &format!("{index:04}{text}"));
        assert!(
            store.total_bytes() <= MIN_BYTES,
            "{} bytes after {index}",
            store.total_bytes()
        );
    }
    store.sync().unwrap();
    assert!(store.removed_segments() > 0);
    let (texts, ..) = read_all(dir.path());
    assert!(texts.len() > 80, "{} kept", texts.len());
    assert!(texts.last().unwrap().starts_with("0999"));
    assert!(texts.is_sorted());
}

#[test]
fn one_directory_has_one_collector_and_a_bound_has_a_least() {
    let dir = tempfile::tempdir().unwrap();
    let _store = SegmentStore::open(dir.path(), MIN_BYTES).unwrap();
    assert!(matches!(
        SegmentStore::open(dir.path(), MIN_BYTES),
        Err(StoreError::Locked { .. })
    ));
    let small = SegmentStore::open(&dir.path().join("other"), MIN_BYTES - 1);
    assert!(matches!(small, Err(StoreError::Bound { .. })));
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(matches!(
        SegmentStore::open(&file, MIN_BYTES),
        Err(StoreError::Directory { .. })
    ));
}
