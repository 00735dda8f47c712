//! HTML and SVG text into which foreign text can only come escaped.

use crate::format::clean;

/// Markup under construction. Raw markup must be known at compile time; everything else is escaped or a number.
#[derive(Debug, Clone, Default)]
pub(crate) struct Markup {
    text: String,
}

impl Markup {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Markup written in this crate.
    pub(crate) fn raw(&mut self, markup: &'static str) -> &mut Self {
        self.text.push_str(markup);
        self
    }

    /// Text from anywhere: control characters replaced, markup escaped, safe in elements and quoted attributes.
    pub(crate) fn text(&mut self, text: &str) -> &mut Self {
        for c in clean(text).chars() {
            match c {
                '&' => self.text.push_str("&amp;"),
                '<' => self.text.push_str("&lt;"),
                '>' => self.text.push_str("&gt;"),
                '"' => self.text.push_str("&quot;"),
                '\'' => self.text.push_str("&#39;"),
                _ => self.text.push(c),
            }
        }
        self
    }

    /// A number.
    pub(crate) fn int(&mut self, number: i64) -> &mut Self {
        self.text.push_str(&number.to_string());
        self
    }

    /// Markup already built.
    pub(crate) fn part(&mut self, part: &Self) -> &mut Self {
        self.text.push_str(&part.text);
        self
    }

    /// An element around escaped text: `open` and `close` are its tags.
    pub(crate) fn element(&mut self, open: &'static str, text: &str, close: &'static str) -> &mut Self {
        self.raw(open).text(text).raw(close)
    }

    pub(crate) fn finish(self) -> String {
        self.text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_cannot_become_markup() {
        let mut markup = Markup::new();
        markup.element("<b title=\"x\">", "<script a='\"'>&\u{1b}", "</b>");
        let expected = "<b title=\"x\">&lt;script a=&#39;&quot;&#39;&gt;&amp;\u{fffd}</b>";
        assert_eq!(markup.finish(), expected);
    }
}
