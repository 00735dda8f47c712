//! What the devices told joins the verdicts it explains.

use super::words::percent;
use crate::budget::Budget;
use crate::budget::arith::mul_div;
use crate::cause::Cause;
use crate::facts::PPM;
use crate::job::{Verdict, evidence};
use crate::leaf::Leaf;
use crate::links::{Finding, FindingCost, Severity};

/// Most rows of evidence a verdict takes over from findings.
const MOST_ROWS: usize = 8;

/// Gives verdicts the evidence of findings that mean the same, and findings what they cost: named by a verdict, or,
/// where a job's time was `analysed`, nothing that could be measured.
pub(in crate::job) fn join_findings(
    verdicts: &mut [Verdict],
    findings: &mut [Finding],
    analysed: bool,
    totals: &[Budget],
) {
    for finding in findings.iter_mut() {
        let is_named = verdicts
            .iter()
            .any(|verdict| finding.is_meant_by(verdict.cause, &verdict.place));
        finding.cost = match (is_named, analysed) {
            (true, _) => FindingCost::Named,
            (false, true) => FindingCost::NothingMeasured,
            (false, false) => FindingCost::NotMeasured,
        };
        if finding.cost == FindingCost::NothingMeasured {
            bound(finding, totals);
        }
    }
    for verdict in verdicts {
        let meant: Vec<&Finding> = findings
            .iter()
            .filter(|finding| finding.is_meant_by(verdict.cause, &verdict.place))
            .collect();
        let rows = meant.iter().flat_map(|finding| &finding.evidence);
        verdict.evidence.extend(rows.take(MOST_ROWS).cloned());
        for not in meant.iter().flat_map(|finding| &finding.ruled_out) {
            let told = verdict.ruled_out.iter().any(|known| known.cause == not.cause);
            if !told && not.cause != Cause::None && not.cause != verdict.cause {
                verdict.ruled_out.push(not.clone());
            }
        }
        if let [only] = meant.as_slice() {
            complete(verdict, only);
        }
    }
}

/// What a link that carries less than it should can cost at most, where no healthy stretch shows what it does: nobody knows
/// whether the collectives wait for this link, but if they all do, they take no longer than its lost rate makes them.
fn bound(finding: &mut Finding, totals: &[Budget]) {
    let by_network = matches!(
        finding.cause,
        Cause::NetworkPcie | Cause::NetworkConfig | Cause::NetworkNic
    );
    let Some(carries_ppm) = finding.carries_ppm.filter(|_| by_network) else {
        return;
    };
    let sum = |of: &dyn Fn(&Budget) -> u64| totals.iter().map(of).fold(0, u64::saturating_add);
    let exposed = sum(&|total| {
        let leaves = [Leaf::CommTransfer, Leaf::CommNet, Leaf::CommProto];
        let ns = leaves.map(|leaf| u64::try_from(total.leaf_ns(leaf)).unwrap_or(0));
        ns.iter().sum()
    });
    let most = mul_div(exposed, PPM.saturating_sub(carries_ppm), PPM);
    finding.evidence.push(evidence(
        "GPU time it may cost: nothing shows how the job does without it, so this is no verdict",
        format!(
            "from 0 % to {} (if every exposed collective waits for this link)",
            percent(mul_div(most, PPM, sum(&Budget::window_ns)))
        ),
        "0 %",
    ));
}

/// A verdict about a whole node, or the job, is about the one device that says so.
fn complete(verdict: &mut Verdict, finding: &Finding) {
    if finding.severity < Severity::Degraded || verdict.place.nic_port.is_some() {
        return;
    }
    let (own, told) = (&mut verdict.place, &finding.place);
    own.node = own.node.take().or_else(|| told.node.clone());
    own.nic_port.clone_from(&told.nic_port);
    own.link = own.link.take().or_else(|| told.link.clone());
}
