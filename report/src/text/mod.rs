//! The report for a terminal: what is lost, to whom, on what evidence, and the whole budget below it.

mod canvas;
mod leaves;
mod links;
mod ranks;
mod verdict;

use stallscope_attribution::leaf::Leaf;

use crate::document::{Document, Job};
use crate::format::{duration, tenths};
use crate::view;
use canvas::{Canvas, Style, WIDTH, fit};

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
    match (document.jobs.as_slice(), &document.links) {
        ([], None) => canvas.line("stallscope report: no job was recorded"),
        ([], Some(_)) => {
            canvas.line("stallscope report: no step of a job was recorded; this is what the devices told")
        }
        _ => {}
    }
    for (index, job) in document.jobs.iter().enumerate() {
        if index > 0 {
            canvas.line("");
        }
        render_job(&mut canvas, job);
    }
    if let Some(all) = &document.links {
        links::links(&mut canvas, all);
    }
    canvas.finish()
}

fn render_job(canvas: &mut Canvas, job: &Job) {
    head(canvas, job);
    for (index, verdict) in job.verdicts.iter().enumerate() {
        verdict::verdict(canvas, index + 1, verdict);
    }
    leaves::where_it_went(canvas, &job.total);
    leaves::kernels(canvas, job);
    ranks::by_node(canvas, job);
    ranks::by_rank(canvas, job);
    who_caused_it(canvas, job);
    ranks::side_by_side(canvas, job);
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
    for sentence in std::iter::once(view::mfu_sentence(job)).chain(view::roof(job)) {
        for part in canvas::wrap(&sentence, WIDTH) {
            canvas.line(&part);
        }
    }
}

fn who_caused_it(canvas: &mut Canvas, job: &Job) {
    let lines = view::blame_lines(job, MOST_BLAME);
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
    canvas.heading("WHO CAUSED THE WAITING", &view::waiting(job));
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
    use stallscope_attribution::job::{Efficiency, FlopsSource, KernelTime};

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
    fn waiting_under_compute_is_told_from_exposed_waiting() {
        let mut analysis = fixtures::thermal_straggler();
        analysis.blame[0].cost_ns += 10_000_000_000;
        let text = text(&analysis);
        let heading =
            "WHO CAUSED THE WAITING   42.50 s of waiting, exposed of it 32.50 s (comm.skew, 13.7 %)";
        assert!(text.contains(heading), "{text}");
    }

    #[test]
    fn what_the_kernels_were_and_how_mfu_is_counted_is_told() {
        let mut analysis = fixtures::healthy();
        let kernel = |class, time_ns| KernelTime {
            class,
            time_ns,
            count: 2,
        };
        analysis.work.kernels = vec![kernel("gemm", 3_000_000), kernel("unknown", 1_000_000)];
        analysis.work.efficiency = Some(Efficiency {
            source: FlopsSource::Declared,
            hfu_ppm: Some(700_000),
            convention: "of the declared shape".to_owned(),
            peak: "989.4 TFLOP/s bf16".to_owned(),
        });
        let text = text(&analysis);
        for part in [
            "KERNELS BY CLASS",
            "gemm                   75.0 %",
            "HFU, with repeated work, 70.0 %",
            "MFU counts FLOPs of the declared shape",
            "peak 989.4 TFLOP/s bf16",
            "What binds: matrix kernels",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_thousand_ranks_are_a_page_and_not_a_book() {
        let mut analysis = fixtures::thermal_straggler();
        let template = analysis.gpus[0].clone();
        for rank in 4..1_000 {
            let mut gpu = template.clone();
            gpu.subject.rank = rank;
            gpu.subject.node = format!("node{}", rank / 8);
            analysis.gpus.push(gpu);
        }
        let text = text(&analysis);
        assert!(text.lines().count() < 300, "{} lines", text.lines().count());
        assert!(text.contains("968 other ranks"), "{text}");
        assert!(text.contains("109 other nodes"), "{text}");
        assert!(
            text.contains("rank 2 · node1"),
            "the culprit is among those shown"
        );
    }

    #[test]
    fn a_report_without_jobs_says_so() {
        let text = render(&Document::from_analyses([]), TextOptions::default());
        assert_eq!(text, "stallscope report: no job was recorded\n");
    }

    #[test]
    fn links_are_told_with_and_without_a_job() {
        let document = fixtures::links_alone();
        let text = render(&document, TextOptions::default());
        for part in [
            "no step of a job was recorded",
            "LINKS AND FAULTS",
            "network.pcie   degraded, device",
            "rank 5, node1 GPU 3 0000:17:00.0 -> mlx5_1:1 (same switch, in use) to node0 mlx5_1:1",
            "where       node1, PCI 0000:18:00.0",
            "node1: mlx5_0:1: its rate was not measured",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(text.lines().all(|line| line.chars().count() <= WIDTH), "{text}");
        let read = Document::from_json(&document.to_json().expect("JSON")).expect("a document");
        assert_eq!(read, document);
        let page = crate::html::render(&document);
        assert!(
            page.contains("same switch, in use") && page.contains("network.pcie"),
            "{page}"
        );

        let mut analysis = fixtures::healthy();
        analysis.links = fixtures::link_report();
        analysis.links.findings[0].cost = stallscope_attribution::links::FindingCost::NothingMeasured;
        assert!(self::text(&analysis).contains("SEEN, COSTS NOTHING MEASURED"));
    }
}
