//! The configuration file: TOML, unknown keys refused, every setting with a default.
//!
//! [`Config::load`] reads a file, [`Config::parse`] a text; errors carry `file:line`. [`check`] does what
//! `stallscope config check` prints. [`default_file`] renders the commented default file from the documentation of
//! the structures below, so that file and code cannot drift.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, de};

/// Where the packages put the file.
pub const DEFAULT_PATH: &str = "/etc/stallscope/stallscope.toml";

/// Documentation of one section, kept beside the structure it documents.
struct SectionDocs {
    section: &'static str,
    docs: &'static [&'static str],
    fields: &'static [FieldDocs],
}

struct FieldDocs {
    key: &'static str,
    docs: &'static [&'static str],
    shown: &'static str,
}

/// Declares a section once: structure, defaults, and the commented default file.
macro_rules! section {
    (
        $(#[doc = $doc:literal])+
        $name:ident $section:literal {
            $(
                $(#[doc = $field_doc:literal])+
                $(#[serde($($serde:tt)*)])?
                $field:ident: $type:ty = $default:expr, shown $shown:literal;
            )+
        }
    ) => {
        $(#[doc = $doc])+
        #[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name {
            $(
                $(#[doc = $field_doc])+
                $(#[serde($($serde)*)])?
                pub $field: $type,
            )+
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)+ }
            }
        }

        impl $name {
            const DOCS: SectionDocs = SectionDocs {
                section: $section,
                docs: &[$($doc),+],
                fields: &[$(FieldDocs {
                    key: stringify!($field),
                    docs: &[$($field_doc),+],
                    shown: $shown,
                }),+],
            };
        }
    };
}

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Name of this node in reports, and in its certificate.
    #[serde(deserialize_with = "optional_name")]
    pub node: Option<String>,
    /// `[scope]`
    pub scope: Scope,
    /// `[probes]`
    pub probes: Probes,
    /// `[nvml]`
    pub nvml: Nvml,
    /// `[devices]`
    pub devices: Devices,
    /// `[nccl]`
    pub nccl: Nccl,
    /// `[stream]`
    pub stream: Stream,
    /// `[store]`
    pub store: Store,
    /// `[control]`
    pub control: Control,
}

section! {
    /// Which processes are looked at.
    Scope "scope" {
        /// Only processes whose control group is this path or below it, in any hierarchy.
        /// Default: every process of the node.
        #[serde(deserialize_with = "optional_absolute")]
        cgroup: Option<String> = None, shown "\"/system.slice/slurmstepd.scope\"";
    }
}

section! {
    /// The eBPF programs.
    Probes "probes" {
        /// The BPF object file. Default: $STALLSCOPE_BPF_OBJECT, else stallscope.bpf.o beside the binary,
        /// else in ../lib/stallscope/.
        object: Option<PathBuf> = None, shown "\"/usr/lib/stallscope/stallscope.bpf.o\"";
    }
}

section! {
    /// NVIDIA's management library.
    Nvml "nvml" {
        /// Name or path of the library; a name is searched as the loader does.
        #[serde(deserialize_with = "library")]
        library: String = "libnvidia-ml.so.1".to_owned(), shown "\"libnvidia-ml.so.1\"";
        /// Milliseconds between two samples of a GPU's counters; 100 to 60000. The counters' own resolution is 100.
        #[serde(deserialize_with = "sample_ms")]
        sample_ms: u64 = 100, shown "100";
    }
}

section! {
    /// RDMA ports and PCI devices.
    Devices "devices" {
        /// Where sysfs is mounted; in a container, the node's own.
        sys: PathBuf = PathBuf::from("/sys"), shown "\"/sys\"";
    }
}

section! {
    /// NCCL's own events, of jobs that were started with the profiler plugin of this package.
    Nccl "nccl" {
        /// Whether to ask such jobs for the waits of their network steps; see docs/deep-mode.md. Jobs without the plugin
        /// are seen by probes alone, as they are without this setting.
        profiler: bool = false, shown "false";
    }
}

section! {
    /// The stream to a collector. Without `collector` everything stays on the node.
    Stream "stream" {
        /// The collector as host:port. It needs `ca`, `cert` and `key` below.
        #[serde(deserialize_with = "optional_host_port")]
        collector: Option<String> = None, shown "\"collector.example:4433\"";
        /// Name in the collector's certificate. Default: the host of `collector`.
        #[serde(deserialize_with = "optional_name")]
        server_name: Option<String> = None, shown "\"collector.example\"";
        /// Certificates that may sign the collector's (PEM).
        ca: Option<PathBuf> = None, shown "\"/etc/stallscope/tls/ca.pem\"";
        /// This node's certificate (PEM); `node`, else the host name, must be among its subject alternative names.
        cert: Option<PathBuf> = None, shown "\"/etc/stallscope/tls/node.pem\"";
        /// This node's private key (PEM).
        key: Option<PathBuf> = None, shown "\"/etc/stallscope/tls/node.key\"";
    }
}

section! {
    /// The local store.
    Store "store" {
        /// Its directory, made when missing.
        dir: PathBuf = PathBuf::from("/var/lib/stallscope"), shown "\"/var/lib/stallscope\"";
        /// Bytes it may use; at least 1048576. The oldest data goes first.
        #[serde(deserialize_with = "store_bytes")]
        max_bytes: u64 = 1 << 30, shown "1073741824";
    }
}

section! {
    /// The socket that report, top and check speak to.
    Control "control" {
        /// Its path.
        socket: PathBuf = PathBuf::from("/run/stallscope/control.sock"), shown "\"/run/stallscope/control.sock\"";
    }
}

const NODE_DOCS: FieldDocs = FieldDocs {
    key: "node",
    docs: &[
        " Name of this node in reports. Default: its host name. With a collector, the certificate of [stream] must hold",
        " this very name as a subject alternative name, unless the collector runs with --any-name.",
    ],
    shown: "\"node-17\"",
};

/// A complete, consistent stream target; see [`Stream::target`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StreamTarget {
    /// Host name or address, without brackets.
    pub host: String,
    /// UDP port.
    pub port: u16,
    /// Name expected in the collector's certificate.
    pub server_name: String,
    /// Certificate authority, PEM.
    pub ca: PathBuf,
    /// Own certificate, PEM.
    pub cert: PathBuf,
    /// Own key, PEM.
    pub key: PathBuf,
}

/// Why a configuration cannot be used. The text starts with `file:line:` where a line is known.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}; nothing was started", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The text is not what the agent takes.
    #[error("{file}:{line}: {message}")]
    Invalid {
        /// The file as it was named.
        file: String,
        /// Line, from 1.
        line: usize,
        /// What is wrong, and what would be right.
        message: String,
    },
}

impl Config {
    /// Reads and validates a file.
    ///
    /// # Errors
    /// When it cannot be read, is not TOML, or holds an unknown key or a value out of range.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, &path.display().to_string())
    }

    /// Validates a text; `file` names it in errors.
    ///
    /// # Errors
    /// As [`Config::load`], without reading.
    pub fn parse(text: &str, file: &str) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| ConfigError::Invalid {
            file: file.to_owned(),
            line: line_of(text, error.span().map_or(0, |span| span.start)),
            message: error.message().replace('\n', "; "),
        })?;
        match config.stream.target() {
            Ok(_) => Ok(config),
            Err(StreamIncomplete { key, message }) => Err(ConfigError::Invalid {
                file: file.to_owned(),
                line: line_of_key(text, "stream", key),
                message: message.to_owned(),
            }),
        }
    }

    /// The node's name: as configured, else the host name the kernel has, else `localhost`.
    #[must_use]
    pub fn node_name(&self) -> String {
        let hostname = || {
            let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
            let name = name.trim();
            if name.is_empty() {
                "localhost".to_owned()
            } else {
                name.to_owned()
            }
        };
        self.node.clone().unwrap_or_else(hostname)
    }
}

/// Which key of `[stream]` makes it unusable, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct StreamIncomplete {
    key: &'static str,
    message: &'static str,
}

impl Stream {
    /// Where to stream to: `None` when no collector is set.
    ///
    /// # Errors
    /// When a collector is set and `ca`, `cert` or `key` is not. A parsed [`Config`] never gives this.
    pub fn target(&self) -> Result<Option<StreamTarget>, StreamIncomplete> {
        let Some(collector) = &self.collector else {
            return Ok(None);
        };
        let missing = |message| StreamIncomplete {
            key: "collector",
            message,
        };
        let (Some(ca), Some(cert), Some(key)) = (&self.ca, &self.cert, &self.key) else {
            return Err(missing(
                "stream.collector needs stream.ca, stream.cert and stream.key: add the PEM files",
            ));
        };
        let Some((host, port)) = host_port(collector) else {
            return Err(missing("stream.collector must be host:port"));
        };
        Ok(Some(StreamTarget {
            server_name: self.server_name.clone().unwrap_or_else(|| host.to_owned()),
            host: host.to_owned(),
            port,
            ca: ca.clone(),
            cert: cert.clone(),
            key: key.clone(),
        }))
    }
}

/// What `stallscope config check` found in a usable file: things that will not work on this node as it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warning {
    /// `file:line: what, and what follows from it`.
    pub text: String,
}

/// Validates a file and looks whether what it names is there.
///
/// # Errors
/// When the agent would refuse the file.
pub fn check(path: &Path) -> Result<(Config, Vec<Warning>), ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
        path: path.to_owned(),
        source,
    })?;
    let file = path.display().to_string();
    let config = Config::parse(&text, &file)?;
    let named = [
        ("probes", "object", &config.probes.object, "no probes will run"),
        ("stream", "ca", &config.stream.ca, "nothing will be streamed"),
        ("stream", "cert", &config.stream.cert, "nothing will be streamed"),
        ("stream", "key", &config.stream.key, "nothing will be streamed"),
    ];
    let warnings = named
        .into_iter()
        .filter_map(|(section, key, value, lost)| {
            let value = value.as_ref()?;
            let error = std::fs::File::open(value).err()?;
            let line = line_of_key(&text, section, key);
            Some(Warning {
                text: format!(
                    "{file}:{line}: {section}.{key}: {}: {error}; {lost}",
                    value.display()
                ),
            })
        })
        .collect();
    Ok((config, warnings))
}

/// The default file: every setting, commented out, with its documentation.
#[must_use]
pub fn default_file() -> String {
    const SECTIONS: [SectionDocs; 8] = [
        Scope::DOCS,
        Probes::DOCS,
        Nvml::DOCS,
        Devices::DOCS,
        Nccl::DOCS,
        Stream::DOCS,
        Store::DOCS,
        Control::DOCS,
    ];
    let mut out = String::from(
        "# stallscope agent. Every setting is shown commented out: with its default, or with an example where\n\
         # the default is not to set it. Check changes with `stallscope config check`.\n\n",
    );
    render_field(&mut out, &NODE_DOCS);
    for section in SECTIONS {
        out.push('\n');
        render_docs(&mut out, section.docs);
        // Writing to a String cannot fail.
        let _ = writeln!(out, "[{}]", section.section);
        section
            .fields
            .iter()
            .for_each(|field| render_field(&mut out, field));
    }
    out
}

fn render_field(out: &mut String, field: &FieldDocs) {
    render_docs(out, field.docs);
    let _ = writeln!(out, "#{} = {}", field.key, field.shown);
}

fn render_docs(out: &mut String, docs: &[&str]) {
    for line in docs {
        let _ = writeln!(out, "#{line}");
    }
}

fn line_of(text: &str, offset: usize) -> usize {
    let end = offset.min(text.len());
    1 + text.as_bytes()[..end]
        .iter()
        .filter(|&&byte| byte == b'\n')
        .count()
}

/// The line of a key in a text that is known to parse; the section's line, or 1, when the key is not there.
fn line_of_key(text: &str, section: &str, key: &str) -> usize {
    let Ok(table) = toml::de::DeTable::parse(text) else {
        return 1;
    };
    let Some((name, value)) = table.get_ref().get_key_value(section) else {
        return 1;
    };
    let inner = value
        .get_ref()
        .as_table()
        .and_then(|table| table.get_key_value(key));
    line_of(
        text,
        inner.map_or(name.span().start, |(name, _)| name.span().start),
    )
}

fn host_port(text: &str) -> Option<(&str, u16)> {
    let (host, port) = text.rsplit_once(':')?;
    let bare = host
        .strip_prefix('[')
        .map_or(Some(host), |host| host.strip_suffix(']'))?;
    let bracketed = bare.len() != host.len();
    let port: u16 = port.parse().ok().filter(|&port| port != 0)?;
    // A bare IPv6 address with a port is ambiguous.
    (!bare.is_empty() && (bracketed || !bare.contains(':'))).then_some((bare, port))
}

fn optional_host_port<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    match host_port(&text) {
        Some(_) => Ok(Some(text)),
        None => Err(de::Error::custom(format!(
            "`{text}` must be host:port, like collector.example:4433"
        ))),
    }
}

fn optional_name<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
        return Err(de::Error::custom("a name must not be empty nor hold spaces"));
    }
    Ok(Some(text))
}

fn optional_absolute<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text = String::deserialize(from)?;
    if !text.starts_with('/') {
        return Err(de::Error::custom(format!(
            "`{text}` must start with `/`, as the paths in /proc/PID/cgroup do"
        )));
    }
    Ok(Some(text))
}

fn library<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    let text = String::deserialize(from)?;
    if text.is_empty() || text.contains('\0') {
        return Err(de::Error::custom(
            "must be a library's name or path, like libnvidia-ml.so.1",
        ));
    }
    Ok(text)
}

fn sample_ms<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    in_range(u64::deserialize(from)?, 100, 60_000)
}

fn store_bytes<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
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

#[cfg(test)]
mod tests;
