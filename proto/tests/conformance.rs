//! Bytes that every implementation of the protocol must read and write.
//!
//! `tests/vectors/NAME.hex` holds one frame each. `UPDATE_VECTORS=1` writes them anew; a change there is a change of
//! the protocol.
#![expect(clippy::unwrap_used, reason = "tests")]

mod common;

use std::path::PathBuf;

use bytes::BytesMut;
use stallscope_proto::convert::Record;
use stallscope_proto::frame::{self, Decoder};

fn vector_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/vectors")
        .join(name)
        .with_extension("hex")
}

fn to_hex(bytes: &[u8]) -> String {
    let lines: Vec<String> = bytes
        .chunks(32)
        .map(|line| line.iter().map(|byte| format!("{byte:02x}")).collect())
        .collect();
    lines.join("\n") + "\n"
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
    digits
        .chunks(2)
        .map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap())
        .collect()
}

#[test]
fn every_kind_of_record_reads_and_writes_the_stored_bytes() {
    for (name, record) in common::every_kind() {
        let mut framed = BytesMut::new();
        frame::encode(&record.encode(), &mut framed).unwrap();
        let path = vector_path(name);
        if std::env::var_os("UPDATE_VECTORS").is_some() {
            std::fs::write(&path, to_hex(&framed)).unwrap();
        }
        let stored = from_hex(&std::fs::read_to_string(&path).unwrap());
        assert_eq!(framed, stored, "{name} is written differently");

        let mut decoder = Decoder::default();
        decoder.push(&stored);
        let body = decoder.next_body().unwrap().expect("one frame");
        assert_eq!(
            Record::decode(body).unwrap(),
            record,
            "{name} is read differently"
        );
        assert_eq!(decoder.next_body(), Ok(None));
        assert_eq!(decoder.consumed_bytes(), stored.len() as u64);
    }
}

#[test]
fn a_step_with_every_leaf_takes_less_than_400_bytes_and_a_bare_one_less_than_130() {
    let kinds = common::every_kind();
    let bytes = |name: &str| {
        let (_, record) = kinds.iter().find(|(kind, _)| *kind == name).unwrap();
        record.encode().len() + frame::HEADER_BYTES
    };
    assert!(
        bytes("step_full") < 400,
        "step_full takes {} bytes",
        bytes("step_full")
    );
    assert!(
        bytes("step_bare") < 130,
        "step_bare takes {} bytes",
        bytes("step_bare")
    );
}
