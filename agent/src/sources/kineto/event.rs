//! One element of `traceEvents`, borrowed from the text.

use std::borrow::Cow;

use super::walk::{self, Span, Stop};

/// Where an event's fields are. All of them raw: writers differ in what they quote.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Fields {
    ph: Span,
    cat: Span,
    name: Span,
    pid: Span,
    tid: Span,
    ts: Span,
    dur: Span,
    args: Span,
}

impl Fields {
    /// The fields of the event at the begin of the text, and its length.
    pub(super) fn find(text: &[u8]) -> Result<(Self, usize), Stop> {
        let mut fields = Self::default();
        let length = walk::object(text, |key, value| match key {
            b"ph" => fields.ph = value,
            b"cat" => fields.cat = value,
            b"name" => fields.name = value,
            b"pid" => fields.pid = value,
            b"tid" => fields.tid = value,
            b"ts" => fields.ts = value,
            b"dur" => fields.dur = value,
            b"args" => fields.args = value,
            _ => {}
        })?;
        Ok((fields, length))
    }
}

/// An event: its fields and the text they are in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Event<'a> {
    /// The text.
    pub(super) text: &'a [u8],
    /// Its fields.
    pub(super) fields: Fields,
}

impl<'a> Event<'a> {
    /// Whether it has a begin and a duration.
    pub(super) fn is_complete(self) -> bool {
        self.fields.ph.of(self.text) == b"\"X\""
    }

    pub(super) fn category(self) -> Category {
        Category::of(&text(self.fields.cat.of(self.text)))
    }

    /// The name as the text has it, in its quotes.
    pub(super) fn raw_name(self) -> &'a [u8] {
        self.fields.name.of(self.text)
    }

    pub(super) fn pid(self) -> &'a [u8] {
        self.fields.pid.of(self.text)
    }

    pub(super) fn tid(self) -> &'a [u8] {
        self.fields.tid.of(self.text)
    }

    pub(super) fn ts(self) -> &'a [u8] {
        self.fields.ts.of(self.text)
    }

    pub(super) fn dur(self) -> &'a [u8] {
        self.fields.dur.of(self.text)
    }

    /// The arguments as the text has them.
    pub(super) fn raw_args(self) -> &'a [u8] {
        self.fields.args.of(self.text)
    }

    /// The arguments; none where they are no object.
    pub(super) fn args(self) -> Args<'a> {
        Args::find(self.raw_args())
    }
}

/// The arguments that matter, raw; empty where absent.
#[derive(Debug, Default)]
pub(super) struct Args<'a> {
    pub(super) device: &'a [u8],
    pub(super) stream: &'a [u8],
    pub(super) correlation: &'a [u8],
    pub(super) bytes: &'a [u8],
    pub(super) grid: &'a [u8],
    pub(super) block: &'a [u8],
    pub(super) collective: &'a [u8],
    pub(super) elements: &'a [u8],
    pub(super) dtype: &'a [u8],
    pub(super) group_size: &'a [u8],
    pub(super) group_name: &'a [u8],
    pub(super) group_ranks: &'a [u8],
    pub(super) sender: &'a [u8],
    pub(super) receiver: &'a [u8],
}

impl<'a> Args<'a> {
    fn find(text: &'a [u8]) -> Self {
        let mut args = Self::default();
        let walked = walk::object(text, |key, value| {
            let value = value.of(text);
            match key {
                b"device" => args.device = value,
                b"stream" => args.stream = value,
                b"correlation" => args.correlation = value,
                b"bytes" => args.bytes = value,
                b"grid" => args.grid = value,
                b"block" => args.block = value,
                b"Collective name" => args.collective = value,
                b"In msg nelems" => args.elements = value,
                b"dtype" => args.dtype = value,
                b"Group size" => args.group_size = value,
                b"Process Group Name" => args.group_name = value,
                b"Process Group Ranks" => args.group_ranks = value,
                b"Src Rank" => args.sender = value,
                b"Dst Rank" => args.receiver = value,
                _ => {}
            }
        });
        // Arguments that are no object say nothing.
        walked.map_or_else(|_| Self::default(), |_| args)
    }
}

/// What kind of thing an event tells of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Category {
    Kernel,
    Copy,
    Set,
    Runtime,
    Operator,
    Other,
}

impl Category {
    /// By the event's category, which changed its spelling over the years.
    pub(super) fn of(name: &str) -> Self {
        const NAMES: [(&str, Category); 15] = [
            ("cpu_op", Category::Operator),
            ("python_function", Category::Operator),
            ("cuda_runtime", Category::Runtime),
            ("kernel", Category::Kernel),
            ("gpu_memcpy", Category::Copy),
            ("memcpy", Category::Copy),
            ("gpu_memset", Category::Set),
            ("memset", Category::Set),
            ("cuda_driver", Category::Runtime),
            ("hip_runtime", Category::Runtime),
            ("runtime", Category::Runtime),
            ("privateuse1_runtime", Category::Runtime),
            ("privateuse1_driver", Category::Runtime),
            ("operator", Category::Operator),
            ("user_annotation", Category::Operator),
        ];
        NAMES
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map_or(Self::Other, |(_, category)| *category)
    }
}

/// The text of a JSON string; of anything else its source.
pub(super) fn text(raw: &[u8]) -> Cow<'_, str> {
    match raw.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\"")) {
        None => String::from_utf8_lossy(raw),
        Some(plain) if memchr::memchr(b'\\', plain).is_none() => String::from_utf8_lossy(plain),
        Some(_) => serde_json::from_slice(raw).map_or_else(|_| String::from_utf8_lossy(raw), Cow::Owned),
    }
}

/// A whole number, quoted or not; `None` for anything else.
pub(super) fn number(raw: &[u8]) -> Option<u64> {
    let digits = raw.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\""));
    std::str::from_utf8(digits.unwrap_or(raw)).ok()?.parse().ok()
}
