#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::fixtures;

#[test]
fn json_of_a_straggler() {
    let document = Document::from(&fixtures::thermal_straggler());
    insta::assert_snapshot!(document.to_json().unwrap());
}

#[test]
fn every_fixture_holds_its_sums_and_survives_json() {
    let analyses = [
        fixtures::thermal_straggler(),
        fixtures::healthy(),
        fixtures::unexplained(),
        fixtures::with_gaps(),
        fixtures::hostile(fixtures::HOSTILE),
    ];
    let document = Document::from_analyses(&analyses);
    assert_eq!(document.tier, "B", "the weakest tier heads the report");
    let json = document.to_json().unwrap();
    assert_eq!(Document::from_json(&json).unwrap(), document);
}

#[test]
fn blame_sums_to_the_waiting() {
    let job = &Document::from(&fixtures::thermal_straggler()).jobs[0];
    let blamed: i128 = job.blame.iter().map(|blame| i128::from(blame.cost_ns)).sum();
    assert_eq!(Some(&blamed), job.total.budget.get("comm.skew"));
}

#[test]
fn node_roll_ups_add_nanoseconds() {
    let job = &Document::from(&fixtures::thermal_straggler()).jobs[0];
    assert_eq!(job.nodes.len(), 2);
    assert_eq!(
        job.nodes.values().map(|node| node.total_ns).sum::<i128>(),
        job.total.total_ns
    );
    assert_eq!(job.nodes["node1"].budget["compute.clock"], 9_500_000_000);
    assert!(job.total.unmeasured.contains(&"idle.gc".to_owned()));
}

#[test]
fn a_leaf_only_some_gpus_measured_is_named_as_such() {
    let mut analysis = fixtures::healthy();
    analysis.gpus[1] = fixtures::gpu(1, 50_000, &[], &[stallscope_attribution::leaf::Leaf::IdleGc]);
    let total = &Document::from(&analysis).jobs[0].total;
    assert_eq!(total.partly_measured, ["idle.gc"]);
    assert!(total.unmeasured.is_empty());
}

#[test]
fn a_tampered_document_is_refused() {
    let json = Document::from(&fixtures::healthy()).to_json().unwrap();
    let refused = |from: &str, to: &str| {
        assert!(json.contains(from), "{from}");
        Document::from_json(&json.replacen(from, to, 1))
            .unwrap_err()
            .to_string()
    };
    // The first budget in the text is the job's own total, the next with this leaf a node's, then the GPUs'.
    assert!(refused("\"idle.launch\": 4800000000", "\"idle.launch\": 4800000001").contains("totals of job"));
    assert!(refused("\"idle.launch\": 2400000000", "\"idle.launch\": 2400000001").contains("nodes of job"));
    assert!(refused("\"idle.launch\": 1200000000", "\"idle.launch\": 1200000001").contains("leaves sum to"));
    assert!(refused("\"exposed_comm_ns\": 4000000000", "\"exposed_comm_ns\": 0").contains("classes sum to"));
    assert!(refused("stallscope.report/1", "stallscope.report/2").contains("stallscope.report/2"));
    assert!(Document::from_json("{\"schema\": ").is_err());
}

#[test]
fn additions_of_a_newer_producer_are_tolerated() {
    let json = Document::from(&fixtures::healthy()).to_json().unwrap();
    let mut value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let job = &mut value["jobs"][0];
    job["weather"] = "fine".into();
    job["mfu_source"] = "astrology".into();
    // A producer that knows one more idle leaf, and none of the additions to the first contract.
    for rolled_up in ["total", "nodes", "tier", "gaps", "observed"] {
        job.as_object_mut().unwrap().remove(rolled_up);
    }
    let budget = job["gpus"][0]["budget"].as_object_mut().unwrap();
    budget.insert("idle.launch".to_owned(), 1_000_000_000.into());
    budget.insert("idle.cosmic".to_owned(), 200_000_000.into());
    job["verdicts"][0]["cause"] = "device.cosmic".into();
    let document = Document::from_json(&value.to_string()).unwrap();
    assert_eq!(document.jobs[0].gpus[0].budget["idle.cosmic"], 200_000_000);
    assert_eq!(document.jobs[0].mfu_source, MfuSource::Unknown);
}
