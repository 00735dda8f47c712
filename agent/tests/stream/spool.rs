//! A spool in memory that can be bounded, and can lose its tail as a disk does when the power goes.

use std::sync::Mutex;

use bytes::Bytes;
use stallscope_attribution::facts::RecordGap;
use stallscope_proto::convert::{Payload, Record};
use tokio::sync::watch;

use stallscope::store::{Spool, SpoolError};

#[derive(Debug)]
pub(super) struct MemorySpool {
    messages: Mutex<Vec<(u64, Bytes)>>,
    max_messages: usize,
    last: watch::Sender<u64>,
    acked: Mutex<u64>,
    dropped: Mutex<u64>,
}

pub(super) fn gap_record(node: &str, boot_id: u64, sequence: u64) -> Record {
    let what = format!("message {sequence} of boot {boot_id}");
    let gap = RecordGap {
        node: node.to_owned(),
        window: None,
        what,
        count: sequence,
    };
    Record {
        node: node.to_owned(),
        boot_id,
        sequence,
        payload: Payload::Gap(gap),
    }
}

impl MemorySpool {
    pub(super) fn new(max_messages: usize) -> Self {
        Self {
            messages: Mutex::default(),
            max_messages,
            last: watch::Sender::new(0),
            acked: Mutex::new(0),
            dropped: Mutex::new(0),
        }
    }

    pub(super) fn last(&self) -> u64 {
        *self.last.borrow()
    }

    pub(super) fn append_record(&self, record: &Record) {
        let mut messages = self.messages.lock().unwrap();
        assert_eq!(record.sequence, self.last() + 1);
        messages.push((record.sequence, record.encode()));
        if messages.len() > self.max_messages {
            let (dropped, _) = messages.remove(0);
            if dropped > *self.acked.lock().unwrap() {
                *self.dropped.lock().unwrap() += 1;
            }
        }
        self.last.send_replace(record.sequence);
    }

    /// Appends a message that says who wrote it.
    pub(super) fn append(&self, node: &str, boot_id: u64) -> u64 {
        let sequence = self.last() + 1;
        self.append_record(&gap_record(node, boot_id, sequence));
        sequence
    }

    /// The newest message exists by number only.
    pub(super) fn damage_newest(&self) {
        self.last.send_replace(self.last() + 1);
    }

    /// Loses the newest messages, as an unflushed file does; what it lost.
    pub(super) fn lose_tail(&self, count: usize) -> Vec<u64> {
        let mut messages = self.messages.lock().unwrap();
        let keep = messages.len().saturating_sub(count);
        let lost: Vec<u64> = messages.drain(keep..).map(|(sequence, _)| sequence).collect();
        let last = lost.first().map_or(self.last(), |first| first - 1);
        let mut acked = self.acked.lock().unwrap();
        *acked = (*acked).min(last);
        self.last.send_replace(last);
        lost
    }
}

impl Spool for MemorySpool {
    fn epoch(&self) -> u64 {
        1
    }

    fn next_after(
        &self,
        sequence: u64,
        max_messages: usize,
        max_bytes: usize,
    ) -> Result<Vec<(u64, Bytes)>, SpoolError> {
        let messages = self.messages.lock().unwrap();
        let mut bytes = 0;
        let newer = messages
            .iter()
            .filter(|(own, _)| *own > sequence)
            .take(max_messages);
        let fitting = newer.take_while(|(_, message)| {
            let fits = bytes == 0 || bytes + message.len() <= max_bytes;
            bytes += message.len();
            fits
        });
        Ok(fitting.cloned().collect())
    }

    fn acked(&self, sequence: u64) {
        *self.acked.lock().unwrap() = sequence;
    }

    fn last_acked(&self) -> u64 {
        *self.acked.lock().unwrap()
    }

    fn dropped_unacked(&self) -> u64 {
        *self.dropped.lock().unwrap()
    }

    fn watch_last(&self) -> watch::Receiver<u64> {
        self.last.subscribe()
    }
}
