//! How a verdict says what the ranks' network steps waited for.

use super::words::{View, percent};
use crate::cause::Cause;
use crate::job::waits::{RankWaits, Says, Slow};
use crate::job::{Evidence, RuledOut, evidence};

/// Most ranks whose steps a verdict tells of.
const MOST_ROWS: usize = 4;

/// What the steps waited for, of the ranks that say most about the verdict: who is slow, and who waits for it.
pub(super) fn rows(view: &View<'_>) -> Vec<Evidence> {
    let waits = &view.ledger.waits;
    let telling: Vec<&RankWaits> = match (view.candidate.cause, view.ledger.says) {
        (cause, _) if cause.slows_communication() => {
            let first = of_interest(view);
            let others = waits.iter().filter(|rank| first != Some(rank.rank));
            let own = waits.iter().filter(|rank| first == Some(rank.rank));
            own.chain(others).take(MOST_ROWS).collect()
        }
        (_, Says::Late(at)) if view.hit.contains(&waits[at].rank) => vec![&waits[at]],
        _ => Vec::new(),
    };
    telling.into_iter().map(|rank| row(view, rank)).collect()
}

/// The rank whose steps stand out; else one of the verdict's node.
fn of_interest(view: &View<'_>) -> Option<usize> {
    let waits = &view.ledger.waits;
    match view.ledger.says {
        Says::Slow(Slow::Way(at) | Slow::Receiver(at) | Slow::Flush(at)) | Says::Late(at) => {
            Some(waits[at].rank)
        }
        _ => {
            let node = view.place.node.as_ref()?;
            waits.iter().find(|rank| rank.node == *node).map(|rank| rank.rank)
        }
    }
}

fn row(view: &View<'_>, rank: &RankWaits) -> Evidence {
    let before = view
        .base
        .and_then(|base| base.waits.iter().find(|other| other.rank == rank.rank));
    evidence(
        format!(
            "what NCCL's network steps of rank {} ({}) waited for",
            view.subjects[rank.rank].rank, rank.node
        ),
        told(rank),
        before.map_or_else(
            || "most of the time for GPUs, on either side".into(),
            |before| format!("{}, before", told(before)),
        ),
    )
}

/// `sending: 5 % GPU, 3 % credit, 92 % wire; ...`
fn told(rank: &RankWaits) -> String {
    let [gpu, credit, wire] = rank.sending().map(percent);
    let [arrival, flush, consume] = rank.receiving().map(percent);
    let sending = if rank.credit_ppm().is_some() {
        format!("{gpu} GPU, {credit} the receiver's credit, {wire} wire")
    } else {
        format!("{gpu} GPU or the receiver's credit, {wire} wire")
    };
    format!(
        "sending: {sending} (on the wire {} of the time); receiving: {arrival} arrival, {flush} flush, {consume} GPU \
         (data awaited {} of the time)",
        percent(rank.wire_ppm()),
        percent(rank.arrival_ppm()),
    )
}

/// What the steps rule out.
pub(super) fn ruled_out(view: &View<'_>) -> Vec<RuledOut> {
    let waits = &view.ledger.waits;
    let fabric = |why: String| RuledOut {
        cause: Cause::NetworkFabric,
        why,
    };
    match view.ledger.says {
        Says::AsBefore => {
            let most = |waits: &[RankWaits]| waits.iter().map(RankWaits::wire_ppm).max().unwrap_or(0);
            let before = view.base.map_or(0, |base| most(&base.waits));
            vec![fabric(format!(
                "NCCL's network steps of no rank wait longer for the network than before (on the wire at most {} of the \
                 time, {} before)",
                percent(most(waits)),
                percent(before),
            ))]
        }
        Says::Late(at) => vec![fabric(format!(
            "NCCL's network steps wait for the GPU of rank {} ({}), which neither takes what arrived nor gives what others \
             wait for, and not for the network",
            view.subjects[waits[at].rank].rank, waits[at].node
        ))],
        Says::Slow(Slow::Receiver(at)) => vec![fabric(format!(
            "what was ready to be sent waited for room before it was sent, and nothing was long on the wire: rank {} ({}) \
             makes no room, though its GPU has taken what came",
            view.subjects[waits[at].rank].rank, waits[at].node
        ))],
        Says::Slow(_) | Says::Nothing => Vec::new(),
    }
}
