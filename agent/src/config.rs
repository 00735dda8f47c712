//! The configuration file: TOML, unknown keys refused, every setting with a default.
//!
//! [`Config::load`] reads a file, [`Config::parse`] a text; errors carry `file:line`. [`check`] does what
//! `stallscope config check` prints. [`default_file`] renders the commented default file from the documentation of
//! the structures below, so that file and code cannot drift.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;

mod model;
mod stream;
#[cfg(test)]
mod tests;
mod values;

pub use model::DeclaredModel;
pub use stream::StreamTarget;

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
    #[serde(deserialize_with = "values::optional_name")]
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
    /// `[model]`
    pub model: Model,
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
        #[serde(deserialize_with = "values::optional_absolute")]
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
        #[serde(deserialize_with = "values::library")]
        library: String = "libnvidia-ml.so.1".to_owned(), shown "\"libnvidia-ml.so.1\"";
        /// Milliseconds between two samples of a GPU's counters; 100 to 60000. The counters' own resolution is 100.
        #[serde(deserialize_with = "values::sample_ms")]
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
    /// What NCCL's network steps wait for.
    Nccl "nccl" {
        /// Whether to attach to the hooks that NCCL has for it, for a second now and then, within 0.5 % of the time of its
        /// network threads.
        waits: bool = true, shown "true";
        /// Whether to ask jobs that were started with the profiler plugin of this package to tell it themselves; see
        /// docs/deep-mode.md. Jobs without the plugin are seen by probes alone, as they are without this setting.
        profiler: bool = false, shown "false";
    }
}

section! {
    /// The model that is trained here, to know MFU of jobs that declare nothing themselves: a job's own
    /// STALLSCOPE_MODEL_FLOPS_PER_STEP or STALLSCOPE_MODEL_SHAPE comes first. Either `flops_per_step`, or the six numbers of
    /// its shape, which give 6N + 12LHQT FLOPs per token (PaLM's convention: full attention, nothing repeated).
    Model "model" {
        /// Only the job of this name, as reports show it. Default: every job of this node that declares nothing.
        #[serde(deserialize_with = "values::optional_job")]
        job: Option<String> = None, shown "\"llm-7b\"";
        /// FLOPs of the model per step on one GPU; counts before the shape.
        #[serde(deserialize_with = "values::optional_count")]
        flops_per_step: Option<u64> = None, shown "3.2e14";
        /// N, its parameters; of a mixture of experts those that one token uses.
        #[serde(deserialize_with = "values::optional_count")]
        parameters: Option<u64> = None, shown "7e9";
        /// L, its layers.
        #[serde(deserialize_with = "values::optional_count")]
        layers: Option<u64> = None, shown "32";
        /// H, attention heads of a layer.
        #[serde(deserialize_with = "values::optional_count")]
        heads: Option<u64> = None, shown "32";
        /// Q, the size of a head.
        #[serde(deserialize_with = "values::optional_count")]
        head_size: Option<u64> = None, shown "128";
        /// T, tokens of a sequence.
        #[serde(deserialize_with = "values::optional_count")]
        sequence: Option<u64> = None, shown "4096";
        /// Tokens that the whole job takes per step, all gradient accumulation included. They are shared among the
        /// ranks that the job's launcher declares (WORLD_SIZE and its likes); without these MFU stays unknown.
        #[serde(deserialize_with = "values::optional_count")]
        tokens_per_step: Option<u64> = None, shown "4194304";
    }
}

section! {
    /// The stream to a collector. Without `collector` everything stays on the node.
    Stream "stream" {
        /// The collector as host:port. It needs `ca`, `cert` and `key` below.
        #[serde(deserialize_with = "values::optional_host_port")]
        collector: Option<String> = None, shown "\"collector.example:4433\"";
        /// Name in the collector's certificate. Default: the host of `collector`.
        #[serde(deserialize_with = "values::optional_name")]
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
        #[serde(deserialize_with = "values::store_bytes")]
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

/// A section whose settings do not fit together.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Incomplete {
    section: &'static str,
    /// The key to show the line of.
    key: &'static str,
    message: String,
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
        let whole = config.stream.target().map(|_| ());
        match whole.and_then(|()| config.model.declared().map(|_| ())) {
            Ok(()) => Ok(config),
            Err(Incomplete {
                section,
                key,
                message,
            }) => Err(ConfigError::Invalid {
                file: file.to_owned(),
                line: line_of_key(text, section, key),
                message,
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
    const SECTIONS: [SectionDocs; 9] = [
        Scope::DOCS,
        Probes::DOCS,
        Nvml::DOCS,
        Devices::DOCS,
        Nccl::DOCS,
        Model::DOCS,
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
