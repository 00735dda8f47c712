use std::io::Read;

use stallscope::sources::kineto::{self, Trace, TraceError};
use stallscope_attribution::activity;
use stallscope_attribution::job::JobAnalysis;
use stallscope_attribution::leaf::Leaf;
use stallscope_report::document::Document;

use super::path;

fn read(text: &str) -> Result<Trace, TraceError> {
    kineto::read(text.as_bytes())
}

fn kernel(ts: &str, dur: &str, more: &str) -> String {
    format!(
        r#"{{"ph":"X","cat":"kernel","name":"volta_sgemm_nn","pid":0,"tid":7,"ts":{ts},"dur":{dur},"args":{{"device":0,"stream":7{more}}}}}"#
    )
}

fn whole(events: &[String]) -> String {
    format!(r#"{{"schemaVersion":1,"traceEvents":[{}]}}"#, events.join(","))
}

fn explain(text: &str) -> JobAnalysis {
    let trace = read(text).expect("trace");
    activity::analyse(kineto::job("job", vec![("file".into(), trace)]).expect("job"))
}

fn said(analysis: &JobAnalysis, words: &str) -> u64 {
    let gap = analysis.gaps.iter().find(|gap| gap.what.contains(words));
    gap.unwrap_or_else(|| panic!("{words:?} is not among {:?}", analysis.gaps))
        .count
}

#[test]
fn what_is_no_trace_is_refused_by_name() {
    for text in ["", "   ", "hello", "{}", r#"{"schemaVersion":1}"#, "\u{1}\u{2}"] {
        assert!(
            matches!(read(text), Err(TraceError::NotATrace { .. })),
            "{text:?}"
        );
    }
    for text in [
        "[]",
        r#"{"traceEvents":[]}"#,
        r#"{"traceEvents":[{"ph":"X","cat":"cpu_op"}]}"#,
        "[",
        "[{",
    ] {
        assert!(
            matches!(read(text), Err(TraceError::NoGpuEvents { .. })),
            "{text:?}"
        );
    }
}

#[test]
fn a_bare_array_is_a_trace() {
    let analysis = explain(&format!("[{},]", kernel("10", "5.5", "")));
    assert_eq!(analysis.gpus[0].total.leaf_ns(Leaf::ComputeKernel), 5_500);
}

#[test]
fn events_that_cannot_be_used_are_counted() {
    let events = [
        kernel("10", "5", ""),
        kernel("NaN", "5", ""),
        kernel("20", "-1", ""),
        kernel("99999999999999999999999", "1", ""),
        kernel("18446744073709551", "1", ""),
        kernel("null", "1", ""),
        kernel("30", "5", ""),
        kernel("30", "5", ""),
        kernel("40", "0", ""),
        "17".to_owned(),
        "[[]]".to_owned(),
    ];
    let analysis = explain(&whole(&events));
    assert_eq!(analysis.gpus[0].total.window_ns(), 30_000);
    assert_eq!(analysis.gpus[0].total.leaf_ns(Leaf::ComputeKernel), 10_000);
    assert_eq!(said(&analysis, "no number"), 2);
    assert_eq!(said(&analysis, "negative time"), 1);
    assert_eq!(said(&analysis, "beyond 64 bits"), 2);
    assert_eq!(said(&analysis, "appear twice"), 1);
    assert_eq!(said(&analysis, "not valid JSON"), 2);
}

#[test]
fn an_unknown_kernel_is_reported_as_such() {
    let text = whole(&[kernel("10", "5", "").replace("volta_sgemm_nn", "my_secret")]);
    assert_eq!(said(&explain(&text), "my_secret"), 1);
}

#[test]
fn several_gpus_in_a_file_are_apart() {
    let text = whole(&[
        kernel("10", "5", ""),
        kernel("10", "9", "").replace(r#""device":0"#, r#""device":1"#),
    ]);
    let analysis = explain(&text);
    let totals: Vec<_> = analysis
        .gpus
        .iter()
        .map(|gpu| (gpu.subject.gpu, gpu.total.window_ns()))
        .collect();
    assert_eq!(totals, [(0, 5_000), (1, 9_000)]);
}

#[test]
fn kernels_of_a_graph_share_its_launch() {
    let launch = r#"{"ph":"X","cat":"cuda_runtime","name":"cudaGraphLaunch","pid":1,"tid":1,"ts":5,"dur":1,"args":{"correlation":9}}"#;
    let more = r#","correlation":9"#;
    let text = whole(&[
        launch.to_owned(),
        kernel("10", "5", more),
        kernel("16", "5", more),
    ]);
    let analysis = explain(&text);
    assert_eq!(analysis.gpus[0].total.leaf_ns(Leaf::IdleLaunch), 1_000);
}

#[test]
fn a_cut_file_says_what_is_lost() {
    let text = whole(&[kernel("10", "5", ""), kernel("20", "5", "")]);
    for cut in 0..text.len() {
        match read(&text[..cut]) {
            Ok(trace) => {
                let analysis = activity::analyse(kineto::job("job", vec![("f".into(), trace)]).expect("job"));
                said(&analysis, "the file ends inside the trace");
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    assert!(
        read(&text)
            .expect("trace")
            .records
            .gaps
            .iter()
            .all(|gap| !gap.what.contains("ends inside"))
    );
}

#[test]
fn a_cut_or_damaged_archive_says_what_is_lost() {
    let packed = std::fs::read(path("dlrm-8-ranks/worker0.json.gz")).expect("trace");
    let mut damaged = packed.clone();
    let middle = damaged.len() / 2;
    damaged[middle..middle + 64].fill(0x55);
    for bytes in [packed[..packed.len() / 2].to_vec(), damaged] {
        let file = tempfile::NamedTempFile::new().expect("file");
        std::fs::write(file.path(), bytes).expect("write");
        match kineto::read_file(file.path()) {
            Ok(trace) => assert!(
                trace
                    .records
                    .gaps
                    .iter()
                    .any(|gap| gap.what.contains("breaks off") || gap.what.contains("valid JSON")),
                "{:?}",
                trace.records.gaps
            ),
            Err(error) => assert!(matches!(error, TraceError::NoGpuEvents { .. }), "{error}"),
        }
    }
}

#[test]
fn files_that_are_not_of_one_run_are_refused() {
    let named = |rank: u32, world: u32| {
        let events = kernel("10", "5", "");
        let text = format!(
            r#"{{"distributedInfo":{{"rank":{rank},"world_size":{world}}},"traceEvents":[{events}]}}"#
        );
        (format!("rank{rank}"), read(&text).expect("trace"))
    };
    let plain = (
        "plain".to_owned(),
        read(&whole(&[kernel("1", "1", "")])).expect("trace"),
    );
    let why = |traces| kineto::job("job", traces).expect_err("refused").to_string();
    assert!(why(vec![named(1, 2), named(1, 2)]).contains("rank 1 is in both"));
    assert!(why(vec![named(0, 2), named(1, 4)]).contains("of 2 ranks"));
    assert!(why(vec![named(0, 2), plain]).contains("does not say its rank"));
}

#[test]
fn events_that_overlap_are_counted_once() {
    let other = kernel("12", "20", "").replace(r#""stream":7"#, r#""stream":8"#);
    let analysis = explain(&whole(&[kernel("10", "10", ""), other, kernel("15", "3", "")]));
    let total = &analysis.gpus[0].total;
    assert_eq!(
        (total.window_ns(), total.leaf_ns(Leaf::ComputeKernel)),
        (22_000, 22_000)
    );
}

#[test]
fn a_trace_without_any_time_is_refused_by_name() {
    let text = whole(&[
        kernel("10", "0", ""),
        kernel("10", "0", ""),
        kernel("20", "0", ""),
    ]);
    assert!(matches!(read(&text), Err(TraceError::NoGpuTime { events: 3 })));
}

#[test]
fn a_time_years_away_is_left_out_and_counted() {
    let analysis = explain(&whole(&[
        kernel("10", "5", ""),
        kernel("20", "5", ""),
        kernel("30", "5", ""),
        kernel("9000000000000000", "5", ""),
    ]));
    assert_eq!(analysis.gpus[0].total.window_ns(), 25_000);
    assert_eq!(said(&analysis, "days away"), 1);
}

/// One rank of a job whose steps end in a collective that all ranks leave together.
fn rank(rank: u32, world: u32, late_us: u64, shift_us: u64) -> (String, Trace) {
    let mut events = Vec::new();
    for step in 0..2 {
        let at = 1_000 + 1_000 * step + shift_us;
        let compute = 500 + late_us;
        events.push(kernel(&at.to_string(), &compute.to_string(), ""));
        let reduce = kernel(&(at + compute).to_string(), &(900 - compute).to_string(), "");
        events.push(reduce.replace("volta_sgemm_nn", "ncclDevKernel_AllReduce_Sum_f32_RING_LL"));
    }
    let events = events.join(",");
    let info = format!(r#"{{"rank":{rank},"world_size":{world}}}"#);
    let text = format!(r#"{{"distributedInfo":{info},"traceEvents":[{events}]}}"#);
    (format!("rank{rank}"), read(&text).expect("trace"))
}

fn analyse(traces: Vec<(String, Trace)>) -> JobAnalysis {
    let analysis = activity::analyse(kineto::job("job", traces).expect("job"));
    Document::from(&analysis).check().expect("sums hold");
    analysis
}

#[test]
fn a_missing_rank_is_named() {
    let analysis = analyse((0..7).map(|at| rank(at, 8, 0, 0)).collect());
    said(&analysis, "7 of 8 ranks");
}

#[test]
fn clocks_minutes_apart_are_named() {
    let shifted = |at: u32| rank(at, 8, 0, if at == 3 { 600_000_000 } else { 0 });
    let analysis = analyse((0..8).map(shifted).collect());
    assert_eq!(said(&analysis, "rank 3 recorded at another time"), 1);
    said(&analysis, "up to 600 s away");
    let together = analyse((0..8).map(|at| rank(at, 8, 0, 0)).collect());
    assert!(!together.gaps.iter().any(|gap| gap.what.contains("another time")));
}

#[test]
fn ten_thousand_ranks_make_one_report() {
    let late = |at: u32| rank(at, 10_000, if at == 77 { 200 } else { 0 }, 0);
    let analysis = analyse((0..10_000).map(late).collect());
    assert_eq!(analysis.gpus.len(), 10_000);
    let culprits: Vec<_> = analysis.blame.iter().map(|blame| blame.place.rank).collect();
    assert_eq!(culprits, [Some(77)]);
    // What is the same in all ranks is said once.
    assert!(analysis.gaps.len() < 10, "{:?}", analysis.gaps.len());
    assert_eq!(said(&analysis, "ranks 0, 1, 2 and 9997 more"), 40_000);
}

/// Gives a trace of `left` more kernels without ever holding it.
struct Endless {
    left: u64,
    text: Vec<u8>,
}

impl Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.text.len() < buffer.len() && self.left > 0 {
            self.left -= 1;
            let operator = format!(
                r#"{{"ph":"X","cat":"cpu_op","name":"aten::add","pid":1,"tid":1,"ts":{},"dur":3}},"#,
                self.left
            );
            self.text.extend_from_slice(operator.as_bytes());
        }
        let given = self.text.len().min(buffer.len());
        buffer[..given].copy_from_slice(&self.text[..given]);
        self.text.drain(..given);
        Ok(given)
    }
}

#[test]
fn a_stream_of_events_is_read_as_it_comes() {
    let endless = Endless {
        left: 20_000,
        text: format!("[{},", kernel("10", "5", "")).into_bytes(),
    };
    let trace = kineto::read(endless).expect("trace");
    assert_eq!(trace.events, 20_001);
}
