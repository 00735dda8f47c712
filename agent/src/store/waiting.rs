//! Messages that the disk did not take yet.

use std::collections::VecDeque;

use bytes::Bytes;

/// Most bytes that wait: some three thousand steps.
const MOST_BYTES: usize = 4 << 20;
/// What a message costs beyond its bytes.
const ENTRY_BYTES: usize = 64;

/// Consecutive messages, in order, up to a bound.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    messages: VecDeque<(u64, Bytes)>,
    bytes: usize,
}

impl Waiting {
    /// Takes a message, unless there is no room for it.
    pub(super) fn push(&mut self, sequence: u64, body: &Bytes) -> bool {
        let bytes = self.bytes + body.len() + ENTRY_BYTES;
        let fits = bytes <= MOST_BYTES;
        if fits {
            self.messages.push_back((sequence, body.clone()));
            self.bytes = bytes;
        }
        fits
    }

    /// The oldest message.
    pub(super) fn front(&self) -> Option<&(u64, Bytes)> {
        self.messages.front()
    }

    /// Drops the oldest message.
    pub(super) fn pop(&mut self) {
        if let Some((_, body)) = self.messages.pop_front() {
            self.bytes -= body.len() + ENTRY_BYTES;
        }
    }

    /// Those from `sequence` on.
    pub(super) fn from(&self, sequence: u64) -> impl Iterator<Item = &(u64, Bytes)> {
        let begin = self.messages.partition_point(|(number, _)| *number < sequence);
        self.messages.range(begin..)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.messages.len()
    }
}
