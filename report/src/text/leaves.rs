//! Where the time went, leaf by leaf.

use stallscope_attribution::leaf::Class;

use super::canvas::{self, Canvas, Style, bar, fit};
use crate::document::{Job, Rollup};
use crate::format::{clean, counted, duration, tenths};
use crate::share::tenths_of_percent;
use crate::view::{self, Line, Measured};
use crate::words;

pub(super) fn where_it_went(canvas: &mut Canvas, total: &Rollup) {
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

pub(super) fn gpus(count: u64) -> String {
    counted(count, "GPU")
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

/// What the kernels were, by the class of their names.
pub(super) fn kernels(canvas: &mut Canvas, job: &Job) {
    if job.kernels.is_empty() {
        return;
    }
    canvas.heading(
        "KERNELS BY CLASS",
        "length of kernels whatever ran beside them; classes by name",
    );
    let times: Vec<i128> = job.kernels.iter().map(|of| of.time_ns.into()).collect();
    for (of, share) in job.kernels.iter().zip(tenths_of_percent(&times)) {
        let (class, time) = (fit(&clean(&of.class), 20), duration(of.time_ns.into()));
        let count = counted(of.count, "kernel");
        canvas.line(&format!(
            "    {class} {:>6} % {:<14}{} {time:>9}  {count}",
            tenths(share),
            "",
            fit(&bar(share, 8), 8)
        ));
    }
}
