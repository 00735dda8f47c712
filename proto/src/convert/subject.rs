//! Subjects: announced once under a number, named by it afterwards.

use std::collections::{BTreeMap, BTreeSet};

use stallscope_attribution::facts::GpuSubject;

use super::{WireError, name, text_of};
use crate::v1;

/// Most subjects that one boot of an agent may use within a segment of its store, and that a reader remembers of it.
pub const MAX_SUBJECTS: usize = 4096;

impl v1::GpuSubject {
    /// The subject as `sender` tells it.
    #[must_use]
    pub fn new(sender: &str, subject: &GpuSubject) -> Self {
        Self {
            job: subject.job.clone(),
            node: if subject.node == sender {
                String::new()
            } else {
                subject.node.clone()
            },
            gpu: subject.gpu,
            pci: subject.pci.clone(),
            device: subject.device.clone(),
            rank: subject.rank,
            world: subject.world,
            pid: subject.pid,
        }
    }

    /// The subject in a message of `sender`.
    ///
    /// # Errors
    /// When a name is missing or not a name.
    pub fn into_subject(self, sender: &str) -> Result<GpuSubject, WireError> {
        Ok(GpuSubject {
            job: name("subject.job", self.job)?,
            node: if self.node.is_empty() {
                sender.to_owned()
            } else {
                name("subject.node", self.node)?
            },
            gpu: self.gpu,
            pci: text_of("subject.pci", self.pci)?,
            device: text_of("subject.device", self.device)?,
            rank: self.rank,
            world: self.world,
            pid: self.pid,
        })
    }
}

/// A subject under its number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SubjectEntry {
    /// The subject.
    pub subject: GpuSubject,
    /// Declared kind of its job; empty when unknown.
    pub job_kind: String,
}

/// The writing side: gives each subject its number and says when it must be announced.
///
/// A subject that is not used all through a segment loses its number, and gets another when it comes back: an agent may
/// run for years and see any number of processes.
#[derive(Debug, Default)]
pub struct SubjectNumbers {
    numbers: BTreeMap<GpuSubject, u32>,
    announced: BTreeSet<u32>,
    last: u32,
}

impl SubjectNumbers {
    /// The subject's number, and whether it must be announced before it is used. `None` when [`MAX_SUBJECTS`]
    /// subjects have numbers already.
    pub fn number(&mut self, subject: &GpuSubject) -> Option<(u32, bool)> {
        let id = match self.numbers.get(subject) {
            Some(id) => *id,
            None if self.numbers.len() >= MAX_SUBJECTS => return None,
            None => {
                self.last = self.last.checked_add(1)?;
                self.numbers.insert(subject.clone(), self.last);
                self.last
            }
        };
        Some((id, self.announced.insert(id)))
    }

    /// Makes every subject be announced again: a new segment begins, whose readers know none.
    pub fn forget_announcements(&mut self) {
        let announced = std::mem::take(&mut self.announced);
        if announced.is_empty() {
            // A segment that could not be begun yet.
            return;
        }
        self.numbers.retain(|_, id| announced.contains(id));
    }
}

/// The reading side: the subjects one boot of an agent announced; of more than [`MAX_SUBJECTS`] those announced last.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KnownSubjects {
    /// With the count of announcements at which it was announced last.
    entries: BTreeMap<u32, (u64, SubjectEntry)>,
    announcements: u64,
}

impl KnownSubjects {
    /// Takes an announcement; one told before may be told again.
    ///
    /// # Errors
    /// When the number is 0 or belongs to another subject.
    pub fn announce(&mut self, id: u32, entry: SubjectEntry) -> Result<(), WireError> {
        if id == 0 {
            return Err(WireError::Subject {
                id,
                why: "numbers start at 1",
            });
        }
        let known = self.entries.get(&id);
        if known.is_some_and(|(_, known)| known.subject != entry.subject) {
            return Err(WireError::Subject {
                id,
                why: "the number belongs to another subject",
            });
        }
        if known.is_none() && self.entries.len() >= MAX_SUBJECTS {
            self.forget_oldest();
        }
        self.announcements += 1;
        self.entries.insert(id, (self.announcements, entry));
        Ok(())
    }

    /// A segment announces what it uses, so what was announced longest ago is used no more.
    fn forget_oldest(&mut self) {
        let oldest = self.entries.iter().min_by_key(|(_, (at, _))| *at);
        if let Some(id) = oldest.map(|(id, _)| *id) {
            self.entries.remove(&id);
        }
    }

    /// All of them, by number.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &SubjectEntry)> {
        self.entries.iter().map(|(id, (_, entry))| (*id, entry))
    }

    /// The subject of that number, if it was announced.
    #[must_use]
    pub fn get(&self, id: u32) -> Option<&SubjectEntry> {
        self.entries.get(&id).map(|(_, entry)| entry)
    }
}
