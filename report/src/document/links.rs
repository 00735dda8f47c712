//! What the devices told about links and faults, and which GPU reaches the network how.

use serde::{Deserialize, Serialize};
use stallscope_attribution::job::JobAnalysis;
use stallscope_attribution::links::{self, LinkReport};

use super::{Document, Evidence, Period, RuledOut, SCHEMA, Where};

/// Paths, findings, and what was not seen, over all jobs.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Links {
    /// Which GPU reaches which ports.
    pub paths: Vec<LinkPath>,
    /// What is wrong with links and devices, worst first.
    pub findings: Vec<Finding>,
    /// What nobody could look at; it is not known to be healthy.
    pub not_seen: Vec<NotSeen>,
}

/// A GPU, its rank, and its ports.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkPath {
    /// Node name.
    pub node: String,
    /// Job; empty when no process uses the GPU.
    pub job: String,
    /// Rank in the job; `null` when no process uses the GPU.
    pub rank: Option<u32>,
    /// GPU index on the node; `null` when only the bus told of it.
    pub gpu: Option<u32>,
    /// PCI address; empty when unknown.
    pub pci: String,
    /// The ports nearest to it, and those its process uses.
    pub ports: Vec<LinkPort>,
}

/// A port as a GPU sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LinkPort {
    /// `mlx5_3:1`, or the interface.
    pub port: String,
    /// PCI address; empty when unknown.
    pub pci: String,
    /// Interface; empty when it has none.
    pub netdev: String,
    /// `same_switch`, `same_root`, `same_numa`, `across_host` or `unknown`.
    pub distance: String,
    /// Whether the rank's process was seen to send by it; `null` when nobody could look.
    pub used: Option<bool>,
    /// Who is at the other end: node and port, or address.
    pub peers: Vec<String>,
}

/// Something that is wrong with a link or a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Stable name of the cause it would be.
    pub cause: String,
    /// Where it sits.
    #[serde(rename = "where")]
    pub place: Where,
    /// `sender`, `receiver`, `path` or `device`.
    pub side: String,
    /// `failed`, `degraded` or `notice`.
    pub severity: String,
    /// `verdict` when one names it with its cost, `nothing_measured` when jobs lost nothing to it, `not_measured` when
    /// no job's time was measured beside it.
    pub costs: String,
    /// In one sentence.
    pub summary: String,
    /// What was seen beside what was expected.
    pub evidence: Vec<Evidence>,
    /// What it was not, and why.
    pub ruled_out: Vec<RuledOut>,
    /// From the first window or event that shows it to the last.
    pub observed: Period,
}

/// Something nobody could look at.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NotSeen {
    /// Node name; empty when it concerns all.
    pub node: String,
    /// What, and why.
    pub what: String,
}

impl Document {
    /// A report without a job's steps: what the devices told, when that is anything.
    #[must_use]
    pub fn of_links(links: &LinkReport) -> Option<Self> {
        Links::of([links]).map(|links| Self {
            schema: SCHEMA.to_owned(),
            tier: String::new(),
            jobs: Vec::new(),
            links: Some(links),
        })
    }
}

impl Links {
    /// What the analyses of several jobs hold; jobs on the same nodes see the same findings, which are told once.
    pub(super) fn of_jobs(analyses: &[&JobAnalysis]) -> Option<Self> {
        Self::of(analyses.iter().map(|analysis| &analysis.links))
    }

    fn of<'a>(reports: impl IntoIterator<Item = &'a LinkReport>) -> Option<Self> {
        let mut all = Self::default();
        for report in reports {
            all.paths.extend(report.paths.iter().map(LinkPath::from));
            for finding in report.findings.iter().map(Finding::from) {
                let known = all.findings.iter_mut().find(|known| is_same(known, &finding));
                match known {
                    Some(known) if finding.costs == "verdict" => *known = finding,
                    Some(_) => {}
                    None => all.findings.push(finding),
                }
            }
            all.not_seen.extend(report.unseen.iter().map(|unseen| NotSeen {
                node: unseen.node.clone(),
                what: unseen.what.clone(),
            }));
        }
        // A GPU without a process in one job's record may have one in another's.
        let used: Vec<(String, String)> = all
            .paths
            .iter()
            .filter(|path| path.rank.is_some())
            .map(|path| (path.node.clone(), path.pci.to_lowercase()))
            .collect();
        all.paths.retain(|path| {
            path.rank.is_some() || !used.contains(&(path.node.clone(), path.pci.to_lowercase()))
        });
        all.paths.dedup();
        all.not_seen.sort();
        all.not_seen.dedup();
        (all != Self::default()).then_some(all)
    }
}

/// Whether two jobs tell of one thing.
fn is_same(one: &Finding, other: &Finding) -> bool {
    (
        &one.cause,
        &one.place.node,
        &one.place.pci,
        &one.place.nic_port,
        &one.summary,
    ) == (
        &other.cause,
        &other.place.node,
        &other.place.pci,
        &other.place.nic_port,
        &other.summary,
    )
}

impl From<&links::GpuPath> for LinkPath {
    fn from(path: &links::GpuPath) -> Self {
        Self {
            node: path.node.clone(),
            job: path.job.clone(),
            rank: path.rank,
            gpu: path.gpu,
            pci: path.pci.clone(),
            ports: path.ports.iter().map(LinkPort::from).collect(),
        }
    }
}

impl From<&links::PathPort> for LinkPort {
    fn from(port: &links::PathPort) -> Self {
        Self {
            port: port.port.clone(),
            pci: port.pci.clone(),
            netdev: port.netdev.clone(),
            distance: port.distance.name().to_owned(),
            used: port.is_used.value().copied(),
            peers: port.peers.clone(),
        }
    }
}

impl From<&links::Finding> for Finding {
    fn from(finding: &links::Finding) -> Self {
        Self {
            cause: finding.cause.name().to_owned(),
            place: Where::from(&finding.place),
            side: finding.side.name().to_owned(),
            severity: finding.severity.name().to_owned(),
            costs: finding.cost.name().to_owned(),
            summary: finding.summary.clone(),
            evidence: finding.evidence.iter().map(Evidence::from).collect(),
            ruled_out: finding.ruled_out.iter().map(RuledOut::from).collect(),
            observed: Period::from(finding.window),
        }
    }
}
