//! Whole reports of real traces, as people and programs get them.
//!
//! After a change that is meant, `INSTA_UPDATE=always cargo test -p stallscope --test explain snapshots` writes them anew; read
//! the difference before it is committed. `sweeps_are_those_of_another_program` holds the numbers in them.

use std::path::PathBuf;

use serde_json::Value;
use stallscope::answers::{Format, render};
use stallscope_report::document::Document;

use super::{explain_as, oracle_says, path, straggler};

/// A snapshot's name, its job's, and the traces of the job.
const REPORTS: [(&str, &[&str]); 5] = [
    ("loader-alone", &["kineto-resnet50/workers-0.pt.trace.json.gz"]),
    ("loader-beside", &["kineto-resnet50/workers-4.pt.trace.json.gz"]),
    (
        "recommender",
        &[
            "dlrm-8-ranks/worker0.json.gz",
            "dlrm-8-ranks/worker1.json.gz",
            "dlrm-8-ranks/worker2.json.gz",
            "dlrm-8-ranks/worker3.json.gz",
            "dlrm-8-ranks/worker4.json.gz",
            "dlrm-8-ranks/worker5.json.gz",
            "dlrm-8-ranks/worker6.json.gz",
            "dlrm-8-ranks/worker7.json.gz",
        ],
    ),
    ("one-rank-of-eight", &["hta/control.json.gz"]),
    ("amd", &["mi300/resnet_act_checkpoint.json.gz"]),
];

fn check(name: &str, document: &Document) {
    let formats = [
        ("text", Format::Text),
        ("json", Format::Json),
        ("html", Format::Html),
    ];
    for (kind, format) in formats {
        let report = render(document, format, false).expect("a report");
        insta::assert_snapshot!(format!("{name}.{kind}"), report);
    }
}

#[test]
fn reports_of_traces() {
    for (name, files) in REPORTS {
        check(name, &Document::from(&explain_as(name, files)));
    }
}

#[test]
fn reports_of_recordings() {
    let Some(document) = straggler::document("reports_of_recordings") else {
        return;
    };
    check("slow-worker", &document);
}

/// The four classes in the committed JSON, against a sweep in another language over the same files.
#[test]
fn sweeps_are_those_of_another_program() {
    let files = REPORTS
        .iter()
        .flat_map(|(_, files)| files.iter().map(|file| path(file)));
    let Some(theirs) = oracle_says("sweeps_are_those_of_another_program", "sweep.py", files) else {
        return;
    };
    let theirs: Value = serde_json::from_str(&theirs).expect("JSON");
    for (name, files) in REPORTS {
        let committed = committed(name);
        let gpus = committed["jobs"][0]["gpus"].as_array().expect("GPUs");
        assert_eq!(gpus.len(), files.len(), "{name}");
        for (gpu, file) in gpus.iter().zip(files) {
            let theirs = &theirs[path(file).to_str().expect("a path")];
            assert_eq!(gpu["total_ns"], theirs["total_ns"], "{file}");
            assert_eq!(gpu["sweep"], theirs["sweep"], "{file}");
        }
    }
}

/// The JSON of a snapshot, below its header.
fn committed(name: &str) -> Value {
    let file = format!("tests/explain/snapshots/explain__snapshots__{name}.json.snap");
    let file = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(file);
    let text = std::fs::read_to_string(&file).expect("a snapshot");
    let (_, json) = text
        .strip_prefix("---\n")
        .and_then(|rest| rest.split_once("\n---\n"))
        .expect("a header");
    serde_json::from_str(json).expect("JSON")
}
