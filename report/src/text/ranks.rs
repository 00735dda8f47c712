//! The same budget by node and by rank.

use stallscope_attribution::leaf::Leaf;

use super::canvas::{self, Canvas, Style, WIDTH, fit};
use super::leaves::gpus;
use crate::document::{Gpu, Job, Rollup};
use crate::format::{clean, ppm_percent, tenths};
use crate::share::apportion;
use crate::view::{self, Band, Line, Measured};

/// Ranks side by side in one block of the table by rank.
const RANKS_PER_BLOCK: usize = 10;

pub(super) fn by_node(canvas: &mut Canvas, job: &Job) {
    if job.nodes.len() < 2 {
        return;
    }
    canvas.heading("BY NODE", &bands_legend(job));
    let (shown, rest) = view::shown_nodes(job);
    for (node, rollup) in &shown {
        band_row(
            canvas,
            &format!("{} ({})", clean(node), gpus(rollup.gpus)),
            rollup,
            "",
        );
    }
    if let Some(rest) = rest {
        let nodes = job.nodes.len() - shown.len();
        band_row(
            canvas,
            &format!("{nodes} other nodes ({})", gpus(rest.gpus)),
            &rest,
            "",
        );
    }
}

pub(super) fn by_rank(canvas: &mut Canvas, job: &Job) {
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
        band_row(canvas, &view::gpu_name(gpu), &Rollup::over([*gpu]), &marks);
    }
    if let Some(rest) = view::hidden_gpus(job) {
        band_row(canvas, &format!("{} other ranks", rest.gpus), &rest, "");
        canvas.line("  the others lost less; `--format json` has all");
    }
    for block in shown.chunks(RANKS_PER_BLOCK) {
        canvas.line("");
        rank_block(canvas, block);
    }
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

pub(super) fn side_by_side(canvas: &mut Canvas, job: &Job) {
    let shown = view::shown_gpus(job);
    // Traces hold no device counters: a table of nothing says nothing.
    if shown.iter().all(|gpu| gpu.activity.is_none()) && job.mfu_points.is_none() && job.tier == "A" {
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
        let name = fit(&view::gpu_name(gpu), 30);
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
