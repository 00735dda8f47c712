//! Where to stream to.

use std::path::PathBuf;

use super::values::host_port;
use super::{Incomplete, Stream};

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

impl Stream {
    /// Where to stream to: `None` when no collector is set.
    ///
    /// # Errors
    /// When a collector is set and `ca`, `cert` or `key` is not. A parsed `Config` never gives this.
    pub fn target(&self) -> Result<Option<StreamTarget>, Incomplete> {
        let Some(collector) = &self.collector else {
            return Ok(None);
        };
        let missing = |message: &str| Incomplete {
            section: "stream",
            key: "collector",
            message: message.to_owned(),
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
