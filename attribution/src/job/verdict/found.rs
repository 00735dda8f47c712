//! What the devices told joins the verdicts it explains.

use crate::cause::Cause;
use crate::job::Verdict;
use crate::links::{Finding, FindingCost, Severity};

/// Most rows of evidence a verdict takes over from findings.
const MOST_ROWS: usize = 8;

/// Gives verdicts the evidence of findings that mean the same, and findings what they cost: named by a verdict, or,
/// where a job's time was `analysed`, nothing that could be measured.
pub(in crate::job) fn join_findings(verdicts: &mut [Verdict], findings: &mut [Finding], analysed: bool) {
    for finding in findings.iter_mut() {
        let is_named = verdicts
            .iter()
            .any(|verdict| finding.is_meant_by(verdict.cause, &verdict.place));
        finding.cost = match (is_named, analysed) {
            (true, _) => FindingCost::Named,
            (false, true) => FindingCost::NothingMeasured,
            (false, false) => FindingCost::NotMeasured,
        };
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
