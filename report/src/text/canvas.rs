//! Lines of at most 100 columns, coloured only when asked.

/// Columns of the report.
pub(crate) const WIDTH: usize = 100;

/// How a piece of text stands out, where colour is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Heading,
    Strong,
    Alarm,
    Good,
    Faint,
}

impl Style {
    const fn code(self) -> &'static str {
        match self {
            Self::Heading => "1;36",
            Self::Strong => "1",
            Self::Alarm => "1;31",
            Self::Good => "1;32",
            Self::Faint => "2",
        }
    }
}

/// The text so far.
pub(crate) struct Canvas {
    text: String,
    colour: bool,
}

impl Canvas {
    pub(crate) const fn new(colour: bool) -> Self {
        Self {
            text: String::new(),
            colour,
        }
    }

    /// The text in a style; unchanged without colour.
    pub(crate) fn paint(&self, style: Style, text: &str) -> String {
        if self.colour {
            format!("\u{1b}[{}m{text}\u{1b}[0m", style.code())
        } else {
            text.to_owned()
        }
    }

    pub(crate) fn line(&mut self, line: &str) {
        self.text.push_str(line.trim_end());
        self.text.push('\n');
    }

    pub(crate) fn rule(&mut self) {
        let rule = self.paint(Style::Faint, &"─".repeat(WIDTH));
        self.line(&rule);
    }

    pub(crate) fn heading(&mut self, heading: &str, rest: &str) {
        self.line("");
        let heading = self.paint(Style::Heading, heading);
        self.line(&format!("{heading}   {rest}"));
    }

    /// A label and a paragraph, wrapped with a hanging indent.
    pub(crate) fn labelled(&mut self, label: &str, text: &str) {
        const INDENT: usize = 14;
        for (index, part) in wrap(text, WIDTH - INDENT).iter().enumerate() {
            let label = if index == 0 { label } else { "" };
            self.line(&format!("  {label:<width$}{part}", width = INDENT - 2));
        }
    }

    pub(crate) fn finish(self) -> String {
        self.text
    }
}

/// Words in lines of at most `width` characters; a longer word is cut.
pub(crate) fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    let mut used = 0;
    for word in text.split_whitespace() {
        let mut letters: Vec<char> = word.chars().collect();
        if used > 0 && used + 1 + letters.len() > width {
            lines.push(String::new());
            used = 0;
        }
        while letters.len() > width {
            let rest = letters.split_off(width);
            append(&mut lines, &letters);
            lines.push(String::new());
            letters = rest;
        }
        if used > 0 {
            append(&mut lines, &[' ']);
            used += 1;
        }
        append(&mut lines, &letters);
        used += letters.len();
    }
    lines
}

fn append(lines: &mut [String], letters: &[char]) {
    if let Some(line) = lines.last_mut() {
        line.extend(letters);
    }
}

/// The text in exactly `width` characters: padded, or cut with an ellipsis.
pub(crate) fn fit(text: &str, width: usize) -> String {
    let length = text.chars().count();
    if length <= width {
        return format!("{text}{}", " ".repeat(width - length));
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// The line without what goes beyond the report's width.
pub(crate) fn cut(line: &str) -> String {
    line.chars().take(WIDTH).collect()
}

/// A bar of `width` cells for tenths of a percent, to an eighth of a cell. Anything above zero shows.
pub(crate) fn bar(tenths: i64, width: usize) -> String {
    const EIGHTHS: [char; 8] = [' ', '▏', '▎', '▍', '▌', '▋', '▊', '▉'];
    let Ok(share @ 1..) = u64::try_from(tenths) else {
        return String::new();
    };
    let eighths = (share.min(1000) * width as u64 * 8).div_ceil(1000);
    let full = usize::try_from(eighths / 8).unwrap_or(width);
    let mut bar = "█".repeat(full);
    if let Ok(part @ 1..) = usize::try_from(eighths % 8) {
        bar.push(EIGHTHS[part]);
    }
    bar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrapping_keeps_every_word_and_the_width() {
        let text = "one two threefour five-is-a-long-word six";
        let lines = wrap(text, 9);
        assert!(lines.iter().all(|line| line.chars().count() <= 9), "{lines:?}");
        let letters = |text: &str| text.chars().filter(|c| !c.is_whitespace()).collect::<String>();
        assert_eq!(letters(&lines.concat()), letters(text));
        assert_eq!(wrap("", 9), [""]);
    }

    #[test]
    fn bars_never_exceed_their_width_and_never_hide_a_loss() {
        assert_eq!(bar(1000, 10), "█".repeat(10));
        assert_eq!(bar(5000, 10), "█".repeat(10));
        assert_eq!(bar(1, 10), "▏");
        assert_eq!(bar(0, 10), "");
        assert_eq!(bar(-50, 10), "");
    }
}
