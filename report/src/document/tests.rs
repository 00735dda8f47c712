#![expect(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;
use stallscope_attribution::leaf::Leaf;

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
fn the_error_of_aligned_clocks_is_a_number() {
    let mut analysis = fixtures::healthy();
    let json = |analysis: &_| Document::from(analysis).to_json().unwrap();
    assert!(!json(&analysis).contains("\"clocks\""), "nothing was aligned");
    analysis.work.clocks = Some(stallscope_attribution::job::ClockAlignment {
        clocks: 8,
        error_ns: 21_500,
    });
    let json: serde_json::Value = serde_json::from_str(&json(&analysis)).unwrap();
    let clocks = &json["jobs"][0]["clocks"];
    assert_eq!(clocks, &serde_json::json!({"count": 8, "error_ns": 21_500}));
}

#[test]
fn the_job_with_most_gpu_time_comes_first() {
    let mut small = fixtures::healthy();
    small.job = "co-tenant".to_owned();
    small.gpus.truncate(1);
    let document = Document::from_analyses(&[small, fixtures::thermal_straggler()]);
    let totals: Vec<i128> = document.jobs.iter().map(|job| job.total.total_ns).collect();
    assert!(totals[0] > totals[1], "{totals:?}");
    assert_eq!(document.jobs[1].job, "co-tenant");
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
    analysis.gpus[1] = fixtures::gpu(1, 50_000, &[], &[Leaf::IdleGc]);
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

#[test]
fn a_negative_leaf_is_refused_unless_it_may_be() {
    let mut document = Document::from(&fixtures::healthy());
    document.check().unwrap();
    let gpu = &mut document.jobs[0].gpus[0];
    *gpu.budget.get_mut("idle.gc").unwrap() -= 5;
    *gpu.budget.get_mut("idle.unknown").unwrap() += 5;
    assert!(document.check().unwrap_err().to_string().contains("leaf idle.gc"));
}

/// Leaves of any size, negative only where that is allowed; the total is whatever they sum to.
fn any_leaves() -> impl Strategy<Value = Vec<i64>> {
    let leaf = |leaf: &Leaf| {
        let sizes = prop_oneof![
            Just(0_i64),
            0_i64..1_000,
            0_i64..1_000_000_000_000,
            0_i64..i64::MAX / 32
        ];
        let may_be_negative = leaf.may_be_negative();
        (sizes, any::<bool>()).prop_map(move |(ns, negate)| if negate && may_be_negative { -ns } else { ns })
    };
    Leaf::ALL.iter().map(leaf).collect::<Vec<_>>()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_holds_its_sums_survives_json_and_renders(
        budgets in proptest::collection::vec(any_leaves(), 0..40),
        name in ".{0,20}",
    ) {
        let mut document = Document::from(&fixtures::with_gaps());
        let job = &mut document.jobs[0];
        let template = job.gpus.remove(0);
        job.gpus.clear();
        for (rank, leaves) in (0..).zip(budgets) {
            let Ok(total_ns) = u64::try_from(leaves.iter().sum::<i64>()) else { continue };
            let mut gpu = Gpu { rank, node: name.clone(), total_ns, ..template.clone() };
            gpu.sweep = Sweep::default();
            for (leaf, ns) in Leaf::ALL.iter().zip(leaves) {
                gpu.budget.insert(leaf.name().to_owned(), ns);
                let of = match leaf.class() {
                    stallscope_attribution::leaf::Class::Compute => &mut gpu.sweep.compute_ns,
                    stallscope_attribution::leaf::Class::Comm => &mut gpu.sweep.exposed_comm_ns,
                    stallscope_attribution::leaf::Class::Memory => &mut gpu.sweep.exposed_memory_ns,
                    stallscope_attribution::leaf::Class::Idle => &mut gpu.sweep.idle_ns,
                };
                *of += i128::from(ns);
            }
            job.gpus.push(gpu);
        }
        job.total = Rollup::over(&job.gpus);
        job.nodes = by_node(&job.gpus);
        document.check()?;
        let json = document.to_json()?;
        prop_assert_eq!(&Document::from_json(&json)?, &document);
        let text = crate::text::render(&document, crate::text::TextOptions::default());
        for line in text.lines() {
            prop_assert!(line.chars().count() <= 100, "{}", line);
        }
        prop_assert!(crate::html::render(&document).ends_with("</html>\n"));
    }
}
