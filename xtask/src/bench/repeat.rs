//! A real trace repeated end to end: the same events again and again, later each time.

use std::io::Write;

use anyhow::{Context, Result};

/// Before the numbers that differ from one repetition to the next.
const TIME: &str = "\"ts\": ";
const CORRELATION: &str = "\"correlation\": ";

/// The text of a trace, cut at the numbers that change.
#[derive(Debug)]
pub(super) struct Template<'a> {
    head: &'a str,
    pieces: Vec<Piece<'a>>,
    tail: &'a str,
    /// What a repetition adds to times, microseconds.
    span_us: u64,
    /// And to correlation ids.
    ids: u64,
}

/// Text up to a number, and the whole part of the number.
#[derive(Debug)]
struct Piece<'a> {
    text: &'a str,
    number: u64,
    is_time: bool,
}

impl<'a> Template<'a> {
    /// Cuts up a trace as Kineto writes it.
    pub(super) fn of(text: &'a str) -> Result<Self> {
        let open = "\"traceEvents\": [";
        let from = text.find(open).context("the trace has no traceEvents")? + open.len();
        let to = from + text[from..].find("\n  ]").context("its traceEvents do not end")?;
        let (mut pieces, mut at) = (Vec::new(), from);
        let (mut first_us, mut last_us, mut ids) = (u64::MAX, 0, 0);
        while let Some((number_at, is_time)) = next_number(&text[at..to]) {
            let number_at = at + number_at;
            let digits = text[number_at..].bytes().take_while(u8::is_ascii_digit).count();
            let end = number_at + digits;
            let number = text[number_at..end].parse::<u64>().unwrap_or(0);
            if is_time {
                (first_us, last_us) = (first_us.min(number), last_us.max(number));
            } else {
                ids = ids.max(number + 1);
            }
            pieces.push(Piece {
                text: &text[at..number_at],
                number,
                is_time,
            });
            at = end;
        }
        let [rest, tail] = [&text[at..to], &text[to..]];
        pieces.push(Piece {
            text: rest,
            number: 0,
            is_time: false,
        });
        Ok(Self {
            head: &text[..from],
            pieces,
            tail,
            // A second apart: longer than any event of the source lasts.
            span_us: last_us.saturating_sub(first_us) + 1_000_000,
            ids,
        })
    }

    /// Writes whole repetitions until `bytes` are reached; how many were written.
    pub(super) fn write(&self, bytes: u64, out: &mut impl Write) -> Result<u64> {
        let mut written = 0_u64;
        let mut put = |text: &[u8]| -> Result<u64> {
            out.write_all(text).context("failed to write the trace")?;
            written += text.len() as u64;
            Ok(written)
        };
        put(self.head.as_bytes())?;
        let mut round = 0;
        loop {
            let mut so_far = 0;
            let (last, pieces) = self.pieces.split_last().context("an empty trace")?;
            for piece in pieces {
                put(piece.text.as_bytes())?;
                let step = if piece.is_time { self.span_us } else { self.ids };
                so_far = put((piece.number + round * step).to_string().as_bytes())?;
            }
            so_far = so_far.max(put(last.text.as_bytes())?);
            if so_far >= bytes {
                return put(self.tail.as_bytes());
            }
            put(b",")?;
            round += 1;
        }
    }
}

/// Where the next time or correlation id begins, and whether it is a time.
fn next_number(text: &str) -> Option<(usize, bool)> {
    let mut at = 0;
    loop {
        let quote = at + text[at..].find('"')?;
        let rest = &text[quote..];
        for (key, is_time) in [(TIME, true), (CORRELATION, false)] {
            if let Some(value) = rest.strip_prefix(key)
                && value.starts_with(|first: char| first.is_ascii_digit())
            {
                return Some((quote + key.len(), is_time));
            }
        }
        at = quote + 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_are_the_same_events_later() -> Result<()> {
        let text = r#"{
  "traceEvents": [
  {
    "name": "a \"ts\"", "ts": 10.5, "dur": 3, "args": { "correlation": 7, "device": 0 }
  },
  {
    "ts": 20, "dur": 1
  }
  ],
  "host": "h"
}"#;
        let mut out = Vec::new();
        let written = Template::of(text)?.write(text.len() as u64 + 1, &mut out)?;
        assert_eq!(written, out.len() as u64);
        let parsed: serde_json::Value = serde_json::from_slice(&out)?;
        let events = parsed["traceEvents"].as_array().context("events")?;
        let times: Vec<_> = events.iter().map(|event| event["ts"].as_f64()).collect();
        assert_eq!(
            times,
            [Some(10.5), Some(20.0), Some(1_000_020.5), Some(1_000_030.0)]
        );
        let ids: Vec<_> = events
            .iter()
            .map(|event| event["args"]["correlation"].as_u64())
            .collect();
        assert_eq!(ids, [Some(7), None, Some(15), None]);
        assert_eq!(parsed["host"], "h");
        Ok(())
    }
}
