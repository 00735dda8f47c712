//! The tables of the page.

use stallscope_attribution::leaf::{Class, Leaf};

use crate::document::{Evidence, Job, Rollup, RuledOut};
use crate::format::{duration, ppm_percent, tenths};
use crate::markup::Markup;
use crate::share::tenths_of_percent;
use crate::view::{self, Band, Line, Measured};
use crate::words;

/// Lines of the table of who caused the waiting.
const MOST_BLAME: usize = 20;

pub(super) fn evidence(out: &mut Markup, all: &[Evidence]) {
    if all.is_empty() {
        return;
    }
    out.raw("<table class=\"evidence\"><thead><tr><th>what was measured</th><th>seen</th><th>expected</th></tr></thead><tbody>");
    for evidence in all {
        out.element("<tr><td>", &evidence.what, "</td>");
        out.element("<td class=\"seen\">", &evidence.value, "</td>");
        out.element("<td class=\"q\">", &evidence.expected, "</td></tr>");
    }
    out.raw("</tbody></table>\n");
}

pub(super) fn ruled_out(out: &mut Markup, all: &[RuledOut]) {
    if all.is_empty() {
        return;
    }
    out.raw("<table class=\"evidence\"><thead><tr><th>ruled out</th><th>because</th></tr></thead><tbody>");
    for ruled_out in all {
        out.element("<tr><td class=\"c\">", &ruled_out.cause, "</td>");
        out.element("<td class=\"q\">", &ruled_out.why, "</td></tr>");
    }
    out.raw("</tbody></table>\n");
}

pub(super) fn who_caused_it(out: &mut Markup, job: &Job) {
    out.raw("<section><h2>Who caused the waiting</h2>");
    let lines = view::blame_lines(job, MOST_BLAME);
    if lines.is_empty() {
        let known = job.total.is_measured(Leaf::CommSkew);
        out.element(
            "<p>",
            if known {
                "No rank waited for another."
            } else {
                "Waiting was not measured."
            },
            "</p></section>\n",
        );
        return;
    }
    out.element("<p>", &view::waiting(job), ".</p>");
    out.raw("<div class=\"panel\"><table><thead><tr><th>who</th><th>cause</th><th>leaf</th>");
    out.raw("<th class=\"n\">GPU time of others</th><th class=\"n\">share</th></tr></thead><tbody>");
    for line in lines {
        out.element("<tr><td>", &line.place, "</td>")
            .element("<td class=\"c\">", &line.cause, "</td>");
        out.element("<td class=\"c\">", &line.leaf, "</td>").element(
            "<td class=\"n\">",
            &duration(line.ns),
            "</td>",
        );
        out.element("<td class=\"n\">", &tenths(line.tenths), " %</td></tr>");
    }
    out.raw("</tbody></table></div></section>\n");
}

pub(super) fn side_by_side(out: &mut Markup, job: &Job) {
    // Traces hold no device counters: a table of nothing says nothing.
    if job.gpus.iter().all(|gpu| gpu.activity.is_none()) && job.mfu_points.is_none() && job.tier == "A" {
        return;
    }
    out.raw("<section><h2>Side by side</h2><p>A driver's 100 % says only that some kernel was resident, even one that ");
    out.raw("waits. Mean percent over the steps.</p><div class=\"panel\"><table><thead><tr><th>GPU</th><th>device</th>");
    out.raw("<th class=\"n\">driver utilisation</th><th class=\"n\">SM</th><th class=\"n\">tensor</th>");
    out.raw("<th class=\"n\">HBM</th><th class=\"n\">MFU</th></tr></thead><tbody>");
    for gpu in view::shown_gpus(job) {
        let own = Rollup::over([gpu]);
        out.element("<tr><td>", &view::gpu_name(gpu), "</td>");
        out.element("<td class=\"q\">", &gpu.device, "</td>");
        match &gpu.activity {
            Some(a) => {
                for share in [a.driver_utilisation, a.sm, a.tensor, a.hbm] {
                    out.element("<td class=\"n\">", &ppm_percent(share.ppm), "</td>");
                }
            }
            None => {
                let why = gpu.activity_missing.as_deref().unwrap_or("not measured");
                out.element("<td class=\"q\" colspan=\"4\">", why, "</td>");
            }
        }
        let mfu = match job.mfu_points {
            Some(_) if view::ideal_known(&own) => tenths(view::bands(&own)[Band::Ideal as usize]),
            _ => "unknown".to_owned(),
        };
        out.element("<td class=\"n\">", &mfu, "</td></tr>");
    }
    out.raw("</tbody></table></div></section>\n");
}

/// What the kernels were, by the class of their names.
pub(super) fn kernels(out: &mut Markup, job: &Job) {
    if job.kernels.is_empty() {
        return;
    }
    out.raw("<section><h2>Kernels by class</h2><p>Length of kernels whatever ran beside them; classes by name.</p>");
    out.raw("<div class=\"panel\"><table><thead><tr><th>class</th><th class=\"n\">kernels</th><th class=\"n\">time</th>");
    out.raw("<th class=\"n\">share</th></tr></thead><tbody>");
    let times: Vec<i128> = job.kernels.iter().map(|of| of.time_ns.into()).collect();
    for (of, share) in job.kernels.iter().zip(tenths_of_percent(&times)) {
        out.element("<tr><td class=\"c\">", &of.class, "</td>");
        out.element("<td class=\"n\">", &of.count.to_string(), "</td>");
        out.element("<td class=\"n\">", &duration(of.time_ns.into()), "</td>");
        out.element("<td class=\"n\">", &tenths(share), " %</td></tr>");
    }
    out.raw("</tbody></table></div></section>\n");
}

pub(super) fn budget(out: &mut Markup, job: &Job) {
    out.raw("<section><h2>The whole budget</h2><p>Every nanosecond is in exactly one leaf; ");
    out.raw("one that was not measured has no number, its time is in the last leaf of its class.</p>");
    out.raw(
        "<div class=\"panel\"><table><thead><tr><th>leaf</th><th>what it is</th><th class=\"n\">share</th>",
    );
    out.raw("<th class=\"n\">bounds</th><th class=\"n\">GPU time</th></tr></thead><tbody>");
    let lines = view::lines(&job.total);
    for class in Class::ALL {
        let of_class: Vec<&Line> = lines.iter().filter(|line| line.class == class).collect();
        out.element(
            "<tr class=\"group\"><td colspan=\"2\">",
            words::class(class),
            "</td>",
        );
        numbers(
            out,
            of_class.iter().map(|line| line.tenths).sum(),
            None,
            job.total.sweep.class_ns(class),
        );
        of_class.into_iter().for_each(|line| leaf(out, line));
    }
    out.raw("<tr class=\"sum\"><td colspan=\"2\">sum</td>");
    numbers(
        out,
        lines.iter().map(|line| line.tenths).sum(),
        None,
        lines.iter().map(|line| line.ns).sum(),
    );
    out.raw("</tbody></table></div>\n");
    by_rank(out, job);
    out.raw("</section>\n");
}

fn leaf(out: &mut Markup, line: &Line) {
    out.raw(if line.ns == 0 {
        "<tr class=\"zero\">"
    } else {
        "<tr>"
    });
    out.element("<td class=\"c\">", &line.name, "</td>");
    match line.measured {
        Measured::Nowhere if line.ns == 0 => {
            out.element(
                "<td class=\"q\">",
                &line.words,
                "</td><td class=\"n\" colspan=\"3\">not measured</td></tr>",
            );
            return;
        }
        Measured::Partly => out.element(
            "<td class=\"q\">",
            &line.words,
            " (not measured on every GPU)</td>",
        ),
        Measured::Nowhere => out.element("<td class=\"q\">", &line.words, " (estimated)</td>"),
        Measured::Everywhere => out.element("<td class=\"q\">", &line.words, "</td>"),
    };
    numbers(out, line.tenths, line.bounds, line.ns);
}

fn numbers(out: &mut Markup, share: i64, bounds: Option<(i64, i64)>, ns: i128) {
    let bounds = bounds
        .map(|(low, high)| format!("{} – {}", tenths(low), tenths(high)))
        .unwrap_or_default();
    out.element("<td class=\"n\">", &tenths(share), " %</td>")
        .element("<td class=\"n\">", &bounds, "</td>");
    out.element("<td class=\"n\">", &duration(ns), "</td></tr>\n");
}

/// Leaves in rows, ranks in columns; folded, because it grows with the job.
fn by_rank(out: &mut Markup, job: &Job) {
    let gpus = view::shown_gpus(job);
    let columns: Vec<Vec<Line>> = gpus
        .iter()
        .map(|gpu| view::lines(&Rollup::over([*gpu])))
        .collect();
    out.raw("<details><summary>By rank, percent of the rank's own time</summary><div class=\"panel wide\"><table><thead><tr><th>leaf</th>");
    for gpu in &gpus {
        out.element("<th class=\"n\">", &format!("rank {}", gpu.rank), "</th>");
    }
    out.raw("</tr></thead><tbody>");
    for known in Leaf::ALL {
        let cells: Vec<Option<&Line>> = columns
            .iter()
            .map(|lines| lines.iter().find(|line| line.name == known.name()))
            .collect();
        if cells.iter().flatten().all(|line| line.tenths == 0) {
            continue;
        }
        out.element("<tr><td class=\"c\">", known.name(), "</td>");
        for cell in cells {
            let is_missing = |line: &Line| line.measured == Measured::Nowhere && line.ns == 0;
            let text = cell
                .filter(|line| !is_missing(line))
                .map_or_else(|| "-".to_owned(), |line| tenths(line.tenths));
            out.element("<td class=\"n\">", &text, "</td>");
        }
        out.raw("</tr>");
    }
    out.raw("</tbody></table></div></details>\n");
}
