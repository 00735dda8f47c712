//! Batches of observations on their way to history, bounded by what they hold.
//!
//! A bound on batches alone would not bound memory: a batch is what one turn gave, a handful of observations on a quiet
//! node and hundreds of thousands after a stall.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use crate::observation::Observation;

/// Batches that wait at most: some seconds of a busy node.
const MOST_BATCHES: usize = 64;
/// Observations that wait at most: about 25 MB.
const MOST_OBSERVATIONS: usize = 200_000;

/// The end that gives.
#[derive(Debug)]
pub(super) struct Giver {
    batches: SyncSender<Vec<Observation>>,
    waiting: Arc<AtomicUsize>,
}

/// The end that takes.
#[derive(Debug)]
pub(super) struct Taker {
    batches: Receiver<Vec<Observation>>,
    waiting: Arc<AtomicUsize>,
}

/// A queue with room for [`MOST_OBSERVATIONS`].
pub(super) fn queue() -> (Giver, Taker) {
    bounded(MOST_BATCHES)
}

/// A queue for fewer batches.
pub(super) fn bounded(most_batches: usize) -> (Giver, Taker) {
    let (given, taken) = sync_channel(most_batches);
    let waiting = Arc::new(AtomicUsize::new(0));
    let giver = Giver {
        batches: given,
        waiting: Arc::clone(&waiting),
    };
    let taker = Taker {
        batches: taken,
        waiting,
    };
    (giver, taker)
}

impl Giver {
    /// Gives a batch, or gives it back when the queue is full. A batch that finds nothing waiting is always taken, however
    /// large: nothing smaller would come through behind it.
    pub(super) fn try_send(&self, batch: Vec<Observation>) -> Result<(), TrySendError<Vec<Observation>>> {
        let count = batch.len();
        let waiting = self.waiting.load(Ordering::Acquire);
        if waiting > 0 && waiting + count > MOST_OBSERVATIONS {
            return Err(TrySendError::Full(batch));
        }
        // Counted first, so that the taker never takes off what is not yet on.
        self.waiting.fetch_add(count, Ordering::AcqRel);
        self.batches.try_send(batch).inspect_err(|_| {
            self.waiting.fetch_sub(count, Ordering::AcqRel);
        })
    }
}

impl Taker {
    /// The next batch.
    ///
    /// # Errors
    /// None came in time, or none will come any more.
    pub(super) fn recv_timeout(&self, timeout: Duration) -> Result<Vec<Observation>, RecvTimeoutError> {
        let batch = self.batches.recv_timeout(timeout)?;
        self.waiting.fetch_sub(batch.len(), Ordering::AcqRel);
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use stallscope_attribution::time::Window;

    use super::*;
    use crate::observation::Fact;

    fn batch(count: usize) -> Vec<Observation> {
        let observation = Observation {
            window: Window::instant(1),
            fact: Fact::RealtimeOffset { ns: 0 },
        };
        vec![observation; count]
    }

    #[test]
    fn what_waits_is_bounded_in_observations_and_room_comes_back() {
        let (giver, taker) = queue();
        giver.try_send(batch(MOST_OBSERVATIONS + 1)).unwrap();
        let back = giver.try_send(batch(1)).unwrap_err();
        assert!(matches!(back, TrySendError::Full(batch) if batch.len() == 1));
        taker.recv_timeout(Duration::ZERO).unwrap();
        for _ in 0..4 {
            giver.try_send(batch(MOST_OBSERVATIONS / 4)).unwrap();
        }
        giver.try_send(batch(1)).unwrap_err();
        taker.recv_timeout(Duration::ZERO).unwrap();
        giver.try_send(batch(1)).unwrap();
    }

    #[test]
    fn batches_that_find_no_place_leave_no_trace() {
        let (giver, taker) = bounded(1);
        giver.try_send(batch(1)).unwrap();
        for _ in 0..10 {
            giver.try_send(batch(MOST_OBSERVATIONS / 2)).unwrap_err();
        }
        taker.recv_timeout(Duration::ZERO).unwrap();
        assert_eq!(giver.waiting.load(Ordering::Acquire), 0);
    }
}
