//! One element of `traceEvents`, borrowed from the text.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::value::RawValue;

/// The fields that matter. All of them raw: writers differ in what they quote.
#[derive(Debug, Deserialize)]
pub(super) struct Event<'a> {
    #[serde(borrow)]
    pub(super) ph: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) cat: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) name: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) pid: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) tid: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) ts: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) dur: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) args: Option<&'a RawValue>,
}

/// The arguments that matter.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Args<'a> {
    #[serde(borrow)]
    pub(super) device: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) stream: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) correlation: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) bytes: Option<&'a RawValue>,
    #[serde(borrow)]
    pub(super) grid: Option<&'a RawValue>,
    #[serde(borrow, rename = "Collective name")]
    pub(super) collective: Option<&'a RawValue>,
    #[serde(borrow, rename = "In msg nelems")]
    pub(super) elements: Option<&'a RawValue>,
    #[serde(borrow, rename = "dtype")]
    pub(super) dtype: Option<&'a RawValue>,
    #[serde(borrow, rename = "Group size")]
    pub(super) group_size: Option<&'a RawValue>,
    #[serde(borrow, rename = "Process Group Name")]
    pub(super) group_name: Option<&'a RawValue>,
    #[serde(borrow, rename = "Process Group Ranks")]
    pub(super) group_ranks: Option<&'a RawValue>,
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
            ("kernel", Category::Kernel),
            ("gpu_memcpy", Category::Copy),
            ("memcpy", Category::Copy),
            ("gpu_memset", Category::Set),
            ("memset", Category::Set),
            ("cuda_runtime", Category::Runtime),
            ("cuda_driver", Category::Runtime),
            ("hip_runtime", Category::Runtime),
            ("runtime", Category::Runtime),
            ("privateuse1_runtime", Category::Runtime),
            ("privateuse1_driver", Category::Runtime),
            ("cpu_op", Category::Operator),
            ("operator", Category::Operator),
            ("user_annotation", Category::Operator),
            ("python_function", Category::Operator),
        ];
        NAMES
            .iter()
            .find(|(known, _)| known.eq_ignore_ascii_case(name))
            .map_or(Self::Other, |(_, category)| *category)
    }
}

/// The text of a JSON string; of anything else its source.
pub(super) fn text(raw: &RawValue) -> Cow<'_, str> {
    let source = raw.get();
    match source.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')) {
        None => Cow::Borrowed(source),
        Some(plain) if !plain.contains('\\') => Cow::Borrowed(plain),
        Some(_) => serde_json::from_str(source).map_or(Cow::Borrowed(source), Cow::Owned),
    }
}

/// A whole number, quoted or not; `None` for anything else.
pub(super) fn number(raw: Option<&RawValue>) -> Option<u64> {
    raw?.get().trim_matches('"').parse().ok()
}
