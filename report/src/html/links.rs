//! Links and faults: findings, which GPU reaches the network how, and what was not seen.

use super::tables;
use crate::document::{Finding, Links};
use crate::markup::Markup;
use crate::view;

/// Paths the page shows; the JSON has them all.
const MOST_PATHS: usize = 64;

pub(super) fn links(out: &mut Markup, links: &Links) {
    out.raw("<article class=\"job\">\n<section><h2>Links and faults</h2>");
    out.raw(if links.findings.is_empty() {
        "<p>No device told of anything that stands out.</p></section>\n"
    } else {
        "<p>What devices told, and whether it costs a job anything.</p>\n"
    });
    if !links.findings.is_empty() {
        links.findings.iter().for_each(|finding| card(out, finding));
        out.raw("</section>\n");
    }
    paths(out, links);
    if !links.not_seen.is_empty() {
        out.raw("<section><h2>Not seen</h2><p>What nobody could look at is not known to be healthy.</p><ul class=\"gaps\">");
        for one in &links.not_seen {
            out.element("<li>", &view::not_seen(one), "</li>");
        }
        out.raw("</ul></section>\n");
    }
    out.raw("</article>\n");
}

fn card(out: &mut Markup, finding: &Finding) {
    out.raw(if finding.costs == "verdict" {
        "<section class=\"card\">"
    } else {
        "<section class=\"card none\">"
    });
    out.element("<h3>", &finding.summary, "</h3>");
    out.raw("<ul class=\"meta\">")
        .element("<li class=\"cause\">", &finding.cause, "</li>");
    out.element("<li>", &view::place(&finding.place), "</li>");
    out.element("<li>", &finding.severity, "</li>");
    out.element("<li>", &finding.side, "</li>");
    out.element("<li>", view::finding_costs(&finding.costs), "</li></ul>\n");
    tables::evidence(out, &finding.evidence);
    tables::ruled_out(out, &finding.ruled_out);
    out.raw("</section>\n");
}

fn paths(out: &mut Markup, links: &Links) {
    if links.paths.is_empty() {
        return;
    }
    out.raw("<section><h2>Rank, GPU, port</h2><p>The nearest ports, those in use, and who is at their other end.</p>");
    out.raw("<ul class=\"gaps\">");
    for path in links.paths.iter().take(MOST_PATHS) {
        out.element("<li>", &view::path(path), "</li>");
    }
    out.raw("</ul>");
    let more = links.paths.len().saturating_sub(MOST_PATHS);
    if more > 0 {
        out.element(
            "<p class=\"more\">",
            &format!("{more} others are in the JSON report."),
            "</p>",
        );
    }
    out.raw("</section>\n");
}
