//! The BPF programs on the machines' kernel.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use stallscope_vm::Program;

use super::super::pair::Pair;
use crate::bpf::verifier;

/// What must be there on a stock kernel, in the words of `stallscope doctor`.
const KERNEL: [&str; 7] = [
    "privileges",
    "kernel.version",
    "kernel.uprobes",
    "kernel.tracefs",
    "kernel.sched",
    "kernel.btf",
    "cgroups",
];

/// Every program loads, and none costs this verifier much more than the table says.
pub(super) fn load(pair: &Pair) -> Result<String> {
    let program = Program {
        words: vec![pair.inside.verifier_counts.display().to_string()],
        variables: vec![(
            "STALLSCOPE_BPF_OBJECT".into(),
            pair.inside.bpf_object.display().to_string(),
        )],
    };
    let said = pair.left.guest.run(program, 180)?;
    ensure!(said.code == Some(0), "{}{}", said.stdout, said.stderr);
    verifier::within_limits(&pair.paths, &said.stdout)
}

/// The doctor finds all that a kernel can give.
pub(super) fn doctor(pair: &Pair) -> Result<String> {
    let stallscope = pair.inside.stallscope.display().to_string();
    let program = super::super::guest::program(&[&stallscope, "doctor", "--format", "json"]);
    let said = pair.left.guest.run(program, 60)?;
    let report: Value =
        serde_json::from_str(&said.stdout).with_context(|| format!("no report: {}", said.stderr))?;
    let checks = report["checks"].as_array().context("a report has checks")?;
    for name in KERNEL {
        let check = checks
            .iter()
            .find(|check| check["name"] == name)
            .with_context(|| format!("the doctor did not look at {name}"))?;
        ensure!(check["state"] == "ok", "{name}: {check}");
    }
    Ok(format!("{} things of the kernel as they should be", KERNEL.len()))
}
