//! Links and faults: findings, which GPU reaches the network how, and what was not seen.

use super::canvas::{self, Canvas, Style, WIDTH};
use super::verdict;
use crate::document::{Finding, Links};
use crate::format::clean;
use crate::view;

/// Paths a table for people shows; the JSON has them all.
const MOST_PATHS: usize = 32;
/// Lines of what was not seen.
const MOST_NOT_SEEN: usize = 16;

pub(super) fn links(canvas: &mut Canvas, links: &Links) {
    for (costs, heading, words) in [
        ("verdict", "LINKS AND FAULTS", "named by a verdict above"),
        (
            "not_measured",
            "LINKS AND FAULTS",
            "no job's time was measured beside them",
        ),
        (
            "nothing_measured",
            "SEEN, COSTS NOTHING MEASURED",
            "no job lost measurable time to them",
        ),
    ] {
        let all: Vec<&Finding> = links
            .findings
            .iter()
            .filter(|finding| finding.costs == costs)
            .collect();
        if all.is_empty() {
            continue;
        }
        canvas.heading(heading, words);
        all.into_iter().for_each(|one| finding(canvas, one));
    }
    paths(canvas, links);
    not_seen(canvas, links);
}

fn finding(canvas: &mut Canvas, finding: &Finding) {
    let style = if finding.severity == "notice" {
        Style::Faint
    } else {
        Style::Alarm
    };
    let cause = canvas.paint(style, &clean(&finding.cause));
    let how = canvas.paint(
        Style::Faint,
        &format!("{}, {}", clean(&finding.severity), clean(&finding.side)),
    );
    canvas.line("");
    canvas.line(&format!("  {cause}   {how}"));
    canvas.labelled("what", &clean(&finding.summary));
    canvas.labelled("where", &view::place(&finding.place));
    verdict::evidence(canvas, &finding.evidence);
    verdict::ruled_out(canvas, &finding.ruled_out);
}

fn paths(canvas: &mut Canvas, links: &Links) {
    if links.paths.is_empty() {
        return;
    }
    canvas.heading(
        "RANK, GPU, PORT",
        "the nearest ports, those in use, and who is at their other end",
    );
    for path in links.paths.iter().take(MOST_PATHS) {
        for (index, part) in canvas::wrap(&view::path(path), WIDTH - 4).iter().enumerate() {
            canvas.line(&format!("{}{part}", if index == 0 { "  " } else { "    " }));
        }
    }
    if links.paths.len() > MOST_PATHS {
        let more = links.paths.len() - MOST_PATHS;
        canvas.line(&format!("  {more} others; `--format json` has all"));
    }
}

fn not_seen(canvas: &mut Canvas, links: &Links) {
    if links.not_seen.is_empty() {
        return;
    }
    canvas.heading("NOT SEEN", "what nobody could look at is not known to be healthy");
    for one in links.not_seen.iter().take(MOST_NOT_SEEN) {
        for (index, part) in canvas::wrap(&view::not_seen(one), WIDTH - 4).iter().enumerate() {
            canvas.line(&format!("{}{part}", if index == 0 { "  " } else { "    " }));
        }
    }
    if links.not_seen.len() > MOST_NOT_SEEN {
        let more = links.not_seen.len() - MOST_NOT_SEEN;
        canvas.line(&format!("  {more} more; `--format json` has all"));
    }
}
