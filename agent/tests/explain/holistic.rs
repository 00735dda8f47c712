//! HolisticTraceAnalysis 0.5.0 reads the same files and must come to the same times.

use serde_json::Value;
use stallscope_attribution::leaf::Class;

use super::{explain, oracle_says, path};

const FILES: [&str; 4] = [
    "kineto-resnet50/workers-0.pt.trace.json.gz",
    "kineto-resnet50/workers-4.pt.trace.json.gz",
    "hta/control.json.gz",
    "hta/df_index_resolver.json.gz",
];

/// Its idle and compute time are ours; its other time is our exposed communication and copies together.
#[test]
fn holistic_trace_analysis_finds_the_same_times() {
    let test = "holistic_trace_analysis_finds_the_same_times";
    let Some(theirs) = oracle_says(test, "holistic.py", FILES.map(path)) else {
        return;
    };
    let theirs: Value = serde_json::from_str(&theirs).expect("JSON");
    for file in FILES {
        let analysis = explain(&[file]);
        let total = &analysis.gpus[0].total;
        let us = |ns: i64| {
            assert_eq!(ns % 1000, 0, "{file} has times in whole microseconds");
            Some(ns / 1000)
        };
        let [compute, comm, memory, idle] = Class::ALL.map(|class| total.class_ns(class));
        let window = i64::try_from(total.window_ns()).expect("a window");
        let theirs = &theirs[path(file).to_str().expect("a path")];
        let found = ["idle", "compute", "non_compute", "kernel"].map(|name| theirs[name].as_i64());
        assert_eq!(
            found,
            [us(idle), us(compute), us(comm + memory), us(window)],
            "{file}"
        );
    }
}
