//! Cuts a JSON stream into the values that matter, through a sliding buffer: memory does not grow with the file.

use std::io::Read;

use super::TraceError;
use super::event::{Event, Fields};
use super::walk::Stop;

/// Bytes read at once, when a text is long.
const CHUNK: usize = 256 * 1024;
/// And at first: a job of thousands of ranks has thousands of short ones.
const FIRST_CHUNK: usize = 16 * 1024;
/// Longest single event or top-level field that is read. Kineto's are below 100 KiB.
pub(super) const LONGEST_VALUE: usize = 16 * 1024 * 1024;

/// A stream of JSON text.
pub(super) struct Scanner<R> {
    reader: R,
    buffer: Vec<u8>,
    /// Bytes to read next.
    chunk: usize,
    at: usize,
    ended: bool,
    /// Why reading stopped before the end, when it did.
    broken: Option<String>,
    /// Bytes consumed before the buffer.
    before: u64,
}

/// What the text ended in.
pub(super) enum Cut {
    /// The text ended inside the value.
    Ended,
    /// The trace cannot be read on.
    Failed(TraceError),
}

impl<R: Read> Scanner<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            buffer: Vec::new(),
            chunk: FIRST_CHUNK,
            at: 0,
            ended: false,
            broken: None,
            before: 0,
        }
    }

    /// Bytes of text consumed.
    pub(super) fn offset(&self) -> u64 {
        self.before + self.at as u64
    }

    /// Why reading stopped early: a damaged or cut compressed stream, or an error of the disk.
    pub(super) fn broken(&self) -> Option<&str> {
        self.broken.as_deref()
    }

    /// The next byte that is not white space, not consumed; `None` at the end.
    pub(super) fn peek(&mut self) -> Option<u8> {
        loop {
            while let Some(byte) = self.buffer.get(self.at) {
                if !byte.is_ascii_whitespace() {
                    return Some(*byte);
                }
                self.at += 1;
            }
            if !self.fill() {
                return None;
            }
        }
    }

    /// Consumes the byte that [`Self::peek`] gave.
    pub(super) fn skip(&mut self) {
        self.at += 1;
    }

    /// The value that begins at the next byte, consumed. The text is valid until the next call.
    pub(super) fn value(&mut self) -> Result<&[u8], Cut> {
        if self.peek().is_none() {
            return Err(Cut::Ended);
        }
        let mut state = Nesting::default();
        let mut seen = 0;
        loop {
            let text = &self.buffer[self.at + seen..];
            if let Some(length) = state.end(text) {
                let from = self.at;
                self.at += seen + length;
                return Ok(&self.buffer[from..self.at]);
            }
            seen += text.len();
            if seen > LONGEST_VALUE {
                return Err(self.too_long());
            }
            if !self.fill() {
                return if state.is_scalar() && seen > 0 {
                    let from = self.at;
                    self.at += seen;
                    Ok(&self.buffer[from..self.at])
                } else {
                    Err(Cut::Ended)
                };
            }
        }
    }

    /// The event that begins at the next byte, consumed; `None` for an object that is no JSON, consumed too. It is
    /// valid until the next call.
    pub(super) fn event(&mut self) -> Result<Option<Event<'_>>, Cut> {
        loop {
            match Fields::find(&self.buffer[self.at..]) {
                Ok((fields, length)) => {
                    let text = &self.buffer[self.at..self.at + length];
                    self.at += length;
                    return Ok(Some(Event { text, fields }));
                }
                // Its brackets may still tell where it ends.
                Err(Stop::Broken) => return self.value().map(|_| None),
                Err(Stop::Ended) => {
                    if self.buffer.len() - self.at > LONGEST_VALUE {
                        return Err(self.too_long());
                    }
                    if !self.fill() {
                        return Err(Cut::Ended);
                    }
                }
            }
        }
    }

    fn too_long(&self) -> Cut {
        Cut::Failed(TraceError::TooLong {
            at_byte: self.offset(),
            limit: LONGEST_VALUE,
        })
    }

    /// Skips the value that begins at the next byte, however long it is.
    pub(super) fn skip_value(&mut self) -> Result<(), Cut> {
        if self.peek().is_none() {
            return Err(Cut::Ended);
        }
        let mut state = Nesting::default();
        loop {
            let text = &self.buffer[self.at..];
            if let Some(length) = state.end(text) {
                self.at += length;
                return Ok(());
            }
            self.at = self.buffer.len();
            if !self.fill() {
                return Err(Cut::Ended);
            }
        }
    }

    /// Reads on, dropping what is consumed; `false` at the end.
    fn fill(&mut self) -> bool {
        if self.ended {
            return false;
        }
        self.before += self.at as u64;
        self.buffer.drain(..self.at);
        self.at = 0;
        let kept = self.buffer.len();
        // As much again as is held: a long value is not walked anew for every chunk of it.
        self.buffer.resize(kept + self.chunk.max(kept), 0);
        self.chunk = (2 * self.chunk).min(CHUNK);
        let got = loop {
            match self.reader.read(&mut self.buffer[kept..]) {
                Ok(got) => break got,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.broken = Some(error.to_string());
                    break 0;
                }
            }
        };
        self.buffer.truncate(kept + got);
        self.ended = got == 0;
        got > 0
    }
}

/// Where a value ends: brackets counted outside strings.
#[derive(Default)]
struct Nesting {
    depth: u32,
    in_string: bool,
    escaped: bool,
    started: bool,
    nested: bool,
}

impl Nesting {
    /// A number or a word has no mark of its end.
    const fn is_scalar(&self) -> bool {
        self.started && !self.nested && !self.in_string
    }

    /// Length of the part of `text` up to the end of the value; `None` when it goes on.
    fn end(&mut self, text: &[u8]) -> Option<usize> {
        let mut at = 0;
        while at < text.len() {
            if self.in_string {
                if self.escaped {
                    self.escaped = false;
                    at += 1;
                    continue;
                }
                let stop = text[at..].iter().position(|byte| matches!(byte, b'"' | b'\\'))?;
                at += stop + 1;
                if text[at - 1] == b'\\' {
                    self.escaped = true;
                } else {
                    self.in_string = false;
                    if self.depth == 0 {
                        return Some(at);
                    }
                }
                continue;
            }
            match text[at] {
                b'"' => {
                    (self.in_string, self.nested) = (true, true);
                }
                b'{' | b'[' => {
                    self.depth = self.depth.saturating_add(1);
                    self.nested = true;
                }
                b'}' | b']' => {
                    if self.depth == 0 {
                        return Some(at);
                    }
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Some(at + 1);
                    }
                }
                b',' | b' ' | b'\n' | b'\r' | b'\t' if self.depth == 0 => return Some(at),
                _ => {}
            }
            self.started = true;
            at += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    /// Gives one byte at a time, the worst case for a sliding buffer.
    struct Drip<'a>(&'a [u8]);

    impl Read for Drip<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.0.read(&mut buffer[..1])
        }
    }

    fn values(text: &str) -> Vec<String> {
        let mut scanner = Scanner::new(Drip(text.as_bytes()));
        let mut values = Vec::new();
        while scanner.peek().is_some() {
            if scanner.peek() == Some(b',') {
                scanner.skip();
                continue;
            }
            match scanner.value() {
                Ok(value) => values.push(String::from_utf8(value.to_vec()).unwrap()),
                Err(_) => break,
            }
        }
        values
    }

    #[test]
    fn values_end_where_they_end() {
        assert_eq!(
            values(r#" {"a":"}\"]{"} , [1,[2]],"x,\\" ,-1.5e3, null"#),
            [r#"{"a":"}\"]{"}"#, "[1,[2]]", r#""x,\\""#, "-1.5e3", "null"]
        );
    }

    #[test]
    fn a_cut_value_is_no_value() {
        assert!(values(r#"{"a":[1,2"#).is_empty());
        assert!(values(r#""abc\"#).is_empty());
        assert!(values("").is_empty());
    }

    #[test]
    fn an_endless_value_is_refused_without_being_held() {
        let mut scanner = Scanner::new(std::io::repeat(b'['));
        assert!(matches!(
            scanner.value(),
            Err(Cut::Failed(TraceError::TooLong { .. }))
        ));
        assert!(scanner.buffer.capacity() < 4 * LONGEST_VALUE);
    }

    #[test]
    fn skipping_holds_nothing() {
        let text = format!("[{}]7", "1,".repeat(1 << 20));
        let mut scanner = Scanner::new(text.as_bytes());
        assert!(scanner.skip_value().is_ok());
        assert_eq!(scanner.peek(), Some(b'7'));
        assert!(scanner.buffer.capacity() <= 4 * CHUNK);
    }
}
