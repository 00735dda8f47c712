use super::*;

/// Kernels of 1,000 apart by `pause`, from `start`, with a collective at the end that begins when they are done and
/// ends at `end`.
fn working(start: u64, kernels: u64, length: u64, pause: u64, end: u64) -> Vec<Record> {
    let mut records: Vec<Record> = (0..kernels)
        .map(|at| {
            let begin = start + at * (length + pause);
            Record {
                token: 10 + at,
                ..record(begin, begin + length, GEMM, Some(begin.saturating_sub(10)))
            }
        })
        .collect();
    let done = start + kernels * (length + pause);
    records.push(record(done, end, COMM, Some(done - 5)));
    records
}

fn issuing(end: u64) -> Vec<HostRange> {
    vec![doing(0, end, Doing::Issue)]
}

#[test]
fn what_waiting_hides_is_no_cause() {
    // Ranks 0 to 2 lose 2,000 to launches and wait 20,000; rank 3 computes all the time.
    let mut traces: Vec<RankTrace> = (0..3)
        .map(|at| rank(at, 4, working(100, 4, 1_000, 500, 26_100), issuing(26_100)))
        .collect();
    traces.push(rank(3, 4, working(100, 26, 1_000, 0, 26_100), issuing(26_100)));
    let analysis = explain(traces);
    let launch: i64 = analysis
        .gpus
        .iter()
        .map(|gpu| gpu.total.leaf_ns(Leaf::IdleLaunch))
        .sum();
    assert_eq!(launch, 3 * 2_000);
    let causes: Vec<_> = analysis
        .verdicts
        .iter()
        .map(|verdict| (verdict.cause, verdict.place.rank))
        .collect();
    assert_eq!(causes, [(Cause::JobImbalance, Some(3))]);
    let hidden = analysis.verdicts[0].ruled_out.iter();
    assert!(
        hidden.clone().all(|out| out.cause != Cause::HostLaunch),
        "{hidden:?}"
    );
}

#[test]
fn a_rank_whose_same_kernels_take_longer_has_a_slow_device() {
    let mut traces: Vec<RankTrace> = (0..3)
        .map(|at| rank(at, 4, working(100, 10, 1_000, 0, 15_200), issuing(15_200)))
        .collect();
    traces.push(rank(3, 4, working(100, 10, 1_500, 0, 15_200), issuing(15_200)));
    let verdict = &explain(traces).verdicts[0];
    assert_eq!((verdict.cause, verdict.place.rank), (Cause::KernelClock, Some(3)));
    assert!(
        verdict
            .evidence
            .iter()
            .any(|seen| seen.value.starts_with("150 %")),
        "{:?}",
        verdict.evidence
    );
}

fn busy(device: &str, work: Work, pipe: Option<Pipe>) -> JobAnalysis {
    let records = vec![Record {
        pipe,
        ..record(0, 1_000_000, work, Some(0))
    }];
    let mut trace = rank(0, 1, records, Vec::new());
    trace.devices[0].subject.device = device.into();
    explain(vec![trace])
}

#[test]
fn plain_units_are_a_loss_where_tensor_units_take_the_same_operands() {
    let a100 = busy("NVIDIA A100-SXM4-80GB", GEMM, Some(Pipe::Plain));
    assert_eq!(a100.verdicts[0].cause, Cause::KernelLowTensor);
    // 19.5 of 156 TFLOP/s.
    assert_eq!(a100.verdicts[0].cost_ns, 875_000);
    let v100 = busy("Tesla V100-SXM2-32GB", GEMM, Some(Pipe::Plain));
    assert_eq!(
        v100.verdicts[0].cause,
        Cause::None,
        "Volta's tensor units take 16 bits only"
    );
    assert!(
        v100.verdicts[0]
            .evidence
            .iter()
            .any(|seen| seen.what.contains("plain FP32"))
    );
    let tensor = busy("NVIDIA A100-SXM4-80GB", GEMM, Some(Pipe::Tensor));
    assert_eq!(tensor.verdicts[0].cause, Cause::None);
}

#[test]
fn a_gpu_full_of_work_without_matrix_math_is_bound_by_memory() {
    let analysis = busy("", Work::Kernel(KernelClass::Elementwise), None);
    assert_eq!(analysis.verdicts[0].cause, Cause::KernelMemoryBound);
    let returns = &analysis.verdicts[0].recovers;
    assert!(returns.low_gpu_ns < returns.gpu_ns && returns.gpu_ns < returns.high_gpu_ns);
    assert_eq!(analysis.work.kernels[0].class, "elementwise");
}

#[test]
fn copies_from_pageable_memory_are_evidence() {
    let records = vec![
        record(0, 1_000, GEMM, Some(0)),
        Record {
            bytes: Some(1 << 20),
            pageable: true,
            ..record(1_000, 2_000, Work::ToDevice, Some(0))
        },
    ];
    let analysis = explain(vec![rank(0, 1, records, Vec::new())]);
    assert_eq!(analysis.verdicts[0].cause, Cause::DataCopy);
    assert!(
        analysis.verdicts[0]
            .evidence
            .iter()
            .any(|seen| seen.what.contains("pageable"))
    );
}
