//! What the collector knows, in memory: nodes, their streams, and the recent steps of every job.
//!
//! Pure: time comes in as an argument, and the same records in the same order give the same board, whether they come
//! from connections or from segments read back.

mod facts;
mod job;
mod node;
#[cfg(test)]
mod tests;
mod windows;

pub use node::Absence;

use std::collections::{BTreeMap, BTreeSet};

use stallscope_attribution::facts::{GpuSubject, RecordGap};
use stallscope_proto::convert::{Payload, Record, SubjectEntry, WireError};
use stallscope_proto::v1;

use job::Job;
use node::{Boot, Node};

/// How much the board holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BoardLimits {
    /// Steps and spans of a GPU older than this, counted from its newest, are forgotten, ns.
    pub window_ns: u64,
    /// Steps and spans of all jobs together; about 1.2 KiB each.
    pub max_entries: usize,
    /// Nodes.
    pub max_nodes: usize,
    /// Jobs; the one heard of longest ago goes first.
    pub max_jobs: usize,
}

impl Default for BoardLimits {
    fn default() -> Self {
        Self {
            window_ns: 600_000_000_000,
            max_entries: 100_000,
            max_nodes: 4096,
            max_jobs: 256,
        }
    }
}

/// How far ahead of the last known a message's number may be: a thousand messages a second for 50 days.
pub const MOST_AHEAD: u64 = 1 << 32;

/// What is to be done with a message, by its number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// It is new.
    New,
    /// It is known: nothing is to be done.
    Duplicate,
    /// There are too many nodes already.
    TooManyNodes,
    /// It is more than [`MOST_AHEAD`] ahead: taking it would make a duplicate of whatever comes after.
    TooFarAhead,
}

/// Nodes, streams and jobs.
#[derive(Debug, Default)]
pub struct Board {
    limits: BoardLimits,
    nodes: BTreeMap<String, Node>,
    jobs: BTreeMap<String, Job>,
    entries: usize,
    refused_messages: u64,
    /// Since when nothing can be stored, `CLOCK_REALTIME` ns, and why.
    full: Option<(u64, String)>,
}

impl Board {
    /// An empty board.
    #[must_use]
    pub fn new(limits: BoardLimits) -> Self {
        Self {
            limits,
            ..Self::default()
        }
    }

    /// Whether a message with this number is new. Changes nothing.
    #[must_use]
    pub fn admission(&self, node: &str, boot_id: u64, sequence: u64) -> Admission {
        match self.nodes.get(node) {
            None if self.nodes.len() >= self.limits.max_nodes => Admission::TooManyNodes,
            Some(known) if known.boot(boot_id).is_some_and(|boot| sequence <= boot.last_seq) => {
                Admission::Duplicate
            }
            known
                if sequence
                    > known
                        .map_or(0, |node| node.counted(boot_id))
                        .saturating_add(MOST_AHEAD) =>
            {
                Admission::TooFarAhead
            }
            None | Some(_) => Admission::New,
        }
    }

    /// Takes a message that is new; one that is known, or comes from one node too many, changes nothing.
    pub fn apply(&mut self, received_ns: u64, envelope: v1::Envelope) {
        let (node_name, boot_id, sequence) =
            (envelope.node.clone(), envelope.agent_boot_id, envelope.sequence);
        if self.admission(&node_name, boot_id, sequence) != Admission::New {
            return;
        }
        let node = self.nodes.entry(node_name.clone()).or_default();
        node.count_message(&node_name, boot_id, sequence, received_ns);
        let result = Record::try_from(envelope).and_then(|record| self.apply_record(record, received_ns));
        if let Err(error) = result {
            self.refused_messages += 1;
            if let Some(node) = self.nodes.get_mut(&node_name) {
                node.count_refused(&node_name, &error, received_ns);
            }
        }
    }

    fn apply_record(&mut self, record: Record, received_ns: u64) -> Result<(), WireError> {
        let Record {
            node: node_name,
            boot_id,
            payload,
            ..
        } = record;
        speaks_of(&node_name, &payload)?;
        let Some(node) = self.nodes.get_mut(&node_name) else {
            return Ok(());
        };
        match payload {
            Payload::Subject { id, entry } => node.boot_mut(boot_id).subjects.announce(id, entry),
            Payload::Port(port) => {
                node.heard_of(
                    &node_name,
                    realtime(port.window.end_ns(), port.realtime_offset_ns),
                );
                node.ports.add(port, self.limits.window_ns);
                Ok(())
            }
            Payload::Hardware(hardware) => {
                node.heard_of(
                    &node_name,
                    realtime(hardware.window.end_ns(), hardware.realtime_offset_ns),
                );
                node.hardware.add(hardware, self.limits.window_ns);
                Ok(())
            }
            Payload::Gap(gap) => {
                node.add_gap(gap);
                Ok(())
            }
            Payload::Step { subject, step } => {
                let entry = node.subject(boot_id, subject)?;
                let end_ns = realtime(step.window.end_ns(), step.realtime_offset_ns);
                node.heard_of(&node_name, end_ns);
                self.with_job(entry, received_ns, |job, subject| {
                    job.add_step(subject, *step, end_ns)
                });
                Ok(())
            }
            Payload::Span { subject, span } => {
                let entry = node.subject(boot_id, subject)?;
                let end_ns = realtime(span.window.end_ns(), span.realtime_offset_ns);
                node.heard_of(&node_name, end_ns);
                self.with_job(entry, received_ns, |job, subject| {
                    job.add_span(subject, *span, end_ns)
                });
                Ok(())
            }
        }
    }

    fn with_job(&mut self, entry: SubjectEntry, received_ns: u64, add: impl FnOnce(&mut Job, &GpuSubject)) {
        let SubjectEntry { subject, job_kind } = entry;
        let others_full = self.entries >= self.limits.max_entries && self.jobs.len() > 1;
        let jobs_full = !self.jobs.contains_key(&subject.job) && self.jobs.len() >= self.limits.max_jobs;
        if jobs_full || others_full {
            self.forget_oldest_job(&subject.job);
        }
        let job = self.jobs.entry(subject.job.clone()).or_default();
        let before = job.entries();
        job.received_ns = job.received_ns.max(received_ns);
        if !job_kind.is_empty() {
            job.kind = job_kind;
        }
        add(job, &subject);
        job.trim(&subject, self.limits.window_ns);
        let others = self.entries - before;
        job.trim_to(&subject, self.limits.max_entries.saturating_sub(others));
        self.entries = others + job.entries();
    }

    /// Makes room; what is forgotten here is still on disk.
    fn forget_oldest_job(&mut self, but: &str) {
        let others = self.jobs.iter().filter(|(name, _)| *name != but);
        let oldest = others
            .min_by_key(|(_, job)| job.received_ns)
            .map(|(name, _)| name.clone());
        if let Some(job) = oldest.and_then(|name| self.jobs.remove(&name)) {
            self.entries -= job.entries();
        }
    }

    /// Takes what a segment says of a stream.
    pub fn apply_state(&mut self, state: v1::StreamState) {
        if self.admission(&state.node, state.agent_boot_id, u64::MAX) == Admission::TooManyNodes {
            return;
        }
        let node = self.nodes.entry(state.node.clone()).or_default();
        let boot = node.boot_mut(state.agent_boot_id);
        boot.last_seq = boot.last_seq.max(state.last_seq);
        for announced in state.subjects {
            let Some(subject) = announced
                .subject
                .and_then(|subject| subject.into_subject(&state.node).ok())
            else {
                continue;
            };
            let entry = SubjectEntry {
                subject,
                job_kind: announced.job_kind,
            };
            // What was stored was accepted before; a refusal here would come again with every segment.
            let _ = boot.subjects.announce(announced.id, entry);
        }
    }

    /// All streams, as a new segment begins with them.
    #[must_use]
    pub fn states(&self) -> Vec<v1::StreamState> {
        self.nodes
            .iter()
            .flat_map(|(name, node)| node.states(name))
            .collect()
    }

    /// How far each boot of the node is known, newest boot first.
    #[must_use]
    pub fn resume(&self, node: &str) -> Vec<v1::Resume> {
        let boots = self.nodes.get(node).map(Node::boots).unwrap_or_default();
        let resume = |boot: &Boot| v1::Resume {
            agent_boot_id: boot.id,
            last_seq: boot.last_seq,
        };
        boots.iter().rev().map(resume).collect()
    }

    /// A connection of the node was made.
    pub fn connected(&mut self, node: &str, now_ns: u64) {
        if self.admission(node, 0, u64::MAX) != Admission::TooManyNodes {
            self.nodes.entry(node.to_owned()).or_default().connected(now_ns);
        }
    }

    /// The node said something, if only that it lives.
    pub fn heard(&mut self, node: &str, now_ns: u64) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.heard_ns = node.heard_ns.max(now_ns);
        }
    }

    /// The node's connection ended.
    pub fn disconnected(&mut self, node: &str, absence: Absence) {
        if let Some(node) = self.nodes.get_mut(node) {
            node.absence = absence;
        }
    }

    /// Takes from another board which nodes are there, for a board that was read back from disk.
    pub fn adopt_presence(&mut self, live: &Self) {
        for (name, node) in &mut self.nodes {
            if let Some(live) = live.nodes.get(name) {
                node.absence = live.absence;
                node.heard_ns = live.heard_ns;
            }
        }
        self.full.clone_from(&live.full);
    }

    /// Whether what nodes send can be stored.
    pub fn note_store(&mut self, now_ns: u64, trouble: Option<&str>) {
        match trouble {
            None => self.full = None,
            Some(why) => {
                self.full.get_or_insert_with(|| (now_ns, why.to_owned()));
            }
        }
    }

    /// Notes something missing from a node's record that no message told.
    pub fn note_gap(&mut self, gap: RecordGap) {
        if let Some(node) = self.nodes.get_mut(&gap.node) {
            node.add_gap(gap);
        }
    }

    /// Names of the jobs heard of at or after a time, the one heard of last first.
    #[must_use]
    pub fn jobs_since(&self, received_ns: u64) -> Vec<String> {
        let mut found: Vec<_> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.received_ns >= received_ns)
            .collect();
        found.sort_by_key(|(_, job)| std::cmp::Reverse(job.received_ns));
        found.into_iter().map(|(name, _)| name.clone()).collect()
    }

    /// The job that a question without a name means: the one of most ranks, of those the one heard of last. What
    /// shares a GPU with it is a job too, and must not take its place by speaking last.
    #[must_use]
    pub fn main_job(&self) -> Option<String> {
        let ranks = |job: &Job| job.gpus.keys().map(|gpu| gpu.rank).collect::<BTreeSet<_>>().len();
        let main = self
            .jobs
            .iter()
            .max_by_key(|(_, job)| (ranks(job), job.received_ns));
        main.map(|(name, _)| name.clone())
    }

    /// Messages refused because they were not facts.
    #[must_use]
    pub const fn refused_messages(&self) -> u64 {
        self.refused_messages
    }

    /// Steps and spans held.
    #[must_use]
    pub const fn entries(&self) -> usize {
        self.entries
    }
}

/// An agent knows its own node alone: what it says of another could accuse it.
fn speaks_of(node: &str, payload: &Payload) -> Result<(), WireError> {
    let (field, named) = match payload {
        Payload::Subject { entry, .. } => ("subject.node", &entry.subject.node),
        Payload::Port(port) => ("port.node", &port.node),
        Payload::Hardware(hardware) => ("hardware.node", &hardware.node),
        Payload::Gap(gap) => ("gap.node", &gap.node),
        Payload::Step { .. } | Payload::Span { .. } => return Ok(()),
    };
    if named == node {
        return Ok(());
    }
    Err(WireError::Name {
        field,
        why: "another node's, and an agent speaks of its own",
    })
}

/// `CLOCK_REALTIME` of a monotonic time; saturates instead of wrapping on invented clocks.
fn realtime(monotonic_ns: u64, offset_ns: i64) -> u64 {
    monotonic_ns.saturating_add_signed(offset_ns)
}
