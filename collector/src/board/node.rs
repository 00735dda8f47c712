//! One node: its boots, ports, gaps, and whether it is there.

use std::collections::VecDeque;

use stallscope_attribution::facts::{HardwareFacts, PortFacts, RecordGap};
use stallscope_attribution::time::Window;
use stallscope_proto::convert::{KnownSubjects, SubjectEntry, WireError};
use stallscope_proto::v1;

use super::windows::Windows;

/// Boots of one node that are told apart; a message of one forgotten would be stored again.
const MAX_BOOTS: usize = 64;
const MAX_GAPS: usize = 256;
const MAX_PORT_WINDOWS: usize = 16_384;
/// Sixteen devices told every two seconds for an hour.
const MAX_HARDWARE_WINDOWS: usize = 32_768;
/// Subjects of one frame of stream state, so that it fits a frame.
const SUBJECTS_PER_STATE: usize = 256;

/// Why no connection of a node is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Absence {
    /// It is open.
    Here,
    /// The agent closed it in order.
    Stopped,
    /// It broke, or was closed because of a fault.
    Lost,
    /// None was ever made to this collector process.
    #[default]
    NeverSeen,
}

#[derive(Debug, Default)]
pub(super) struct Boot {
    pub(super) id: u64,
    pub(super) last_seq: u64,
    pub(super) subjects: KnownSubjects,
}

#[derive(Debug, Default)]
pub(super) struct Node {
    /// In order of their first message.
    boots: Vec<Boot>,
    pub(super) ports: Windows<PortFacts, MAX_PORT_WINDOWS>,
    pub(super) hardware: Windows<HardwareFacts, MAX_HARDWARE_WINDOWS>,
    pub(super) gaps: VecDeque<RecordGap>,
    forgotten_gaps: u64,
    /// When it last said anything, `CLOCK_REALTIME` of the collector.
    pub(super) heard_ns: u64,
    /// End of the newest window it told of, `CLOCK_REALTIME` of the node.
    pub(super) told_to_ns: u64,
    pub(super) absence: Absence,
    /// A gap whose end is the next thing told.
    open_gap: Option<RecordGap>,
}

impl Node {
    pub(super) fn boots(&self) -> &[Boot] {
        &self.boots
    }

    pub(super) fn boot(&self, id: u64) -> Option<&Boot> {
        self.boots.iter().find(|boot| boot.id == id)
    }

    /// How far the boot has counted; for a new one, how far any did: numbers go on in a store from boot to boot.
    pub(super) fn counted(&self, boot_id: u64) -> u64 {
        let any = || self.boots.iter().map(|boot| boot.last_seq).max().unwrap_or(0);
        self.boot(boot_id).map_or_else(any, |boot| boot.last_seq)
    }

    pub(super) fn boot_mut(&mut self, id: u64) -> &mut Boot {
        let index = self
            .boots
            .iter()
            .position(|boot| boot.id == id)
            .unwrap_or_else(|| {
                if self.boots.len() >= MAX_BOOTS {
                    self.boots.remove(0);
                }
                self.boots.push(Boot {
                    id,
                    ..Boot::default()
                });
                self.boots.len() - 1
            });
        &mut self.boots[index]
    }

    pub(super) fn subject(&self, boot_id: u64, id: u32) -> Result<SubjectEntry, WireError> {
        self.boot(boot_id)
            .and_then(|boot| boot.subjects.get(id))
            .cloned()
            .ok_or(WireError::Subject {
                id,
                why: "it was never announced",
            })
    }

    /// Counts a message that is new; names what is missing before it.
    pub(super) fn count_message(&mut self, name: &str, boot_id: u64, sequence: u64, received_ns: u64) {
        self.heard_ns = self.heard_ns.max(received_ns);
        let newest = self.boots.last().map(|boot| (boot.id, boot.last_seq));
        let known = self.boot(boot_id).map(|boot| boot.last_seq);
        let before = known.or(newest.map(|(_, last_seq)| last_seq)).unwrap_or(0);
        if known.is_none() && newest.is_some() {
            self.open_gap(
                name,
                "the agent restarted; nothing was seen until it was back".into(),
                0,
            );
        }
        // A new boot may count on from a tail that its store lost: then its numbers begin below.
        let missing = sequence.saturating_sub(before.saturating_add(1));
        if missing > 0 {
            let what = format!("messages {} to {} never arrived", before + 1, sequence - 1);
            self.open_gap(name, what, missing);
        }
        self.boot_mut(boot_id).last_seq = sequence;
    }

    pub(super) fn count_refused(&mut self, name: &str, error: &WireError, received_ns: u64) {
        let what = format!("messages refused, the last because: {error}");
        let same = |gap: &&mut RecordGap| gap.what.starts_with("messages refused");
        if let Some(gap) = self.gaps.iter_mut().find(same) {
            gap.what = what;
            gap.count += 1;
            let start_ns = gap.window.map_or(received_ns, Window::start_ns);
            gap.window = Window::new(start_ns, received_ns).or(gap.window);
            return;
        }
        let window = Some(Window::instant(received_ns));
        self.add_gap(RecordGap {
            node: name.to_owned(),
            window,
            what,
            count: 1,
        });
    }

    fn open_gap(&mut self, name: &str, what: String, count: u64) {
        if let Some(open) = self.open_gap.take() {
            self.add_gap(open);
        }
        self.open_gap = Some(RecordGap {
            node: name.to_owned(),
            window: None,
            what,
            count,
        });
    }

    /// The node told of a window that ended then.
    pub(super) fn heard_of(&mut self, name: &str, end_ns: u64) {
        if let Some(mut open) = self.open_gap.take() {
            open.node = name.to_owned();
            open.window = Window::new(self.told_to_ns, end_ns).filter(|window| window.start_ns() > 0);
            self.add_gap(open);
        }
        self.told_to_ns = self.told_to_ns.max(end_ns);
    }

    pub(super) fn add_gap(&mut self, gap: RecordGap) {
        if self.gaps.len() >= MAX_GAPS {
            self.gaps.pop_front();
            self.forgotten_gaps += 1;
        }
        self.gaps.push_back(gap);
    }

    /// Everything missing from this node's record.
    pub(super) fn all_gaps(&self, name: &str) -> Vec<RecordGap> {
        let mut all: Vec<_> = self.gaps.iter().chain(&self.open_gap).cloned().collect();
        if self.forgotten_gaps > 0 {
            let what = "earlier gaps, no longer told one by one".to_owned();
            all.insert(
                0,
                RecordGap {
                    node: name.to_owned(),
                    window: None,
                    what,
                    count: self.forgotten_gaps,
                },
            );
        }
        all
    }

    pub(super) fn connected(&mut self, now_ns: u64) {
        self.absence = Absence::Here;
        self.heard_ns = self.heard_ns.max(now_ns);
    }

    pub(super) fn states(&self, name: &str) -> Vec<v1::StreamState> {
        self.boots
            .iter()
            .flat_map(|boot| boot_states(name, boot))
            .collect()
    }
}

fn boot_states(node: &str, boot: &Boot) -> Vec<v1::StreamState> {
    let announced: Vec<_> = boot
        .subjects
        .iter()
        .map(|(id, entry)| v1::SubjectAnnounced {
            id,
            subject: Some(v1::GpuSubject::new(node, &entry.subject)),
            job_kind: entry.job_kind.clone(),
        })
        .collect();
    let state = |subjects: &[v1::SubjectAnnounced]| v1::StreamState {
        node: node.to_owned(),
        agent_boot_id: boot.id,
        last_seq: boot.last_seq,
        subjects: subjects.to_vec(),
    };
    if announced.is_empty() {
        return vec![state(&[])];
    }
    announced.chunks(SUBJECTS_PER_STATE).map(state).collect()
}
