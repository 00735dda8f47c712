//! Text, one line per check, and JSON.

use std::fmt::Write as _;

use super::{Report, State};

impl State {
    const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Limited => "limited",
            Self::Missing => "missing",
            Self::NotConfigured => "-",
        }
    }
}

impl Report {
    /// One line per check: state, name, what was found, what is lost, what to do.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut out = format!("stallscope {} on {}\n", self.version, self.node);
        for check in &self.checks {
            // Writing to a String cannot fail.
            let _ = write!(
                out,
                "{:<8} {:<15} {}",
                check.state.word(),
                check.name,
                one_line(&check.found)
            );
            if !check.lost.is_empty() {
                let _ = write!(out, " | lost: {}", one_line(&check.lost));
            }
            if !check.fix.is_empty() {
                let _ = write!(out, " | fix: {}", one_line(&check.fix));
            }
            out.push('\n');
        }
        let missing: Vec<&str> = self
            .checks
            .iter()
            .filter(|check| check.needed && check.state == State::Missing)
            .map(|check| check.name)
            .collect();
        let _ = if missing.is_empty() {
            writeln!(out, "everything needed for a useful report is here")
        } else {
            writeln!(out, "a useful report needs: {}", missing.join(", "))
        };
        out
    }

    /// The whole report as one JSON object.
    ///
    /// # Errors
    /// Never for a report made by [`examine`](super::examine).
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        serde_json::to_string_pretty(self)
    }
}

fn one_line(text: &str) -> String {
    text.replace('\n', "; ")
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::super::{Check, Report, State};

    fn report() -> Report {
        let checks = vec![
            Check::ok("kernel.version", "6.1").needed(),
            Check::bad(
                "nvml",
                State::Missing,
                "no GPU\ncounters",
                "the GPU side",
                "install the driver",
            )
            .needed(),
            Check::bad(
                "kernel.btf",
                State::Limited,
                "none",
                "a little",
                "boot another kernel",
            ),
        ];
        Report::new("n0".to_owned(), checks)
    }

    #[test]
    fn text_has_one_line_per_check_and_a_verdict() {
        let text = report().to_text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 5, "{text}");
        assert_eq!(lines[1], "ok       kernel.version  6.1");
        assert_eq!(
            lines[2],
            "missing  nvml            no GPU; counters | lost: the GPU side | fix: install the driver"
        );
        assert_eq!(lines[4], "a useful report needs: nvml");
    }

    #[test]
    fn json_is_the_same_report() {
        let report = report();
        assert!(!report.useful);
        let json: serde_json::Value = serde_json::from_str(&report.to_json().unwrap()).unwrap();
        assert_eq!(json["schema"], "stallscope.doctor/1");
        assert_eq!(json["useful"], false);
        assert_eq!(json["checks"][1]["state"], "missing");
        assert_eq!(json["checks"][2]["needed"], false);
    }

    #[test]
    fn limited_things_leave_a_report_useful() {
        let limited = Check::bad(
            "kernel.btf",
            State::Limited,
            "none",
            "a little",
            "boot another kernel",
        )
        .needed();
        let report = Report::new("n0".to_owned(), vec![limited]);
        assert!(report.useful);
        assert!(
            report
                .to_text()
                .ends_with("everything needed for a useful report is here\n")
        );
    }
}
