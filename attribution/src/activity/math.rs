//! Arithmetic of operators, and which GPU work was issued when.

use super::{Issued, Pipe, Record, Work};
use crate::peaks::Precision;
use crate::time::Window;

/// An operator whose arithmetic its shapes tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MathOp {
    /// Thread that ran it.
    pub thread: u32,
    /// When the thread was in it.
    pub window: Window,
    /// Multiplications and additions.
    pub flops: u64,
    /// Type of its operands.
    pub precision: Precision,
}

/// Stretches of threads, looked up by thread and time. Stretches of one thread do not overlap.
#[derive(Debug, Clone, Default)]
pub(super) struct Stretches(Vec<(u32, Window, usize)>);

impl Stretches {
    /// From stretches in any order; each keeps its position.
    pub(super) fn new(stretches: impl IntoIterator<Item = (u32, Window)>) -> Self {
        let mut sorted: Vec<(u32, Window, usize)> = stretches
            .into_iter()
            .enumerate()
            .map(|(at, (thread, window))| (thread, window, at))
            .collect();
        sorted.sort_unstable();
        Self(sorted)
    }

    /// The stretch in which a record was launched.
    pub(super) fn of(&self, record: &Record) -> Option<usize> {
        let launch = record.launch?;
        let at = self.0.partition_point(|(thread, window, _)| {
            (*thread, window.start_ns()) <= (launch.thread, launch.at_ns)
        });
        let (thread, window, index) = self.0.get(at.checked_sub(1)?)?;
        (*thread == launch.thread && launch.at_ns < window.end_ns()).then_some(*index)
    }
}

/// By record: whether it is forward work done again.
pub(super) fn repeated(records: &[Record], issued: &[Issued]) -> Vec<bool> {
    let stretches = Stretches::new(issued.iter().map(|issued| (issued.thread, issued.window)));
    records
        .iter()
        .map(|record| matches!(record.work, Work::Kernel(_)) && stretches.of(record).is_some())
        .collect()
}

/// Arithmetic of one GPU by precision, and how much of its matrix kernels' time it accounts for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Arithmetic {
    /// Of the model, by precision, FLOP.
    pub(super) model: Vec<(Precision, u64)>,
    /// Repeated, by precision, FLOP.
    pub(super) repeated: Vec<(Precision, u64)>,
    /// Time of matrix kernels launched by these operators, ns.
    pub(super) covered_ns: u64,
    /// Time of all matrix kernels, ns.
    pub(super) matmul_ns: u64,
}

impl Arithmetic {
    /// From the operators that launched any of `records`. FP32 operands that kernels of the tensor units multiply
    /// count as TF32.
    pub(super) fn of(records: &[Record], again: &[bool], math: &[MathOp]) -> Self {
        let stretches = Stretches::new(math.iter().map(|op| (op.thread, op.window)));
        let mut found = Self::default();
        let mut seen: Vec<Option<(bool, bool)>> = vec![None; math.len()];
        for (record, again) in records.iter().zip(again) {
            let is_matmul = matches!(record.work, Work::Kernel(class) if class.is_matmul());
            if !matches!(record.work, Work::Kernel(_)) {
                continue;
            }
            let op = stretches.of(record);
            if is_matmul {
                found.matmul_ns += record.window.len_ns();
                found.covered_ns += op.map_or(0, |_| record.window.len_ns());
            }
            if let Some(op) = op {
                let (tensor, repeated) = seen[op].unwrap_or((false, false));
                seen[op] = Some((tensor || record.pipe == Some(Pipe::Tensor), repeated || *again));
            }
        }
        for (op, seen) in math.iter().zip(seen) {
            let Some((tensor, again)) = seen else { continue };
            let precision = match op.precision {
                Precision::Fp32 if tensor => Precision::Tf32,
                known => known,
            };
            let of = if again {
                &mut found.repeated
            } else {
                &mut found.model
            };
            match of.iter_mut().find(|(known, _)| *known == precision) {
                Some((_, flops)) => *flops = flops.saturating_add(op.flops),
                None => of.push((precision, op.flops)),
            }
        }
        found
    }
}
