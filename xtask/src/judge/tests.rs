#![expect(clippy::unwrap_used, reason = "tests")]

use serde_json::json;

use super::*;

fn truth() -> Truth {
    serde_json::from_value(json!({
        "cause": "device.thermal",
        "where": {"node": "n1", "gpu": 0, "rank": 2},
        "leaves": {"ideal": 50, "compute.clock": 20, "compute.nonmatmul": 10, "idle.unknown": 20},
        "mfu_points": 50.0
    }))
    .unwrap()
}

fn report(verdicts: &Value) -> Value {
    json!({"jobs": [{
        "mfu_points": 47.5,
        "gpus": [
            {"budget": {"ideal": 25, "compute.clock": 10, "compute.kernel": 5, "idle.unknown": 10},
             "unmeasured": ["compute.nonmatmul"]},
            {"budget": {"ideal": 25, "compute.clock": 10, "compute.kernel": 5, "idle.unknown": 10},
             "unmeasured": ["compute.nonmatmul"]}
        ],
        "verdicts": verdicts
    }]})
}

fn verdict(cause: &str, node: &str, gpu: u32, confidence: &str) -> Value {
    let place = json!({"node": node, "gpu": gpu, "rank": 2, "pci": null});
    json!({"cause": cause, "where": place, "confidence": confidence})
}

#[test]
fn cause_and_place_must_both_be_right() {
    let judged = |verdicts: Value| judge(&truth(), &report(&verdicts));
    let right = judged(json!([verdict("device.thermal", "n1", 0, "high")]));
    assert!(right.top_cause_right);
    assert_eq!(right.false_culprits, 0);
    let elsewhere = judged(json!([verdict("device.thermal", "n1", 1, "high")]));
    assert!(!elsewhere.top_cause_right);
    assert_eq!(elsewhere.false_culprits, 1);
    let second = judged(json!([
        verdict("data.loader", "n1", 0, "high"),
        verdict("device.thermal", "n1", 0, "high")
    ]));
    assert!(!second.top_cause_right);
    assert_eq!(second.false_culprits, 1);
    assert!(!judged(json!([])).top_cause_right);
}

#[test]
fn a_guess_and_an_acquittal_accuse_nobody() {
    let verdicts = json!([
        verdict("none", "n1", 0, "high"),
        verdict("host.cpu", "n1", 0, "low")
    ]);
    assert_eq!(judge(&truth(), &report(&verdicts)).false_culprits, 0);
}

#[test]
fn unmeasured_leaves_count_in_the_residual() {
    let judged = judge(&truth(), &report(&json!([])));
    assert_eq!(judged.leaf_error_points, Some(0.0));
    assert_eq!(judged.mfu_error_points, Some(2.5));
}

#[test]
fn leaf_error_is_the_mean_over_leaves() {
    let mut wrong = report(&json!([]));
    wrong["jobs"][0]["gpus"][0]["budget"] = json!({"ideal": 25, "idle.unknown": 25});
    // ideal 50/50, clock 20/10, kernel 10/5, unknown 20/35: 30 points over four leaves.
    assert_eq!(judge(&truth(), &wrong).leaf_error_points, Some(7.5));
    assert_eq!(judge(&truth(), &json!({})).leaf_error_points, None);
}

#[test]
fn a_starved_host_may_be_named_where_the_truth_saw_one_and_nowhere_else() {
    let starved = [verdict("host.cpu", "n1", 0, "high")];
    let judged = |truth: &Truth| {
        let judged = judge(truth, &report(&json!(starved)));
        (judged.top_cause_right, judged.false_culprits)
    };
    let healthy = Truth {
        cause: "none".to_owned(),
        place: Place::default(),
        ..truth()
    };
    assert_eq!(judged(&healthy), (false, 1));
    let also = vec!["host.cpu".to_owned()];
    let crowded = Truth {
        also: also.clone(),
        ..healthy
    };
    assert_eq!(judged(&crowded), (true, 0));
    let thermal = Truth { also, ..truth() };
    assert_eq!(judged(&thermal), (false, 0), "the fault must still come first");
}
