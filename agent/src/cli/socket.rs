//! How commands find the running agent.

use std::path::{Path, PathBuf};

use crate::config::{Config, DEFAULT_PATH};

/// Arguments of the commands that speak to the agent on this node.
#[derive(Debug, clap::Args)]
pub(super) struct AgentArgs {
    /// Configuration of the agent (TOML); its default place when absent
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Control socket of the agent; the configured one when absent
    #[arg(long, value_name = "SOCKET")]
    socket: Option<PathBuf>,
}

impl AgentArgs {
    /// The configuration: the file named, else the default file where there is one, else the defaults.
    pub(super) fn config(&self) -> Result<Config, String> {
        let default = Path::new(DEFAULT_PATH);
        match &self.config {
            Some(file) => Config::load(file).map_err(|error| error.to_string()),
            None if default.exists() => Config::load(default).map_err(|error| error.to_string()),
            None => Ok(Config::default()),
        }
    }

    /// The control socket, when it was named.
    pub(super) fn socket_named(&self) -> Option<PathBuf> {
        self.socket.clone()
    }

    /// The agent's control socket.
    pub(super) fn socket(&self, config: Config) -> PathBuf {
        self.socket.clone().unwrap_or(config.control.socket)
    }
}
