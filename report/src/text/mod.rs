//! The report for a terminal: what is lost, to whom, on what evidence, and the whole budget below it.

mod canvas;

use stallscope_attribution::leaf::{Class, Leaf};

use crate::document::{Document, Gpu, Job, Rollup, Verdict};
use crate::format::{clean, duration, ppm_percent, tenths, utc};
use crate::share::apportion;
use crate::view::{self, Band, Line, Measured};
use crate::words;
use canvas::{Canvas, Style, WIDTH, bar, fit};

/// Ranks side by side in one block of the table by rank.
const RANKS_PER_BLOCK: usize = 10;
/// Lines of the table of who caused the waiting.
const MOST_BLAME: usize = 12;

/// How to render.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TextOptions {
    /// Use ANSI colours.
    pub colour: bool,
}

/// The report as text of at most 100 columns.
#[must_use]
pub fn render(document: &Document, options: TextOptions) -> String {
    let mut canvas = Canvas::new(options.colour);
    if document.jobs.is_empty() {
        canvas.line("stallscope report: no job was recorded");
    }
    for (index, job) in document.jobs.iter().enumerate() {
        if index > 0 {
            canvas.line("");
        }
        render_job(&mut canvas, job);
    }
    canvas.finish()
}

fn render_job(canvas: &mut Canvas, job: &Job) {
    head(canvas, job);
    for (index, verdict) in job.verdicts.iter().enumerate() {
        render_verdict(canvas, index + 1, verdict);
    }
    where_it_went(canvas, &job.total);
    by_node(canvas, job);
    by_rank(canvas, job);
    who_caused_it(canvas, job);
    side_by_side(canvas, job);
    gaps(canvas, job);
    canvas.heading("HOW TO READ", "");
    for note in view::notes(job) {
        for (index, part) in canvas::wrap(&note, WIDTH - 4).iter().enumerate() {
            canvas.line(&format!("{}{part}", if index == 0 { "  " } else { "    " }));
        }
    }
}

fn head(canvas: &mut Canvas, job: &Job) {
    canvas.rule();
    let title = canvas.paint(Style::Strong, "stallscope");
    for (index, part) in canvas::wrap(&view::subject(job), WIDTH - 12).iter().enumerate() {
        canvas.line(&if index == 0 {
            format!("{title}  {part}")
        } else {
            format!("            {part}")
        });
    }
    canvas.rule();
    for part in canvas::wrap(&view::headline(job), WIDTH) {
        let part = canvas.paint(Style::Strong, &part);
        canvas.line(&part);
    }
    for part in canvas::wrap(&view::mfu_sentence(job), WIDTH) {
        canvas.line(&part);
    }
}

fn render_verdict(canvas: &mut Canvas, number: usize, verdict: &Verdict) {
    let style = if verdict.cause == "none" {
        Style::Good
    } else {
        Style::Alarm
    };
    let cause = canvas.paint(style, &clean(&verdict.cause));
    let confidence = canvas.paint(
        Style::Faint,
        &format!("confidence {}", clean(&verdict.confidence)),
    );
    canvas.heading(&format!("VERDICT {number}"), &format!("{cause}   {confidence}"));
    canvas.labelled("what", &clean(words::cause_named(&verdict.cause)));
    canvas.labelled("where", &view::place(&verdict.place));
    if verdict.cost_ns > 0 {
        canvas.labelled("costs", &view::cost(verdict));
    }
    if let Some(onset) = verdict.onset_unix_ns {
        canvas.labelled("since", &utc(onset));
    }
    evidence(canvas, verdict);
    for (index, ruled_out) in verdict.ruled_out.iter().enumerate() {
        let label = if index == 0 { "ruled out" } else { "" };
        canvas.labelled(
            label,
            &format!("{}: {}", clean(&ruled_out.cause), clean(&ruled_out.why)),
        );
    }
    if !verdict.confirm.is_empty() {
        canvas.labelled("to confirm", &clean(&verdict.confirm));
    }
    if let Some(returns) = view::returns(verdict) {
        canvas.labelled("fix returns", &returns);
    }
}

/// Three columns, each cell wrapped, so that no number is ever cut.
fn evidence(canvas: &mut Canvas, verdict: &Verdict) {
    const COLUMNS: [usize; 3] = [40, 22, 20];
    if verdict.evidence.is_empty() {
        return;
    }
    let titles = ["what was measured", "seen", "expected"].map(str::to_owned);
    let rows = verdict
        .evidence
        .iter()
        .map(|e| [clean(&e.what), clean(&e.value), clean(&e.expected)]);
    for (index, row) in std::iter::once(titles).chain(rows).enumerate() {
        let mut cells: [Vec<String>; 3] = Default::default();
        for ((cell, text), width) in cells.iter_mut().zip(&row).zip(COLUMNS) {
            *cell = canvas::wrap(text, width);
        }
        for part in 0..cells.iter().map(Vec::len).max().unwrap_or(0) {
            let label = if index == 0 { "evidence" } else { "" };
            let text = |column: usize| {
                fit(
                    cells[column].get(part).map_or("", String::as_str),
                    COLUMNS[column],
                )
            };
            let body = format!("{}  {}  {}", text(0), text(1), text(2));
            let body = if index == 0 {
                canvas.paint(Style::Faint, body.trim_end())
            } else {
                body
            };
            canvas.line(&format!("  {label:<12}{body}"));
        }
    }
}

fn where_it_went(canvas: &mut Canvas, total: &Rollup) {
    let time = duration(total.total_ns);
    canvas.heading(
        "WHERE THE TIME WENT",
        &format!("{time} of GPU time on all {} = 100.0 %", gpus(total.gpus)),
    );
    let lines = view::lines(total);
    for class in Class::ALL {
        let of_class: Vec<&Line> = lines.iter().filter(|line| line.class == class).collect();
        let (share, ns) = (
            of_class.iter().map(|l| l.tenths).sum(),
            total.sweep.class_ns(class),
        );
        let row = waterfall_row(words::class(class), share, None, ns, "");
        let row = canvas.paint(Style::Strong, &row);
        canvas.line(&row);
        for line in of_class {
            let row = leaf_row(line);
            let row = if line.ns == 0 {
                canvas.paint(Style::Faint, row.trim_end())
            } else {
                row
            };
            canvas.line(&row);
        }
    }
    let sum = lines.iter().map(|line| line.tenths).sum();
    canvas.line(&waterfall_row(
        "sum",
        sum,
        None,
        lines.iter().map(|line| line.ns).sum(),
        "",
    ));
}

fn gpus(count: u64) -> String {
    crate::format::counted(count, "GPU")
}

fn leaf_row(line: &Line) -> String {
    let name = format!("  {}", line.name);
    match line.measured {
        // Its zero means nothing: the time is in the residual of its class.
        Measured::Nowhere if line.ns == 0 => {
            format!(
                "  {} {:>6}   {:<33}{}",
                fit(&name, 22),
                "-",
                "not measured",
                line.words
            )
        }
        Measured::Nowhere => waterfall_row(&name, line.tenths, line.bounds, line.ns, "estimated"),
        Measured::Partly => waterfall_row(
            &name,
            line.tenths,
            line.bounds,
            line.ns,
            "at least; not on every GPU",
        ),
        Measured::Everywhere => waterfall_row(&name, line.tenths, line.bounds, line.ns, &line.words),
    }
}

fn waterfall_row(name: &str, share: i64, bounds: Option<(i64, i64)>, ns: i128, words: &str) -> String {
    let bounds = bounds
        .map(|(low, high)| format!("[{}, {}]", tenths(low), tenths(high)))
        .unwrap_or_default();
    let time = duration(ns);
    let row = format!(
        "  {} {:>6} % {bounds:<14}{} {time:>9}  {words}",
        fit(name, 22),
        tenths(share),
        fit(&bar(share, 8), 8)
    );
    canvas::cut(&row)
}

fn by_node(canvas: &mut Canvas, job: &Job) {
    if job.nodes.len() < 2 {
        return;
    }
    canvas.heading("BY NODE", &bands_legend(job));
    for (node, rollup) in &job.nodes {
        band_row(
            canvas,
            &format!("{} ({})", clean(node), gpus(rollup.gpus)),
            rollup,
            "",
        );
    }
}

fn by_rank(canvas: &mut Canvas, job: &Job) {
    let shown = view::shown_gpus(job);
    if shown.is_empty() {
        return;
    }
    canvas.heading("BY RANK", &bands_legend(job));
    for gpu in &shown {
        let marks: String = job
            .verdicts
            .iter()
            .enumerate()
            .fold(String::new(), |marks, (index, verdict)| {
                if verdict.place.rank == Some(gpu.rank) {
                    format!("{marks} ◄ V{}", index + 1)
                } else {
                    marks
                }
            });
        band_row(canvas, &gpu_name(gpu), &Rollup::over([*gpu]), &marks);
    }
    if shown.len() < job.gpus.len() {
        canvas.line(&format!(
            "  and {} ranks that lost less; `--format json` has all",
            job.gpus.len() - shown.len()
        ));
    }
    for block in shown.chunks(RANKS_PER_BLOCK) {
        canvas.line("");
        rank_block(canvas, block);
    }
}

fn gpu_name(gpu: &Gpu) -> String {
    format!("rank {} {} GPU {}", gpu.rank, clean(&gpu.node), gpu.gpu)
}

const fn glyph(band: Band) -> char {
    match band {
        Band::Ideal => '█',
        Band::Compute => '▓',
        Band::Comm => '▒',
        Band::Waiting => 'w',
        Band::Memory => 'm',
        Band::Idle => '·',
    }
}

fn bands_legend(job: &Job) -> String {
    let known = view::ideal_known(&job.total);
    let used = Band::ALL.into_iter().filter(|band| known || *band != Band::Ideal);
    used.map(|band| format!("{} {}", glyph(band), band.words(known)))
        .collect::<Vec<_>>()
        .join("  ")
}

fn band_row(canvas: &mut Canvas, name: &str, rollup: &Rollup, marks: &str) {
    const CELLS: i64 = 60;
    let bands = view::bands(rollup);
    // Negative bands (a clock above the reference) cannot be drawn; the numbers below carry them.
    let drawn: Vec<i128> = bands.iter().map(|tenths| i128::from((*tenths).max(0))).collect();
    let cells = apportion(&drawn, CELLS);
    let bar: String = Band::ALL
        .into_iter()
        .zip(cells)
        .flat_map(|(band, cells)| std::iter::repeat_n(glyph(band), usize::try_from(cells).unwrap_or(0)))
        .collect();
    let marks = marks.chars().take(WIDTH - 93).collect::<String>();
    canvas.line(&format!(
        "  {} {bar}{}",
        fit(name, 30),
        canvas.paint(Style::Alarm, &marks)
    ));
}

/// Leaves in rows, ranks in columns; only leaves that some rank shows.
fn rank_block(canvas: &mut Canvas, gpus: &[&Gpu]) {
    let columns: Vec<Vec<Line>> = gpus
        .iter()
        .map(|gpu| view::lines(&Rollup::over([*gpu])))
        .collect();
    let head: String = gpus
        .iter()
        .map(|gpu| format!("{:>7}", format!("r{}", gpu.rank)))
        .collect();
    let head = canvas.paint(
        Style::Faint,
        &canvas::cut(&format!("  {:<20}{head}", "percent of own time")),
    );
    canvas.line(&head);
    let mut names: Vec<&str> = Vec::new();
    for line in columns.iter().flatten().filter(|line| line.tenths != 0) {
        if !names.contains(&line.name.as_str()) {
            names.push(&line.name);
        }
    }
    let order = |name: &str| Leaf::from_name(name).map_or(usize::MAX, |leaf| leaf.index());
    names.sort_by_key(|name| order(name));
    for name in names {
        let cell = |lines: &Vec<Line>| {
            let line = lines.iter().find(|line| line.name == name);
            let text = match line {
                Some(line) if line.measured == Measured::Nowhere && line.ns == 0 => "-".to_owned(),
                Some(line) => tenths(line.tenths),
                None => "-".to_owned(),
            };
            format!("{text:>7}")
        };
        let cells: String = columns.iter().map(cell).collect();
        canvas.line(&canvas::cut(&format!("  {}{cells}", fit(name, 20))));
    }
    let sums = columns
        .iter()
        .map(|lines| format!("{:>7}", tenths(lines.iter().map(|line| line.tenths).sum())));
    canvas.line(&canvas::cut(&format!(
        "  {:<20}{}",
        "sum",
        sums.collect::<String>()
    )));
}

fn who_caused_it(canvas: &mut Canvas, job: &Job) {
    let lines = view::blame_lines(job, MOST_BLAME);
    let waiting_ns = job.total.leaf_ns(Leaf::CommSkew);
    if lines.is_empty() {
        let skew_known = job.total.is_measured(Leaf::CommSkew);
        let none = if skew_known {
            "no rank waited for another"
        } else {
            "waiting was not measured"
        };
        canvas.heading("WHO CAUSED THE WAITING", none);
        return;
    }
    let sum = tenths(lines.iter().map(|line| line.tenths).sum());
    canvas.heading(
        "WHO CAUSED THE WAITING",
        &format!(
            "comm.skew, {} = {sum} %, moved to who was late",
            duration(waiting_ns)
        ),
    );
    for line in lines {
        let (place, time) = (fit(&line.place, 36), duration(line.ns));
        let cause = if line.leaf.is_empty() {
            line.cause
        } else {
            format!("{} ({})", line.cause, line.leaf)
        };
        let row = format!("  {place} {:>6} % {time:>9}  {cause}", tenths(line.tenths));
        canvas.line(&canvas::cut(&row));
    }
}

fn side_by_side(canvas: &mut Canvas, job: &Job) {
    let shown = view::shown_gpus(job);
    if shown.is_empty() {
        return;
    }
    canvas.heading(
        "SIDE BY SIDE",
        "mean percent; a driver's 100 % says only that some kernel was resident",
    );
    let head = format!(
        "  {:<30}{:>9}{:>9}{:>9}{:>9}{:>9}",
        "", "driver", "SM", "tensor", "HBM", "MFU"
    );
    let head = canvas.paint(Style::Faint, &head);
    canvas.line(&head);
    for gpu in shown {
        let own = Rollup::over([gpu]);
        let mfu = match job.mfu_points {
            Some(_) if view::ideal_known(&own) => tenths(view::bands(&own)[Band::Ideal as usize]),
            _ => "unknown".to_owned(),
        };
        let name = fit(&gpu_name(gpu), 30);
        match (&gpu.activity, &gpu.activity_missing) {
            (Some(a), _) => {
                let [driver, sm, tensor, hbm] =
                    [a.driver_utilisation, a.sm, a.tensor, a.hbm].map(|share| ppm_percent(share.ppm));
                let row = format!("  {name}{driver:>9}{sm:>9}{tensor:>9}{hbm:>9}{mfu:>9}");
                canvas.line(&canvas::cut(&row));
            }
            (None, why) => {
                let why = clean(why.as_deref().unwrap_or("not measured"));
                canvas.line(&format!("  {name}  {}{mfu:>9}", fit(&why, 34)));
            }
        }
    }
}

fn gaps(canvas: &mut Canvas, job: &Job) {
    if job.gaps.is_empty() {
        canvas.heading("GAPS", "none: nothing is missing from the record");
        return;
    }
    canvas.heading("GAPS", "what is missing from the record");
    for gap in &job.gaps {
        for (index, part) in canvas::wrap(&view::gap(gap), WIDTH - 4).iter().enumerate() {
            canvas.line(&format!("{}{part}", if index == 0 { "  " } else { "    " }));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn text(analysis: &stallscope_attribution::job::JobAnalysis) -> String {
        render(&Document::from(analysis), TextOptions::default())
    }

    #[test]
    fn straggler() {
        insta::assert_snapshot!(text(&fixtures::thermal_straggler()));
    }

    #[test]
    fn healthy() {
        insta::assert_snapshot!(text(&fixtures::healthy()));
    }

    #[test]
    fn unexplained() {
        insta::assert_snapshot!(text(&fixtures::unexplained()));
    }

    #[test]
    fn gaps_are_named() {
        let text = text(&fixtures::with_gaps());
        let gaps = text.split("GAPS").nth(1).unwrap_or_default();
        insta::assert_snapshot!(gaps);
    }

    #[test]
    fn no_line_is_wider_than_the_report_and_nothing_steers_the_terminal() {
        let long = "a-name-without-any-end".repeat(30);
        for analysis in [
            fixtures::hostile(fixtures::HOSTILE),
            fixtures::hostile(&long),
            fixtures::with_gaps(),
        ] {
            let text = text(&analysis);
            for line in text.lines() {
                assert!(
                    line.chars().count() <= WIDTH,
                    "{} columns: {line}",
                    line.chars().count()
                );
            }
            assert!(!text.chars().any(|c| c != '\n' && c.is_control()));
        }
    }

    #[test]
    fn colour_changes_nothing_but_colour() {
        let document = Document::from(&fixtures::thermal_straggler());
        let coloured = render(&document, TextOptions { colour: true });
        let mut plain = String::new();
        let mut parts = coloured.split('\u{1b}');
        plain.push_str(parts.next().unwrap_or_default());
        for part in parts {
            plain.push_str(part.split_once('m').map_or("", |(_, text)| text));
        }
        let trimmed: Vec<&str> = plain.lines().map(str::trim_end).collect();
        assert_eq!(
            trimmed.join("\n") + "\n",
            render(&document, TextOptions::default())
        );
    }

    #[test]
    fn a_report_without_jobs_says_so() {
        let text = render(&Document::from_analyses([]), TextOptions::default());
        assert_eq!(text, "stallscope report: no job was recorded\n");
    }
}
