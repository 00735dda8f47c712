//! Communicators by name: what their constructors and the library's own memory tell.

use std::collections::{HashMap, HashSet};

use stallscope_records::abi::Function;
use stallscope_records::record::{CommSeen, Constructor, Teardown, flag};

use super::decode::Refusal;
use super::nccl::{self, CommHash, NcclVersion};
use crate::observation::{CommCreated, Fact, ProcessKey, Thread};

/// Communicators remembered; beyond, everything is forgotten and their children's names with it.
const REMEMBERED: usize = 65_536;
/// `ncclInProgress`: the call went through, and the communicator comes later.
const IN_PROGRESS: i32 = 7;

/// What a communicator's children need to know of it.
#[derive(Debug, Clone, Copy)]
struct Lineage {
    name: Option<Name>,
    /// NCCL's magic of it, from which the names of communicators that grow from it come.
    magic: Option<u64>,
    /// Children so far, as NCCL counts them; `None` when some may not have been seen.
    children: Option<u32>,
}

/// A key that is equal on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Name {
    /// NCCL's own.
    Nccl(CommHash),
    /// Ours, where the library's version is not known.
    Own(u64),
}

impl Name {
    const fn key(self) -> u64 {
        match self {
            Self::Nccl(key) | Self::Own(key) => key,
        }
    }
}

/// The communicators of all processes.
#[derive(Debug, Default)]
pub(super) struct Comms {
    known: HashMap<(ProcessKey, u64), Lineage>,
    /// Made by a call that returned before the communicator was there: in a group, or not blocking.
    expected: HashSet<(ProcessKey, Name)>,
}

impl Comms {
    /// A constructor was called.
    pub(super) fn made(&mut self, thread: Thread, made: &Constructor) -> Result<CommCreated, Refusal> {
        let function = Function::from_number(made.function).ok_or(Refusal::Malformed)?;
        let (name, magic) = self.name(thread.process, function, made);
        let result = made.head.result;
        if made.head.flags & flag::RETURNED == 0 {
            return Err(Refusal::Unfinished);
        }
        if made.comm == 0 && made.head.flags & flag::UNREADABLE != 0 {
            return Err(Refusal::Unreadable);
        }
        if let Some(name) = name
            && (result == IN_PROGRESS || result == 0 && made.comm == 0)
        {
            self.make_room();
            self.expected.insert((thread.process, name));
        }
        if made.comm == 0 && result == 0 {
            // A rank that takes no part in the split, or a group: the communicator will be seen in use.
            return Err(Refusal::Known);
        }
        if made.comm != 0 {
            self.make_room();
            let lineage = Lineage {
                name,
                magic,
                children: Some(0),
            };
            self.known.insert((thread.process, made.comm), lineage);
        }
        let number = |value: i32, flag: u16| {
            (made.head.flags & flag != 0)
                .then_some(value)
                .and_then(|value| u32::try_from(value).ok())
        };
        Ok(CommCreated {
            thread,
            comm: made.comm,
            key: name.map(Name::key),
            is_nccl_hash: matches!(name, Some(Name::Nccl(_))),
            rank: number(made.rank, flag::RANK),
            ranks: number(made.ranks, flag::RANKS),
            device: number(made.device, flag::DEVICE),
            result,
            found_in_use: false,
        })
    }

    /// A communicator was used for the first time. What the library wrote into it counts, whatever was known before.
    pub(super) fn seen(&mut self, thread: Thread, seen: &CommSeen) -> Result<CommCreated, Refusal> {
        let (Ok(rank), Ok(ranks), Ok(device)) = (
            u32::try_from(seen.rank),
            u32::try_from(seen.ranks),
            u32::try_from(seen.device),
        ) else {
            return Err(Refusal::StrangeComm);
        };
        if seen.magic != nccl::MAGIC || rank >= ranks || seen.hash == 0 {
            return Err(Refusal::StrangeComm);
        }
        let name = Name::Nccl(seen.hash);
        let was_made = self.expected.remove(&(thread.process, name));
        self.make_room();
        let known = self.known.get(&(thread.process, seen.comm)).copied();
        let same = known.filter(|known| known.name.is_none_or(|of| of == name));
        let lineage = Lineage {
            name: Some(name),
            magic: same.and_then(|known| known.magic),
            children: same.map_or(was_made.then_some(0), |known| known.children),
        };
        self.known.insert((thread.process, seen.comm), lineage);
        Ok(CommCreated {
            thread,
            comm: seen.comm,
            key: Some(seen.hash),
            is_nccl_hash: true,
            rank: Some(rank),
            ranks: Some(ranks),
            device: Some(device),
            result: 0,
            found_in_use: !was_made && same.is_none(),
        })
    }

    /// A communicator is being ended.
    pub(super) fn ended(&mut self, thread: Thread, ended: &Teardown) -> Result<Fact, Refusal> {
        let function = Function::from_number(ended.function).ok_or(Refusal::Malformed)?;
        if matches!(function, Function::CommDestroy | Function::CommAbort) {
            self.known.remove(&(thread.process, ended.comm));
        }
        Ok(Fact::CommDestroyed {
            thread,
            comm: ended.comm,
        })
    }

    /// Forgets a process that is gone.
    pub(super) fn forget(&mut self, process: ProcessKey) {
        self.known.retain(|(owner, _), _| *owner != process);
        self.expected.retain(|(owner, _)| *owner != process);
    }

    fn make_room(&mut self) {
        if self.known.len() >= REMEMBERED {
            self.known.clear();
        }
        if self.expected.len() >= REMEMBERED {
            self.expected.clear();
        }
    }

    /// Name and magic of what a constructor makes.
    fn name(
        &mut self,
        process: ProcessKey,
        function: Function,
        made: &Constructor,
    ) -> (Option<Name>, Option<u64>) {
        let version = NcclVersion::from_code(made.version);
        let has_id = made.head.flags & flag::ID != 0;
        let from_id = has_id.then(|| magic_of(&made.id));
        match function {
            Function::CommSplit | Function::CommShrink => {
                let name = self.child(process, function, made, version);
                let magic = match name {
                    Some(Name::Nccl(hash)) => Some(hash),
                    _ => None,
                };
                (name, magic)
            }
            Function::CommGrow => {
                let magic = self.grown(process, made, version).or(from_id);
                let name = magic.map(|magic| match version {
                    Some(_) => Name::Nccl(nccl::combined(magic, i64::from(made.ranks).cast_unsigned())),
                    None => Name::Own(own(&[&magic.to_le_bytes(), &made.ranks.to_le_bytes()])),
                });
                (name, magic)
            }
            _ if has_id => {
                let name = match version {
                    Some(version) => Name::Nccl(nccl::of_unique_id(version, &made.id)),
                    None => Name::Own(own(&[&made.id])),
                };
                (Some(name), from_id)
            }
            _ => (None, None),
        }
    }

    /// Children are counted alike on all ranks, since every rank of the parent takes part in making them. A call that failed may
    /// have been counted or not, so after one nothing is certain any more.
    fn child(
        &mut self,
        process: ProcessKey,
        function: Function,
        made: &Constructor,
        version: Option<NcclVersion>,
    ) -> Option<Name> {
        let parent = self.known.get_mut(&(process, made.parent))?;
        let shrinks = function == Function::CommShrink;
        let before = parent.children;
        if !shrinks || parent.name.is_some_and(|name| matches!(name, Name::Own(_))) {
            let went_through = matches!(made.head.result, 0 | IN_PROGRESS);
            parent.children = before
                .and_then(|count| count.checked_add(1))
                .filter(|_| went_through);
        }
        match (parent.name?, version) {
            (Name::Nccl(hash), Some(version)) if shrinks => {
                Some(Name::Nccl(nccl::of_split(version, hash, 0, 0)))
            }
            (Name::Nccl(hash), Some(version)) => {
                Some(Name::Nccl(nccl::of_split(version, hash, before? + 1, made.color)))
            }
            (name, _) => Some(Name::Own(own(&[
                &name.key().to_le_bytes(),
                &(function as u64).to_le_bytes(),
                &before?.to_le_bytes(),
                &if shrinks { 0 } else { made.color }.to_le_bytes(),
            ]))),
        }
    }

    /// The magic of what grows from a communicator that this rank is in.
    fn grown(
        &mut self,
        process: ProcessKey,
        made: &Constructor,
        version: Option<NcclVersion>,
    ) -> Option<u64> {
        version?;
        let parent = self.known.get_mut(&(process, made.parent))?;
        let went_through = matches!(made.head.result, 0 | IN_PROGRESS);
        let count = parent.children.and_then(|count| count.checked_add(1));
        parent.children = count.filter(|_| went_through);
        Some(nccl::combined(parent.magic?, u64::from(count?)))
    }
}

/// A unique id starts with the magic of the communicators made from it.
fn magic_of(id: &[u8; 128]) -> u64 {
    id.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// FNV-1a over the parts: the same on every rank, and good enough for keys that are random or few.
fn own(parts: &[&[u8]]) -> u64 {
    parts
        .iter()
        .flat_map(|part| part.iter())
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        })
}

#[cfg(test)]
mod tests;
