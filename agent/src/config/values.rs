//! How single values of the file are read. Each refuses with what would be right.

use serde::{Deserialize, Deserializer, de};
use stallscope_attribution::flops;

pub(super) fn host_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let bare = host
        .strip_prefix('[')
        .map_or(Some(host), |host| host.strip_suffix(']'))?;
    let bracketed = bare.len() != host.len();
    let port: u16 = port.parse().ok().filter(|&port| port != 0)?;
    // A bare IPv6 address with a port is ambiguous.
    (!bare.is_empty() && (bracketed || !bare.contains(':'))).then_some((bare, port))
}

pub(super) fn optional_host_port<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    match host_port(&text) {
        Some(_) => Ok(Some(text)),
        None => Err(de::Error::custom(format!(
            "`{text}` must be host:port, like collector.example:4433"
        ))),
    }
}

pub(super) fn optional_name<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(de::Error::custom("a name must not be empty nor hold spaces"));
    }
    Ok(Some(text))
}

pub(super) fn optional_job<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(de::Error::custom(
            "a job's name must not be empty nor hold control characters",
        ));
    }
    Ok(Some(text))
}

pub(super) fn optional_absolute<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    if !text.starts_with('/') {
        return Err(de::Error::custom(format!(
            "`{text}` must start with `/`, as the paths in /proc/PID/cgroup do"
        )));
    }
    Ok(Some(text))
}

pub(super) fn library<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() || text.contains('\0') {
        return Err(de::Error::custom(
            "must be a library's name or path, like libnvidia-ml.so.1",
        ));
    }
    Ok(text)
}

pub(super) fn sample_ms<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    in_range(u64::deserialize(from)?, 100, 60_000)
}

pub(super) fn store_bytes<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    in_range(u64::deserialize(from)?, 1 << 20, u64::MAX)
}

fn in_range<E: de::Error>(value: u64, low: u64, high: u64) -> Result<u64, E> {
    if (low..=high).contains(&value) {
        Ok(value)
    } else if high == u64::MAX {
        Err(E::custom(format!("{value} is too small: at least {low}")))
    } else {
        Err(E::custom(format!("{value} is out of range: {low} to {high}")))
    }
}

/// A whole number above 0, also written as `7e9` or `"6.7e9"`.
pub(super) fn optional_count<'de, D: Deserializer<'de>>(from: D) -> Result<Option<u64>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Whole(i64),
        Float(f64),
        Text(String),
    }
    let text = match Number::deserialize(from)
        .map_err(|_| de::Error::custom("must be a whole number above 0, like 7000000000 or 7e9"))?
    {
        Number::Whole(number) => number.to_string(),
        // The shortest text that gives this float again: what was written, for up to 15 digits.
        Number::Float(number) => format!("{number:e}"),
        Number::Text(text) => text,
    };
    match flops::whole(&text).filter(|number| *number > 0) {
        Some(number) => Ok(Some(number)),
        None => Err(de::Error::custom(format!(
            "`{text}` must be a whole number above 0, like 7000000000 or 7e9"
        ))),
    }
}
