//! The report as one HTML page: no script, no file beside it, light or dark with the reader's system.

mod links;
mod tables;

use crate::document::{Document, Job, Verdict};
use crate::format::{self, duration, ppm_percent};
use crate::markup::Markup;
use crate::svg;
use crate::view;
use crate::words;

const PAGE_STYLE: &str = include_str!("page.css");

/// The report as an HTML page.
#[must_use]
pub fn render(document: &Document) -> String {
    let mut page = Markup::new();
    page.raw("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    page.raw("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    page.raw("<meta name=\"color-scheme\" content=\"light dark\">\n");
    // Nothing may be loaded and nothing may run, whatever a name in the report looks like.
    page.raw("<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n");
    page.element("<title>", &title(document), "</title>\n");
    page.raw("<style>\n")
        .raw(svg::STYLE)
        .raw(PAGE_STYLE)
        .raw("</style>\n</head>\n<body>\n<main>\n");
    page.raw("<header class=\"brand\"><b>stallscope</b>").element(
        "<span>",
        &document.schema,
        "</span></header>\n",
    );
    match (document.jobs.as_slice(), &document.links) {
        ([], None) => {
            page.raw("<p class=\"headline\">No job was recorded.</p>\n");
        }
        ([], Some(_)) => {
            page.raw(
                "<p class=\"headline\">No step of a job was recorded; this is what the devices told.</p>\n",
            );
        }
        _ => {}
    }
    for (index, job) in document.jobs.iter().enumerate() {
        page.part(&render_job(job, index as i64));
    }
    if let Some(all) = &document.links {
        links::links(&mut page, all);
    }
    page.raw("</main>\n</body>\n</html>\n");
    page.finish()
}

fn title(document: &Document) -> String {
    let names: Vec<String> = document
        .jobs
        .iter()
        .take(3)
        .map(|job| format::clean(&job.job))
        .collect();
    if names.is_empty() {
        "stallscope report".to_owned()
    } else {
        format!("stallscope: {}", names.join(", "))
    }
}

fn render_job(job: &Job, index: i64) -> Markup {
    let mut out = Markup::new();
    out.raw("<article class=\"job\">\n")
        .element("<h1>", &view::subject(job), "</h1>\n");
    out.element("<p class=\"headline\">", &view::headline(job), "</p>\n");
    tiles(&mut out, job);
    out.raw("<section><h2>From all GPU time to model math</h2>");
    out.element("<p>", &view::mfu_sentence(job), ".");
    if let Some(roof) = view::roof(job) {
        out.element(" ", &roof, ".");
    }
    out.raw(if job.total.intervals.is_empty() {
        "</p>"
    } else {
        " Whiskers are the bounds of what the tier can see.</p>"
    });
    out.raw("<div class=\"panel\">")
        .part(&svg::waterfall(job, index, false))
        .raw("</div></section>\n");
    out.raw("<section><h2>Verdicts</h2>");
    out.raw("<p>What is lost, to whom, on what evidence, and one step that confirms or refutes it.</p>\n");
    for verdict in &job.verdicts {
        card(&mut out, verdict);
    }
    out.raw("</section>\n<section><h2>Where each rank's time went</h2>");
    out.raw("<p>Percent of the rank's own time. Waiting is charged to the rank that waited here; below, to who was late.</p>");
    out.raw("<div class=\"panel\">")
        .part(&svg::legend(job))
        .part(&svg::ranks(job, index));
    let hidden = job.gpus.len().saturating_sub(view::shown_gpus(job).len());
    if hidden > 0 {
        let more = format!("{hidden} ranks that lost less are left out; the JSON report has all.");
        out.element("<p class=\"more\">", &more, "</p>");
    }
    out.raw("</div></section>\n");
    tables::who_caused_it(&mut out, job);
    tables::side_by_side(&mut out, job);
    tables::kernels(&mut out, job);
    tables::budget(&mut out, job);
    gaps(&mut out, job);
    out.raw("<footer>How to read this report<ul>");
    for note in view::notes(job) {
        out.element("<li>", &note, "</li>");
    }
    out.raw("</ul></footer>\n</article>\n");
    out
}

fn tiles(out: &mut Markup, job: &Job) {
    out.raw("<dl class=\"tiles\">\n");
    let mfu = view::mfu_percent(job).map(|mfu| format!("{mfu} %"));
    let source = match (&mfu, view::hfu_percent(job)) {
        (Some(_), Some(hfu)) => format!("of the peak did model math; HFU {hfu} %"),
        (Some(_), None) => "of the device's peak did model math".to_owned(),
        (None, _) => "declare model FLOPs to know it".to_owned(),
    };
    tile(
        out,
        "MFU",
        mfu.as_deref().unwrap_or("unknown"),
        &source,
        mfu.is_none(),
    );
    if let Some(top) = job.verdicts.first() {
        let (label, is_cost) = match top.cause.as_str() {
            "none" => ("Top cause", false),
            "unknown" => ("Lost without an explanation", true),
            _ => ("Top cause costs", true),
        };
        let value = if is_cost {
            format!("{} %", ppm_percent(top.share.ppm))
        } else {
            "none".to_owned()
        };
        tile(
            out,
            label,
            &value,
            &format!("{} · {}", top.cause, view::place(&top.place)),
            !is_cost,
        );
        let returns = if top.recovers.gpu_ns > 0 {
            duration(top.recovers.gpu_ns.into())
        } else {
            "-".to_owned()
        };
        let points = view::recovered_points(top).unwrap_or_else(|| "GPU time in this period".to_owned());
        tile(out, "Fixing it returns", &returns, &points, false);
    }
    let gpus = format::counted(job.gpus.len() as u64, "GPU");
    tile(
        out,
        "GPU time analysed",
        &duration(job.total.total_ns),
        &format!("{gpus} · tier {}", job.tier),
        false,
    );
    out.raw("</dl>\n");
}

fn tile(out: &mut Markup, label: &str, value: &str, small: &str, is_word: bool) {
    out.raw("<div class=\"tile\">").element("<dt>", label, "</dt>");
    out.raw(if is_word { "<dd class=\"word\">" } else { "<dd>" })
        .text(value);
    out.element("<small>", small, "</small></dd></div>\n");
}

fn card(out: &mut Markup, verdict: &Verdict) {
    out.raw(if verdict.cause == "none" {
        "<section class=\"card none\">"
    } else {
        "<section class=\"card\">"
    });
    out.element("<h3>", words::cause_named(&verdict.cause), "</h3>");
    out.raw("<ul class=\"meta\">")
        .element("<li class=\"cause\">", &verdict.cause, "</li>");
    out.element("<li>", &view::place(&verdict.place), "</li>");
    out.element("<li>confidence ", &verdict.confidence, "</li>");
    if let Some(onset) = verdict.onset_unix_ns {
        out.element("<li>since ", &format::utc(onset), "</li>");
    }
    out.raw("</ul>\n<dl>");
    if verdict.cost_ns > 0 {
        out.element(
            "<dt>costs</dt><dd class=\"strong\">",
            &view::cost(verdict),
            "</dd>",
        );
    }
    if let Some(returns) = view::returns(verdict) {
        out.element("<dt>fixing it returns</dt><dd>", &returns, "</dd>");
    }
    if !verdict.confirm.is_empty() {
        out.element("<dt>to confirm</dt><dd>", &verdict.confirm, "</dd>");
    }
    out.raw("</dl>\n");
    tables::evidence(out, &verdict.evidence);
    tables::ruled_out(out, &verdict.ruled_out);
    out.raw("</section>\n");
}

fn gaps(out: &mut Markup, job: &Job) {
    out.raw("<section><h2>Gaps</h2>");
    if job.gaps.is_empty() {
        out.raw("<p>None: nothing is missing from the record.</p></section>\n");
        return;
    }
    out.raw("<p>What is missing from the record.</p><ul class=\"gaps\">");
    for gap in &job.gaps {
        out.element("<li>", &view::gap(gap), "</li>");
    }
    out.raw("</ul></section>\n");
}

#[cfg(test)]
mod tests;
