//! Walks JSON text without building anything: where values begin and end.
//!
//! Structure is checked (brackets, colons, commas), the inside of numbers and of skipped values is not: whoever uses a
//! value parses it.

/// A part of a text, by byte offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Span {
    from: usize,
    to: usize,
}

impl Span {
    /// The bytes; empty for a value that is absent.
    pub(super) fn of(self, text: &[u8]) -> &[u8] {
        text.get(self.from..self.to).unwrap_or_default()
    }
}

/// Why a value was not walked to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// The text ends inside it.
    Ended,
    /// It is no JSON.
    Broken,
}

/// Bytes of a string that are looked at one by one.
const SHORT: usize = 12;

/// What a byte does outside strings.
const PLAIN: u8 = 0;
const OPEN: u8 = 1;
const CLOSE: u8 = 2;
const QUOTE: u8 = 3;
const CLASS: [u8; 256] = {
    let mut table = [PLAIN; 256];
    table[b'{' as usize] = OPEN;
    table[b'[' as usize] = OPEN;
    table[b'}' as usize] = CLOSE;
    table[b']' as usize] = CLOSE;
    table[b'"' as usize] = QUOTE;
    table
};

/// Walks the object that begins at `text[0]` and hands over key (without quotes) and value of each member. The length
/// of the object.
pub(super) fn object(text: &[u8], mut member: impl FnMut(&[u8], Span)) -> Result<usize, Stop> {
    if text.first() != Some(&b'{') {
        return Err(Stop::Broken);
    }
    let mut at = 1;
    loop {
        at = blank(text, at);
        match text.get(at).ok_or(Stop::Ended)? {
            b'}' => return Ok(at + 1),
            b'"' => {}
            _ => return Err(Stop::Broken),
        }
        let key = Span {
            from: at + 1,
            to: string(text, at)? - 1,
        };
        at = blank(text, key.to + 1);
        if *text.get(at).ok_or(Stop::Ended)? != b':' {
            return Err(Stop::Broken);
        }
        let from = blank(text, at + 1);
        let to = value(text, from)?;
        member(key.of(text), Span { from, to });
        at = blank(text, to);
        match text.get(at).ok_or(Stop::Ended)? {
            b',' => at += 1,
            b'}' => {}
            _ => return Err(Stop::Broken),
        }
    }
}

/// The first byte from `at` that is not white space.
#[inline]
fn blank(text: &[u8], mut at: usize) -> usize {
    while text
        .get(at)
        .is_some_and(|byte| matches!(byte, b' ' | b'\n' | b'\r' | b'\t'))
    {
        at += 1;
    }
    at
}

/// The end of the value at `at`.
#[inline]
fn value(text: &[u8], at: usize) -> Result<usize, Stop> {
    match text.get(at).ok_or(Stop::Ended)? {
        b'"' => string(text, at),
        b'{' | b'[' => nested(text, at),
        b'}' | b']' | b',' | b':' => Err(Stop::Broken),
        _ => scalar(text, at),
    }
}

/// The end of the number or word at `at`.
#[inline]
fn scalar(text: &[u8], mut at: usize) -> Result<usize, Stop> {
    loop {
        match text.get(at).ok_or(Stop::Ended)? {
            b',' | b'}' | b']' | b' ' | b'\n' | b'\r' | b'\t' => return Ok(at),
            b'"' | b'{' | b'[' | b':' => return Err(Stop::Broken),
            _ => at += 1,
        }
    }
}

/// The end of the string whose opening quote is at `at`.
#[inline]
fn string(text: &[u8], at: usize) -> Result<usize, Stop> {
    let mut at = at + 1;
    // Most strings are short, and searching in vectors has a price of its own.
    let short = text.len().min(at + SHORT);
    while at < short {
        match text[at] {
            b'"' => return Ok(at + 1),
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    loop {
        let rest = text.get(at..).ok_or(Stop::Ended)?;
        let stop = at + memchr::memchr2(b'"', b'\\', rest).ok_or(Stop::Ended)?;
        if text[stop] == b'"' {
            return Ok(stop + 1);
        }
        at = stop + 2;
    }
}

/// The end of the object or array whose opening bracket is at `at`.
fn nested(text: &[u8], mut at: usize) -> Result<usize, Stop> {
    let mut depth = 0_u32;
    loop {
        let byte = *text.get(at).ok_or(Stop::Ended)?;
        match CLASS[usize::from(byte)] {
            PLAIN => at += 1,
            OPEN => {
                depth = depth.saturating_add(1);
                at += 1;
            }
            CLOSE => {
                depth -= 1;
                at += 1;
                if depth == 0 {
                    return Ok(at);
                }
            }
            _ => at = string(text, at)?,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn members(text: &str) -> Result<(Vec<(String, String)>, usize), Stop> {
        let mut found = Vec::new();
        let show = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let length = object(text.as_bytes(), |key, value| {
            found.push((show(key), show(value.of(text.as_bytes()))));
        })?;
        Ok((found, length))
    }

    #[test]
    fn members_are_cut_where_they_end() {
        let text = r#"{ "a" : "}\"]{" , "b":[1,{"c":"]"}],"d":-1.5e3 ,"":null} rest"#;
        let (found, length) = members(text).expect("an object");
        let expected = [
            ("a", r#""}\"]{""#),
            ("b", r#"[1,{"c":"]"}]"#),
            ("d", "-1.5e3"),
            ("", "null"),
        ];
        let expected = expected.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(found, expected);
        assert_eq!(&text[length..], " rest");
    }

    #[test]
    fn every_cut_is_seen_as_one() {
        let text = r#"{"a":{"b":["\\",2]},"c":17}"#;
        for cut in 1..text.len() {
            assert_eq!(members(&text[..cut]), Err(Stop::Ended), "{cut}");
        }
        assert!(members(text).is_ok());
    }

    #[test]
    fn what_is_no_object_is_broken() {
        for text in [
            "[]",
            "{1}",
            r#"{"a"}"#,
            r#"{"a":}"#,
            r#"{"a" 1}"#,
            r#"{"a":1 2}"#,
            r#"{"a":b"c"}"#,
        ] {
            assert_eq!(members(text), Err(Stop::Broken), "{text}");
        }
    }
}
