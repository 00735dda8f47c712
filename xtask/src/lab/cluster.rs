//! Virtual nodes, their agents and the collector, as one thing that starts and stops.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::certificates::{Authority, Identity};
use super::process::{Child, Namespace, inside};
use super::virtual_nodes::{Node, Ready, VirtualNodes};
use super::{interrupt, leftovers};
use crate::build::Programs;
use crate::overhead::Watched;
use crate::paths::Paths;
use crate::shell;

/// The collector's UDP port inside its namespace.
const PORT: u16 = 4433;

/// The collector's name in its certificate.
const COLLECTOR: &str = "collector";

/// An agent's control socket, beside its configuration.
const SOCKET: &str = "control.sock";

/// What agents watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Watch {
    /// There are no agents.
    Nothing,
    /// All but what NCCL's network steps wait for.
    AllButWaits,
    /// All.
    All,
}

/// A running cluster. Dropping it stops everything and removes what was left.
pub struct Cluster {
    programs: Programs,
    dir: PathBuf,
    ready: Ready,
    authority: Authority,
    operator: Identity,
    agents: Vec<Agent>,
    collector: Option<Child>,
    nodes: VirtualNodes,
    management: Option<Namespace>,
    _lock: File,
}

/// An agent and the node it watches.
pub struct Agent {
    node: Node,
    namespace: Namespace,
    config: PathBuf,
    child: Option<Child>,
}

impl Agent {
    /// The agent's process, unless it is stopped.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::pid)
    }

    /// What measuring it takes, unless it is stopped.
    #[must_use]
    pub fn watched(&self) -> Option<Watched> {
        let socket = self.config.with_file_name(SOCKET);
        self.pid().map(|pid| Watched { pid, socket })
    }

    /// The node it watches.
    #[must_use]
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its configuration file.
    #[must_use]
    pub fn config(&self) -> &Path {
        &self.config
    }
}

impl Cluster {
    /// Starts the scenario's nodes, the collector, and, unless nothing is watched, an agent on each node. Files go to `dir`.
    ///
    /// # Errors
    /// Something did not start; what did is stopped.
    pub fn start(
        paths: &Paths,
        programs: &Programs,
        scenario: &Path,
        dir: &Path,
        watch: Watch,
    ) -> Result<Self> {
        let lock = lock(paths)?;
        fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let mut nodes = VirtualNodes::start(
            &programs.vnode,
            scenario,
            &dir.join("vnode"),
            &dir.join("vnode.log"),
        )?;
        let ready = nodes.ready(Duration::from_secs(30))?;
        let management = ready
            .collector
            .netns
            .as_deref()
            .map(Namespace::open)
            .transpose()?;
        let authority = Authority::create(&dir.join("tls"))?;
        let operator = authority.issue("operator", &[])?;
        let mut cluster = Self {
            programs: programs.clone(),
            dir: dir.to_owned(),
            ready,
            authority,
            operator,
            agents: Vec::new(),
            collector: None,
            nodes,
            management,
            _lock: lock,
        };
        cluster.start_collector()?;
        if watch != Watch::Nothing {
            for node in cluster.ready.nodes.clone() {
                let config = cluster.write_config(&node, watch)?;
                cluster.agents.push(Agent {
                    namespace: Namespace::open(&node.netns)?,
                    node,
                    config,
                    child: None,
                });
            }
            for index in 0..cluster.agents.len() {
                cluster.start_agent(index)?;
            }
        }
        Ok(cluster)
    }

    /// The virtual nodes, for their events.
    pub fn nodes(&mut self) -> &mut VirtualNodes {
        &mut self.nodes
    }

    /// The agents, one per node.
    #[must_use]
    pub fn agents(&self) -> &[Agent] {
        &self.agents
    }

    /// The collector's process, unless it is stopped.
    #[must_use]
    pub fn collector_pid(&self) -> Option<u32> {
        self.collector.as_ref().map(Child::pid)
    }

    /// Whether there is a collector to ask and an agent that fed it.
    #[must_use]
    pub fn can_report(&self) -> bool {
        self.collector.is_some() && !self.agents.is_empty()
    }

    /// The folder with logs, configurations and stores.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Starts the collector, again if it was killed. Its store stays.
    ///
    /// # Errors
    /// It cannot be started or ends at once.
    pub fn start_collector(&mut self) -> Result<()> {
        let identity = self.authority.issue(COLLECTOR, &[self.ready.collector.ip])?;
        let mut command = inside(self.management.as_ref(), &self.programs.stallscope);
        command
            .arg("collect")
            .args(["--listen", &self.collector_address().to_string()])
            .arg("--store")
            .arg(self.dir.join("collector"))
            .arg("--ca")
            .arg(identity.ca)
            .arg("--cert")
            .arg(identity.cert)
            .arg("--key")
            .arg(identity.key);
        let mut child = Child::start(COLLECTOR, &mut command, &self.dir.join("collector.log"), false)?;
        settle(&mut child)?;
        self.collector = Some(child);
        Ok(())
    }

    /// Starts the agent of one node, again if it was killed. Its store stays.
    ///
    /// # Errors
    /// It cannot be started or ends at once.
    pub fn start_agent(&mut self, index: usize) -> Result<()> {
        let agent = &mut self.agents[index];
        let mut command = inside(Some(&agent.namespace), &self.programs.stallscope);
        // The agent does not know these: the node's management library, loaded into it, does.
        command
            .arg("agent")
            .arg("--config")
            .arg(&agent.config)
            .envs(&agent.node.env);
        let log = self.dir.join(format!("agent-{}.log", agent.node.name));
        let mut child = Child::start(
            &format!("agent on {}", agent.node.name),
            &mut command,
            &log,
            false,
        )?;
        settle(&mut child)?;
        agent.child = Some(child);
        Ok(())
    }

    /// Kills the collector as a crash would.
    pub fn kill_collector(&mut self) {
        if let Some(mut child) = self.collector.take() {
            child.kill();
        }
    }

    /// Kills one agent as a crash would.
    pub fn kill_agent(&mut self, index: usize) {
        if let Some(mut child) = self.agents[index].child.take() {
            child.kill();
        }
    }

    /// An error if something that should run does not.
    ///
    /// # Errors
    /// It names what ended and shows its log.
    pub fn check_running(&mut self) -> Result<()> {
        interrupt::check()?;
        let agents = self.agents.iter_mut().filter_map(|agent| agent.child.as_mut());
        for child in self.collector.iter_mut().chain(agents) {
            child.check_running()?;
        }
        Ok(())
    }

    /// The collector's report.
    ///
    /// # Errors
    /// The collector gives none: it may have nothing yet.
    pub fn report(&self, format: &str) -> Result<String> {
        let mut command = inside(self.management.as_ref(), &self.programs.stallscope);
        command
            .arg("report")
            .args([
                "--collector",
                &self.collector_address().to_string(),
                "--server-name",
                COLLECTOR,
            ])
            .arg("--ca")
            .arg(&self.operator.ca)
            .arg("--cert")
            .arg(&self.operator.cert)
            .arg("--key")
            .arg(&self.operator.key)
            .args(["--format", format]);
        let stderr = File::options()
            .create(true)
            .append(true)
            .open(self.dir.join("report.log"))?;
        let output = command
            .stdin(std::process::Stdio::null())
            .stderr(stderr)
            .output()?;
        ensure!(
            output.status.success(),
            "{} failed with {}; see {}",
            shell::line(&command),
            output.status,
            self.dir.join("report.log").display()
        );
        String::from_utf8(output.stdout).context("the report is not UTF-8")
    }

    /// Stops the agents as an operator would, so that they hand over what they hold.
    pub fn stop_agents(&mut self) {
        for agent in &mut self.agents {
            if let Some(mut child) = agent.child.take() {
                child.stop();
            }
        }
    }

    /// Stops everything and names what the virtual nodes could not take down themselves.
    #[must_use]
    pub fn stop(&mut self) -> Vec<String> {
        self.stop_agents();
        if let Some(mut child) = self.collector.take() {
            child.stop();
        }
        self.nodes.stop();
        leftovers::remove(&self.ready)
    }

    fn collector_address(&self) -> SocketAddr {
        SocketAddr::new(self.ready.collector.ip, PORT)
    }

    fn write_config(&self, node: &Node, watch: Watch) -> Result<PathBuf> {
        let identity = self.authority.issue(&node.name, &[node.ip])?;
        let home = self.dir.join(&node.name);
        fs::create_dir_all(&home)?;
        let collector = self.collector_address().to_string();
        let config = AgentConfig {
            node: &node.name,
            scope: Scope { cgroup: &node.cgroup },
            probes: Probes {
                object: &self.programs.bpf_object,
            },
            nvml: Nvml {
                library: &node.nvml_library,
            },
            stream: Stream {
                collector: &collector,
                server_name: COLLECTOR,
                ca: &identity.ca,
                cert: &identity.cert,
                key: &identity.key,
            },
            store: Store {
                dir: &home.join("store"),
            },
            control: Control {
                socket: &home.join(SOCKET),
            },
            nccl: Nccl {
                waits: watch == Watch::All,
            },
        };
        let path = home.join("stallscope.toml");
        fs::write(&path, toml::to_string(&config)?)?;
        Ok(path)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for left in self.stop() {
            eprintln!("left behind: {left}");
        }
    }
}

/// Only one cluster at a time: two would measure each other.
fn lock(paths: &Paths) -> Result<File> {
    use rustix::fs::{FlockOperation, flock};
    fs::create_dir_all(&paths.cache)?;
    let path = paths.cache.join("lab.lock");
    let file = File::create(&path).with_context(|| format!("failed to create {}", path.display()))?;
    if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        eprintln!("another run has the virtual nodes; waiting for it to end");
        while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            interrupt::check()?;
            std::thread::sleep(Duration::from_millis(200));
        }
    }
    Ok(file)
}

/// A daemon that cannot work says so within its first moments.
fn settle(child: &mut Child) -> Result<()> {
    let deadline = Instant::now() + Duration::from_millis(300);
    while Instant::now() < deadline {
        child.check_running()?;
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

#[derive(Serialize)]
struct AgentConfig<'a> {
    node: &'a str,
    scope: Scope<'a>,
    probes: Probes<'a>,
    nvml: Nvml<'a>,
    stream: Stream<'a>,
    store: Store<'a>,
    control: Control<'a>,
    nccl: Nccl,
}

#[derive(Serialize)]
struct Scope<'a> {
    cgroup: &'a str,
}

#[derive(Serialize)]
struct Probes<'a> {
    object: &'a Path,
}

#[derive(Serialize)]
struct Nvml<'a> {
    library: &'a Path,
}

#[derive(Serialize)]
struct Stream<'a> {
    collector: &'a str,
    server_name: &'a str,
    ca: &'a Path,
    cert: &'a Path,
    key: &'a Path,
}

#[derive(Serialize)]
struct Store<'a> {
    dir: &'a Path,
}

#[derive(Serialize)]
struct Control<'a> {
    socket: &'a Path,
}

#[derive(Serialize)]
struct Nccl {
    waits: bool,
}
