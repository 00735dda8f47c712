//! One verdict: what, where, on what evidence.

use super::canvas::{self, Canvas, Style, fit};
use crate::document::{Evidence, RuledOut, Verdict};
use crate::format::{clean, utc};
use crate::view;
use crate::words;

pub(super) fn verdict(canvas: &mut Canvas, number: usize, verdict: &Verdict) {
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
    evidence(canvas, &verdict.evidence);
    ruled_out(canvas, &verdict.ruled_out);
    if !verdict.confirm.is_empty() {
        canvas.labelled("to confirm", &clean(&verdict.confirm));
    }
    if let Some(returns) = view::returns(verdict) {
        canvas.labelled("fix returns", &returns);
    }
}

pub(super) fn ruled_out(canvas: &mut Canvas, all: &[RuledOut]) {
    for (index, ruled_out) in all.iter().enumerate() {
        let label = if index == 0 { "ruled out" } else { "" };
        canvas.labelled(
            label,
            &format!("{}: {}", clean(&ruled_out.cause), clean(&ruled_out.why)),
        );
    }
}

/// Three columns, each cell wrapped, so that no number is ever cut.
pub(super) fn evidence(canvas: &mut Canvas, all: &[Evidence]) {
    const COLUMNS: [usize; 3] = [40, 22, 20];
    if all.is_empty() {
        return;
    }
    let titles = ["what was measured", "seen", "expected"].map(str::to_owned);
    let rows = all
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
