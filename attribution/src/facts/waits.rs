//! What the network steps of NCCL's proxy threads waited for.
//!
//! A step is a chunk of a collective on its way from one GPU to another: the sender's proxy waits for its GPU to produce it,
//! for the receiver's credit, and for the network; the receiver's waits for it to arrive, for it to be flushed to the GPU's
//! memory, and for the GPU to consume it.

/// What network steps waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepWaits {
    /// Sending: for the GPU to produce the data.
    pub send_gpu: StepWait,
    /// Sending: for the receiver's credit; `None` where this NCCL does not tell it from waiting for the GPU.
    pub send_credit: Option<StepWait>,
    /// Sending: for the network.
    pub send_wire: StepWait,
    /// Receiving: for the data to arrive, because of the network or a late sender.
    pub receive_wire: StepWait,
    /// Receiving: for the data to be flushed to the GPU's memory.
    pub receive_flush: StepWait,
    /// Receiving: for the GPU to consume the data.
    pub receive_gpu: StepWait,
    /// Steps sent.
    pub sent: u64,
    /// Steps received.
    pub received: u64,
    /// Changes to a state without a known meaning.
    pub unknown: u64,
}

/// One wait in a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepWait {
    /// Time of all steps in it, summed, ns: more than the window when many waited at a time.
    pub steps_ns: u64,
    /// Time in which at least one step was in it, ns.
    pub any_ns: u64,
    /// Steps that entered it.
    pub entered: u64,
}

/// What the network steps of one process waited for. They are looked at for a part of the time only, so shares of what was
/// watched say something, and sums do not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ProcessWaits {
    /// Process id on the node.
    pub pid: u32,
    /// Time for which its proxy threads were watched, each by itself, summed, ns.
    pub watched_ns: u64,
    /// What their steps waited for, summed; `any_ns` too is by thread.
    pub waits: StepWaits,
}

impl StepWaits {
    /// Adds what another thread's steps waited for, or the same thread's in another window. Credit stays told apart only
    /// where both tell it apart: else the wait for the GPU holds part of it.
    pub fn add(&mut self, other: &Self) {
        self.send_gpu.add(other.send_gpu);
        let both = self.send_credit.zip(other.send_credit);
        if both.is_none() {
            for credit in [self.send_credit, other.send_credit].into_iter().flatten() {
                self.send_gpu.add(credit);
            }
        }
        self.send_credit = both.map(|(mut own, credit)| {
            own.add(credit);
            own
        });
        self.send_wire.add(other.send_wire);
        self.receive_wire.add(other.receive_wire);
        self.receive_flush.add(other.receive_flush);
        self.receive_gpu.add(other.receive_gpu);
        for (sum, of) in [
            (&mut self.sent, other.sent),
            (&mut self.received, other.received),
            (&mut self.unknown, other.unknown),
        ] {
            *sum = sum.saturating_add(of);
        }
    }
}

impl StepWait {
    fn add(&mut self, other: Self) {
        self.steps_ns = self.steps_ns.saturating_add(other.steps_ns);
        self.any_ns = self.any_ns.saturating_add(other.any_ns);
        self.entered = self.entered.saturating_add(other.entered);
    }
}

impl ProcessWaits {
    /// Adds what was seen of the same process by another thread, or in another window.
    pub fn add(&mut self, other: &Self) {
        self.watched_ns = self.watched_ns.saturating_add(other.watched_ns);
        self.waits.add(&other.waits);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credit_that_one_side_does_not_tell_apart_is_waiting_for_the_gpu() {
        let wait = |ns| StepWait {
            steps_ns: 2 * ns,
            any_ns: ns,
            entered: 1,
        };
        let told = StepWaits {
            send_gpu: wait(100),
            send_credit: Some(wait(10)),
            ..StepWaits::default()
        };
        let untold = StepWaits {
            send_gpu: wait(1_000),
            ..StepWaits::default()
        };
        let mut twice = told;
        twice.add(&told);
        assert_eq!(twice.send_credit.map(|credit| credit.any_ns), Some(20));
        assert_eq!(twice.send_gpu.any_ns, 200);
        for (mut one, other) in [(told, untold), (untold, told)] {
            one.add(&other);
            assert_eq!(one.send_credit, None);
            assert_eq!((one.send_gpu.any_ns, one.send_gpu.entered), (1_110, 3));
        }
    }
}
