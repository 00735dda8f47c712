//! The pictures: the waterfall from all GPU time to model math, and where each rank's time went.
//!
//! One unit of width is a tenth of a percent, so every coordinate is an integer and bars are as exact as the numbers
//! beside them.

use stallscope_attribution::leaf::{Class, Leaf};

use crate::document::{Job, Rollup};
use crate::format::tenths;
use crate::markup::Markup;
use crate::view::{self, Band, Line};

/// Losses drawn one by one; smaller ones share a row.
const MOST_LOSSES: usize = 14;

/// Left edge and width of the plot: a tenth of a percent is one unit.
const PLOT_X: i64 = 480;
const PLOT_WIDTH: i64 = 1000;
const WIDTH: i64 = 1900;
const ROW: i64 = 52;
const BAR: i64 = 34;
const TOP: i64 = 56;

/// Styles of the pictures; part of a page's style sheet, or inside a picture that stands alone.
pub(crate) const STYLE: &str = include_str!("html/picture.css");

/// The waterfall of a job as an SVG file that stands alone, light or dark with its viewer.
#[must_use]
pub fn waterfall_file(job: &Job) -> String {
    let mut file = Markup::new();
    file.raw("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n")
        .part(&waterfall(job, 0, true))
        .raw("\n");
    file.finish()
}

/// One row of the waterfall.
struct Row {
    label: String,
    code: String,
    class: &'static str,
    tenths: i64,
    bounds: Option<(i64, i64)>,
    note: String,
}

/// The waterfall, inline.
pub(crate) fn waterfall(job: &Job, index: i64, alone: bool) -> Markup {
    let rows = losses(job);
    let last = remainder(job);
    let height = TOP + ROW * (rows.len() as i64 + 2) + 24;
    let mut svg = open(index, "waterfall", height, alone);
    let spoken = format!("{} {}", view::headline(job), view::mfu_sentence(job));
    describe(
        &mut svg,
        index,
        "waterfall",
        "From all GPU time to model math",
        &spoken,
    );
    hatch(&mut svg, index, "waterfall");
    axis(&mut svg, height);
    let whole = Row {
        label: "all GPU time".to_owned(),
        code: String::new(),
        class: "whole",
        tenths: 1000,
        bounds: None,
        note: String::new(),
    };
    draw_row(&mut svg, index, &whole, 0, 0, "");
    let mut left = 1000;
    for (position, row) in rows.iter().enumerate() {
        let start = left - row.tenths.max(0);
        draw_row(&mut svg, index, row, position as i64 + 1, start, "−");
        left -= row.tenths;
        connector(&mut svg, left, position as i64 + 1);
    }
    draw_row(&mut svg, index, &last, rows.len() as i64 + 1, 0, "");
    svg.raw("</svg>");
    svg
}

/// What is subtracted, in the order nothing runs → only copies → only communication → compute that is not model
/// math. Without model FLOPs compute is not a loss.
fn losses(job: &Job) -> Vec<Row> {
    const ORDER: [Class; 4] = [Class::Idle, Class::Memory, Class::Comm, Class::Compute];
    let split_compute = view::ideal_known(&job.total);
    let lines = view::lines(&job.total);
    let mut drawn: Vec<Line> = Vec::new();
    for class in ORDER {
        let is_loss = |line: &&Line| {
            line.class == class
                && line.tenths != 0
                && line.name != Leaf::Ideal.name()
                && (class != Class::Compute || split_compute)
        };
        drawn.extend(lines.iter().filter(is_loss).cloned());
    }
    let mut sizes: Vec<i64> = drawn.iter().map(|line| line.tenths.abs()).collect();
    sizes.sort_unstable_by_key(|size| std::cmp::Reverse(*size));
    let least = sizes.get(MOST_LOSSES).copied().unwrap_or(0);
    let (own, small): (Vec<Line>, Vec<Line>) = drawn.into_iter().partition(|line| line.tenths.abs() > least);
    let mut rows: Vec<Row> = Vec::new();
    if !small.is_empty() {
        rows.push(Row {
            label: format!("{} smaller losses", small.len()),
            code: String::new(),
            class: "small",
            tenths: small.iter().map(|line| line.tenths).sum(),
            bounds: None,
            note: String::new(),
        });
    }
    rows.extend(own.into_iter().map(|line| row(job, line)));
    rows
}

fn row(job: &Job, line: Line) -> Row {
    let is_waiting = line.name == Leaf::CommSkew.name();
    let note = view::blame_lines(job, 1_000)
        .into_iter()
        .next()
        .filter(|_| is_waiting);
    Row {
        class: class(Band::of(&line.name, line.class)),
        label: line.words,
        code: line.name,
        tenths: line.tenths,
        bounds: line.bounds,
        note: note.map_or_else(String::new, |blame| format!("{}: {} →", blame.place, blame.cause)),
    }
}

/// What remains at the bottom: model math, or all compute when it cannot be told apart.
fn remainder(job: &Job) -> Row {
    let known = view::ideal_known(&job.total);
    let bands = view::bands(&job.total);
    let (band, label) = if known {
        (Band::Ideal, "model math = MFU")
    } else {
        (Band::Compute, "compute (model share unknown)")
    };
    Row {
        label: label.to_owned(),
        code: if known {
            Leaf::Ideal.name().to_owned()
        } else {
            "compute".to_owned()
        },
        class: class(band),
        tenths: bands[band as usize],
        bounds: view::lines(&job.total)
            .into_iter()
            .find(|line| known && line.name == Leaf::Ideal.name())
            .and_then(|l| l.bounds),
        note: String::new(),
    }
}

const fn class(band: Band) -> &'static str {
    match band {
        Band::Ideal => "ideal",
        Band::Compute => "compute",
        Band::Comm => "comm",
        Band::Waiting => "waiting",
        Band::Memory => "memory",
        Band::Idle => "idle",
    }
}

fn draw_row(svg: &mut Markup, index: i64, row: &Row, position: i64, start: i64, sign: &str) {
    let y = TOP + ROW * position;
    let baseline = y + 25;
    let is_gain = row.tenths < 0;
    svg.raw("<g><title>")
        .text(&row.code)
        .raw(" ")
        .text(&tenths(row.tenths))
        .raw(" %</title>");
    svg.raw("<text class=\"label\" x=\"")
        .int(PLOT_X - 24)
        .raw("\" y=\"")
        .int(baseline)
        .raw("\">");
    svg.text(&row.label).raw("</text>");
    let width = row.tenths.abs();
    bar(
        svg,
        index,
        "waterfall",
        if is_gain { "gain" } else { row.class },
        PLOT_X + start,
        y,
        width,
    );
    if let Some((low, high)) = row.bounds.filter(|(low, high)| low < high) {
        let edge = start + row.tenths;
        let (from, to) = if sign.is_empty() {
            (low, high)
        } else {
            (edge - high, edge - low)
        };
        whisker(
            svg,
            PLOT_X + from.clamp(0, 1000),
            PLOT_X + to.clamp(0, 1000),
            y + BAR / 2,
        );
    }
    if !row.note.is_empty() && (250..=PLOT_WIDTH).contains(&start) {
        svg.raw("<text class=\"note\" x=\"")
            .int(PLOT_X + start - 14)
            .raw("\" y=\"")
            .int(baseline)
            .raw("\">");
        svg.text(&row.note).raw("</text>");
    }
    let sign = if is_gain { "+" } else { sign };
    svg.raw("<text class=\"value\" x=\"")
        .int(PLOT_X + PLOT_WIDTH + 118)
        .raw("\" y=\"")
        .int(baseline)
        .raw("\">");
    svg.text(sign).text(&tenths(row.tenths.abs())).raw("</text>");
    svg.raw("<text class=\"code\" x=\"")
        .int(PLOT_X + PLOT_WIDTH + 146)
        .raw("\" y=\"")
        .int(baseline)
        .raw("\">");
    svg.text(&row.code).raw("</text></g>");
}

/// A bar, cut at the edges of the plot: an ideal above 100 % (FLOPs declared too high) must not cover the labels.
fn bar(svg: &mut Markup, index: i64, picture: &'static str, class: &'static str, x: i64, y: i64, width: i64) {
    let end = (x + width).clamp(PLOT_X, PLOT_X + PLOT_WIDTH);
    let x = x.clamp(PLOT_X, PLOT_X + PLOT_WIDTH - 2);
    let width = (end - x).max(2);
    svg.raw("<rect class=\"")
        .raw(class)
        .raw("\" x=\"")
        .int(x)
        .raw("\" y=\"")
        .int(y)
        .raw("\" width=\"")
        .int(width);
    svg.raw("\" height=\"").int(BAR).raw("\"");
    if class == "waiting" {
        svg.raw(" fill=\"url(#hatch-")
            .raw(picture)
            .raw("-")
            .int(index)
            .raw(")\"");
    }
    svg.raw("/>");
}

fn whisker(svg: &mut Markup, from: i64, to: i64, y: i64) {
    for (x1, y1, x2, y2) in [
        (from, y, to, y),
        (from, y - 7, from, y + 7),
        (to, y - 7, to, y + 7),
    ] {
        svg.raw("<line class=\"whisker\" x1=\"")
            .int(x1)
            .raw("\" y1=\"")
            .int(y1);
        svg.raw("\" x2=\"").int(x2).raw("\" y2=\"").int(y2).raw("\"/>");
    }
}

/// From the edge a loss leaves to the next row.
fn connector(svg: &mut Markup, left: i64, position: i64) {
    let (x, y) = (PLOT_X + left.clamp(0, PLOT_WIDTH), TOP + ROW * position + BAR);
    svg.raw("<line class=\"connector\" x1=\"")
        .int(x)
        .raw("\" x2=\"")
        .int(x)
        .raw("\" y1=\"")
        .int(y);
    svg.raw("\" y2=\"").int(y + ROW - BAR).raw("\"/>");
}

fn open(index: i64, picture: &'static str, height: i64, alone: bool) -> Markup {
    let mut svg = Markup::new();
    svg.raw("<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"picture\" viewBox=\"0 0 ")
        .int(WIDTH)
        .raw(" ")
        .int(height);
    svg.raw("\" role=\"img\" aria-labelledby=\"")
        .raw(picture)
        .raw("-title-")
        .int(index);
    svg.raw(" ").raw(picture).raw("-desc-").int(index).raw("\">");
    if alone {
        svg.raw("<style>")
            .raw(STYLE)
            .raw("</style><rect class=\"paper\" width=\"100%\" height=\"100%\"/>");
    }
    svg
}

fn describe(svg: &mut Markup, index: i64, picture: &'static str, title: &str, description: &str) {
    svg.raw("<title id=\"")
        .raw(picture)
        .raw("-title-")
        .int(index)
        .raw("\">")
        .text(title)
        .raw("</title>");
    svg.raw("<desc id=\"")
        .raw(picture)
        .raw("-desc-")
        .int(index)
        .raw("\">")
        .text(description)
        .raw("</desc>");
}

/// The pattern that tells waiting apart without colour.
fn hatch(svg: &mut Markup, index: i64, picture: &'static str) {
    svg.raw("<defs><pattern id=\"hatch-")
        .raw(picture)
        .raw("-")
        .int(index);
    svg.raw("\" width=\"14\" height=\"14\" patternUnits=\"userSpaceOnUse\" patternTransform=\"rotate(45)\">");
    svg.raw("<rect class=\"hatch-ground\" width=\"14\" height=\"14\"/><rect class=\"hatch-line\" width=\"6\" height=\"14\"/>");
    svg.raw("</pattern></defs>");
}

fn axis(svg: &mut Markup, height: i64) {
    for tick in [0, 250, 500, 750, 1000] {
        let x = PLOT_X + tick;
        svg.raw("<line class=\"grid\" x1=\"")
            .int(x)
            .raw("\" x2=\"")
            .int(x)
            .raw("\" y1=\"40\" y2=\"")
            .int(height - 16);
        svg.raw("\"/><text class=\"tick\" x=\"")
            .int(x)
            .raw("\" y=\"28\">")
            .int(tick / 10)
            .raw(" %</text>");
    }
}

/// Where each rank's time went, one stacked bar each, inline.
pub(crate) fn ranks(job: &Job, index: i64) -> Markup {
    let gpus = view::shown_gpus(job);
    let height = TOP + ROW * gpus.len() as i64 + 24;
    let mut svg = open(index, "ranks", height, false);
    let spoken = "One bar per rank, split into model math, other compute, exposed communication, waiting, copies and idle.";
    describe(&mut svg, index, "ranks", "Where each rank's time went", spoken);
    hatch(&mut svg, index, "ranks");
    axis(&mut svg, height);
    for (position, gpu) in gpus.iter().enumerate() {
        let y = TOP + ROW * position as i64;
        let verdict = job
            .verdicts
            .iter()
            .find(|verdict| verdict.place.rank == Some(gpu.rank));
        svg.raw("<g><text class=\"label\" x=\"")
            .int(PLOT_X - 24)
            .raw("\" y=\"")
            .int(y + 25)
            .raw("\">");
        svg.text(&shortened(&view::gpu_name(gpu), 36)).raw("</text>");
        stacked(&mut svg, index, &Rollup::over([*gpu]), y);
        if let Some(verdict) = verdict {
            svg.raw("<text class=\"mark\" x=\"")
                .int(PLOT_X + PLOT_WIDTH + 20)
                .raw("\" y=\"")
                .int(y + 25)
                .raw("\">◄ ");
            svg.text(&verdict.cause).raw("</text>");
        }
        svg.raw("</g>");
    }
    svg.raw("</svg>");
    svg
}

fn stacked(svg: &mut Markup, index: i64, rollup: &Rollup, y: i64) {
    let known = view::ideal_known(rollup);
    let mut x = PLOT_X;
    for (band, tenths_of_band) in Band::ALL.into_iter().zip(view::bands(rollup)) {
        // A band below zero cannot be drawn; the table carries its number.
        let width = tenths_of_band.clamp(0, PLOT_X + PLOT_WIDTH - x);
        if width == 0 {
            continue;
        }
        svg.raw("<g><title>")
            .text(band.words(known))
            .raw(" ")
            .text(&tenths(tenths_of_band))
            .raw(" %</title>");
        bar(svg, index, "ranks", class(band), x, y, width);
        if width >= 70 {
            svg.raw("<text class=\"inside on-")
                .raw(class(band))
                .raw("\" x=\"")
                .int(x + width / 2)
                .raw("\" y=\"")
                .int(y + 25)
                .raw("\">");
            svg.text(&tenths(tenths_of_band)).raw("</text>");
        }
        svg.raw("</g>");
        x += width;
    }
}

/// The legend of the bands, as HTML.
pub(crate) fn legend(job: &Job) -> Markup {
    let known = view::ideal_known(&job.total);
    let mut legend = Markup::new();
    legend.raw("<ul class=\"legend\">");
    for band in Band::ALL.into_iter().filter(|band| known || *band != Band::Ideal) {
        legend
            .raw("<li><span class=\"swatch s-")
            .raw(class(band))
            .raw("\"></span>")
            .text(band.words(known))
            .raw("</li>");
    }
    legend.raw("</ul>");
    legend
}

fn shortened(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    text.chars().take(most - 1).chain(['…']).collect()
}
