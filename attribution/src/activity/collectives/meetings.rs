//! Which records of different ranks are one collective.
//!
//! The n-th collective of a communicator is the same one on all its ranks. A send and its receive meet on a channel of
//! their own, from one rank to the other within a communicator: other ranks of it take no part in them.

use std::collections::BTreeMap;

use crate::activity::{KernelClass, Peer, Record, Work};

/// A communicator, or one direction between two of its ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Channel {
    /// Communicator; 0 when the trace does not say.
    pub(super) group: u64,
    /// Sender and receiver, by rank; `None` for collectives of the whole communicator.
    pub(super) pair: Option<(u32, u32)>,
}

/// What each rank recorded on a channel, in order, by the rank's position.
pub(super) type Members<'a> = BTreeMap<usize, Vec<&'a Record>>;

/// The communication records of all ranks by channel. `numbers` are the ranks' own numbers, by position.
pub(super) fn channels<'a>(ranks: &[&'a [Record]], numbers: &[u32]) -> BTreeMap<Channel, Members<'a>> {
    let mut channels: BTreeMap<Channel, Members<'a>> = BTreeMap::new();
    for (at, (records, own)) in ranks.iter().zip(numbers).enumerate() {
        let communication = records
            .iter()
            .filter(|record| record.work == Work::Kernel(KernelClass::Communication));
        for record in communication {
            let collective = record.collective;
            let pair = collective
                .and_then(|collective| collective.peer)
                .map(|peer| match peer {
                    Peer::To(other) => (*own, other),
                    Peer::From(other) => (other, *own),
                });
            let group = collective.map_or(0, |collective| collective.group);
            let members = channels.entry(Channel { group, pair }).or_default();
            members.entry(at).or_default().push(record);
        }
    }
    channels
}

/// Whether the same collectives of a channel are known of all its ranks; else why not. `world` is the number of
/// ranks of the job, 0 when unknown.
pub(super) fn complete(channel: Channel, members: &Members<'_>, world: u32) -> Result<(), String> {
    let name = match channel {
        Channel { pair: Some(_), .. } => "transfers between two ranks",
        Channel { group: 0, .. } => "collectives of one communicator",
        Channel { .. } => "collectives of a communicator",
    };
    let expected = expected(channel, members, world);
    if expected == 1 {
        return Ok(());
    }
    if members.len() < 2 || members.len() < expected {
        let of = if expected == 0 {
            "an unknown number".to_owned()
        } else {
            expected.to_string()
        };
        return Err(format!(
            "{name}: {} of {of} ranks given, so waiting for the last rank cannot be told from transfer; give the \
             traces of all ranks",
            members.len(),
        ));
    }
    let mut sequences = members.values();
    let first = sequences.next().map_or(&[][..], Vec::as_slice);
    let message = |record: &Record| record.collective.map(|collective| collective.message);
    for sequence in sequences {
        if sequence.len() != first.len() {
            return Err(format!(
                "{name}: ranks recorded {} and {} of them, so they cannot be matched; trace the same steps on all \
                 ranks",
                first.len(),
                sequence.len(),
            ));
        }
        let differs = first
            .iter()
            .zip(sequence)
            .position(|(a, b)| message(a) != message(b));
        if let Some(at) = differs {
            return Err(format!(
                "{name}: number {} differs between ranks, so they cannot be matched; trace the same steps on all \
                 ranks, of one run",
                at + 1,
            ));
        }
    }
    Ok(())
}

/// Ranks that a channel must have; 0 when unknown.
fn expected(channel: Channel, members: &Members<'_>, world: u32) -> usize {
    if channel.pair.is_some() {
        return 2;
    }
    let declared = members
        .values()
        .flatten()
        .filter_map(|record| record.collective)
        .map(|collective| collective.ranks)
        .max()
        .filter(|ranks| *ranks > 0);
    declared.unwrap_or(if channel.group == 0 { world } else { 0 }) as usize
}
