//! The verifier gate: how many instructions the kernel's verifier walks per program, against a checked-in table.
//!
//! A program that suddenly costs the verifier far more is close to being rejected by an older kernel.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::paths::{self, Paths};
use crate::shell;

/// Instructions walked, by program name.
type Counts = BTreeMap<String, u64>;

/// Growth over the table that passes without a new table, percent. Compilers move counts by a few percent.
const TOLERANCE_PERCENT: u64 = 10;

/// How many times the table's count another kernel may walk: older verifiers prune less, 4.7 times at most was seen on 6.1.
const OTHER_KERNEL: u64 = 6;

/// Loads the object and holds the counts against the table; with `write` renews the table instead.
///
/// # Errors
/// The kernel refused a program, or the counts differ.
pub fn gate(paths: &Paths, write: bool) -> Result<()> {
    let counted = count(paths, &super::build(paths, false)?)?;
    let file = table_file(paths);
    if write {
        return fs::write(&file, render(&counted))
            .with_context(|| format!("failed to write {}", file.display()));
    }
    compare(&read(&file)?, &counted)?;
    eprintln!(
        "bpf-stats: the kernel took {} programs; {} instructions the largest",
        counted.len(),
        largest(&counted)
    );
    Ok(())
}

/// Holds counts of another kernel against the table, `name count` a line: every program is there, and none costs more than
/// [`OTHER_KERNEL`] times what the table says. Hands back a summary.
///
/// # Errors
/// A program is missing or costs more.
pub(crate) fn within_limits(paths: &Paths, text: &str) -> Result<String> {
    let limits = read(&table_file(paths))?
        .into_iter()
        .map(|(name, count)| (name, count * OTHER_KERNEL))
        .collect();
    let counted = parse(text)?;
    compare(&limits, &counted)?;
    Ok(format!(
        "{} programs; {} instructions the largest",
        counted.len(),
        largest(&counted)
    ))
}

fn table_file(paths: &Paths) -> PathBuf {
    paths.root.join("ebpf/verifier-counts.txt")
}

fn largest(counts: &Counts) -> u64 {
    counts.values().copied().max().unwrap_or(0)
}

fn count(paths: &Paths, object: &Path) -> Result<Counts> {
    let text = shell::output(
        Command::new(paths::cargo())
            .current_dir(&paths.root)
            .args([
                "run",
                "--quiet",
                "--locked",
                "--package",
                "stallscope-e2e",
                "--bin",
                "verifier-counts",
            ])
            .env("STALLSCOPE_BPF_OBJECT", object),
    )
    .context("the programs were not loaded")?;
    parse(&text)
}

/// Compares what the kernel counted with the checked-in table: no program may be missing from either side, or cost more
/// than the tolerance allows.
fn compare(table: &Counts, counted: &Counts) -> Result<()> {
    let mut complaints = Vec::new();
    for (program, &count) in counted {
        match table.get(program) {
            None => complaints.push(format!("{program}: {count} instructions, not in the table")),
            Some(&limit) if count > limit + limit * TOLERANCE_PERCENT / 100 => {
                complaints.push(format!("{program}: {count} instructions, table says {limit}"));
            }
            Some(_) => {}
        }
    }
    complaints.extend(
        table
            .keys()
            .filter(|program| !counted.contains_key(*program))
            .map(|program| format!("{program}: not loaded")),
    );
    if complaints.is_empty() {
        return Ok(());
    }
    bail!(
        "verifier counts differ from ebpf/verifier-counts.txt (`cargo xtask bpf-stats --write` accepts them):\n  {}",
        complaints.join("\n  ")
    )
}

/// Reads the checked-in table.
fn read(path: &Path) -> Result<Counts> {
    let text = fs::read_to_string(path).with_context(|| format!("failed to read {}", path.display()))?;
    parse(&text).with_context(|| format!("{} is malformed", path.display()))
}

fn parse(text: &str) -> Result<Counts> {
    text.lines()
        .filter(|line| !line.starts_with('#') && !line.trim().is_empty())
        .map(|line| {
            let (name, count) = line
                .split_once(char::is_whitespace)
                .context("a line is not `name count`")?;
            Ok((
                name.to_owned(),
                count.trim().parse().with_context(|| format!("count of {name}"))?,
            ))
        })
        .collect()
}

/// The table as it is checked in.
fn render(counts: &Counts) -> String {
    let mut text = String::from(
        "# Instructions the kernel's verifier walked per program. `cargo xtask bpf-stats --write` renews this file.\n",
    );
    for (name, count) in counts {
        let _ = writeln!(text, "{name:<40} {count}");
    }
    text
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn counts(entries: &[(&str, u64)]) -> Counts {
        entries
            .iter()
            .map(|&(name, count)| (name.to_owned(), count))
            .collect()
    }

    #[test]
    fn the_table_round_trips() {
        let table = counts(&[("nccl_all_reduce", 812), ("sched_switch", 99)]);
        assert_eq!(parse(&render(&table)).unwrap(), table);
        assert!(parse("nonsense").is_err());
    }

    #[test]
    fn growth_and_absence_are_named() {
        let table = counts(&[("a", 100), ("b", 100), ("gone", 1)]);
        let error = compare(&table, &counts(&[("a", 110), ("b", 111), ("new", 5)]))
            .unwrap_err()
            .to_string();
        assert!(!error.contains("a: 110"), "{error}");
        assert!(
            error.contains("b: 111") && error.contains("new: 5") && error.contains("gone: not loaded"),
            "{error}"
        );
        assert!(compare(&table, &table).is_ok());
    }
}
